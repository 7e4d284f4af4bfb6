//! The 8254 interval timer with the speaker's gate at port 0x61.
//!
//! A counter is a function of the time since it was loaded. As in KVM a counter is loaded at once
//! when its last byte is written, a low gate does not stop modes 0, 2, 3 and 4 (a rising gate starts
//! modes 1, 2, 3 and 5 again), and a periodic counter 0 interrupts at most every 200 µs. Unlike there
//! binary-coded decimal is obeyed.

use crate::engine::state::{PitChannelState, PitState};

/// The frequency in Hz, as KVM has it.
const FREQUENCY: u128 = 1_193_181;
const NS_PER_SECOND: u128 = 1_000_000_000;
/// The least time between two interrupts of a periodic counter.
const MIN_PERIOD_NS: u64 = 200_000;
/// The mode of a counter after power-on, when no control word has come yet (KVM's number).
const NO_MODE: u8 = 0xff;

/// What a byte access means next ([`PitChannelState::read_state`]); all else is the low byte.
mod byte {
    pub(super) const HIGH: u8 = 2;
    pub(super) const LOW_OF_TWO: u8 = 3;
    pub(super) const HIGH_OF_TWO: u8 = 4;
}

/// The three counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pit {
    channels: [Channel; 3],
    hpet_legacy: bool,
    speaker_on: bool,
    /// When counter 0 interrupts next.
    deadline: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Channel {
    state: PitChannelState,
    loaded_ns: u64,
}

impl Pit {
    /// As after power-on.
    #[must_use]
    pub fn new(now_ns: u64) -> Self {
        let channel = |gate| Channel {
            state: PitChannelState {
                count: 0x1_0000,
                mode: NO_MODE,
                gate,
                ..Default::default()
            },
            loaded_ns: now_ns,
        };
        Self {
            channels: [channel(true), channel(true), channel(false)],
            hpet_legacy: false,
            speaker_on: false,
            deadline: None,
        }
    }

    /// Its state; the time since the counters were loaded is no part of it.
    #[must_use]
    pub fn save(&self) -> PitState {
        PitState {
            channels: self.channels.map(|channel| channel.state),
            hpet_legacy: self.hpet_legacy,
            speaker_on: self.speaker_on,
        }
    }

    /// Takes what [`Self::save`] has given. All counters start from their loaded count.
    pub fn restore(&mut self, state: &PitState, now_ns: u64) {
        self.channels = state.channels.map(|state| Channel {
            state,
            loaded_ns: now_ns,
        });
        self.hpet_legacy = state.hpet_legacy;
        self.speaker_on = state.speaker_on;
        self.deadline = None;
        self.schedule(now_ns);
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Whether counter 0 has raised IRQ 0 up to `now_ns`. Interrupts that were missed are one.
    pub fn expire(&mut self, now_ns: u64) -> bool {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now_ns) else {
            return false;
        };
        let channel = &self.channels[0];
        self.deadline = channel.is_periodic().then(|| {
            let count = u128::from(channel.count());
            let turn = channel.ticks(now_ns) / count + 1;
            let next = channel.time_of(turn * count);
            next.max(deadline.saturating_add(MIN_PERIOD_NS))
                .max(now_ns.saturating_add(1))
        });
        true
    }

    /// Reads port 0x40 to 0x43, or 0x61.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port & 3)].read(now_ns),
            0x61 => self.read_speaker(now_ns),
            // The control word cannot be read.
            _ => 0,
        }
    }

    /// Writes port 0x40 to 0x43, or 0x61.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        match port {
            0x40..=0x42 => {
                let index = port & 3;
                if self.channels[usize::from(index)].write(value, now_ns) && index == 0 {
                    self.schedule(now_ns);
                }
            }
            0x43 => self.control(value, now_ns),
            0x61 => {
                self.speaker_on = value & 2 != 0;
                self.channels[2].set_gate(value & 1 != 0, now_ns);
            }
            _ => {}
        }
    }

    fn read_speaker(&self, now_ns: u64) -> u8 {
        let counter = &self.channels[2];
        // Linux and KVM: the refresh toggle changes every 16.4 µs, near enough the 15 of a PC.
        let refresh = (now_ns >> 14) as u8 & 1;
        u8::from(counter.state.gate)
            | u8::from(self.speaker_on) << 1
            | refresh << 4
            | u8::from(counter.output(now_ns)) << 5
    }

    /// The control word (data sheet, "programming the 8254").
    fn control(&mut self, value: u8, now_ns: u64) {
        if value >> 6 == 3 {
            for (index, channel) in self.channels.iter_mut().enumerate() {
                if value & 2 << index == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(now_ns);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now_ns);
                }
            }
            return;
        }
        let channel = &mut self.channels[usize::from(value >> 6)];
        let access = value >> 4 & 3;
        if access == 0 {
            channel.latch_count(now_ns);
            return;
        }
        let state = &mut channel.state;
        state.access = access;
        state.read_state = access;
        state.write_state = access;
        // Modes 6 and 7 are 2 and 3.
        state.mode = match value >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        state.bcd = value & 1 != 0;
    }

    /// Counter 0 has been loaded.
    fn schedule(&mut self, now_ns: u64) {
        let channel = &self.channels[0];
        let interrupts = matches!(channel.state.mode, 0..=4) && !self.hpet_legacy;
        self.deadline = interrupts.then(|| {
            let at = channel.time_of(u128::from(channel.count()));
            if channel.is_periodic() {
                at.max(now_ns.saturating_add(MIN_PERIOD_NS))
            } else {
                at
            }
        });
    }
}

impl Channel {
    fn is_periodic(&self) -> bool {
        matches!(self.state.mode, 2 | 3)
    }

    /// The loaded count as a number, never zero.
    fn count(&self) -> u64 {
        let loaded = match self.state.count & 0xffff {
            0 => 0x1_0000,
            loaded => loaded,
        };
        if self.state.bcd {
            u64::from(from_bcd(loaded)).max(1)
        } else {
            u64::from(loaded)
        }
    }

    /// Clock pulses since the count was loaded.
    fn ticks(&self, now_ns: u64) -> u128 {
        u128::from(now_ns.saturating_sub(self.loaded_ns)) * FREQUENCY / NS_PER_SECOND
    }

    /// When that many pulses have come.
    fn time_of(&self, ticks: u128) -> u64 {
        let after = (ticks * NS_PER_SECOND).div_ceil(FREQUENCY);
        self.loaded_ns
            .saturating_add(u64::try_from(after).unwrap_or(u64::MAX))
    }

    /// What the counting element shows.
    fn current(&self, now_ns: u64) -> u16 {
        let count = self.count();
        let ticks = self.ticks(now_ns);
        let wrap = if self.state.bcd { 10_000 } else { 0x1_0000 };
        let phase = |ticks: u128| (ticks % u128::from(count)) as u64;
        let shown = match self.state.mode {
            // Having reached zero they go on from the highest count.
            0 | 1 | 4 | 5 => {
                let passed = (ticks % u128::from(wrap)) as u64;
                (count % wrap + wrap - passed) % wrap
            }
            // Square wave: it counts by two.
            3 => (count - phase(2 * ticks)) % wrap,
            _ => (count - phase(ticks)) % wrap,
        };
        if self.state.bcd {
            to_bcd(shown as u16)
        } else {
            shown as u16
        }
    }

    /// The OUT pin.
    fn output(&self, now_ns: u64) -> bool {
        let count = u128::from(self.count());
        let ticks = self.ticks(now_ns);
        match self.state.mode {
            1 => ticks < count,
            2 => ticks != 0 && ticks.is_multiple_of(count),
            3 => ticks % count < count.div_ceil(2),
            4 | 5 => ticks == count,
            _ => ticks >= count,
        }
    }

    fn set_gate(&mut self, gate: bool, now_ns: u64) {
        if gate && !self.state.gate && matches!(self.state.mode, 1 | 2 | 3 | 5) {
            self.loaded_ns = now_ns;
        }
        self.state.gate = gate;
    }

    fn latch_count(&mut self, now_ns: u64) {
        if self.state.count_latched == 0 {
            self.state.latched_count = self.current(now_ns);
            self.state.count_latched = self.state.access;
        }
    }

    fn latch_status(&mut self, now_ns: u64) {
        if !self.state.status_latched {
            self.state.status = u8::from(self.output(now_ns)) << 7
                | (self.state.access & 3) << 4
                | (self.state.mode & 7) << 1
                | u8::from(self.state.bcd);
            self.state.status_latched = true;
        }
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if self.state.status_latched {
            self.state.status_latched = false;
            return self.state.status;
        }
        if self.state.count_latched != 0 {
            let [low, high] = self.state.latched_count.to_le_bytes();
            let (value, next) = match self.state.count_latched {
                byte::HIGH => (high, 0),
                byte::LOW_OF_TWO => (low, byte::HIGH),
                _ => (low, 0),
            };
            self.state.count_latched = next;
            return value;
        }
        let [low, high] = self.current(now_ns).to_le_bytes();
        let (value, next) = match self.state.read_state {
            byte::HIGH => (high, byte::HIGH),
            byte::LOW_OF_TWO => (low, byte::HIGH_OF_TWO),
            byte::HIGH_OF_TWO => (high, byte::LOW_OF_TWO),
            other => (low, other),
        };
        self.state.read_state = next;
        value
    }

    /// Whether the count is complete, and loaded.
    fn write(&mut self, value: u8, now_ns: u64) -> bool {
        let count = match self.state.write_state {
            byte::HIGH => u16::from(value) << 8,
            byte::LOW_OF_TWO => {
                self.state.write_latch = value;
                self.state.write_state = byte::HIGH_OF_TWO;
                return false;
            }
            byte::HIGH_OF_TWO => {
                self.state.write_state = byte::LOW_OF_TWO;
                u16::from_le_bytes([self.state.write_latch, value])
            }
            // No control word has come yet. As in KVM it is taken for a low byte.
            _ => u16::from(value),
        };
        self.state.count = match count {
            0 => 0x1_0000,
            count => count.into(),
        };
        self.loaded_ns = now_ns;
        true
    }
}

/// The number of up to five decimal digits that are written as hexadecimal ones; 0x10000 is 10000.
fn from_bcd(digits: u32) -> u32 {
    (0..5).rev().fold(0, |number, place| {
        number * 10 + (digits >> (4 * place) & 0xf)
    })
}

fn to_bcd(number: u16) -> u16 {
    let digit = |place: u32| number / 10u16.pow(place) % 10;
    (0..4).fold(0, |digits, place| digits | digit(place) << (4 * place))
}

#[cfg(test)]
mod tests;
