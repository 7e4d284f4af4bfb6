//! The machine's fixed numbers: guest physical addresses, I/O ports and interrupt lines.
//!
//! ```text
//! 0000_0000  RAM, with the PC's legacy hole A_0000..10_0000 reserved; ACPI tables at E_0000
//! C000_0000  32-bit PCI memory window (RAM goes on at 1_0000_0000)
//! E000_0000  ECAM, bus 0
//! FEC0_0000  I/O APIC            FEE0_0000  local APICs
//! FFFB_C000  KVM's identity map and TSS pages (Intel only; never RAM)
//! 1_0000_0000  RAM beyond 3 GiB
//! above RAM  64-bit PCI memory window
//! ```

use std::ops::Range;

/// RAM below this address is contiguous from zero; more RAM starts at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on behind the PCI hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// The PC's hole below 1 MiB (video memory and ROMs): never usable RAM for a guest.
pub const LEGACY_HOLE: Range<u64> = 0xa_0000..0x10_0000;
/// The ACPI tables, RSDP first.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;

/// The 32-bit PCI memory window.
pub const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration space by memory access: one bus of 32 devices with 8 functions.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The I/O APIC's registers.
pub const IO_APIC: u64 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Four pages that KVM on Intel processors takes for real mode: identity map, then TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The size of the 64-bit PCI memory window, in bytes.
pub const PCI_WINDOW_64_LEN: u64 = 16 << 30;

/// The most RAM a guest may have, in bytes: window and RAM together stay within the 40 physical
/// address bits that every processor profile promises.
pub const MAX_RAM: u64 = (1 << 40) - HIGH_RAM_START - 2 * PCI_WINDOW_64_LEN;

/// The guest physical ranges of `ram` bytes of RAM.
#[must_use]
pub fn ram_ranges(ram: u64) -> Vec<Range<u64>> {
    let low = ram.min(LOW_RAM_END);
    let high = HIGH_RAM_START..HIGH_RAM_START + (ram - low);
    [0..low, high]
        .into_iter()
        .filter(|range| !range.is_empty())
        .collect()
}

/// The 64-bit PCI memory window of a guest with `ram` bytes of RAM, aligned to its own size.
#[must_use]
pub fn pci_window_64(ram: u64) -> Range<u64> {
    let ram_end = ram_ranges(ram).last().map_or(0, |range| range.end);
    let start = ram_end
        .max(HIGH_RAM_START)
        .next_multiple_of(PCI_WINDOW_64_LEN);
    start..start + PCI_WINDOW_64_LEN
}

/// I/O ports.
pub mod port {
    /// 8042 keyboard controller, data.
    pub const I8042_DATA: u16 = 0x60;
    /// 8042 keyboard controller, status and command.
    pub const I8042_COMMAND: u16 = 0x64;
    /// RTC and CMOS: index, then data.
    pub const RTC: u16 = 0x70;
    /// The first 16550, eight registers.
    pub const SERIAL0: u16 = 0x3f8;
    /// pvpanic's event register.
    pub const PVPANIC: u16 = 0x505;
    /// ACPI PM1a event block, four bytes.
    pub const PM1_EVENT: u16 = 0x600;
    /// ACPI PM1a control block, two bytes.
    pub const PM1_CONTROL: u16 = 0x604;
    /// ACPI PM timer, four bytes.
    pub const PM_TIMER: u16 = 0x608;
    /// ACPI GPE0 block: status and enable, two bytes each.
    pub const GPE0: u16 = 0x620;
    /// PCI configuration mechanism 1, address.
    pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
    /// The reset control register (inside the range of PCI's address port).
    pub const RESET_CONTROL: u16 = 0xcf9;
    /// PCI configuration mechanism 1, data.
    pub const PCI_CONFIG_DATA: u16 = 0xcfc;
}

/// Global system interrupts. Below 16 they are the ISA IRQs of the same number.
pub mod gsi {
    /// i8042 keyboard.
    pub const KEYBOARD: u32 = 1;
    /// First serial line.
    pub const SERIAL0: u32 = 4;
    /// RTC.
    pub const RTC: u32 = 8;
    /// ACPI's system control interrupt; level-triggered, active high.
    pub const SCI: u32 = 9;
    /// i8042 pointing device.
    pub const MOUSE: u32 = 12;
    /// PCI INTx lines: device number modulo 8, level-triggered, active low on a board, which makes
    /// no difference to us: a line is raised or not.
    pub const PCI_INTX: std::ops::Range<u32> = 16..24;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_and_windows_never_overlap() {
        for ram in [
            1 << 20,
            128 << 20,
            LOW_RAM_END,
            LOW_RAM_END + 4096,
            64 << 30,
            MAX_RAM,
        ] {
            let ranges = ram_ranges(ram);
            let sum: u64 = ranges.iter().map(|range| range.end - range.start).sum();
            assert_eq!(sum, ram);
            assert!(ranges[0].end <= PCI_WINDOW_32.start);
            let window = pci_window_64(ram);
            assert!(window.start >= ranges.last().unwrap().end);
            assert_eq!(window.start % PCI_WINDOW_64_LEN, 0);
            assert!(window.end <= 1 << 40, "{ram:#x} ends at {:#x}", window.end);
        }
    }
}
