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

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    /// A region for one queue, as a process left it that has done `script`.
    struct Case {
        message: VhostUserInflight,
        file: File,
    }

    impl Case {
        fn new() -> Self {
            let (message, file) = create(1, SIZE).unwrap();
            Self { message, file }
        }

        fn tracker(&self) -> Tracker {
            let region = Inflight::map(&self.message, self.file.try_clone().unwrap()).unwrap();
            region.queue(0, SIZE).unwrap()
        }
    }

    #[test]
    fn the_layout_is_the_specified_one() {
        let case = Case::new();
        assert_eq!(case.message.mmap_size, 192);
        let mut tracker = case.tracker();
        assert_eq!(tracker.recover(0x1234), Recovered::Fresh);
        tracker.fetched(1);
        tracker.fetched(2);
        tracker.publishing(2);
        tracker.published(2, 0x1235);
        let mut bytes = vec![0; 64];
        std::os::unix::fs::FileExt::read_exact_at(&case.file, &mut bytes, 0).unwrap();
        let mut expected = vec![0; 64];
        expected[8] = 1; // version
        expected[10] = 8; // desc_num
        expected[12] = 2; // last_batch_head
        expected[14..16].copy_from_slice(&[0x35, 0x12]);
        expected[32] = 1; // desc[1].inflight, counter 0
        expected[56] = 1; // desc[2].counter
        assert_eq!(bytes, expected);
    }

    #[test]
    fn heads_come_back_in_the_order_in_which_they_were_taken() {
        let case = Case::new();
        let mut tracker = case.tracker();
        tracker.recover(0);
        for head in [5, 3, 7, 0] {
            tracker.fetched(head);
        }
        tracker.publishing(3);
        tracker.published(3, 1);
        let mut successor = case.tracker();
        assert_eq!(successor.recover(1), Recovered::InFlight(vec![5, 7, 0]));
        successor.fetched(1);
        let mut third = case.tracker();
        assert_eq!(third.recover(1), Recovered::InFlight(vec![5, 7, 0, 1]));
    }

    #[test]
    fn every_point_of_a_publication_is_recovered_from() {
        // (stores that were made, the used ring's index, what is in flight then)
        for (stores, used_idx, in_flight) in [
            (0, 1, vec![4, 6]),
            (1, 1, vec![4, 6]), // next, last_batch_head
            (1, 2, vec![6]),    // the used ring's index
            (2, 2, vec![6]),    // inflight, used_idx
        ] {
            let case = Case::new();
            let mut tracker = case.tracker();
            tracker.recover(0);
            for head in [2, 4, 6] {
                tracker.fetched(head);
            }
            tracker.publishing(2);
            tracker.published(2, 1);
            if stores > 0 {
                tracker.publishing(4);
            }
            if stores > 1 {
                tracker.published(4, 2);
            }
            let recovered = case.tracker().recover(used_idx);
            assert_eq!(
                recovered,
                Recovered::InFlight(in_flight),
                "{stores} {used_idx}"
            );
        }
    }

    #[test]
    fn a_region_of_an_earlier_life_is_cleared() {
        let case = Case::new();
        let mut tracker = case.tracker();
        tracker.recover(500);
        tracker.fetched(1);
        assert_eq!(case.tracker().recover(0), Recovered::InFlight(vec![]));
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        let (mut message, file) = create(2, SIZE).unwrap();
        let map = |message: &VhostUserInflight| Inflight::map(message, file.try_clone().unwrap());
        assert!(map(&message).is_ok_and(|region| region.queue(2, SIZE).is_none()));
        assert!(map(&message).is_ok_and(|region| region.queue(0, SIZE * 2).is_none()));
        message.mmap_size -= 1;
        assert!(map(&message).is_err());
        message.mmap_size = 1 << 40;
        message.queue_size = 1024;
        assert!(map(&message).is_err(), "beyond the file");
    }
}
