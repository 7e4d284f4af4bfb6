//! The tables that are plain structures.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::AcpiConfig;
use crate::layout::{self, gsi, port};
use crate::legacy;

pub(super) const OEM: [u8; 6] = *b"MICA  ";
pub(super) const OEM_TABLE: [u8; 8] = *b"MICAVM  ";
pub(super) const OEM_REVISION: u32 = 1;

/// Length of the header that all tables share.
pub(super) const HEADER_LEN: usize = 36;

/// Length of the RSDP of revision 2.
pub(super) const RSDP_LEN: u64 = 36;

/// The CMOS byte with the century.
const CMOS_CENTURY: u8 = 0x32;

/// IA-PC boot architecture flags (ACPI 6.5, table 5.11).
mod boot_flag {
    pub(super) const HAS_8042: u16 = 1 << 1;
    pub(super) const NO_VGA: u16 = 1 << 2;
    pub(super) const NO_ASPM: u16 = 1 << 4;
    pub(super) const NO_CMOS_RTC: u16 = 1 << 5;
}

/// Flags of MADT interrupt source overrides (MPS INTI flags).
mod inti {
    pub(super) const ACTIVE_HIGH: u16 = 0b01;
    pub(super) const LEVEL: u16 = 0b11 << 2;
}

pub(super) fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

pub(super) fn rsdp(xsdt: u64) -> Vec<u8> {
    bytes_of(&Rsdp::new(OEM, xsdt))
}

pub(super) fn xsdt(tables: &[u64]) -> Vec<u8> {
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for &table in tables {
        xsdt.add_entry(table);
    }
    bytes_of(&xsdt)
}

pub(super) fn facs() -> Vec<u8> {
    bytes_of(&FACS::new())
}

/// A register block on I/O ports, `bits` wide, accessed in units of `access`.
fn io_block(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
}

pub(super) fn fadt(config: &AcpiConfig, facs: u64, dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // Every table lies below 4 GiB. The FACS has one address, for giving two is an ambiguity that
    // guests warn of.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (gsi::SCI as u16).into();

    fadt.pm1a_evt_blk = u32::from(port::PM1_EVENT).into();
    fadt.x_pm1a_evt_blk = io_block(port::PM1_EVENT, 32, AccessSize::WordAccess);
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(port::PM1_CONTROL).into();
    fadt.x_pm1a_cnt_blk = io_block(port::PM1_CONTROL, 16, AccessSize::WordAccess);
    fadt.pm1_cnt_len = 2;
    if config.pm_timer {
        fadt = fadt.flag(Flags::TmrValExt);
        fadt.pm_tmr_blk = u32::from(port::PM_TIMER).into();
        fadt.x_pm_tmr_blk = io_block(port::PM_TIMER, 32, AccessSize::DwordAccess);
        fadt.pm_tmr_len = 4;
    }
    fadt.reset_reg = io_block(port::RESET_CONTROL, 8, AccessSize::ByteAccess);
    fadt.reset_value = legacy::RESET_VALUE;

    // Latencies past 100 and 1000 microseconds mean that there is no C2 and C3.
    fadt.p_lvl2_lat = 0x0fff.into();
    fadt.p_lvl3_lat = 0x0fff.into();
    if config.rtc {
        fadt.century = CMOS_CENTURY;
    }
    fadt.iapc_boot_arch = boot_flags(config).into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Mica\0\0\0\0").into();
    bytes_of(&fadt.finalize())
}

fn boot_flags(config: &AcpiConfig) -> u16 {
    let mut flags = boot_flag::NO_VGA | boot_flag::NO_ASPM;
    if config.keyboard {
        flags |= boot_flag::HAS_8042;
    }
    if !config.rtc {
        flags |= boot_flag::NO_CMOS_RTC;
    }
    flags
}

/// Every ISA interrupt is the global system interrupt of its number, the timer's too: KVM's PIT is
/// on pin 0 of the I/O APIC, not on pin 2 as on a board. Only the SCI is not as ISA has it.
pub(super) fn madt(vcpus: u32) -> Vec<u8> {
    /// Dual 8259s are present, as interrupt controllers of a PC come.
    const PCAT_COMPAT: u8 = 1;
    const FLAGS: usize = 40;

    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local_apic);
    for index in 0..vcpus {
        let id = index as u8;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));

    // The crate has none of the structures below, and revision 1 with no flags.
    let madt = bytes_of(&madt);
    let mut table = Sdt::new(*b"APIC", madt.len() as u32, 5, OEM, OEM_TABLE, OEM_REVISION);
    table.write_bytes(HEADER_LEN, &madt[HEADER_LEN..]);
    table.write_u8(FLAGS, PCAT_COMPAT);
    table.append_slice(&source_override(
        gsi::SCI as u8,
        gsi::SCI,
        inti::ACTIVE_HIGH | inti::LEVEL,
    ));
    table.append_slice(&LINT1_NMI);
    table.as_slice().to_vec()
}

/// ISA interrupt `irq` is global system interrupt `gsi` (ACPI 6.5, 5.2.12.5).
fn source_override(irq: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let [g0, g1, g2, g3] = gsi.to_le_bytes();
    let [f0, f1] = flags.to_le_bytes();
    [2, 10, 0, irq, g0, g1, g2, g3, f0, f1]
}

/// NMI is on LINT1 of every processor (ACPI 6.5, 5.2.12.7).
const LINT1_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];

pub(super) fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, 0);
    bytes_of(&mcfg)
}
