//! A PS/2 mouse with three buttons and a wheel (the IntelliMouse extension).

use std::collections::VecDeque;

use minicbor::{Decode, Encode};

/// Bytes of movement that wait for the guest; what moves beyond that is added up until it fits.
const BUFFER_LEN: usize = 32;
const ANSWERS_LEN: usize = 8;
/// The most movement that waits for a guest, in counts: beyond several screens more does not matter.
const MAX_PENDING: i32 = 1 << 14;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
const IDENTITY_PLAIN: u8 = 0;
const IDENTITY_WHEEL: u8 = 3;
/// Sample rates set in this order switch the wheel on.
const WHEEL_KNOCK: [u8; 3] = [200, 100, 80];

/// A change of the pointing device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PointerEvent {
    /// Counts to the right.
    pub right: i32,
    /// Counts up.
    pub up: i32,
    /// Wheel clicks towards the user.
    pub wheel: i32,
    /// Pressed buttons: left, right, middle from bit 0.
    pub buttons: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
enum Pending {
    #[n(0)]
    SampleRate,
    #[n(1)]
    Resolution,
}

/// The mouse behind the 8042's second port.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Mouse {
    #[n(0)]
    sample_rate: u8,
    #[n(1)]
    resolution: u8,
    #[n(2)]
    scaling_2_1: bool,
    #[n(3)]
    reporting: bool,
    /// Sends when asked only.
    #[n(4)]
    remote: bool,
    /// Sends back what it gets.
    #[n(5)]
    wrap: bool,
    #[n(6)]
    has_wheel: bool,
    /// The last three sample rates, newest last.
    #[n(7)]
    rates: [u8; 3],
    #[n(8)]
    pending: Option<Pending>,
    #[n(9)]
    answers: VecDeque<u8>,
    #[n(10)]
    packets: VecDeque<u8>,
    #[n(11)]
    buttons: u8,
    #[n(12)]
    right: i32,
    #[n(13)]
    up: i32,
    #[n(14)]
    wheel: i32,
    #[n(15)]
    buttons_changed: bool,
    #[n(16)]
    last_sent: u8,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            sample_rate: 100,
            resolution: 2,
            scaling_2_1: false,
            reporting: false,
            remote: false,
            wrap: false,
            has_wheel: false,
            rates: [0; 3],
            pending: None,
            answers: VecDeque::new(),
            packets: VecDeque::new(),
            buttons: 0,
            right: 0,
            up: 0,
            wheel: 0,
            buttons_changed: false,
            last_sent: 0,
        }
    }
}

impl Mouse {
    /// Moves the mouse; what the guest has no room for is kept and sent with the next movement.
    pub(super) fn moved(&mut self, event: PointerEvent) {
        let add = |sum: &mut i32, change: i32| {
            *sum = sum.saturating_add(change).clamp(-MAX_PENDING, MAX_PENDING);
        };
        add(&mut self.right, event.right);
        add(&mut self.up, event.up);
        add(&mut self.wheel, event.wheel);
        let buttons = event.buttons & 0x07;
        self.buttons_changed |= buttons != self.buttons;
        self.buttons = buttons;
        self.report();
    }

    /// Queues packets of what has changed, as far as there is room.
    fn report(&mut self) {
        if !self.reporting || self.remote || self.wrap {
            return;
        }
        while self.has_changes() && self.packets.len() + 4 <= BUFFER_LEN {
            let packet = self.take_packet();
            self.packets.extend(packet);
        }
    }

    fn has_changes(&self) -> bool {
        self.buttons_changed || self.right != 0 || self.up != 0 || self.has_wheel && self.wheel != 0
    }

    fn take_packet(&mut self) -> Vec<u8> {
        let take = |sum: &mut i32, low: i32, high: i32| {
            let part = (*sum).clamp(low, high);
            *sum -= part;
            part
        };
        let right = take(&mut self.right, -255, 255);
        let up = take(&mut self.up, -255, 255);
        self.buttons_changed = false;
        let signs = u8::from(right < 0) << 4 | u8::from(up < 0) << 5;
        let mut packet = vec![0x08 | self.buttons | signs, right as u8, up as u8];
        if self.has_wheel {
            packet.push(take(&mut self.wheel, -8, 7) as u8);
        } else {
            self.wheel = 0;
        }
        packet
    }

    /// A byte from the host to the mouse.
    pub(super) fn command(&mut self, byte: u8) {
        self.answers.clear();
        // Wrap mode ends by reset and by its own command.
        if self.wrap && !matches!(byte, 0xec | 0xff) {
            return self.answers.push_back(byte);
        }
        match self.pending.take() {
            Some(Pending::SampleRate) => self.set_sample_rate(byte),
            Some(Pending::Resolution) => self.resolution = byte & 0x03,
            None => return self.start_command(byte),
        }
        self.answers.push_back(ACK);
    }

    fn set_sample_rate(&mut self, rate: u8) {
        self.sample_rate = rate;
        self.rates = [self.rates[1], self.rates[2], rate];
        self.has_wheel |= self.rates == WHEEL_KNOCK;
    }

    fn start_command(&mut self, byte: u8) {
        self.answers.push_back(ACK);
        match byte {
            0xe6 => self.scaling_2_1 = false,
            0xe7 => self.scaling_2_1 = true,
            0xe8 => self.pending = Some(Pending::Resolution),
            0xe9 => self
                .answers
                .extend([self.status(), self.resolution, self.sample_rate]),
            0xea => {
                self.remote = false;
                self.forget_movement();
            }
            0xeb => {
                let packet = self.take_packet();
                self.answers.extend(packet);
            }
            0xec => self.wrap = false,
            0xee => {
                self.wrap = true;
                self.forget_movement();
            }
            0xf0 => {
                self.remote = true;
                self.forget_movement();
            }
            0xf2 => self.answers.push_back(if self.has_wheel {
                IDENTITY_WHEEL
            } else {
                IDENTITY_PLAIN
            }),
            0xf3 => self.pending = Some(Pending::SampleRate),
            0xf4 => {
                self.reporting = true;
                self.forget_movement();
            }
            0xf5 => {
                self.reporting = false;
                self.forget_movement();
            }
            0xf6 => self.set_defaults(),
            0xfe => self.answers = [self.last_sent].into(),
            0xff => {
                *self = Self::default();
                self.answers = [ACK, SELF_TEST_PASSED, IDENTITY_PLAIN].into();
            }
            _ => self.answers = [RESEND].into(),
        }
    }

    fn set_defaults(&mut self) {
        let defaults = Self::default();
        self.sample_rate = defaults.sample_rate;
        self.resolution = defaults.resolution;
        self.scaling_2_1 = false;
        self.reporting = false;
        self.remote = false;
        self.forget_movement();
    }

    fn forget_movement(&mut self) {
        self.packets.clear();
        (self.right, self.up, self.wheel) = (0, 0, 0);
        self.buttons_changed = false;
    }

    /// The first byte of the status report; its buttons are in another order than a packet's.
    fn status(&self) -> u8 {
        let [left, right, middle] = [0, 1, 2].map(|button| self.buttons >> button & 1);
        right
            | middle << 1
            | left << 2
            | u8::from(self.scaling_2_1) << 4
            | u8::from(self.reporting) << 5
            | u8::from(self.remote) << 6
    }

    /// The next byte to the host.
    pub(super) fn pop(&mut self) -> Option<u8> {
        let byte = match self.answers.pop_front() {
            Some(answer) => answer,
            None if self.pending.is_some() => return None,
            None => {
                self.report();
                self.packets.pop_front()?
            }
        };
        if byte != RESEND {
            self.last_sent = byte;
        }
        Some(byte)
    }

    /// Whether the state is one that this mouse can be in.
    pub(super) fn is_possible(&self) -> bool {
        self.packets.len() <= BUFFER_LEN
            && self.answers.len() <= ANSWERS_LEN
            && self.buttons < 8
            && [self.right, self.up, self.wheel]
                .iter()
                .all(|sum| sum.unsigned_abs() <= MAX_PENDING.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mouse: &mut Mouse) -> Vec<u8> {
        std::iter::from_fn(|| mouse.pop()).collect()
    }

    fn send(mouse: &mut Mouse, commands: &[u8]) -> Vec<u8> {
        let mut answers = vec![];
        for &command in commands {
            mouse.command(command);
            answers.extend(drain(mouse));
        }
        answers
    }

    #[test]
    fn commands_are_answered() {
        for (commands, answers) in [
            (&[0xff][..], &[ACK, 0xaa, 0][..]),
            (&[0xf2], &[ACK, 0]),
            (&[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2], &[ACK; 7]),
            (&[0xe8, 3, 0xe7, 0xe9], &[ACK, ACK, ACK, ACK, 0x10, 3, 100]),
            (&[0xee, 0x55, 0xf2, 0xec], &[ACK, 0x55, 0xf2, ACK]),
            (&[0xeb], &[ACK, 0x08, 0, 0]),
            (&[0x77], &[RESEND]),
        ] {
            let mut found = send(&mut Mouse::default(), commands);
            if commands.len() == 7 {
                assert_eq!(found.pop(), Some(IDENTITY_WHEEL));
            }
            assert_eq!(found, answers, "{commands:x?}");
        }
    }

    #[test]
    fn movement_is_reported_whole() {
        let mut mouse = Mouse::default();
        let event = |right, up, wheel, buttons| PointerEvent {
            right,
            up,
            wheel,
            buttons,
        };
        mouse.moved(event(5, 5, 0, 1));
        assert!(drain(&mut mouse).is_empty(), "reporting is off");
        send(&mut mouse, &[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4]);
        mouse.moved(event(3, -2, 1, 1));
        assert_eq!(drain(&mut mouse), [0x29, 3, 0xfe, 1]);
        mouse.moved(event(300, 0, 0, 0));
        assert_eq!(drain(&mut mouse), [0x08, 255, 0, 0, 0x08, 45, 0, 0]);

        // More than the buffer holds arrives nonetheless, and memory stays bounded.
        mouse.moved(event(10_000, -10_000, 0, 0));
        assert!(mouse.is_possible());
        let packets = drain(&mut mouse);
        let right: u32 = packets.chunks(4).map(|packet| u32::from(packet[1])).sum();
        assert_eq!(right, 10_000);
    }
}
