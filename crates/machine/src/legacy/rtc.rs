//! The MC146818 real-time clock with its CMOS RAM.
//!
//! The clock is the host's wall clock plus what the guest's settings have made of it, so it goes on
//! while the machine is paused, saved or off, as a battery-backed part does. Time fields are computed
//! when they are read. While the guest holds the update cycle (`SET`, or the divider in reset) they
//! are plain bytes, from which the clock goes on at release.
//!
//! Flags are brought up to date whenever somebody looks and when [`Rtc::tick`] is called. The timer
//! descriptor that the device registers with the event loop is armed only while an interrupt is
//! enabled; a guest that merely reads the time costs the host nothing.

use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use mica_base::clock::Clock;
use minicbor::{Decode, Encode};
use vmm_sys_util::timerfd::TimerFd;

use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::engine::InterruptLine;
use crate::layout::port;

use super::PortDevice;

mod calendar;
mod cmos;

use calendar::{Alarm, Date, Format};
use cmos::{
    A_DIVIDER, A_DIVIDER_RESET, A_RATE, A_UPDATE_IN_PROGRESS, B_24_HOURS, B_BINARY, B_SET,
    CMOS_LEN, D_VALID, INDEX_MASK, TIME_REGISTERS, flag, is_time, register, write_memory_sizes,
};

const NANOS_PER_SECOND: i128 = 1_000_000_000;
/// How long before an update the update-in-progress bit warns, in nanoseconds (data sheet, t_BUC).
const UPDATE_WARNING_NS: i128 = 244_000;

const STATE_VERSION: u16 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct State {
    /// All registers and RAM. The time fields count only while the clock is held.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    cmos: Vec<u8>,
    #[n(1)]
    index: u8,
    /// What the clock is ahead of the host's, in seconds and nanoseconds.
    #[n(2)]
    offset_seconds: i64,
    #[n(3)]
    offset_nanos: u32,
    /// Up to when the flags are accounted for: the clock's own time, in the same form.
    #[n(4)]
    seen_seconds: i64,
    #[n(5)]
    seen_nanos: u32,
}

/// The clock chip.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    line: Arc<dyn InterruptLine>,
    line_high: bool,
    timer: TimerFd,
    armed: bool,
    paused: bool,
    cmos: [u8; CMOS_LEN],
    index: u8,
    /// What the clock is ahead of the host's, in nanoseconds.
    offset: i128,
    /// Up to when the flags are accounted for, in nanoseconds of the clock's own time.
    seen: i128,
}

impl Rtc {
    /// A clock for a machine with `ram` bytes of RAM, whose sizes firmware looks up in the CMOS RAM.
    ///
    /// # Errors
    ///
    /// The host gives no timer descriptor.
    pub fn new(
        clock: Arc<dyn Clock>,
        line: Arc<dyn InterruptLine>,
        ram: u64,
    ) -> Result<Self, DeviceError> {
        let timer = TimerFd::new().map_err(|error| DeviceError {
            device: "rtc".into(),
            reason: format!("creating its timer: {error}"),
        })?;
        let mut cmos = [0; CMOS_LEN];
        cmos[usize::from(register::A)] = 0x26;
        cmos[usize::from(register::B)] = B_24_HOURS;
        cmos[usize::from(register::D)] = D_VALID;
        write_memory_sizes(&mut cmos, ram);
        let seen = clock.wall().as_nanos() as i128;
        Ok(Self {
            clock,
            line,
            line_high: false,
            timer,
            armed: false,
            paused: false,
            cmos,
            index: 0,
            offset: 0,
            seen,
        })
    }

    /// When [`Rtc::tick`] has something to do next, in the clock's monotonic time; never if no
    /// interrupt is enabled or the machine is paused.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let wait = self.time_to_interrupt()?;
        let wait = Duration::from_nanos(u64::try_from(wait).unwrap_or(0));
        Some(self.clock.monotonic().saturating_add(wait))
    }

    /// Raises the interrupts that have come due. Calling it early or twice does no harm.
    pub fn tick(&mut self) {
        self.refresh();
    }

    fn get(&self, register: u8) -> u8 {
        self.cmos[usize::from(register)]
    }

    fn is_held(&self) -> bool {
        self.get(register::B) & B_SET != 0 || self.is_divider_reset()
    }

    fn is_divider_reset(&self) -> bool {
        self.get(register::A) & A_DIVIDER >= A_DIVIDER_RESET
    }

    fn format(&self) -> Format {
        let b = self.get(register::B);
        Format {
            binary: b & B_BINARY != 0,
            hours24: b & B_24_HOURS != 0,
        }
    }

    /// The clock's time in nanoseconds since 1970.
    fn now(&self) -> i128 {
        self.clock.wall().as_nanos() as i128 + self.offset
    }

    fn now_seconds(&self) -> i64 {
        self.now().div_euclid(NANOS_PER_SECOND) as i64
    }

    fn period(&self) -> Option<i128> {
        // Rates 1 and 2 are those of 8 and 9, as with the usual 32.768 kHz time base.
        let rate = match self.get(register::A) & A_RATE {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        (!self.is_divider_reset()).then(|| (NANOS_PER_SECOND << (rate - 1)) / 32_768)
    }

    fn alarm(&self) -> Alarm {
        Alarm::decode(
            self.format(),
            self.get(register::HOURS_ALARM),
            self.get(register::MINUTES_ALARM),
            self.get(register::SECONDS_ALARM),
        )
    }

    /// Nanoseconds until an enabled flag that is not set yet gets set.
    fn time_to_interrupt(&self) -> Option<i128> {
        if self.paused {
            return None;
        }
        let wanted = self.get(register::B) & !self.get(register::C) & flag::ALL;
        let now = self.now();
        let second = now.div_euclid(NANOS_PER_SECOND);
        let mut next = None;
        let mut consider = |at: i128| next = Some(next.map_or(at, |other: i128| other.min(at)));
        if wanted & flag::PERIODIC != 0
            && let Some(period) = self.period()
        {
            consider((now.div_euclid(period) + 1) * period);
        }
        if !self.is_held() {
            if wanted & flag::UPDATE != 0 {
                consider((second + 1) * NANOS_PER_SECOND);
            }
            if wanted & flag::ALARM != 0
                && let Some(at) = self.alarm().next_after(second as i64)
            {
                consider(i128::from(at) * NANOS_PER_SECOND);
            }
        }
        next.map(|at| at - now)
    }

    /// Sets the flags of everything that happened since the last look.
    fn catch_up(&mut self) {
        if self.paused {
            return;
        }
        let now = self.now();
        let seen = std::mem::replace(&mut self.seen, now);
        // The host's clock, and so this one, may go back; nothing has happened then.
        if now <= seen {
            return;
        }
        let mut flags = 0;
        if let Some(period) = self.period()
            && now.div_euclid(period) != seen.div_euclid(period)
        {
            flags |= flag::PERIODIC;
        }
        let seconds = |time: i128| time.div_euclid(NANOS_PER_SECOND) as i64;
        if !self.is_held() && seconds(now) != seconds(seen) {
            flags |= flag::UPDATE;
            let alarm = self.alarm().next_after(seconds(seen));
            if alarm.is_some_and(|at| at <= seconds(now)) {
                flags |= flag::ALARM;
            }
        }
        self.cmos[usize::from(register::C)] |= flags;
    }

    fn update_line(&mut self) {
        let due = self.get(register::B) & self.get(register::C) & flag::ALL != 0;
        if due != self.line_high {
            self.line_high = due;
            self.line.set(due);
        }
    }

    /// Brings flags, line and timer up to date with time and registers.
    fn refresh(&mut self) {
        self.catch_up();
        self.update_line();
        self.arm();
    }

    fn arm(&mut self) {
        let wait = self.time_to_interrupt();
        if wait.is_none() && !self.armed {
            return;
        }
        self.armed = wait.is_some();
        let result = match wait {
            // Zero would disarm.
            Some(wait) => {
                let wait = u64::try_from(wait).unwrap_or(0).max(1);
                self.timer.reset(Duration::from_nanos(wait), None)
            }
            None => self.timer.clear(),
        };
        // Both fail only for an invalid descriptor or time.
        debug_assert!(result.is_ok(), "{result:?}");
    }

    fn read_register(&mut self, index: u8) -> u8 {
        match index {
            register::A => self.get(register::A) | self.update_in_progress(),
            register::C => {
                self.catch_up();
                let flags = std::mem::take(&mut self.cmos[usize::from(register::C)]);
                let requested = self.get(register::B) & flags & flag::ALL != 0;
                self.update_line();
                self.arm();
                flags | if requested { flag::REQUEST } else { 0 }
            }
            _ if is_time(index) && !self.is_held() => {
                Date::of(self.now_seconds()).register(index, self.format())
            }
            _ => self.get(index),
        }
    }

    fn update_in_progress(&self) -> u8 {
        let until_update = NANOS_PER_SECOND - self.now().rem_euclid(NANOS_PER_SECOND);
        if !self.is_held() && until_update <= UPDATE_WARNING_NS {
            A_UPDATE_IN_PROGRESS
        } else {
            0
        }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match index {
            // The flags are read-only; whether RAM is valid says the battery.
            register::C | register::D => return,
            register::A | register::B => {
                self.catch_up();
                self.write_control(index, value);
            }
            _ if is_time(index) && !self.is_held() => {
                // A running clock goes on from the field's new value.
                self.latch_time();
                self.cmos[usize::from(index)] = value;
                self.set_time_from_latch(false);
            }
            _ => self.cmos[usize::from(index)] = value,
        }
        self.refresh();
    }

    fn write_control(&mut self, index: u8, value: u8) {
        let was_held = self.is_held();
        let was_divider_reset = self.is_divider_reset();
        if !was_held {
            self.latch_time();
        }
        self.cmos[usize::from(index)] = match index {
            register::A => value & !A_UPDATE_IN_PROGRESS,
            // SET clears the update-ended interrupt enable.
            _ if value & B_SET != 0 => value & !flag::UPDATE,
            _ => value,
        };
        if was_held && !self.is_held() {
            // Out of divider reset the first update comes after half a second.
            self.set_time_from_latch(was_divider_reset);
        }
    }

    /// Puts the time into the time registers.
    fn latch_time(&mut self) {
        let date = Date::of(self.now_seconds());
        let format = self.format();
        for index in TIME_REGISTERS {
            self.cmos[usize::from(index)] = date.register(index, format);
        }
    }

    /// Lets the clock go on from what the time registers say.
    fn set_time_from_latch(&mut self, at_half_second: bool) {
        let format = self.format();
        let date = Date::decode(format, |index| self.get(index));
        let fraction = if at_half_second {
            NANOS_PER_SECOND / 2
        } else {
            self.now().rem_euclid(NANOS_PER_SECOND)
        };
        let time = i128::from(date.seconds()) * NANOS_PER_SECOND + fraction;
        self.offset += time - self.now();
        self.seen = self.now();
    }
}

impl PortDevice for Rtc {
    fn ports(&self) -> Vec<(u16, u16)> {
        vec![(port::RTC, 2)]
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        match port {
            DATA => self.read_register(self.index & INDEX_MASK),
            // The index cannot be read back.
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        match port {
            // The NMI mask in bit 7 is kept; nothing in this machine raises NMI from the board.
            port::RTC => self.index = value,
            DATA => self.write_register(self.index & INDEX_MASK, value),
            _ => {}
        }
    }
}

const DATA: u16 = port::RTC + 1;

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.catch_up();
        self.paused = true;
        self.arm();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.paused = false;
        self.refresh();
        Ok(())
    }

    /// The reset pin clears interrupt enables and flags; time and RAM stay (data sheet, RESET).
    fn reset(&mut self) {
        self.cmos[usize::from(register::B)] &= !flag::ALL;
        self.cmos[usize::from(register::C)] = 0;
        self.index = 0;
        self.refresh();
        self.cmos[usize::from(register::C)] = 0;
    }

    fn save(&self) -> SavedState {
        let split = |time: i128| {
            (
                time.div_euclid(NANOS_PER_SECOND) as i64,
                time.rem_euclid(NANOS_PER_SECOND) as u32,
            )
        };
        let (offset_seconds, offset_nanos) = split(self.offset);
        let (seen_seconds, seen_nanos) = split(self.seen);
        let state = State {
            cmos: self.cmos.to_vec(),
            index: self.index,
            offset_seconds,
            offset_nanos,
            seen_seconds,
            seen_nanos,
        };
        SavedState::new(STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.read(STATE_VERSION)?;
        let cmos = <[u8; CMOS_LEN]>::try_from(state.cmos)
            .map_err(|cmos| RestoreError::Impossible(format!("{} bytes of CMOS", cmos.len())))?;
        let join =
            |seconds: i64, nanos: u32| i128::from(seconds) * NANOS_PER_SECOND + i128::from(nanos);
        for seconds in [state.offset_seconds, state.seen_seconds] {
            if seconds.unsigned_abs() > 2 * calendar::MAX_SECONDS.unsigned_abs() {
                let reason = format!("a clock {seconds} seconds away");
                return Err(RestoreError::Impossible(reason));
            }
        }
        self.cmos = cmos;
        self.index = state.index;
        self.offset = join(state.offset_seconds, state.offset_nanos);
        self.seen = join(state.seen_seconds, state.seen_nanos);
        self.paused = true;
        self.update_line();
        self.arm();
        Ok(())
    }
}

impl MutEventSubscriber for Rtc {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.timer, EventSet::IN))
            .expect("invariant: a fresh descriptor is registered once");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // The expirations are not read: their number does not matter, and setting the timer, which
        // happens next, takes them back (timerfd_settime).
        self.refresh();
    }
}

#[cfg(test)]
mod tests;
