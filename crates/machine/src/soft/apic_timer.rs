//! The local APIC's timer (SDM volume 3, 11.5.4): one-shot, periodic and TSC-deadline.
//!
//! Its bus clock is 1 GHz and a period is at least 200 µs, as in KVM. It runs while it is masked.

use super::tsc::Tsc;

/// The least period.
const MIN_PERIOD_NS: u64 = 200_000;

/// What bits 18:17 of the LVT timer entry say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    #[default]
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Fires when the time-stamp counter reaches a value.
    TscDeadline,
    /// The reserved value; the timer does not run.
    Reserved,
}

impl TimerMode {
    /// From the LVT timer entry.
    #[must_use]
    pub fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// One processor's timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApicTimer {
    mode: TimerMode,
    /// The initial count register.
    initial: u32,
    /// The divide configuration register.
    divide: u32,
    /// IA32_TSC_DEADLINE, zero when it has fired.
    deadline_tsc: u64,
    /// When it fires.
    expiry: Option<u64>,
}

impl ApicTimer {
    /// The initial count register.
    #[must_use]
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// The divide configuration register.
    #[must_use]
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// IA32_TSC_DEADLINE, which reads as zero in the other modes.
    #[must_use]
    pub fn deadline_tsc(&self) -> u64 {
        self.deadline_tsc
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        self.expiry
    }

    /// The current count register.
    #[must_use]
    pub fn current(&self, now_ns: u64) -> u32 {
        let Some(expiry) = self.expiry.filter(|_| self.mode.counts()) else {
            return 0;
        };
        let mut remaining = expiry.saturating_sub(now_ns);
        if remaining == 0 && self.mode == TimerMode::Periodic && self.period() != 0 {
            // Late; it has been reloaded all the same.
            remaining = self.period() - (now_ns - expiry) % self.period();
        }
        u32::try_from(remaining / self.divisor()).unwrap_or(u32::MAX)
    }

    /// The LVT entry has been written. Between counting and TSC-deadline mode everything stops.
    pub fn set_mode(&mut self, mode: TimerMode) {
        if mode == self.mode {
            return;
        }
        if (mode == TimerMode::TscDeadline) != (self.mode == TimerMode::TscDeadline) {
            self.initial = 0;
            self.deadline_tsc = 0;
            self.expiry = None;
        }
        self.mode = mode;
    }

    /// Writes the initial count register: the timer starts, or stops with zero.
    pub fn set_initial(&mut self, count: u32, now_ns: u64) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = count;
        self.expiry =
            (count != 0 && self.mode.counts()).then(|| now_ns.saturating_add(self.period()));
    }

    /// Writes the divide configuration register; what remains is counted at the new pace.
    pub fn set_divide(&mut self, value: u32, now_ns: u64) {
        let before = self.divisor();
        self.divide = value & 0xb;
        let after = self.divisor();
        if before == after || !self.mode.counts() {
            return;
        }
        self.expiry = self.expiry.map(|expiry| {
            let remaining = u128::from(expiry.saturating_sub(now_ns));
            let remaining = remaining * u128::from(after) / u128::from(before);
            now_ns.saturating_add(u64::try_from(remaining).unwrap_or(u64::MAX))
        });
    }

    /// Writes IA32_TSC_DEADLINE; ignored in the other modes.
    pub fn set_deadline(&mut self, value: u64, tsc: &Tsc, now_ns: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.deadline_tsc = value;
            self.tsc_changed(tsc, now_ns);
        }
    }

    /// The time-stamp counter has been set.
    pub fn tsc_changed(&mut self, tsc: &Tsc, now_ns: u64) {
        if self.mode == TimerMode::TscDeadline {
            let armed = self.deadline_tsc != 0;
            self.expiry = armed.then(|| tsc.when(self.deadline_tsc, now_ns));
        }
    }

    /// Whether it has fired up to `now_ns`. Periods that were missed are one.
    pub fn expire(&mut self, now_ns: u64) -> bool {
        let Some(expiry) = self.expiry.filter(|expiry| *expiry <= now_ns) else {
            return false;
        };
        self.deadline_tsc = 0;
        let period = self.period();
        self.expiry = (self.mode == TimerMode::Periodic && period != 0).then(|| {
            let turns = (now_ns - expiry) / period + 1;
            expiry.saturating_add(turns.saturating_mul(period))
        });
        true
    }

    /// Goes on from saved registers. `current` is the current count register; as in KVM a one-shot
    /// timer with a count of zero fires at once, because its interrupt may be what was not saved.
    pub fn restore(&mut self, mode: TimerMode, initial: u32, current: u32, divide: u32, now: u64) {
        *self = Self {
            mode,
            initial,
            divide: divide & 0xb,
            ..Self::default()
        };
        if initial == 0 || !mode.counts() {
            return;
        }
        let remaining = match u64::from(current) * self.divisor() {
            0 if mode == TimerMode::Periodic => self.period(),
            remaining => remaining.min(self.period()),
        };
        self.expiry = Some(now.saturating_add(remaining));
    }

    /// Table "divide configuration register" (SDM volume 3, figure 11-10).
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | (self.divide & 8) >> 1;
        1 << ((code + 1) & 7)
    }

    fn period(&self) -> u64 {
        let period = u64::from(self.initial) * self.divisor();
        if self.mode == TimerMode::Periodic && period != 0 {
            period.max(MIN_PERIOD_NS)
        } else {
            period
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(mode: TimerMode) -> ApicTimer {
        let mut timer = ApicTimer::default();
        timer.set_mode(mode);
        timer
    }

    #[test]
    fn divisors() {
        let table = [
            (0x0, 2),
            (0x1, 4),
            (0x2, 8),
            (0x3, 16),
            (0x8, 32),
            (0x9, 64),
            (0xa, 128),
            (0xb, 1),
        ];
        for (divide, divisor) in table {
            let mut timer = timer(TimerMode::OneShot);
            timer.set_divide(divide | 0xf4, 0);
            timer.set_initial(1000, 10);
            assert_eq!(timer.next(), Some(10 + 1000 * divisor), "{divide:#x}");
            assert_eq!(timer.current(10 + 250 * divisor), 750, "{divide:#x}");
        }
    }

    #[test]
    fn one_shot_fires_once() {
        let mut timer = timer(TimerMode::OneShot);
        timer.set_divide(0xb, 0);
        timer.set_initial(500, 0);
        assert!(!timer.expire(499));
        assert!(timer.expire(500));
        assert_eq!((timer.next(), timer.current(600)), (None, 0));
        assert_eq!(timer.initial(), 500);
        timer.set_initial(500, 1000);
        timer.set_initial(0, 1001);
        assert_eq!(timer.next(), None);
    }

    #[test]
    fn periodic_fires_without_drift_and_not_too_often() {
        let mut timer = timer(TimerMode::Periodic);
        timer.set_divide(0xb, 0);
        timer.set_initial(1_000_000, 0);
        assert!(timer.expire(1_000_100));
        assert_eq!(timer.next(), Some(2_000_000));
        assert!(timer.expire(7_500_000), "five missed are one");
        assert_eq!(timer.next(), Some(8_000_000));
        timer.set_initial(1, 0);
        assert_eq!(timer.next(), Some(MIN_PERIOD_NS));
    }

    #[test]
    fn a_change_of_the_divisor_scales_what_remains() {
        let mut timer = timer(TimerMode::OneShot);
        timer.set_divide(0xb, 0);
        timer.set_initial(1000, 0);
        timer.set_divide(0x1, 400);
        assert_eq!(timer.next(), Some(400 + 600 * 4));
        assert_eq!(timer.current(400), 600);
    }

    #[test]
    fn a_tsc_deadline() {
        let tsc = Tsc::new(2_000_000, 1000, 0);
        let mut timer = timer(TimerMode::OneShot);
        timer.set_deadline(5000, &tsc, 0);
        assert_eq!(
            (timer.next(), timer.deadline_tsc()),
            (None, 0),
            "wrong mode"
        );
        timer.set_mode(TimerMode::TscDeadline);
        timer.set_initial(5, 0);
        assert_eq!(timer.next(), None, "wrong mode");
        timer.set_deadline(5000, &tsc, 0);
        assert_eq!((timer.next(), timer.deadline_tsc()), (Some(2000), 5000));
        timer.tsc_changed(&Tsc::new(2_000_000, 0, 0), 0);
        assert_eq!(timer.next(), Some(2500));
        assert!(timer.expire(2500));
        assert_eq!((timer.next(), timer.deadline_tsc()), (None, 0));
        timer.set_deadline(1, &tsc, 100);
        assert!(timer.expire(100), "the past fires at once");
        timer.set_deadline(9000, &tsc, 0);
        timer.set_mode(TimerMode::OneShot);
        assert_eq!(timer.next(), None);
    }

    #[test]
    fn it_goes_on_from_saved_registers() {
        let cases = [
            (TimerMode::OneShot, 1000, 300, Some(300)),
            (TimerMode::OneShot, 1000, 0, Some(0)),
            (TimerMode::OneShot, 1000, 5000, Some(1000)),
            (TimerMode::OneShot, 0, 300, None),
            (TimerMode::Periodic, 300_000, 0, Some(300_000)),
            (TimerMode::Periodic, 300_000, 7, Some(7)),
            (TimerMode::TscDeadline, 1000, 300, None),
        ];
        for (mode, initial, current, expiry) in cases {
            let mut timer = ApicTimer::default();
            timer.restore(mode, initial, current, 0xb, 50);
            assert_eq!(
                timer.next(),
                expiry.map(|at| at + 50),
                "{mode:?} {initial} {current}"
            );
        }
    }
}
