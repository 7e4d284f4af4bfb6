//! What an export has done so far.

use std::sync::atomic::{AtomicU64, Ordering};

/// A snapshot of an export's counters, since the export was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Write-zeroes requests that succeeded.
    pub write_zeroes: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written, zeroes apart.
    pub bytes_written: u64,
    /// Requests answered with an I/O error.
    pub errors: u64,
    /// Requests of a kind that the device does not offer.
    pub unsupported: u64,
    /// Requests so malformed that they could not be answered.
    pub malformed: u64,
    /// Requests taken up again after an earlier process was lost.
    pub resubmitted: u64,
    /// Requests that the store has now.
    pub in_flight: u64,
    /// Clients that have connected.
    pub connections: u64,
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// The live form of [`Stats`].
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

counters!(
    reads,
    writes,
    flushes,
    discards,
    write_zeroes,
    bytes_read,
    bytes_written,
    errors,
    unsupported,
    malformed,
    resubmitted,
    in_flight,
    connections,
);

/// One more.
pub(crate) fn count(counter: &AtomicU64) {
    add(counter, 1);
}

/// `n` more.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
