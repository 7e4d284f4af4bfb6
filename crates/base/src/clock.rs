//! The clock seam. Devices and protocol cores ask a [`Clock`] for the time, so that a test can warp
//! it and a paused machine can stop it.

use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A source of time.
pub trait Clock: Send + Sync {
    /// Time since an arbitrary fixed instant; never goes back.
    fn monotonic(&self) -> Duration;

    /// Time since 1970-01-01 00:00:00 UTC, as the host believes it; may jump.
    fn wall(&self) -> Duration;
}

/// The host's own clocks.
#[derive(Debug)]
pub struct HostClock {
    origin: Instant,
}

impl HostClock {
    /// A clock whose monotonic time starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
        }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }

    fn wall(&self) -> Duration {
        // A host set before 1970 reads as 1970 rather than failing a guest's clock chip.
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
    }
}

/// A clock that stands still until it is told to advance.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: Mutex<(Duration, Duration)>,
}

impl ManualClock {
    /// A clock at monotonic zero and the given wall time.
    #[must_use]
    pub fn at(wall: Duration) -> Self {
        Self {
            now: Mutex::new((Duration::ZERO, wall)),
        }
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        let mut now = self
            .now
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        now.0 += by;
        now.1 += by;
    }
}

impl Clock for ManualClock {
    fn monotonic(&self) -> Duration {
        self.now
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .0
    }

    fn wall(&self) -> Duration {
        self.now
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manual_clock_moves_only_when_told() {
        let clock = ManualClock::at(Duration::from_secs(1_000));
        assert_eq!(clock.monotonic(), Duration::ZERO);
        clock.advance(Duration::from_millis(5));
        assert_eq!(clock.monotonic(), Duration::from_millis(5));
        assert_eq!(clock.wall(), Duration::from_millis(1_000_005));
    }
}
