//! The I/O APIC: an 82093AA with 24 pins and KVM's version number.
//!
//! As in KVM a falling line takes the request back even of an edge-triggered pin, so an edge that
//! comes while its pin is masked is lost; Remote IRR falls when a pin is made edge-triggered; and an
//! ExtINT entry delivers nothing, because the 8259s reach the processors by LINT0 only.

use crate::engine::state::{IO_APIC_PINS, IoApicState};

use super::message::{DeliveryMode, Destination, Message};

/// 24 pins, version 0x11.
const VERSION: u32 = (IO_APIC_PINS as u32 - 1) << 16 | 0x11;
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Bits of a redirection entry.
mod entry {
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const DELIVERY_STATUS: u64 = 1 << 12;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
}

/// Takes a message to the local APICs; whether one has accepted it.
pub type Deliver<'a> = &'a mut dyn FnMut(&Message) -> bool;

/// The chip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoApic {
    state: IoApicState,
    /// Edge-triggered requests whose line is still high, but which are delivered.
    delivered: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// As after power-on: all pins masked.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: IoApicState {
                redirection: [entry::MASKED; IO_APIC_PINS],
                ..Default::default()
            },
            delivered: 0,
        }
    }

    /// Its state, without the requests that are delivered.
    #[must_use]
    pub fn save(&self) -> IoApicState {
        IoApicState {
            irr: self.state.irr & !self.delivered,
            ..self.state
        }
    }

    /// Takes what [`Self::save`] has given. Nothing is delivered: the local APICs' states have it.
    pub fn restore(&mut self, state: &IoApicState) {
        self.state = *state;
        self.delivered = 0;
    }

    /// Drives a pin; one that does not exist is ignored.
    pub fn set_line(&mut self, pin: usize, level: bool, deliver: Deliver) {
        let Some(&redirection) = self.state.redirection.get(pin) else {
            return;
        };
        let bit = 1 << pin;
        if !level {
            self.state.irr &= !bit;
            return;
        }
        let was_high = self.state.irr & bit != 0;
        self.state.irr |= bit;
        if redirection & entry::LEVEL == 0 {
            self.delivered &= !bit;
            if was_high {
                return;
            }
        }
        self.service(pin, deliver);
    }

    /// A local APIC has ended a level-triggered interrupt of that vector.
    pub fn end_of_interrupt(&mut self, vector: u8, deliver: Deliver) {
        for pin in 0..IO_APIC_PINS {
            let redirection = &mut self.state.redirection[pin];
            if *redirection as u8 != vector || *redirection & entry::LEVEL == 0 {
                continue;
            }
            *redirection &= !entry::REMOTE_IRR;
            if self.state.irr & 1 << pin != 0 {
                self.service(pin, deliver);
            }
        }
    }

    /// Reads the register at that offset of its page. Registers have 32 bits.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        match offset & 0xff {
            SELECT => self.state.register_select.into(),
            WINDOW => self.read_window(),
            _ => 0,
        }
    }

    /// Writes the register at that offset of its page.
    pub fn write(&mut self, offset: u64, value: u32, deliver: Deliver) {
        match offset & 0xff {
            SELECT => self.state.register_select = value as u8,
            WINDOW => self.write_window(value, deliver),
            _ => {}
        }
    }

    fn read_window(&self) -> u32 {
        match self.state.register_select {
            // The arbitration ID follows the ID.
            0 | 2 => u32::from(self.state.id & 0xf) << 24,
            1 => VERSION,
            select => {
                let index = usize::from(select.wrapping_sub(0x10) >> 1);
                match self.state.redirection.get(index) {
                    _ if select < 0x10 => u32::MAX,
                    None => u32::MAX,
                    Some(redirection) if select & 1 != 0 => (redirection >> 32) as u32,
                    Some(redirection) => *redirection as u32,
                }
            }
        }
    }

    fn write_window(&mut self, value: u32, deliver: Deliver) {
        let select = self.state.register_select;
        if select == 0 {
            self.state.id = (value >> 24) as u8 & 0xf;
        }
        if select < 0x10 {
            return;
        }
        let pin = usize::from((select - 0x10) >> 1);
        let Some(redirection) = self.state.redirection.get_mut(pin) else {
            return;
        };
        /// What only the chip itself changes.
        const READ_ONLY: u64 = entry::REMOTE_IRR | entry::DELIVERY_STATUS;
        let before = *redirection;
        let written = if select & 1 != 0 {
            before & 0xffff_ffff | u64::from(value) << 32
        } else {
            before & !0xffff_ffff | u64::from(value)
        };
        *redirection = written & !READ_ONLY | before & READ_ONLY;
        if *redirection & entry::LEVEL == 0 {
            *redirection &= !entry::REMOTE_IRR;
        } else if self.state.irr & 1 << pin != 0 {
            self.service(pin, deliver);
        }
    }

    /// Sends a pin's message, if it may.
    fn service(&mut self, pin: usize, deliver: Deliver) {
        let redirection = self.state.redirection[pin];
        let level = redirection & entry::LEVEL != 0;
        if redirection & entry::MASKED != 0 || level && redirection & entry::REMOTE_IRR != 0 {
            return;
        }
        if !level {
            self.delivered |= 1 << pin;
        }
        if deliver(&message(redirection)) && level {
            self.state.redirection[pin] |= entry::REMOTE_IRR;
        }
    }
}

fn message(redirection: u64) -> Message {
    let id = (redirection >> 56) as u32;
    Message {
        vector: redirection as u8,
        mode: DeliveryMode::from_bits(redirection as u32),
        destination: if redirection & entry::LOGICAL != 0 {
            Destination::Logical(id)
        } else {
            Destination::Physical(id)
        },
        sender: None,
        level_triggered: redirection & entry::LEVEL != 0,
        assert: true,
        redirection_hint: false,
    }
}

#[cfg(test)]
mod tests;
