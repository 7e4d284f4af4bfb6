//! The 8042 keyboard controller with its two PS/2 ports.
//!
//! A byte on its way to the guest sits in the output buffer until it is read; only then does the
//! controller take the next from its own answers, the keyboard or the mouse, in this order. Each new
//! byte is a new edge on its interrupt line. Every command is answered before the guest's next
//! instruction, so a driver never waits.
//!
//! Pulsing output bit 0 resets the machine, which guests without ACPI do to reboot. The controller
//! may therefore be attached where ACPI says that there is none.

use std::collections::VecDeque;
use std::sync::Arc;

use minicbor::{Decode, Encode};

use crate::device::{Device, RestoreError, SavedState};
use crate::engine::InterruptLine;
use crate::layout::port;

use super::keyboard::{self, Key, Keyboard};
use super::mouse::{Mouse, PointerEvent};
use super::{PortDevice, PowerEvent, PowerSink};

const STATE_VERSION: u16 = 1;

/// Status register.
mod status {
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const LAST_WAS_COMMAND: u8 = 1 << 3;
    /// The keyboard's lock is open.
    pub(super) const UNLOCKED: u8 = 1 << 4;
    pub(super) const FROM_MOUSE: u8 = 1 << 5;
}

/// The command byte: byte 0 of the controller's RAM.
mod mode {
    pub(super) const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub(super) const MOUSE_INTERRUPT: u8 = 1 << 1;
    pub(super) const SYSTEM: u8 = 1 << 2;
    pub(super) const KEYBOARD_OFF: u8 = 1 << 4;
    pub(super) const MOUSE_OFF: u8 = 1 << 5;
    pub(super) const TRANSLATE: u8 = 1 << 6;
    pub(super) const POWER_ON: u8 = SYSTEM | TRANSLATE | KEYBOARD_INTERRUPT;
}

/// Output port: not reset, A20 open; the interrupt bits are computed.
const OUTPUT_PORT: u8 = 0b1100_0011;
const OUTPUT_NOT_RESET: u8 = 1 << 0;

/// Answers of the port tests.
const TEST_PASSED: u8 = 0x00;
const TEST_CLOCK_STUCK_LOW: u8 = 0x01;

/// Where a byte for the guest comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
enum Source {
    /// The controller, or what looks like the keyboard.
    #[n(0)]
    Keyboard,
    #[n(1)]
    Mouse,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct State {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    ram: Vec<u8>,
    /// The command that waits for its data byte.
    #[n(1)]
    pending: Option<u8>,
    #[n(2)]
    last_was_command: bool,
    /// The output buffer: what the guest reads next.
    #[n(3)]
    output: Option<(Source, u8)>,
    /// What was read last; reading an empty buffer shows it again.
    #[n(4)]
    last_output: u8,
    #[n(5)]
    answers: VecDeque<(Source, u8)>,
    /// The keyboard has sent a break prefix that translation holds back.
    #[n(6)]
    break_prefix: bool,
    #[n(7)]
    keyboard: Keyboard,
    #[n(8)]
    mouse: Option<Mouse>,
}

const RAM_LEN: usize = 32;
/// A guest that asks without reading loses its oldest answers.
const MAX_ANSWERS: usize = 4;

impl State {
    fn new(has_mouse: bool) -> Self {
        let mut ram = vec![0; RAM_LEN];
        ram[0] = mode::POWER_ON;
        if !has_mouse {
            ram[0] |= mode::MOUSE_OFF;
        }
        Self {
            ram,
            pending: None,
            last_was_command: false,
            output: None,
            last_output: 0,
            answers: VecDeque::new(),
            break_prefix: false,
            keyboard: Keyboard::default(),
            mouse: has_mouse.then(Mouse::default),
        }
    }

    fn is_on(&self, mode: u8) -> bool {
        self.ram[0] & mode != 0
    }

    fn answer(&mut self, source: Source, byte: u8) {
        if self.answers.len() == MAX_ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back((source, byte));
    }

    fn next_keyboard_byte(&mut self) -> Option<u8> {
        if self.is_on(mode::KEYBOARD_OFF) {
            return None;
        }
        loop {
            let byte = self.keyboard.pop()?;
            if !self.is_on(mode::TRANSLATE) {
                return Some(byte);
            }
            if keyboard::is_break_prefix(byte) {
                self.break_prefix = true;
                continue;
            }
            let is_break = std::mem::take(&mut self.break_prefix);
            return Some(keyboard::translate(byte, is_break));
        }
    }

    fn next_output(&mut self) -> Option<(Source, u8)> {
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        if let Some(byte) = self.next_keyboard_byte() {
            return Some((Source::Keyboard, byte));
        }
        let mouse_on = !self.is_on(mode::MOUSE_OFF);
        let byte = self.mouse.as_mut().filter(|_| mouse_on)?.pop()?;
        Some((Source::Mouse, byte))
    }

    fn status(&self) -> u8 {
        let mut status = status::UNLOCKED;
        if self.is_on(mode::SYSTEM) {
            status |= status::SYSTEM;
        }
        if self.last_was_command {
            status |= status::LAST_WAS_COMMAND;
        }
        match self.output {
            Some((Source::Keyboard, _)) => status | status::OUTPUT_FULL,
            Some((Source::Mouse, _)) => status | status::OUTPUT_FULL | status::FROM_MOUSE,
            None => status,
        }
    }

    /// The output port: its upper bits show the interrupt lines.
    fn output_port(&self) -> u8 {
        match self.output {
            Some((Source::Keyboard, _)) => OUTPUT_PORT | 1 << 4,
            Some((Source::Mouse, _)) => OUTPUT_PORT | 1 << 5,
            None => OUTPUT_PORT,
        }
    }

    fn is_possible(&self, has_mouse: bool) -> bool {
        self.ram.len() == RAM_LEN
            && self.answers.len() <= MAX_ANSWERS
            && self.keyboard.is_possible()
            && self.mouse.as_ref().is_none_or(Mouse::is_possible)
            && self.mouse.is_some() == has_mouse
    }
}

/// The controller, with a keyboard and perhaps a mouse plugged in.
pub struct I8042 {
    keyboard_line: Arc<dyn InterruptLine>,
    mouse_line: Arc<dyn InterruptLine>,
    /// The lines' levels, keyboard first.
    levels: [bool; 2],
    sink: Arc<dyn PowerSink>,
    has_mouse: bool,
    state: State,
}

impl I8042 {
    /// A controller whose reset line goes to `sink`.
    #[must_use]
    pub fn new(
        keyboard_line: Arc<dyn InterruptLine>,
        mouse_line: Arc<dyn InterruptLine>,
        sink: Arc<dyn PowerSink>,
        has_mouse: bool,
    ) -> Self {
        Self {
            keyboard_line,
            mouse_line,
            levels: [false; 2],
            sink,
            has_mouse,
            state: State::new(has_mouse),
        }
    }

    /// Presses (`down`) or releases a key; says whether the keyboard took it.
    pub fn press(&mut self, key: Key, down: bool) -> bool {
        let taken = self.state.keyboard.key(key, down);
        self.update();
        taken
    }

    /// Moves the mouse or its buttons; nothing happens if there is none.
    pub fn move_pointer(&mut self, event: PointerEvent) {
        if let Some(mouse) = &mut self.state.mouse {
            mouse.moved(event);
        }
        self.update();
    }

    /// The keyboard, for what it shows.
    #[must_use]
    pub fn keyboard(&self) -> &Keyboard {
        &self.state.keyboard
    }

    fn command(&mut self, command: u8) {
        let state = &mut self.state;
        state.pending = None;
        match command {
            0x20..=0x3f => {
                let byte = state.ram[usize::from(command & 0x1f)];
                state.answer(Source::Keyboard, byte);
            }
            0x60..=0x7f | 0xd1..=0xd4 => state.pending = Some(command),
            0xa7 => state.ram[0] |= mode::MOUSE_OFF,
            0xa8 if self.has_mouse => state.ram[0] &= !mode::MOUSE_OFF,
            0xa9 if self.has_mouse => state.answer(Source::Keyboard, TEST_PASSED),
            0xa9 => state.answer(Source::Keyboard, TEST_CLOCK_STUCK_LOW),
            0xaa => {
                state.ram[0] |= mode::SYSTEM;
                state.answer(Source::Keyboard, 0x55);
            }
            0xab => state.answer(Source::Keyboard, TEST_PASSED),
            0xad => state.ram[0] |= mode::KEYBOARD_OFF,
            0xae => state.ram[0] &= !mode::KEYBOARD_OFF,
            // The input port: the keyboard is not locked.
            0xc0 => state.answer(Source::Keyboard, 0x80),
            0xd0 => {
                let port = state.output_port();
                state.answer(Source::Keyboard, port);
            }
            // Pulses the output bits that are zero in the command; only the reset line does anything.
            0xf0..=0xff if command & OUTPUT_NOT_RESET == 0 => self.sink.request(PowerEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        let state = &mut self.state;
        match state.pending.take() {
            Some(command @ 0x60..=0x7f) => {
                state.ram[usize::from(command & 0x1f)] = byte;
                if !self.has_mouse {
                    state.ram[0] |= mode::MOUSE_OFF;
                }
            }
            // A20 is always open; the reset line is not.
            Some(0xd1) if byte & OUTPUT_NOT_RESET == 0 => self.sink.request(PowerEvent::Reset),
            Some(0xd2) => state.answer(Source::Keyboard, byte),
            Some(0xd3) if self.has_mouse => state.answer(Source::Mouse, byte),
            // Without a second port its loopback comes back as the keyboard's, which tells a driver
            // so without a timeout.
            Some(0xd3) => state.answer(Source::Keyboard, byte),
            Some(0xd4) => match &mut state.mouse {
                Some(mouse) => {
                    state.ram[0] &= !mode::MOUSE_OFF;
                    mouse.command(byte);
                }
                // Nobody pulls the clock: the controller reports the resend of a timeout.
                None => state.answer(Source::Mouse, 0xfe),
            },
            Some(_) => {}
            None => {
                // Talking to the keyboard switches its port on.
                state.ram[0] &= !mode::KEYBOARD_OFF;
                state.keyboard.command(byte);
            }
        }
    }

    /// Fills the output buffer if it is empty and drives the lines to what it holds.
    fn update(&mut self) {
        let state = &mut self.state;
        if state.output.is_none() {
            state.output = state.next_output();
        }
        let levels = match state.output {
            Some((Source::Keyboard, _)) => [state.is_on(mode::KEYBOARD_INTERRUPT), false],
            Some((Source::Mouse, _)) => [false, state.is_on(mode::MOUSE_INTERRUPT)],
            None => [false; 2],
        };
        self.drive(levels);
    }

    fn drive(&mut self, levels: [bool; 2]) {
        if levels[0] != self.levels[0] {
            self.keyboard_line.set(levels[0]);
        }
        if levels[1] != self.levels[1] {
            self.mouse_line.set(levels[1]);
        }
        self.levels = levels;
    }
}

impl PortDevice for I8042 {
    fn ports(&self) -> Vec<(u16, u16)> {
        vec![(port::I8042_DATA, 1), (port::I8042_COMMAND, 1)]
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        match port {
            port::I8042_COMMAND => self.state.status(),
            port::I8042_DATA => {
                if let Some((_, byte)) = self.state.output.take() {
                    self.state.last_output = byte;
                    // Down in between, so that the next byte is an edge.
                    self.drive([false; 2]);
                    self.update();
                    return byte;
                }
                self.state.last_output
            }
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        match port {
            port::I8042_COMMAND => {
                self.state.last_was_command = true;
                self.command(value);
            }
            port::I8042_DATA => {
                self.state.last_was_command = false;
                self.data(value);
            }
            _ => return,
        }
        self.update();
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }

    fn reset(&mut self) {
        self.state = State::new(self.has_mouse);
        self.update();
    }

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &self.state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.read(STATE_VERSION)?;
        if !state.is_possible(self.has_mouse) {
            return Err(RestoreError::Impossible(
                "queues too long, or a mouse on one side only".into(),
            ));
        }
        self.state = state;
        self.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
