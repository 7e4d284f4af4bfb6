//! Model-specific registers that do nothing but hold a value (SDM volume 4).

use crate::cpu_profile::ARCH_CAPABILITIES;

/// IA32_MCG_CAP: ten banks and a control register.
const MCG_CAP: u64 = 1 << 8 | BANKS as u64;
const BANKS: u32 = 10;
const MC0_CTL: u32 = 0x400;
/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 0x508;
/// IA32_MISC_ENABLE: fast strings; no branch trace store, no precise events.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// A microcode revision that is newer than any that kernels refuse.
const MICROCODE: u64 = 0x1_0000_0000;

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writes {
    /// The bits of the mask may change; others fault.
    Bits(u64),
    /// Nothing, quietly.
    Ignored,
    /// It faults.
    Refused,
}

/// A register, or several in a row.
struct Kind {
    first: u32,
    last: u32,
    reset: u64,
    writes: Writes,
}

const fn kind(first: u32, last: u32, reset: u64, writes: Writes) -> Kind {
    Kind {
        first,
        last,
        reset,
        writes,
    }
}

const KINDS: &[Kind] = &[
    // IA32_SPEC_CTRL, IA32_PRED_CMD: there is no speculation to restrict.
    kind(0x48, 0x48, 0, Writes::Bits(0b111)),
    kind(0x49, 0x49, 0, Writes::Ignored),
    // IA32_BIOS_SIGN_ID.
    kind(0x8b, 0x8b, MICROCODE, Writes::Ignored),
    kind(0xfe, 0xfe, MTRR_CAP, Writes::Refused),
    kind(0x10a, 0x10a, ARCH_CAPABILITIES, Writes::Refused),
    kind(0x179, 0x179, MCG_CAP, Writes::Refused),
    // IA32_MCG_STATUS, IA32_MCG_CTL.
    kind(0x17a, 0x17a, 0, Writes::Bits(0b1111)),
    kind(0x17b, 0x17b, u64::MAX, Writes::Bits(u64::MAX)),
    // IA32_MISC_ENABLE: fast strings, thermal control, CPUID limit and their like.
    kind(0x1a0, 0x1a0, MISC_ENABLE, Writes::Bits(0x4_00c5_0089)),
    // IA32_DEBUGCTL: neither branch traces nor steps by branch.
    kind(0x1d9, 0x1d9, 0, Writes::Bits(0)),
    // MTRRs: ranges, fixed ranges, default type.
    kind(0x200, 0x20f, 0, Writes::Bits(u64::MAX)),
    kind(0x250, 0x250, 0, Writes::Bits(u64::MAX)),
    kind(0x258, 0x259, 0, Writes::Bits(u64::MAX)),
    kind(0x268, 0x26f, 0, Writes::Bits(u64::MAX)),
    kind(0x2ff, 0x2ff, 0, Writes::Bits(0xcff)),
    // Machine check banks: control, status, address, miscellaneous.
    kind(MC0_CTL, MC0_CTL + 4 * BANKS - 1, 0, Writes::Bits(u64::MAX)),
    // KVM's MSR_KVM_POLL_CONTROL: whether the host may poll before it lets a halted vCPU sleep. It
    // never does here, so both answers are kept.
    kind(0x4b56_4d05, 0x4b56_4d05, 1, Writes::Bits(1)),
];

/// One vCPU's registers of this kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredMsrs {
    /// In the order of [`indices`].
    values: Vec<u64>,
}

/// The numbers of all of them, in the order in which they may be restored.
pub(super) fn indices() -> impl Iterator<Item = u32> {
    KINDS.iter().flat_map(|kind| kind.first..=kind.last)
}

/// The register's place among the values, and its kind.
fn find(index: u32) -> Option<(usize, &'static Kind)> {
    let mut place = 0;
    for kind in KINDS {
        if (kind.first..=kind.last).contains(&index) {
            return Some((place + (index - kind.first) as usize, kind));
        }
        place += (kind.last - kind.first + 1) as usize;
    }
    None
}

impl Default for StoredMsrs {
    /// As after power-on.
    fn default() -> Self {
        let values = KINDS
            .iter()
            .flat_map(|kind| (kind.first..=kind.last).map(|_| kind.reset));
        Self {
            values: values.collect(),
        }
    }
}

impl StoredMsrs {
    /// What RDMSR gives; nothing if it is none of these.
    pub(super) fn read(&self, index: u32) -> Option<u64> {
        find(index).and_then(|(place, _)| self.values.get(place).copied())
    }

    /// What WRMSR does; `false` if it is none of these or does not take the value.
    pub(super) fn write(&mut self, index: u32, value: u64) -> bool {
        let Some((place, kind)) = find(index) else {
            return false;
        };
        let Some(old) = self.values.get_mut(place) else {
            return false;
        };
        match kind.writes {
            Writes::Ignored => true,
            Writes::Refused => false,
            Writes::Bits(mask) if (value ^ *old) & !mask != 0 => false,
            Writes::Bits(_) => {
                *old = value;
                true
            }
        }
    }

    /// Sets a register as its state says, whatever a guest may write; `false` if it is none of these.
    pub(super) fn restore(&mut self, index: u32, value: u64) -> bool {
        let slot = find(index).and_then(|(place, _)| self.values.get_mut(place));
        slot.map(|slot| *slot = value).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_has_its_own_place() {
        let mut msrs = StoredMsrs::default();
        for (number, index) in (1000..).zip(indices()) {
            assert!(msrs.restore(index, number), "{index:#x}");
        }
        for (number, index) in (1000..).zip(indices()) {
            assert_eq!(msrs.read(index), Some(number), "{index:#x}");
        }
        assert_eq!(msrs.read(0x3a), None);
        assert_eq!(msrs.read(MC0_CTL + 4 * BANKS), None);
    }

    #[test]
    fn writes_keep_what_is_fixed() {
        let mut msrs = StoredMsrs::default();
        assert!(msrs.write(0x2ff, 0x806) && !msrs.write(0x2ff, 0x1000));
        assert_eq!(msrs.read(0x2ff), Some(0x806));
        assert!(msrs.write(0x1a0, MISC_ENABLE & !1) && !msrs.write(0x1a0, 0));
        assert!(!msrs.write(0x10a, 0) && !msrs.write(0x9999, 0));
        assert!(msrs.write(0x8b, 0));
        assert_eq!(msrs.read(0x8b), Some(MICROCODE));
    }
}
