//! The ACPI tables, by which a guest learns what its machine has, instead of probing for it.
//!
//! The machine describes itself as full ACPI with fixed hardware, not as *hardware-reduced*: PM1 and
//! the SCI are all a guest needs for its power button and for S5, every x86 system knows them, and
//! the reduced model would put a GED device and its AML in their place.
//!
//! What is not there is said to be not there, because a guest then does not look for it, and each
//! look at a port is an exit: no VGA, no 8042, no CMOS clock, no power-management timer unless the
//! configuration has them; no C2 and C3; no SMI command port, so ACPI mode is never switched on; no
//! general purpose events. The legacy-devices flag is clear since the namespace lists every ISA
//! device (ACPI 6.5, 5.2.9.3).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::engine::MAX_VCPUS;
use crate::layout;
use crate::memory::GuestMemory;

mod dsdt;
mod tables;

/// What the tables tell of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Processors, 1 to [`MAX_VCPUS`]. The APIC identifier of each is its index.
    pub vcpus: u32,
    /// RAM in bytes, from which the 64-bit PCI window follows.
    pub ram: u64,
    /// The serial line at COM1.
    pub serial: bool,
    /// The 8042 with its keyboard.
    pub keyboard: bool,
    /// The mouse behind the 8042; needs `keyboard`.
    pub mouse: bool,
    /// The MC146818 clock. A guest with a paravirtual clock has no use for it.
    pub rtc: bool,
    /// The power-management timer. A guest with a paravirtual clock or a stable TSC has no use for
    /// it.
    pub pm_timer: bool,
    /// The pvpanic port.
    pub pvpanic: bool,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs; a machine has 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// The place of the tables is not RAM.
    #[error("ACPI tables at {address:#x}: {source}")]
    Memory {
        /// Where the tables belong.
        address: u64,
        /// Why they cannot be written there.
        source: GuestMemoryError,
    },
}

/// One table and where it is.
struct Placed {
    address: u64,
    bytes: Vec<u8>,
}

/// The tables at their addresses, RSDP first.
pub struct Tables(Vec<Placed>);

impl Tables {
    /// Every table's guest physical address and bytes, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.0.iter().map(|table| (table.address, &table.bytes[..]))
    }
}

/// Builds the tables for [`layout::ACPI_TABLES`].
///
/// # Errors
///
/// [`AcpiError::Vcpus`].
pub fn build(config: &AcpiConfig) -> Result<Tables, AcpiError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(AcpiError::Vcpus(config.vcpus));
    }
    let mut end = layout::ACPI_TABLES.start + tables::RSDP_LEN;
    let mut placed = Vec::new();
    // The FACS wants 64-byte alignment (ACPI 6.5, 5.2.10); the others take it too.
    let mut place = |bytes: Vec<u8>| {
        let address = end.next_multiple_of(64);
        end = address + bytes.len() as u64;
        placed.push(Placed { address, bytes });
        address
    };
    let facs = place(tables::facs());
    let dsdt = place(dsdt::dsdt(config));
    let described = [
        place(tables::fadt(config, facs, dsdt)),
        place(tables::madt(config.vcpus)),
        place(tables::mcfg()),
    ];
    let xsdt = place(tables::xsdt(&described));
    debug_assert!(end <= layout::ACPI_TABLES.end, "tables outgrow their place");
    let rsdp = Placed {
        address: layout::ACPI_TABLES.start,
        bytes: tables::rsdp(xsdt),
    };
    placed.insert(0, rsdp);
    Ok(Tables(placed))
}

/// Builds the tables and writes them to guest memory; gives the address of the RSDP.
///
/// # Errors
///
/// [`AcpiError`].
pub fn write(config: &AcpiConfig, memory: &GuestMemory) -> Result<GuestAddress, AcpiError> {
    for (address, bytes) in build(config)?.iter() {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| AcpiError::Memory { address, source })?;
    }
    Ok(GuestAddress(layout::ACPI_TABLES.start))
}

#[cfg(test)]
mod tests;
