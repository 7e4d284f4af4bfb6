//! A PS/2 keyboard: 105 keys, scan code sets 1 and 2.
//!
//! Keys are named by their make code in set 1, the code that VNC, SPICE and evdev agree on, and sent
//! in the set that the guest has chosen. Set 3, which no current system uses, is refused.

use std::collections::VecDeque;

use minicbor::{Decode, Encode};

/// What the keyboard's own buffer holds, in bytes; a key that finds it full is lost, as it is on
/// the desk.
const BUFFER_LEN: usize = 16;
/// Room for the answers to commands, which come before keys.
const ANSWERS_LEN: usize = 8;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// The identity of an enhanced keyboard.
const IDENTITY: [u8; 2] = [0xab, 0x83];

const BREAK: u8 = 0xf0;
const EXTENDED: u8 = 0xe0;

/// A key, by its make code in scan code set 1; extended keys have `E0h` in the high byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(pub u16);

impl Key {
    /// The Pause key, whose code is a sequence of its own.
    pub const PAUSE: Self = Self(0xe11d);
}

/// Scan code set 2 to set 1, as the 8042 translates; codes from 85h on pass unchanged.
#[rustfmt::skip]
const SET2_TO_SET1: [u8; 0x85] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
    0x80, 0x81, 0x82, 0x41, 0x54,
];

/// A byte from the keyboard as the translating controller shows it. The break prefix is no byte of
/// set 1 but the top bit of the code behind it; the caller holds it back.
pub(super) fn translate(byte: u8, is_break: bool) -> u8 {
    let code = SET2_TO_SET1.get(usize::from(byte)).copied();
    code.unwrap_or(byte) | if is_break { 0x80 } else { 0 }
}

pub(super) fn is_break_prefix(byte: u8) -> bool {
    byte == BREAK
}

fn set1_to_set2(code: u8) -> Option<u8> {
    // F7 and SysRq have two codes each in set 2 that come to one in set 1; the second is what
    // keyboards send.
    let found = SET2_TO_SET1.iter().rposition(|&set1| set1 == code);
    found.map(|set2| set2 as u8)
}

/// A command that waits for its argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
enum Pending {
    #[n(0)]
    Leds,
    #[n(1)]
    ScanSet,
    #[n(2)]
    Typematic,
    /// A set 3 key list, which means nothing in the other sets.
    #[n(3)]
    KeyList,
}

/// The keyboard behind the 8042's first port.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Keyboard {
    #[n(0)]
    scan_set: u8,
    #[n(1)]
    scanning: bool,
    #[n(2)]
    leds: u8,
    #[n(3)]
    typematic: u8,
    #[n(4)]
    pending: Option<Pending>,
    #[n(5)]
    answers: VecDeque<u8>,
    #[n(6)]
    keys: VecDeque<u8>,
    /// What a resend command repeats.
    #[n(7)]
    last_sent: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            scan_set: 2,
            scanning: true,
            leds: 0,
            typematic: TYPEMATIC_DEFAULT,
            pending: None,
            answers: VecDeque::new(),
            keys: VecDeque::new(),
            last_sent: 0,
        }
    }
}

/// 10.9 characters a second after half a second.
const TYPEMATIC_DEFAULT: u8 = 0x2b;

impl Keyboard {
    /// The lit LEDs: scroll, num and caps lock from bit 0.
    #[must_use]
    pub fn leds(&self) -> u8 {
        self.leds
    }

    /// Presses or releases a key. The result says whether the keyboard took it: not while the guest
    /// has scanning off, not when the guest has left its buffer full, not for an unknown key.
    pub(super) fn key(&mut self, key: Key, down: bool) -> bool {
        let mut code = Vec::with_capacity(8);
        if !self.scanning || self.scan_code(key, down, &mut code).is_none() {
            return false;
        }
        // A key goes in whole or not at all.
        if self.keys.len() + code.len() > BUFFER_LEN {
            return false;
        }
        self.keys.extend(code);
        true
    }

    fn scan_code(&self, key: Key, down: bool, code: &mut Vec<u8>) -> Option<()> {
        let set1 = self.scan_set == 1;
        if key == Key::PAUSE {
            // Make and break in one, at the press.
            let sequence: &[u8] = match (down, set1) {
                (false, _) => &[],
                (true, true) => &[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5],
                (true, false) => &[0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77],
            };
            code.extend(sequence);
            return Some(());
        }
        let [prefix, make] = key.0.to_be_bytes();
        match prefix {
            0 => {}
            EXTENDED => code.push(EXTENDED),
            _ => return None,
        }
        if make == 0 || make >= 0x80 {
            return None;
        }
        if set1 {
            code.push(make | if down { 0 } else { 0x80 });
        } else {
            if !down {
                code.push(BREAK);
            }
            code.push(set1_to_set2(make)?);
        }
        Some(())
    }

    /// A byte from the host to the keyboard.
    pub(super) fn command(&mut self, byte: u8) {
        // A new command takes the place of answers nobody fetched.
        self.answers.clear();
        match self.pending.take() {
            Some(pending) if byte < 0xed => self.argument(pending, byte),
            _ => self.start_command(byte),
        }
    }

    fn argument(&mut self, pending: Pending, byte: u8) {
        match (pending, byte) {
            (Pending::Leds, _) => self.leds = byte & 0x07,
            (Pending::Typematic, _) => self.typematic = byte & 0x7f,
            (Pending::ScanSet, 0) => return self.answer(&[ACK, self.scan_set]),
            (Pending::ScanSet, 1 | 2) => {
                self.scan_set = byte;
                self.keys.clear();
            }
            (Pending::ScanSet, _) => return self.answer(&[RESEND]),
            // The list goes on until the next command.
            (Pending::KeyList, _) => self.pending = Some(Pending::KeyList),
        }
        self.answer(&[ACK]);
    }

    fn start_command(&mut self, byte: u8) {
        match byte {
            0xed => self.pending = Some(Pending::Leds),
            0xee => return self.answer(&[0xee]),
            0xf0 => self.pending = Some(Pending::ScanSet),
            0xf2 => return self.answer(&[ACK, IDENTITY[0], IDENTITY[1]]),
            0xf3 => self.pending = Some(Pending::Typematic),
            0xf4 => {
                self.keys.clear();
                self.scanning = true;
            }
            0xf5 => {
                self.set_defaults();
                self.scanning = false;
            }
            0xf6 => self.set_defaults(),
            // Make, break and repeat per key exist in set 3 only.
            0xf7..=0xfa => {}
            0xfb..=0xfd => self.pending = Some(Pending::KeyList),
            0xfe => return self.answer(&[self.last_sent]),
            0xff => {
                *self = Self::default();
                return self.answer(&[ACK, SELF_TEST_PASSED]);
            }
            _ => return self.answer(&[RESEND]),
        }
        self.answer(&[ACK]);
    }

    /// As after power-on, save for the LEDs.
    fn set_defaults(&mut self) {
        self.scan_set = 2;
        self.typematic = TYPEMATIC_DEFAULT;
        self.keys.clear();
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.answers.extend(bytes);
    }

    /// The next byte to the host.
    pub(super) fn pop(&mut self) -> Option<u8> {
        let byte = match self.answers.pop_front() {
            Some(answer) => answer,
            // Keys wait while a command does.
            None if self.pending.is_some() => return None,
            None => self.keys.pop_front()?,
        };
        if byte != RESEND {
            self.last_sent = byte;
        }
        Some(byte)
    }

    /// Whether the state is one that this keyboard can be in.
    pub(super) fn is_possible(&self) -> bool {
        self.keys.len() <= BUFFER_LEN
            && self.answers.len() <= ANSWERS_LEN
            && matches!(self.scan_set, 1 | 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| keyboard.pop()).collect()
    }

    #[test]
    fn commands_are_answered() {
        for (commands, answers) in [
            (&[0xff][..], &[ACK, SELF_TEST_PASSED][..]),
            (&[0xf2], &[ACK, 0xab, 0x83]),
            (&[0xee], &[0xee]),
            (&[0xed, 0x02], &[ACK, ACK]),
            (&[0xf3, 0x00], &[ACK, ACK]),
            (&[0xf0, 0x00], &[ACK, ACK, 2]),
            (&[0xf0, 0x01, 0xf0, 0x00], &[ACK, ACK, ACK, ACK, 1]),
            (&[0xf0, 0x03], &[ACK, RESEND]),
            (&[0xf4], &[ACK]),
            (&[0xf5], &[ACK]),
            (&[0xfb, 0x1c, 0x1d, 0xf4], &[ACK, ACK, ACK, ACK]),
            (&[0xf2, 0xfe], &[ACK, 0xab, 0x83, 0x83]),
            (&[0x12], &[RESEND]),
            // A command in place of an argument is a command.
            (&[0xed, 0xf2], &[ACK, ACK, 0xab, 0x83]),
        ] {
            let mut keyboard = Keyboard::default();
            let mut found = vec![];
            for &command in commands {
                keyboard.command(command);
                found.extend(drain(&mut keyboard));
            }
            assert_eq!(found, answers, "{commands:x?}");
        }
    }

    #[test]
    fn keys_are_sent_in_the_chosen_set() {
        for (key, set2, set1) in [
            (Key(0x1e), &[0x1c, 0xf0, 0x1c][..], &[0x1e, 0x9e][..]),
            (Key(0x41), &[0x83, 0xf0, 0x83], &[0x41, 0xc1]),
            (
                Key(0xe048),
                &[0xe0, 0x75, 0xe0, 0xf0, 0x75],
                &[0xe0, 0x48, 0xe0, 0xc8],
            ),
            (
                Key::PAUSE,
                &[0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77],
                &[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5],
            ),
        ] {
            for (set, expected) in [(2, set2), (1, set1)] {
                let mut keyboard = Keyboard {
                    scan_set: set,
                    ..Keyboard::default()
                };
                assert!(keyboard.key(key, true) && keyboard.key(key, false));
                assert_eq!(drain(&mut keyboard), expected, "{key:x?} set {set}");
            }
        }
    }

    #[test]
    fn unknown_keys_and_full_buffers_send_nothing() {
        let mut keyboard = Keyboard::default();
        for key in [Key(0), Key(0x80), Key(0x1234), Key(0xe000)] {
            assert!(!keyboard.key(key, true), "{key:x?}");
        }
        let taken = (0..100)
            .filter(|_| keyboard.key(Key(0xe048), false))
            .count();
        assert_eq!(taken, BUFFER_LEN / 3, "whole keys only");
        keyboard.command(0xf5);
        assert!(!keyboard.key(Key(0x1e), true), "scanning is off");
    }

    #[test]
    fn every_key_of_set_1_translates_back() {
        for make in 1..0x80 {
            let Some(set2) = set1_to_set2(make) else {
                continue;
            };
            assert_eq!(translate(set2, false), make);
            assert_eq!(translate(set2, true), make | 0x80);
        }
        // Letters, digits, functions, keypad: the codes a PC keyboard has.
        assert!((0x01..=0x53).all(|make| set1_to_set2(make).is_some()));
    }
}
