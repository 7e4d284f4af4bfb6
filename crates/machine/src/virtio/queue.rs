//! The queue side of a device that lives in the VM process: its events, its activation, and the one
//! loop that serves a queue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Activation;
use crate::memory::GuestMemory;

/// Feature bits that every device in this process offers: both are the queue's own business.
pub(super) const F_RING: u64 = 1 << 28 | 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// A request of the driver.
pub(super) type Chain<'a> = DescriptorChain<&'a GuestMemory>;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Done; so many bytes were written into its buffers.
    Done(u32),
    /// It stays at the head of the queue, for the next time.
    Later,
}

/// A device's queues, from its construction on.
pub(super) struct DeviceQueues {
    events: Vec<Arc<EventFd>>,
    active: Option<Activation>,
}

impl DeviceQueues {
    /// The events of `count` queues.
    pub(super) fn new(count: usize) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK).map(Arc::new);
        Ok(Self {
            events: (0..count).map(|_| event()).collect::<Result<_, _>>()?,
            active: None,
        })
    }

    pub(super) fn events(&self) -> Vec<Arc<EventFd>> {
        self.events.clone()
    }

    /// Watches every queue's event.
    pub(super) fn register(&self, ops: &mut EventOps) {
        for event in &self.events {
            ops.add(Events::new_raw(event.as_raw_fd(), EventSet::IN))
                .expect("invariant: epoll takes an eventfd that is registered once");
        }
    }

    /// The queue whose event this is; the event is taken back.
    pub(super) fn acknowledge(&self, events: Events) -> Option<usize> {
        let queue = self
            .events
            .iter()
            .position(|event| event.as_raw_fd() == events.fd())?;
        // Nothing to read: somebody has taken it already.
        let _ = self.events[queue].read();
        Some(queue)
    }

    pub(super) fn activate(&mut self, activation: Activation) {
        self.active = Some(activation);
    }

    pub(super) fn deactivate(&mut self) -> Vec<Option<Queue>> {
        self.active
            .take()
            .map(|active| active.queues)
            .unwrap_or_default()
    }

    /// Whether the driver is ready.
    pub(super) fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Whether the driver has accepted the feature bits.
    pub(super) fn has(&self, features: u64) -> bool {
        self.active
            .as_ref()
            .is_some_and(|active| active.features & features == features)
    }

    /// The queues that the driver has enabled, ascending.
    pub(super) fn enabled(&self) -> impl Iterator<Item = usize> + '_ {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        queues
            .enumerate()
            .filter_map(|(index, queue)| queue.is_some().then_some(index))
    }

    /// Makes the event loop look at queue `index` soon.
    pub(super) fn wake(&self, index: usize) {
        // Fails only if 2^64 signals wait, of which one is enough.
        let _ = self.events[index].write(1);
    }

    /// Tells the driver, if there is one, that the configuration changed.
    pub(super) fn config_changed(&self) {
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    /// Serves the requests of queue `index` until none is left, or one has to wait.
    ///
    /// At most a queue's length is served in one go; then the queue's own event is signalled, so
    /// that a driver that adds without end does not starve the other devices of the event loop.
    pub(super) fn serve(
        &mut self,
        index: usize,
        mut request: impl FnMut(&GuestMemory, Chain<'_>) -> Served,
    ) {
        let Some(active) = &mut self.active else {
            return;
        };
        let Some(Some(queue)) = active.queues.get_mut(index) else {
            return;
        };
        let memory = &active.memory;
        let mut turn = Turn {
            budget: queue.size(),
            used: false,
        };
        if turn.take(queue, memory, &mut request) == Left::More {
            let _ = self.events[index].write(1);
        }
        if turn.used && queue.needs_notification(memory).unwrap_or(true) {
            active.interrupt.used(index as u16);
        }
    }
}

/// Why a turn ended.
#[derive(PartialEq, Eq)]
enum Left {
    /// The queue is empty, broken, or its head waits.
    Nothing,
    /// The budget is spent.
    More,
}

struct Turn {
    budget: u16,
    used: bool,
}

impl Turn {
    fn take(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        request: &mut impl FnMut(&GuestMemory, Chain<'_>) -> Served,
    ) -> Left {
        loop {
            // The ring lies in RAM, so that turning notifications on and off cannot fail.
            let _ = queue.disable_notification(memory);
            let before = self.budget;
            while let Some(chain) = queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                match request(memory, chain) {
                    Served::Later => {
                        queue.go_to_previous_position();
                        return Left::Nothing;
                    }
                    // A head that is no descriptor cannot be given back.
                    Served::Done(len) => self.used |= queue.add_used(memory, head, len).is_ok(),
                }
                self.budget -= 1;
                if self.budget == 0 {
                    return Left::More;
                }
            }
            // Requests that came in between are served, unless the ring is broken and they cannot
            // be reached.
            let more = queue.enable_notification(memory).unwrap_or(false);
            if !more || self.budget == before {
                return Left::Nothing;
            }
        }
    }
}

/// Copies the bytes of a device's configuration; what lies beyond reads as zero.
pub(super) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
    data[len..].fill(0);
}
