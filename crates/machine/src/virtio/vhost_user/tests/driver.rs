//! The driver's side of a device: rings in guest memory, requests, completions.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

use mica_base::units::Bytes;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PATIENCE;
use crate::memory::{self, GuestMemory, MemoryOptions};
use crate::virtio::{Activation, VirtioDevice, VirtioInterrupt};

/// Interrupts, counted.
pub(super) struct Interrupts {
    pub(super) used: Vec<Arc<EventFd>>,
    pub(super) config_changes: AtomicUsize,
}

impl VirtioInterrupt for Interrupts {
    fn used(&self, queue: u16) {
        self.used[usize::from(queue)].write(1).unwrap();
    }

    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::Relaxed);
    }

    fn used_eventfd(&self, queue: u16) -> Arc<EventFd> {
        self.used[usize::from(queue)].clone()
    }
}

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

/// One ring as its driver sees it. Request `slot` has the descriptors from `slot * CHAIN` on.
pub(super) struct DriverRing {
    pub(super) memory: GuestMemory,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    base: u64,
    size: u16,
    avail: u16,
    used: u16,
}

/// The longest descriptor chain.
pub(super) const CHAIN: u16 = 4;

impl DriverRing {
    fn desc(&self) -> u64 {
        self.base
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x4000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn queue(&self, max_size: u16) -> Queue {
        let mut queue = Queue::new(max_size).unwrap();
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(GuestAddress(self.desc()))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_ring()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    /// Makes the buffers (address, length, device writes) available as one chain.
    pub(super) fn add(&mut self, slot: u16, buffers: &[(u64, u32, bool)]) {
        let head = slot * CHAIN;
        for (index, &(address, len, write)) in (head..).zip(buffers) {
            let last = usize::from(index - head) + 1 == buffers.len();
            let flags = if last { 0 } else { F_NEXT } | if write { F_WRITE } else { 0 };
            let at = self.desc() + u64::from(index) * 16;
            self.put(at, address);
            self.put(at + 8, len);
            self.put(at + 12, flags);
            self.put(at + 14, index + 1);
        }
        let entry = self.avail_ring() + 4 + u64::from(self.avail % self.size) * 2;
        self.put(entry, head);
        self.avail = self.avail.wrapping_add(1);
        let index = GuestAddress(self.avail_ring() + 2);
        self.memory
            .store(self.avail, index, Ordering::Release)
            .unwrap();
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(super) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    pub(super) fn used_index(&self) -> u16 {
        let index = GuestAddress(self.used_ring() + 2);
        self.memory.load(index, Ordering::Acquire).unwrap()
    }

    /// The slots completed since the last call, with the lengths written.
    pub(super) fn completed(&mut self) -> Vec<(u16, u32)> {
        let mut done = Vec::new();
        while self.used != self.used_index() {
            let entry = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
            let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
            assert_eq!(head % u32::from(CHAIN), 0, "not the head of a chain");
            done.push((head as u16 / CHAIN, len));
            self.used = self.used.wrapping_add(1);
            // VIRTIO_F_EVENT_IDX: an interrupt, please, for the next one.
            let used_event = self.avail_ring() + 4 + u64::from(self.size) * 2;
            self.put(used_event, self.used);
            fence(Ordering::SeqCst);
        }
        done
    }

    /// Waits, interrupt by interrupt, for `count` completions.
    pub(super) fn wait(&mut self, count: usize) -> Vec<(u16, u32)> {
        let start = Instant::now();
        let mut done = self.completed();
        while done.len() < count {
            let left = PATIENCE.checked_sub(start.elapsed());
            let interrupted = left.is_some_and(|left| wait_readable(&self.call, left));
            assert!(interrupted, "{} of {count} completed", done.len());
            done.extend(self.completed());
        }
        done
    }
}

fn wait_readable(event: &EventFd, timeout: Duration) -> bool {
    let epoll = Epoll::new().unwrap();
    let wanted = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), wanted)
        .unwrap();
    let mut ready = [EpollEvent::default()];
    epoll.wait(timeout.as_millis() as i32, &mut ready).unwrap();
    event.read().is_ok()
}

/// A driver that has found its device.
pub(super) struct Driver {
    pub(super) memory: GuestMemory,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) rings: Vec<DriverRing>,
    max_sizes: Vec<u16>,
}

impl Driver {
    /// Lays out rings of `size` entries in fresh memory.
    pub(super) fn new(device: &dyn VirtioDevice, size: u16) -> Self {
        let memory = memory::allocate(Bytes::mib(64), &MemoryOptions::default()).unwrap();
        let events = device.queue_events();
        let event = |_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let interrupts = Interrupts {
            used: (0..events.len()).map(event).collect(),
            config_changes: AtomicUsize::new(0),
        };
        let rings = events.iter().zip(&interrupts.used).zip(1..);
        let ring = |((kick, call), index): ((&Arc<EventFd>, &Arc<EventFd>), u64)| DriverRing {
            memory: memory.clone(),
            kick: kick.clone(),
            call: call.clone(),
            base: index << 16,
            size,
            avail: 0,
            used: 0,
        };
        Self {
            rings: rings.map(ring).collect(),
            interrupts: Arc::new(interrupts),
            memory: memory.clone(),
            max_sizes: device.queue_sizes().to_vec(),
        }
    }

    /// What the transport hands over at `DRIVER_OK`.
    pub(super) fn activation(&self, features: u64) -> Activation {
        let queues = self.rings.iter().zip(&self.max_sizes);
        Activation {
            memory: self.memory.clone(),
            features,
            queues: queues.map(|(ring, max)| Some(ring.queue(*max))).collect(),
            events: self.rings.iter().map(|ring| ring.kick.clone()).collect(),
            interrupt: self.interrupts.clone(),
        }
    }
}

impl Driver {
    /// Goes on with `device` in place of the one before, as a restored guest does.
    pub(super) fn adopt(&mut self, device: &dyn VirtioDevice) {
        for (ring, kick) in self.rings.iter_mut().zip(device.queue_events()) {
            ring.kick = kick;
        }
    }
}
