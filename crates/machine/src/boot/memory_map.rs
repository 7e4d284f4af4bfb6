//! The guest's memory map, which both boot protocols hand to the kernel.

use std::ops::Range;

use crate::layout;

/// What a range is, in the numbers that e820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
    /// RAM that holds the ACPI tables.
    Acpi = 3,
}

/// The map of a guest with `ram` bytes of RAM, in ascending order.
pub(super) fn memory_map(ram: u64) -> Vec<(Range<u64>, Kind)> {
    let hole = layout::LEGACY_HOLE;
    let acpi = layout::ACPI_TABLES;
    let mut map = vec![
        (0..hole.start, Kind::Ram),
        (hole.start..acpi.start, Kind::Reserved),
        (acpi, Kind::Acpi),
    ];
    let mut ranges = layout::ram_ranges(ram).into_iter();
    if let Some(low) = ranges.next()
        && low.end > hole.end
    {
        map.push((hole.end..low.end, Kind::Ram));
    }
    map.push((layout::PCI_ECAM, Kind::Reserved));
    map.extend(ranges.map(|range| (range, Kind::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_ascend_without_overlap_and_hold_all_ram() {
        for ram in [2 << 20, 128 << 20, layout::LOW_RAM_END, 8 << 30] {
            let map = memory_map(ram);
            for pair in map.windows(2) {
                assert!(pair[0].0.end <= pair[1].0.start, "{map:x?}");
            }
            let sum: u64 = map
                .iter()
                .filter(|(_, kind)| *kind == Kind::Ram)
                .map(|(range, _)| range.end - range.start)
                .sum();
            let hole = layout::LEGACY_HOLE.end - layout::LEGACY_HOLE.start;
            assert_eq!(sum, ram - hole);
            assert!(map.contains(&(layout::PCI_ECAM, Kind::Reserved)));
            assert!(map.contains(&(layout::ACPI_TABLES, Kind::Acpi)));
        }
    }
}
