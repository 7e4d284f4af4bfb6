//! A 16550A UART, register by register as National Semiconductor's PC16550D data sheet has it.
//!
//! The line behind it is infinitely fast: a byte written is with the sink before the guest's next
//! instruction, so the transmitter is always empty, and a byte received waits for no stop bit, so a
//! character timeout (data below the trigger level) is due at once.
//!
//! Input is under hardware flow control. The far end honours RTS: it sends only after the guest has
//! raised RTS or enabled the receive interrupt, and only what the FIFO has room for. So nothing that
//! was typed or piped in early is lost to the FIFO resets of a driver that is still starting.

use std::collections::VecDeque;
use std::sync::Arc;

use minicbor::{Decode, Encode};

use crate::console::ConsoleSink;
use crate::device::{Device, RestoreError, SavedState};
use crate::engine::InterruptLine;

use super::PortDevice;

/// Depth of each FIFO, in bytes.
const FIFO_DEPTH: usize = 16;

const STATE_VERSION: u16 = 1;

/// Interrupt enable register.
mod ier {
    pub(super) const RECEIVED: u8 = 1 << 0;
    pub(super) const THR_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const MODEM_STATUS: u8 = 1 << 3;
    pub(super) const ALL: u8 = 0x0f;
}

/// Interrupt identification register, highest priority first.
mod iir {
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const RECEIVED: u8 = 0x04;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const THR_EMPTY: u8 = 0x02;
    pub(super) const MODEM_STATUS: u8 = 0x00;
    pub(super) const NONE: u8 = 0x01;
    pub(super) const FIFOS_ENABLED: u8 = 0xc0;
}

/// FIFO control register.
mod fcr {
    pub(super) const ENABLE: u8 = 1 << 0;
    pub(super) const RESET_RECEIVER: u8 = 1 << 1;
    pub(super) const TRIGGER_SHIFT: u8 = 6;
    /// The bits that persist: enable, DMA mode, trigger level.
    pub(super) const KEPT: u8 = 0xc9;
}

/// Line control register.
const LCR_DIVISOR_LATCH: u8 = 1 << 7;

/// Modem control register.
mod mcr {
    pub(super) const DTR: u8 = 1 << 0;
    pub(super) const RTS: u8 = 1 << 1;
    pub(super) const OUT1: u8 = 1 << 2;
    pub(super) const OUT2: u8 = 1 << 3;
    pub(super) const LOOPBACK: u8 = 1 << 4;
    pub(super) const ALL: u8 = 0x1f;
}

/// Line status register.
mod lsr {
    pub(super) const DATA_READY: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    pub(super) const THR_EMPTY: u8 = 1 << 5;
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 6;
}

/// Modem status register.
mod msr {
    pub(super) const CTS: u8 = 1 << 4;
    pub(super) const DSR: u8 = 1 << 5;
    pub(super) const RI: u8 = 1 << 6;
    pub(super) const DCD: u8 = 1 << 7;
    /// What the far end shows: always there, always ready.
    pub(super) const CONNECTED: u8 = CTS | DSR | DCD;
}

/// What a guest can observe of the UART.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Registers {
    #[n(0)]
    divisor: u16,
    #[n(1)]
    ier: u8,
    #[n(2)]
    fcr: u8,
    #[n(3)]
    lcr: u8,
    #[n(4)]
    mcr: u8,
    /// The four change bits of the modem status register; the rest follows from the line.
    #[n(5)]
    msr_changes: u8,
    #[n(6)]
    scratch: u8,
    #[n(7)]
    overrun: bool,
    /// The "transmitter holding register empty" interrupt is due; reading IIR takes it back.
    #[n(8)]
    thr_empty_due: bool,
    #[n(9)]
    received: VecDeque<u8>,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            // 115200 baud, which a driver that asks finds already set.
            divisor: 1,
            ier: 0,
            fcr: 0,
            lcr: 0x03,
            mcr: 0,
            msr_changes: 0,
            scratch: 0,
            overrun: false,
            thr_empty_due: false,
            received: VecDeque::new(),
        }
    }
}

impl Registers {
    fn is_loopback(&self) -> bool {
        self.mcr & mcr::LOOPBACK != 0
    }

    fn depth(&self) -> usize {
        if self.fcr & fcr::ENABLE == 0 {
            1
        } else {
            FIFO_DEPTH
        }
    }

    /// How many received bytes raise the interrupt without waiting for the timeout.
    fn trigger(&self) -> usize {
        if self.fcr & fcr::ENABLE == 0 {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr >> fcr::TRIGGER_SHIFT)]
    }

    /// How many bytes the far end may send now.
    fn room(&self) -> usize {
        let ready = self.mcr & mcr::RTS != 0 || self.ier & ier::RECEIVED != 0;
        if ready && !self.is_loopback() {
            self.depth().saturating_sub(self.received.len())
        } else {
            0
        }
    }

    fn modem_lines(&self) -> u8 {
        if !self.is_loopback() {
            return msr::CONNECTED;
        }
        [
            (mcr::RTS, msr::CTS),
            (mcr::DTR, msr::DSR),
            (mcr::OUT1, msr::RI),
            (mcr::OUT2, msr::DCD),
        ]
        .into_iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |lines, (_, input)| lines | input)
    }

    fn interrupt_id(&self) -> u8 {
        if self.ier & ier::LINE_STATUS != 0 && self.overrun {
            iir::LINE_STATUS
        } else if self.ier & ier::RECEIVED != 0 && self.received.len() >= self.trigger() {
            iir::RECEIVED
        } else if self.ier & ier::RECEIVED != 0 && !self.received.is_empty() {
            iir::TIMEOUT
        } else if self.ier & ier::THR_EMPTY != 0 && self.thr_empty_due {
            iir::THR_EMPTY
        } else if self.ier & ier::MODEM_STATUS != 0 && self.msr_changes != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn line_status(&self) -> u8 {
        let mut status = lsr::THR_EMPTY | lsr::TRANSMITTER_EMPTY;
        if !self.received.is_empty() {
            status |= lsr::DATA_READY;
        }
        if self.overrun {
            status |= lsr::OVERRUN;
        }
        status
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value & mcr::ALL;
        let after = self.modem_lines();
        let changed = before ^ after;
        // Trailing edge of RI sets its bit; the other three report either edge.
        let ring_ended = before & !after & msr::RI;
        self.msr_changes |= (changed & !msr::RI | ring_ended) >> 4;
    }

    fn write_fifo_control(&mut self, value: u8) {
        // Switching the FIFOs on or off empties them, as does the reset bit.
        let toggled = (self.fcr ^ value) & fcr::ENABLE != 0;
        let reset =
            value & (fcr::ENABLE | fcr::RESET_RECEIVER) == fcr::ENABLE | fcr::RESET_RECEIVER;
        if toggled || reset {
            self.received.clear();
        }
        // Without the enable bit the others are not programmed.
        self.fcr = if value & fcr::ENABLE == 0 {
            0
        } else {
            value & fcr::KEPT
        };
    }
}

/// A serial port.
pub struct Serial {
    name: String,
    base: u16,
    line: Arc<dyn InterruptLine>,
    line_high: bool,
    sink: Box<dyn ConsoleSink>,
    on_input_wanted: Option<Box<dyn Fn() + Send>>,
    /// The last `push_input` was not accepted whole: somebody waits for room.
    input_waits: bool,
    registers: Registers,
}

impl Serial {
    /// A UART at `base` (eight ports) whose output goes to `sink`.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        base: u16,
        line: Arc<dyn InterruptLine>,
        sink: Box<dyn ConsoleSink>,
    ) -> Self {
        Self {
            name: name.into(),
            base,
            line,
            line_high: false,
            sink,
            on_input_wanted: None,
            input_waits: false,
            registers: Registers::default(),
        }
    }

    /// `notify` is called when there is room again after [`Serial::push_input`] has refused bytes.
    ///
    /// It runs under the device's lock, usually inside a vCPU's exit: it may signal an eventfd, and
    /// must not call the device.
    pub fn on_input_wanted(&mut self, notify: Box<dyn Fn() + Send>) {
        self.on_input_wanted = Some(notify);
    }

    /// Whether [`Serial::push_input`] would accept anything now.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.registers.room() > 0
    }

    /// Gives the guest the first bytes of `bytes`, as many as it has room for, and says how many.
    /// The caller keeps the rest until it is notified.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let accepted = bytes.len().min(self.registers.room());
        self.registers.received.extend(&bytes[..accepted]);
        self.input_waits = accepted < bytes.len();
        self.update_line();
        accepted
    }

    fn is_divisor_selected(&self) -> bool {
        self.registers.lcr & LCR_DIVISOR_LATCH != 0
    }

    fn transmit(&mut self, byte: u8) {
        if self.registers.is_loopback() {
            if self.registers.received.len() < self.registers.depth() {
                self.registers.received.push_back(byte);
            } else {
                self.registers.overrun = true;
            }
        } else {
            self.sink.write(&[byte]);
        }
        self.registers.thr_empty_due = true;
    }

    /// Drives the line to what the registers say. A PC gates it by OUT2, which loopback mode takes
    /// off the pin.
    fn update_line(&mut self) {
        let registers = &self.registers;
        let gate = registers.mcr & (mcr::OUT2 | mcr::LOOPBACK) == mcr::OUT2;
        let high = gate && registers.interrupt_id() != iir::NONE;
        if high != self.line_high {
            self.line_high = high;
            self.line.set(high);
        }
    }

    fn notify_if_room(&mut self) {
        if self.input_waits
            && self.wants_input()
            && let Some(notify) = &self.on_input_wanted
        {
            self.input_waits = false;
            notify();
        }
    }
}

impl PortDevice for Serial {
    fn ports(&self) -> Vec<(u16, u16)> {
        vec![(self.base, 8)]
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        let divisor_selected = self.is_divisor_selected();
        let registers = &mut self.registers;
        let value = match port.wrapping_sub(self.base) {
            0 if divisor_selected => registers.divisor as u8,
            0 => registers.received.pop_front().unwrap_or(0),
            1 if divisor_selected => (registers.divisor >> 8) as u8,
            1 => registers.ier,
            2 => {
                let id = registers.interrupt_id();
                if id == iir::THR_EMPTY {
                    registers.thr_empty_due = false;
                }
                let fifos = registers.fcr & fcr::ENABLE != 0;
                id | if fifos { iir::FIFOS_ENABLED } else { 0 }
            }
            3 => registers.lcr,
            4 => registers.mcr,
            // The two status registers change by being read only if they have something to clear;
            // the usual poll of an idle transmitter ends here.
            5 => {
                let status = registers.line_status();
                if !registers.overrun {
                    return status;
                }
                registers.overrun = false;
                status
            }
            6 => registers.modem_lines() | std::mem::take(&mut registers.msr_changes),
            7 => registers.scratch,
            _ => return 0xff,
        };
        self.update_line();
        self.notify_if_room();
        value
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        let divisor_selected = self.is_divisor_selected();
        let registers = &mut self.registers;
        match port.wrapping_sub(self.base) {
            0 if divisor_selected => {
                registers.divisor = registers.divisor & 0xff00 | u16::from(value)
            }
            0 => self.transmit(value),
            1 if divisor_selected => {
                registers.divisor = registers.divisor & 0x00ff | u16::from(value) << 8;
            }
            1 => {
                let enabled = value & !registers.ier;
                registers.ier = value & ier::ALL;
                // The holding register is empty, so enabling its interrupt makes it due.
                registers.thr_empty_due |= enabled & ier::THR_EMPTY != 0;
            }
            2 => registers.write_fifo_control(value),
            3 => registers.lcr = value,
            4 => registers.write_modem_control(value),
            7 => registers.scratch = value,
            // The status registers are read-only; writing them is a factory test.
            _ => return,
        }
        self.update_line();
        self.notify_if_room();
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
        self.update_line();
    }

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &self.registers)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let registers: Registers = state.read(STATE_VERSION)?;
        if registers.received.len() > FIFO_DEPTH {
            return Err(RestoreError::Impossible(format!(
                "{} bytes in a FIFO of {FIFO_DEPTH}",
                registers.received.len()
            )));
        }
        self.registers = registers;
        self.registers.ier &= ier::ALL;
        self.registers.mcr &= mcr::ALL;
        self.registers.msr_changes &= 0x0f;
        self.registers.fcr &= fcr::KEPT;
        self.update_line();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
