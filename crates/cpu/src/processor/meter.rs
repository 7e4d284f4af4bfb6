//! How far processors have come.

use std::sync::atomic::{AtomicU64, Ordering};

/// What processors use of their budgets: a clock for who wants to tell time by instructions.
#[derive(Debug)]
pub struct Meter {
    used: AtomicU64,
    pause_at: AtomicU64,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            used: AtomicU64::new(0),
            pause_at: AtomicU64::new(u64::MAX),
        }
    }
}

impl Meter {
    /// What was used so far. It is brought up to date after each block: read from inside
    /// [`super::Environment`], it is the count at the beginning of the block.
    #[inline]
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Adds what something else costs than instructions. Not while a processor runs.
    #[inline]
    pub fn add(&self, units: u64) {
        // Only one counts at a time.
        self.used
            .store(self.used().wrapping_add(units), Ordering::Relaxed);
    }

    /// [`super::Processor::run`] comes back after the first block at whose end the count is `used` or more, as
    /// if attention had been asked for just then. At first it is `u64::MAX`.
    pub fn pause_at(&self, used: u64) {
        self.pause_at.store(used, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn is_reached(&self) -> bool {
        self.used() >= self.pause_at.load(Ordering::Relaxed)
    }
}
