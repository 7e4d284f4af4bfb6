//! ACPI's fixed hardware: PM1 event and control registers, the power-management timer, general
//! purpose events, and the reset control register of the chip sets.
//!
//! The machine is always in ACPI mode: there is no SMI command port, so `SCI_EN` reads as one and a
//! guest never has to ask for it (ACPI 6.5, 4.8.2.5 and 5.2.9). Of the sleep states only S5 exists.

use std::sync::Arc;
use std::time::Duration;

use mica_base::clock::Clock;
use minicbor::{Decode, Encode};

use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::engine::InterruptLine;
use crate::layout::port;

use super::PortDevice;

/// What a guest, or its death, asks of the VM process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// The guest has switched the machine off (ACPI S5).
    PowerOff,
    /// The guest has pulled the reset line.
    Reset,
    /// The guest's kernel has panicked, and says so through pvpanic.
    GuestPanicked,
    /// The guest's kernel has panicked and now runs its crash kernel, which will save a dump.
    CrashLoaded,
    /// The guest announces a regular shutdown through pvpanic.
    GuestShutdown,
}

/// Where devices put a [`PowerEvent`].
///
/// Called under the device's lock from inside a vCPU's exit: it records the event, kicks the vCPUs
/// and returns. Until they have stopped the guest may run on, and ask again.
pub trait PowerSink: Send + Sync {
    /// Takes the request.
    fn request(&self, event: PowerEvent);
}

/// `SLP_TYP` of S5, which the DSDT's `\_S5` object tells the guest.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// What written to the reset control register resets: a full reset, and go.
pub(crate) const RESET_VALUE: u8 = RESET_CPU | RESET_FULL;

const RESET_FULL: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;

/// PM1 status and enable bits (ACPI 6.5, 4.8.3.1).
mod pm1 {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const RTC: u16 = 1 << 10;
    /// The events a guest can enable.
    pub(super) const EVENTS: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

/// PM1 control bits (ACPI 6.5, 4.8.3.2).
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0x7;
const SLEEP_ENABLE: u16 = 1 << 13;
/// The bits that keep what was written: bus master reload and the sleep type.
const CONTROL_KEPT: u16 = 1 << 1 | SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT;

/// Ticks of the power-management timer in a second (ACPI 6.5, 4.8.3.3).
const TIMER_HZ: u128 = 3_579_545;

const STATE_VERSION: u16 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Registers {
    #[n(0)]
    pm1_status: u16,
    #[n(1)]
    pm1_enable: u16,
    #[n(2)]
    pm1_control: u16,
    #[n(3)]
    gpe_status: u16,
    #[n(4)]
    gpe_enable: u16,
    #[n(5)]
    reset_control: u8,
    /// The timer as it stood when time last stopped (at rest or paused), in ticks.
    #[n(6)]
    timer_base: u64,
    /// The value of the timer's top bit that the timer status bit has accounted for.
    #[n(7)]
    timer_top: bool,
}

/// The power-management block.
pub struct Power {
    clock: Arc<dyn Clock>,
    sci: Arc<dyn InterruptLine>,
    sci_high: bool,
    sink: Arc<dyn PowerSink>,
    registers: Registers,
    /// When the timer began to count on from `timer_base`; it stands still without.
    running_since: Option<Duration>,
}

impl Power {
    /// Fixed hardware that interrupts through `sci`.
    #[must_use]
    pub fn new(
        clock: Arc<dyn Clock>,
        sci: Arc<dyn InterruptLine>,
        sink: Arc<dyn PowerSink>,
    ) -> Self {
        Self {
            running_since: Some(clock.monotonic()),
            clock,
            sci,
            sci_high: false,
            sink,
            registers: Registers::default(),
        }
    }

    /// Presses the power button. The result says whether the guest listens to it; if not, the press
    /// stays pending until it does.
    pub fn press_power_button(&mut self) -> bool {
        self.registers.pm1_status |= pm1::POWER_BUTTON;
        self.update_sci();
        self.registers.pm1_enable & pm1::POWER_BUTTON != 0
    }

    /// Raises the general purpose event of that number, 0 to 15; others do not exist.
    pub fn raise_gpe(&mut self, event: u8) {
        self.registers.gpe_status |= 1_u16.checked_shl(event.into()).unwrap_or(0);
        self.update_sci();
    }

    fn timer_ticks(&self) -> u64 {
        let running = self.running_since.map_or(Duration::ZERO, |since| {
            self.clock.monotonic().saturating_sub(since)
        });
        let ticks = running.as_nanos() * TIMER_HZ / 1_000_000_000;
        self.registers.timer_base.wrapping_add(ticks as u64)
    }

    fn timer(&mut self) -> u32 {
        let value = self.timer_ticks() as u32;
        // TMR_STS is set whenever the top bit changes.
        let top = value >> 31 != 0;
        if top != self.registers.timer_top {
            self.registers.timer_top = top;
            self.registers.pm1_status |= pm1::TIMER;
        }
        value
    }

    fn stop_timer(&mut self) {
        self.registers.timer_base = self.timer_ticks();
        self.running_since = None;
    }

    fn update_sci(&mut self) {
        let registers = &self.registers;
        let high = registers.pm1_status & registers.pm1_enable & pm1::EVENTS != 0
            || registers.gpe_status & registers.gpe_enable != 0;
        if high != self.sci_high {
            self.sci_high = high;
            self.sci.set(high);
        }
    }

    fn write_control(&mut self, value: u16) {
        self.registers.pm1_control = value & CONTROL_KEPT;
        let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        if value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
            self.sink.request(PowerEvent::PowerOff);
        }
    }

    fn write_reset_control(&mut self, value: u8) {
        let rises = value & !self.registers.reset_control & RESET_CPU != 0;
        self.registers.reset_control = value & (RESET_FULL | RESET_CPU);
        if rises {
            self.sink.request(PowerEvent::Reset);
        }
    }

    fn read_register(&mut self, port: u16) -> u8 {
        let registers = &self.registers;
        match port {
            PM1_STATUS_LOW => low(registers.pm1_status),
            PM1_STATUS_HIGH => high(registers.pm1_status),
            PM1_ENABLE_LOW => low(registers.pm1_enable),
            PM1_ENABLE_HIGH => high(registers.pm1_enable),
            port::PM1_CONTROL => low(registers.pm1_control | SCI_ENABLE),
            PM1_CONTROL_HIGH => high(registers.pm1_control),
            GPE_STATUS_LOW => low(registers.gpe_status),
            GPE_STATUS_HIGH => high(registers.gpe_status),
            GPE_ENABLE_LOW => low(registers.gpe_enable),
            GPE_ENABLE_HIGH => high(registers.gpe_enable),
            port::RESET_CONTROL => registers.reset_control,
            _ => 0xff,
        }
    }
}

const PM1_STATUS_LOW: u16 = port::PM1_EVENT;
const PM1_STATUS_HIGH: u16 = PM1_STATUS_LOW + 1;
const PM1_ENABLE_LOW: u16 = PM1_STATUS_LOW + 2;
const PM1_ENABLE_HIGH: u16 = PM1_STATUS_LOW + 3;
const PM1_CONTROL_HIGH: u16 = port::PM1_CONTROL + 1;
const GPE_STATUS_LOW: u16 = port::GPE0;
const GPE_STATUS_HIGH: u16 = port::GPE0 + 1;
const GPE_ENABLE_LOW: u16 = port::GPE0 + 2;
const GPE_ENABLE_HIGH: u16 = port::GPE0 + 3;

fn low(register: u16) -> u8 {
    register as u8
}

fn high(register: u16) -> u8 {
    (register >> 8) as u8
}

fn set_low(register: &mut u16, value: u8) {
    *register = *register & 0xff00 | u16::from(value);
}

fn set_high(register: &mut u16, value: u8) {
    *register = *register & 0x00ff | u16::from(value) << 8;
}

impl PortDevice for Power {
    fn ports(&self) -> Vec<(u16, u16)> {
        vec![
            (port::PM1_EVENT, 4),
            (port::PM1_CONTROL, 2),
            (port::PM_TIMER, 4),
            (port::GPE0, 4),
            (port::RESET_CONTROL, 1),
        ]
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        let mut byte = [0];
        self.read(port, &mut byte);
        byte[0]
    }

    /// The timer is read at one instant, whatever the width.
    fn read(&mut self, port: u16, data: &mut [u8]) {
        let timer = self.timer().to_le_bytes();
        for (port, byte) in (port..).zip(data) {
            *byte = match port.checked_sub(port::PM_TIMER).map(usize::from) {
                Some(index @ 0..4) => timer[index],
                _ => self.read_register(port),
            };
        }
        self.update_sci();
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        let registers = &mut self.registers;
        match port {
            PM1_STATUS_LOW => registers.pm1_status &= !u16::from(value),
            PM1_STATUS_HIGH => registers.pm1_status &= !(u16::from(value) << 8),
            PM1_ENABLE_LOW => set_low(&mut registers.pm1_enable, value),
            PM1_ENABLE_HIGH => set_high(&mut registers.pm1_enable, value),
            port::PM1_CONTROL => {
                let mut control = registers.pm1_control;
                set_low(&mut control, value);
                self.write_control(control);
            }
            PM1_CONTROL_HIGH => {
                let mut control = registers.pm1_control;
                set_high(&mut control, value);
                self.write_control(control);
            }
            GPE_STATUS_LOW => registers.gpe_status &= !u16::from(value),
            GPE_STATUS_HIGH => registers.gpe_status &= !(u16::from(value) << 8),
            GPE_ENABLE_LOW => set_low(&mut registers.gpe_enable, value),
            GPE_ENABLE_HIGH => set_high(&mut registers.gpe_enable, value),
            port::RESET_CONTROL => self.write_reset_control(value),
            _ => return,
        }
        self.registers.pm1_enable &= pm1::EVENTS;
        self.update_sci();
    }
}

impl Device for Power {
    fn name(&self) -> &str {
        "power"
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.stop_timer();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.running_since = Some(self.clock.monotonic());
        Ok(())
    }

    fn reset(&mut self) {
        // The timer counts on through a reset: nothing in the specification clears it.
        self.registers = Registers {
            timer_base: self.registers.timer_base,
            timer_top: self.registers.timer_top,
            ..Registers::default()
        };
        self.update_sci();
    }

    fn save(&self) -> SavedState {
        let timer_base = self.timer_ticks();
        let registers = Registers {
            timer_base,
            ..self.registers.clone()
        };
        SavedState::new(STATE_VERSION, &registers)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let registers: Registers = state.read(STATE_VERSION)?;
        self.registers = Registers {
            pm1_enable: registers.pm1_enable & pm1::EVENTS,
            pm1_control: registers.pm1_control & CONTROL_KEPT,
            ..registers
        };
        self.running_since = None;
        self.update_sci();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
