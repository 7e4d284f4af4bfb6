//! A time-stamp counter as a function of the machine's clock.

/// A counter that runs at a fixed frequency from a known value at a known time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tsc {
    /// Its frequency in kHz, never zero.
    khz: u32,
    /// Its value at `since_ns`.
    value: u64,
    since_ns: u64,
}

/// The frequency where nobody asks for another one: nanoseconds are counted.
pub(super) const DEFAULT_KHZ: u32 = 1_000_000;
const NS_PER_MS: u128 = 1_000_000;

impl Tsc {
    /// A counter with `value` at `now_ns` and that frequency; zero is taken for 1 GHz.
    #[must_use]
    pub fn new(khz: u32, value: u64, now_ns: u64) -> Self {
        Self {
            khz: if khz == 0 { DEFAULT_KHZ } else { khz },
            value,
            since_ns: now_ns,
        }
    }

    /// The frequency in kHz.
    #[must_use]
    pub fn khz(&self) -> u32 {
        self.khz
    }

    /// What RDTSC gives at `now_ns`.
    #[must_use]
    pub fn at(&self, now_ns: u64) -> u64 {
        let elapsed = u128::from(now_ns.saturating_sub(self.since_ns));
        let cycles = elapsed * u128::from(self.khz) / NS_PER_MS;
        self.value.wrapping_add(cycles as u64)
    }

    /// When the counter reaches `target`, seen from `now_ns`: `now_ns` if it has.
    #[must_use]
    pub fn when(&self, target: u64, now_ns: u64) -> u64 {
        let missing = target.saturating_sub(self.at(now_ns));
        if missing == 0 {
            return now_ns;
        }
        let cycles = u128::from(target.wrapping_sub(self.value));
        let elapsed = (cycles * NS_PER_MS).div_ceil(u128::from(self.khz));
        let at = u128::from(self.since_ns).saturating_add(elapsed);
        // In case the counter has wrapped since `since_ns` the time is not before now.
        u64::try_from(at).unwrap_or(u64::MAX).max(now_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_reached_when_it_says_and_not_before() {
        for khz in [1, 999_999, 1_000_000, 2_399_998, 4_000_001] {
            let tsc = Tsc::new(khz, 1_000, 500);
            for target in [1_001, 5_000, 123_456_789] {
                let at = tsc.when(target, 600);
                assert!(tsc.at(at) >= target, "{khz} kHz, {target}");
                assert!(at == 600 || tsc.at(at - 1) < target, "{khz} kHz, {target}");
            }
        }
    }

    #[test]
    fn the_past_is_now_and_the_far_future_does_not_overflow() {
        let tsc = Tsc::new(3_000_000, 1 << 40, 0);
        assert_eq!(tsc.when(5, 77), 77);
        assert!(Tsc::new(1, 0, u64::MAX).when(u64::MAX, u64::MAX) == u64::MAX);
        assert_eq!(Tsc::new(1_000_000, u64::MAX, 0).at(1), 0);
    }
}
