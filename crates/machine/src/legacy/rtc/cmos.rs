//! The clock's registers and what a BIOS leaves in the RAM behind them.

/// Bytes of CMOS RAM, the clock's registers included.
pub(super) const CMOS_LEN: usize = 128;

/// Register numbers.
pub(super) mod register {
    pub(crate) const SECONDS: u8 = 0x00;
    pub(crate) const SECONDS_ALARM: u8 = 0x01;
    pub(crate) const MINUTES: u8 = 0x02;
    pub(crate) const MINUTES_ALARM: u8 = 0x03;
    pub(crate) const HOURS: u8 = 0x04;
    pub(crate) const HOURS_ALARM: u8 = 0x05;
    pub(crate) const WEEKDAY: u8 = 0x06;
    pub(crate) const DAY: u8 = 0x07;
    pub(crate) const MONTH: u8 = 0x08;
    pub(crate) const YEAR: u8 = 0x09;
    pub(crate) const A: u8 = 0x0a;
    pub(crate) const B: u8 = 0x0b;
    pub(crate) const C: u8 = 0x0c;
    pub(crate) const D: u8 = 0x0d;
    pub(crate) const CENTURY: u8 = 0x32;
}

/// Register A: update in progress, divider, rate.
pub(super) const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
pub(super) const A_DIVIDER: u8 = 0x70;
/// Dividers from here on hold the clock in reset.
pub(super) const A_DIVIDER_RESET: u8 = 0x60;
pub(super) const A_RATE: u8 = 0x0f;

/// Register B.
pub(super) const B_SET: u8 = 1 << 7;
pub(super) const B_24_HOURS: u8 = 1 << 1;
pub(super) const B_BINARY: u8 = 1 << 2;

/// The interrupt flags of register C; the same bits of register B enable them.
pub(super) mod flag {
    pub(crate) const PERIODIC: u8 = 1 << 6;
    pub(crate) const ALARM: u8 = 1 << 5;
    pub(crate) const UPDATE: u8 = 1 << 4;
    pub(crate) const ALL: u8 = PERIODIC | ALARM | UPDATE;
    pub(crate) const REQUEST: u8 = 1 << 7;
}

/// Register D: RAM and time are valid.
pub(super) const D_VALID: u8 = 1 << 7;

/// Index port: the low bits choose a register, the top one masks NMI.
pub(super) const INDEX_MASK: u8 = 0x7f;

pub(super) const TIME_REGISTERS: [u8; 8] = [
    register::SECONDS,
    register::MINUTES,
    register::HOURS,
    register::WEEKDAY,
    register::DAY,
    register::MONTH,
    register::YEAR,
    register::CENTURY,
];

pub(super) fn is_time(index: u8) -> bool {
    TIME_REGISTERS.contains(&index)
}

/// The memory sizes where a PC's BIOS leaves them: KiB of base and extended memory, then 64 KiB
/// units above 16 MiB and above 4 GiB.
pub(super) fn write_memory_sizes(cmos: &mut [u8; CMOS_LEN], ram: u64) {
    const EQUIPMENT: usize = 0x14;
    /// An 80x87 and a PS/2 pointing device.
    const EQUIPPED: u8 = 0x06;

    let below_4g = ram.min(crate::layout::LOW_RAM_END);
    let extended = (below_4g.saturating_sub(1 << 20) >> 10).min(0xffff) as u16;
    let above_16m = (below_4g.saturating_sub(16 << 20) >> 16).min(0xffff) as u16;
    let above_4g = ((ram - below_4g) >> 16).min(0xff_ffff) as u32;
    cmos[EQUIPMENT] = EQUIPPED;
    cmos[0x15..0x17].copy_from_slice(&640_u16.to_le_bytes());
    cmos[0x17..0x19].copy_from_slice(&extended.to_le_bytes());
    cmos[0x30..0x32].copy_from_slice(&extended.to_le_bytes());
    cmos[0x34..0x36].copy_from_slice(&above_16m.to_le_bytes());
    cmos[0x5b..0x5e].copy_from_slice(&above_4g.to_le_bytes()[..3]);
}
