//! The seam under everything that stores bytes: [`Store`], raw capacity in blocks.
//!
//! A store is opened once and shared; each thread that does I/O asks it for a [`StoreQueue`] of its
//! own, so that no request takes a lock on its way down. A queue works by submission and completion:
//!
//! ```text
//!  push, push, push ─▶ submit ─▶ … the queue's descriptor turns readable … ─▶ reap
//! ```
//!
//! The trait is small so that layers stack on it. A redundancy group is a store over stores: its queue
//! holds one queue of each member, slices a request's [`Buffers`] (which share, not copy, memory) and
//! counts completions. Three properties make that work:
//!
//! - **One descriptor to wait on.** A queue is [`AsFd`]; the descriptor polls readable while completions
//!   wait. An io_uring is pollable, and so is the epoll instance over several of them, so any stack of
//!   stores ends in one descriptor beside the doorbell in its thread's `poll`.
//! - **Memory that owns itself.** [`Buffers`] keep their memory mapped until the request is complete,
//!   so submitting is safe, and a store never asks who is above it.
//! - **Durability in the request.** A completed write may be lost until a [`Operation::Flush`] that was
//!   submitted after its completion is itself complete; a write marked durable survives by itself.
//!   There is no other ordering: requests in flight together may take effect in any order.
//!
//! Offsets and lengths are multiples of [`Geometry::block_size`] and lie inside
//! [`Geometry::capacity_bytes`]; [`Geometry::check`] is what callers on the edge to untrusted input use,
//! and a store refuses the rest with `EINVAL`.

mod file;
mod lock;
mod plan;

use std::io;
use std::os::fd::AsFd;

pub(crate) use file::Target;
pub use file::{Engine, FileStore, FileStoreOptions, OpenError};
pub(crate) use plan::{Health, Job, Step};

pub use crate::uring::Buffers;

/// What a store looks like from above. It does not change while the store is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Usable bytes, a multiple of `block_size`.
    pub capacity_bytes: u64,
    /// The smallest unit of a transfer in bytes: a power of two, at least 512.
    pub block_size: u32,
    /// What transfers are best aligned to, in bytes: a power of two, at least `block_size`.
    pub optimal_block_size: u32,
    /// Whether every operation but reads and flushes is refused.
    pub read_only: bool,
}

impl Geometry {
    /// Whether `len` bytes at `offset` are whole blocks inside the store.
    #[must_use]
    pub fn check(&self, offset: u64, len: u64) -> bool {
        let mask = u64::from(self.block_size) - 1;
        (offset | len) & mask == 0
            && offset
                .checked_add(len)
                .is_some_and(|end| end <= self.capacity_bytes)
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Fills the buffers from `offset` on.
    Read {
        /// In bytes.
        offset: u64,
        /// Where the data goes.
        buffers: Buffers,
    },
    /// Writes the buffers from `offset` on.
    Write {
        /// In bytes.
        offset: u64,
        /// Where the data comes from. What changes there meanwhile may or may not be written.
        buffers: Buffers,
        /// Complete only once the data survives power loss.
        durable: bool,
    },
    /// Completes once every write that was complete at its submission survives power loss.
    Flush,
    /// Tells that the range is no longer needed; what it reads as afterwards is undefined.
    Discard {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// As for writes.
        durable: bool,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
        /// Whether the range's capacity may be given back.
        unmap: bool,
        /// As for writes.
        durable: bool,
    },
}

/// An operation on its way down. The tag comes back with its completion and need not be unique.
#[derive(Clone, Debug)]
pub struct Request {
    /// The submitter's own.
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
}

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// As in the request.
    pub tag: u64,
    /// Whether all of it was done. After an error any part may have been.
    pub result: io::Result<()>,
}

/// Raw capacity.
pub trait Store: Send + Sync {
    /// Size and alignment.
    fn geometry(&self) -> Geometry;

    /// A queue for one thread, made to hold `depth` requests at a time; more than that wait inside.
    ///
    /// # Errors
    ///
    /// The system has no resources for one more.
    fn queue(&self, depth: u16) -> io::Result<Box<dyn StoreQueue>>;
}

/// One thread's way into a store. Its descriptor polls readable while completions wait.
///
/// Dropping a queue waits for what it has in flight.
pub trait StoreQueue: AsFd + Send {
    /// Takes a request. It starts at the next [`StoreQueue::submit`] at the latest.
    fn push(&mut self, request: Request);

    /// Starts all that was pushed.
    ///
    /// # Errors
    ///
    /// The queue is unusable; requests in flight may still complete.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends what has completed, without waiting.
    ///
    /// # Errors
    ///
    /// The queue is unusable.
    fn reap(&mut self, completions: &mut Vec<Completion>) -> io::Result<()>;
}

/// The completion of a request that `geometry` rules out.
pub(crate) fn refuse(request: &Request, geometry: &Geometry) -> Option<Completion> {
    let (possible, writes) = match &request.operation {
        Operation::Read { offset, buffers } => (geometry.check(*offset, buffers.len()), false),
        Operation::Write {
            offset, buffers, ..
        } => (geometry.check(*offset, buffers.len()), true),
        Operation::Flush => (true, false),
        Operation::Discard { offset, len, .. } | Operation::WriteZeroes { offset, len, .. } => {
            (geometry.check(*offset, *len), true)
        }
    };
    let code = match (possible, writes && geometry.read_only) {
        (true, false) => return None,
        (_, true) => libc::EROFS,
        (false, false) => libc::EINVAL,
    };
    Some(Completion {
        tag: request.tag,
        result: Err(io::Error::from_raw_os_error(code)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_inside_the_store_pass_the_check() {
        let geometry = Geometry {
            capacity_bytes: 8192,
            block_size: 512,
            optimal_block_size: 4096,
            read_only: false,
        };
        for (offset, len, expected) in [
            (0, 0, true),
            (0, 8192, true),
            (8192, 0, true),
            (7680, 512, true),
            (7680, 1024, false),
            (1, 512, false),
            (0, 100, false),
            (u64::MAX - 511, 512, false),
            (8704, 0, false),
        ] {
            assert_eq!(geometry.check(offset, len), expected, "{offset}+{len}");
        }
    }
}
