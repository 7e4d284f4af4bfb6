//! The record of requests in flight that outlives this process (vhost-user specification, "Inflight I/O
//! tracking"; the bytes are in `docs/formats/vhost-user-inflight.md`).
//!
//! The frontend keeps the shared region; the backend writes into it, in an order that makes sense of
//! whatever is there when the process is killed between any two stores:
//!
//! ```text
//!  fetch:     counter ─▶ inflight = 1
//!  complete:  next, last_batch_head ─▶ used ring's idx ─▶ inflight = 0 ─▶ used_idx
//! ```
//!
//! Killed before `inflight = 1`: the head is in the available ring still and is fetched again. Killed
//! after: it is resubmitted. Killed after the used ring's index moved: `used_idx` differs from it, and
//! the batch that starts at `last_batch_head` is cleared. The region comes from the frontend, so nothing
//! in it is believed: indices are masked by range checks and walks are bounded.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{AtomicInteger, MmapRegion, VolatileMemory};

use super::memory::map_shared;

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;

/// What each queue's part is a multiple of, as in libvhost-user.
const QUEUE_ALIGNMENT: usize = 64;

const VERSION: u16 = 1;

// Offsets in a queue's header.
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

// Offsets in a descriptor's entry.
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

fn queue_bytes(queue_size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(queue_size)).next_multiple_of(QUEUE_ALIGNMENT)
}

/// A fresh region for `queues` queues of `queue_size` descriptors, sealed at its size.
pub(crate) fn create(queues: u16, queue_size: u16) -> io::Result<(VhostUserInflight, File)> {
    let bytes = queue_bytes(queue_size) as u64 * u64::from(queues);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("vhost-inflight", flags)?);
    file.set_len(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok((VhostUserInflight::new(bytes, 0, queues, queue_size), file))
}

/// A region that a frontend handed in.
pub(crate) struct Inflight {
    map: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

impl Inflight {
    /// Maps the region that `message` describes.
    pub(crate) fn map(message: &VhostUserInflight, file: File) -> io::Result<Self> {
        let (queues, queue_size) = (message.num_queues, message.queue_size);
        let needed = queue_bytes(queue_size) as u64 * u64::from(queues);
        if message.mmap_size < needed {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            map: Arc::new(map_shared(file, message.mmap_offset, needed, ())?),
            queues,
            queue_size,
        })
    }

    /// The part of queue `index`, which has `size` descriptors. `None` if the region has no such part.
    pub(crate) fn queue(&self, index: u16, size: u16) -> Option<Tracker> {
        (index < self.queues && size <= self.queue_size).then(|| Tracker {
            map: self.map.clone(),
            base: usize::from(index) * queue_bytes(self.queue_size),
            size,
            counter: 0,
        })
    }
}

/// What a region tells about the process before.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Recovered {
    /// Nothing: the region is new.
    Fresh,
    /// These heads were in flight, in the order in which they were fetched.
    InFlight(Vec<u16>),
}

/// One queue's part of the region.
pub(crate) struct Tracker {
    map: Arc<MmapRegion>,
    base: usize,
    size: u16,
    /// The number that the next fetched head gets.
    counter: u64,
}

impl Tracker {
    fn cell<T: AtomicInteger>(&self, offset: usize) -> &T {
        self.map
            .get_atomic_ref(self.base + offset)
            .expect("invariant: the mapping covers every queue's part, and its fields are aligned")
    }

    fn header(&self, offset: usize) -> &AtomicU16 {
        self.cell(offset)
    }

    fn entry(&self, head: u16, offset: usize) -> usize {
        debug_assert!(head < self.size);
        HEADER_BYTES + usize::from(head) * ENTRY_BYTES + offset
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        self.cell(self.entry(head, INFLIGHT_AT))
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.cell(self.entry(head, NEXT_AT))
    }

    fn entry_counter(&self, head: u16) -> &AtomicU64 {
        self.cell(self.entry(head, COUNTER_AT))
    }

    /// Brings the region in line with the used ring, whose index is `used_idx`, and says what was in
    /// flight.
    pub(crate) fn recover(&mut self, used_idx: u16) -> Recovered {
        if self.header(VERSION_AT).load(Ordering::Acquire) == 0 {
            self.header(USED_IDX_AT).store(used_idx, Ordering::Release);
            self.header(DESC_NUM_AT).store(self.size, Ordering::Release);
            self.header(VERSION_AT).store(VERSION, Ordering::Release);
            return Recovered::Fresh;
        }
        self.finish_last_batch(used_idx);
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.inflight(*head).load(Ordering::Acquire) == 1)
            .map(|head| (self.entry_counter(head).load(Ordering::Acquire), head))
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(last, _)| last.wrapping_add(1));
        Recovered::InFlight(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Clears what was published in the used ring but not yet here.
    fn finish_last_batch(&self, used_idx: u16) {
        let batch = used_idx.wrapping_sub(self.header(USED_IDX_AT).load(Ordering::Acquire));
        if batch > self.size {
            // No batch is larger than its ring: the region is of an earlier life of the ring.
            (0..self.size).for_each(|head| self.inflight(head).store(0, Ordering::Release));
        } else {
            let mut head = self.header(LAST_BATCH_HEAD_AT).load(Ordering::Acquire);
            for _ in 0..batch {
                if head >= self.size {
                    break;
                }
                self.inflight(head).store(0, Ordering::Release);
                head = self.next(head).load(Ordering::Acquire);
            }
        }
        self.header(USED_IDX_AT).store(used_idx, Ordering::Release);
    }

    /// Notes that `head` was taken from the available ring.
    pub(crate) fn fetched(&mut self, head: u16) {
        self.entry_counter(head)
            .store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        self.inflight(head).store(1, Ordering::Release);
    }

    /// Notes that `head` is about to be published in the used ring, as a batch of one.
    pub(crate) fn publishing(&self, head: u16) {
        let before = self.header(LAST_BATCH_HEAD_AT).load(Ordering::Acquire);
        self.next(head).store(before, Ordering::Release);
        self.header(LAST_BATCH_HEAD_AT)
            .store(head, Ordering::Release);
    }

    /// Notes that `head` was published, which made the used ring's index `used_idx`.
    pub(crate) fn published(&self, head: u16, used_idx: u16) {
        self.inflight(head).store(0, Ordering::Release);
        self.header(USED_IDX_AT).store(used_idx, Ordering::Release);
    }
}
