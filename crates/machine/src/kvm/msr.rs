//! Model-specific registers: which are part of a vCPU's state.

use std::collections::HashSet;
use std::ops::RangeInclusive;

/// IA32_TIME_STAMP_COUNTER: a field of its own in the state.
pub(super) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: arms a timer, so it is restored when everything else is.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that KVM lists but that are no part of the state.
const EXCLUDED: [RangeInclusive<u32>; 7] = [
    TSC..=TSC,
    // The old numbers of kvmclock's registers, aliases of 0x4b56_4d00 and 0x4b56_4d01.
    0x11..=0x12,
    // IA32_SMBASE: readable in system management mode only.
    0x9e..=0x9e,
    // Performance counters: no profile has them, and their control registers are host state.
    0xc1..=0xc8,
    0x186..=0x18d,
    // VMX capabilities: no profile has nested virtualization.
    0x480..=0x493,
    // Hyper-V's synthetic registers: not offered.
    0x4000_0000..=0x4000_0fff,
];

/// MSRs that KVM has but does not list: the MTRRs, in the order in which they are set.
const UNLISTED: [RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];
/// IA32_MCG_CAP: its low byte counts the machine check banks, four registers each from 0x400 on.
pub(super) const MCG_CAP: u32 = 0x179;
const MC0_CTL: u32 = 0x400;

/// The candidates for a vCPU's state, in the order in which they are to be restored: what KVM lists
/// without the excluded, what it does not list, `banks` of machine check registers, and last the
/// deadline timer. Some do not exist on some processors.
pub(super) fn candidates(listed: &[u32], banks: u8) -> Vec<u32> {
    let excluded = |index: &u32| EXCLUDED.iter().any(|range| range.contains(index));
    let bank_registers = MC0_CTL..MC0_CTL + 4 * u32::from(banks);
    let mut seen = HashSet::new();
    listed
        .iter()
        .copied()
        .filter(|index| !excluded(index) && *index != TSC_DEADLINE)
        .chain(UNLISTED.into_iter().flatten())
        .chain(bank_registers)
        .chain([TSC_DEADLINE])
        .filter(|index| seen.insert(*index))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_distinct_and_the_timer_comes_last() {
        let listed = [0x6e0, 0x174, 0x10, 0x480, 0x40000000, 0x277, 0x174];
        let candidates = candidates(&listed, 2);
        assert_eq!(candidates[..2], [0x174, 0x277]);
        assert_eq!(candidates.last(), Some(&TSC_DEADLINE));
        assert!(candidates.contains(&0x407) && !candidates.contains(&0x408));
        let distinct: HashSet<_> = candidates.iter().collect();
        assert_eq!(distinct.len(), candidates.len());
    }
}
