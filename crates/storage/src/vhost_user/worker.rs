//! One queue's thread: from the available ring through the store to the used ring.
//!
//! Each round takes all available heads, submits them together, completes what is done, and raises one
//! interrupt; only when a round finds nothing does the thread sleep. Memory is bounded by the ring: a
//! head that is in flight cannot be taken again.

mod requests;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Event;
use super::device::Device;
use super::event::{Doorbell, Signal, Stop};
use super::inflight::Tracker;
use super::memory::{DirtyLog, Memory, Span};
use super::stats::count;
use crate::store::StoreQueue;

/// How often a ring without a doorbell is looked at.
const NO_DOORBELL_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// A request that the store has.
struct Slot {
    kind: Kind,
    status: GuestAddress,
    /// What a read writes into, for the dirty log.
    spans: Vec<Span>,
    bytes: u64,
    /// Operations that are not complete.
    pending: u32,
    failed: bool,
}

/// Why a queue cannot go on: its driver or its store broke the rules.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("the driver offers descriptor {0}, which is out of range or in flight")]
    Head(u16),
    #[error("the ring is inconsistent: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("the store's queue failed: {0}")]
    Store(#[from] io::Error),
}

/// A queue's thread.
pub(crate) struct Worker {
    parts: Parts,
    store: Box<dyn StoreQueue>,
    /// Whether the driver may use indirect descriptors.
    indirect: bool,
    slots: Vec<Option<Slot>>,
    in_flight: usize,
    /// Used buffers since the last interrupt.
    used: bool,
}

/// What a [`Worker`] is made of.
pub(crate) struct Parts {
    pub(crate) index: u16,
    pub(crate) device: Arc<Device>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) log: Arc<DirtyLog>,
    pub(crate) queue: Queue,
    pub(crate) tracker: Option<Tracker>,
    pub(crate) doorbell: Option<Doorbell>,
    pub(crate) call: Arc<Signal>,
    pub(crate) error: Arc<Signal>,
    pub(crate) stop: Arc<Stop>,
    /// The features that the driver has accepted.
    pub(crate) acked: u64,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let size = parts.queue.size();
        let store = parts.device.store.queue(size)?;
        let indirect = virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
        Ok(Self {
            store,
            indirect: parts.acked & 1 << indirect != 0,
            parts,
            slots: (0..size).map(|_| None).collect(),
            in_flight: 0,
            used: false,
        })
    }

    /// Works until it is told to stop, then drains and gives the queue back.
    pub(crate) fn run(mut self, resubmit: &[u16]) -> Queue {
        if let Err(broken) = self.serve(resubmit) {
            self.parts.device.report(Event::QueueBroken {
                queue: self.parts.index,
                reason: broken.to_string(),
            });
            self.parts.error.raise();
            if !matches!(broken, Broken::Store(_)) {
                // What the store has is still answered.
                let _ = self.drain();
            }
            self.wait_for_stop();
        }
        let lost = self.in_flight as u64;
        self.parts
            .device
            .counters
            .in_flight
            .fetch_sub(lost, Ordering::Relaxed);
        self.parts.queue
    }

    fn serve(&mut self, resubmit: &[u16]) -> Result<(), Broken> {
        for head in resubmit {
            count(&self.parts.device.counters.resubmitted);
            self.begin(*head)?;
        }
        // The process before may have died between the used ring and the interrupt.
        self.used = true;
        self.parts.call.raise();
        let mut heads = Vec::new();
        loop {
            self.parts.queue.disable_notification(&*self.parts.memory)?;
            heads.extend(
                self.parts
                    .queue
                    .iter(&*self.parts.memory)?
                    .map(|chain| chain.head_index()),
            );
            for head in heads.drain(..) {
                if let Some(tracker) = &mut self.parts.tracker
                    && head < self.parts.queue.size()
                {
                    tracker.fetched(head);
                }
                self.begin(head)?;
            }
            self.push_on()?;
            if self.parts.stop.is_requested() {
                return self.drain();
            }
            if self.parts.queue.enable_notification(&*self.parts.memory)? {
                continue;
            }
            self.wait()?;
        }
    }

    /// Submits, completes and interrupts.
    fn push_on(&mut self) -> Result<(), Broken> {
        self.store.submit()?;
        let mut completions = Vec::new();
        self.store.reap(&mut completions)?;
        for completion in completions {
            self.complete(completion)?;
        }
        if std::mem::take(&mut self.used) && self.wants_interrupt()? {
            self.parts.call.raise();
        }
        Ok(())
    }

    fn wants_interrupt(&mut self) -> Result<bool, Broken> {
        const NO_INTERRUPT: u16 = virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT as u16;
        let needed = self.parts.queue.needs_notification(&*self.parts.memory)?;
        if self.parts.queue.event_idx_enabled() {
            return Ok(needed);
        }
        let flags: u16 = self
            .parts
            .memory
            .load(
                GuestAddress(self.parts.queue.avail_ring()),
                Ordering::Relaxed,
            )
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> Result<(), Broken> {
        let (stop, store) = (self.parts.stop.as_fd(), self.store.as_fd());
        let mut fds = vec![
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(store, PollFlags::IN),
        ];
        let mut timeout = Some(NO_DOORBELL_INTERVAL);
        if let Some(doorbell) = &self.parts.doorbell {
            fds.push(PollFd::from_borrowed_fd(doorbell.as_fd(), PollFlags::IN));
            timeout = None;
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Broken::Store(error.into())),
        }
        let rung = fds.get(2).map_or(PollFlags::empty(), PollFd::revents);
        if rung.contains(PollFlags::IN) {
            let alive = self.parts.doorbell.as_ref().is_some_and(Doorbell::clear);
            if !alive {
                self.parts.doorbell = None;
            }
        } else if !rung.is_empty() {
            self.parts.doorbell = None; // Its other end is gone.
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Broken> {
        self.push_on()?;
        while self.in_flight > 0 {
            let mut fds = [PollFd::from_borrowed_fd(self.store.as_fd(), PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Broken::Store(error.into())),
            }
            self.push_on()?;
        }
        Ok(())
    }

    fn wait_for_stop(&self) {
        let mut fds = [PollFd::from_borrowed_fd(
            self.parts.stop.as_fd(),
            PollFlags::IN,
        )];
        while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
    }
}
