//! One virtqueue as the frontend configures it.
//!
//! ```text
//!              SET_VRING_KICK and enabled
//!   ┌─────────┐ ───────────────────────▶ ┌─────────┐
//!   │ stopped │                          │ running │ a thread of its own
//!   └─────────┘ ◀─────────────────────── └─────────┘
//!              GET_VRING_BASE, disabled, new memory
//! ```

use std::sync::Arc;
use std::thread::JoinHandle;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::device::Device;
use super::event::{Doorbell, Signal, Stop};
use super::inflight::{Inflight, Recovered};
use super::memory::{DirtyLog, Memory, Regions};
use super::worker::{Parts, Worker};

/// The largest ring: it bounds the memory of a queue.
pub(crate) const QUEUE_SIZE_MAX: u16 = 1024;

/// Where a ring's parts are in the frontend's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) used: u64,
    pub(crate) available: u64,
}

/// Why a ring cannot run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the frontend has shared no memory")]
    NoMemory,
    #[error("the ring has no addresses")]
    NoAddresses,
    #[error("the ring's addresses are not in shared memory")]
    Addresses,
    #[error("the ring's size or alignment is invalid: {0}")]
    Layout(#[from] virtio_queue::Error),
    #[error("{0}")]
    System(#[from] std::io::Error),
}

struct Running {
    thread: JoinHandle<Queue>,
    stop: Arc<Stop>,
}

/// What a ring's thread shares with its connection.
pub(crate) struct Context<'a> {
    pub(crate) device: &'a Arc<Device>,
    pub(crate) regions: &'a Regions,
    pub(crate) memory: Option<&'a Arc<Memory>>,
    pub(crate) log: &'a Arc<DirtyLog>,
    pub(crate) inflight: Option<&'a Inflight>,
    pub(crate) acked: u64,
}

/// A virtqueue.
pub(crate) struct Vring {
    index: u16,
    pub(crate) size: u16,
    pub(crate) addresses: Option<RingAddresses>,
    /// Where in the available ring to go on.
    pub(crate) base: u16,
    /// Set by the kick message, unset by `GET_VRING_BASE`: between the two, the ring is started.
    pub(crate) started: bool,
    pub(crate) doorbell: Option<Doorbell>,
    pub(crate) call: Arc<Signal>,
    pub(crate) error: Arc<Signal>,
    pub(crate) enabled: bool,
    running: Option<Running>,
}

impl Vring {
    pub(crate) fn new(index: u16) -> Self {
        Self {
            index,
            size: QUEUE_SIZE_MAX,
            addresses: None,
            base: 0,
            started: false,
            doorbell: None,
            call: Arc::default(),
            error: Arc::default(),
            enabled: false,
            running: None,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Stops the thread, if there is one, once what it has in flight is answered.
    pub(crate) fn halt(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        running.stop.request();
        if let Ok(queue) = running.thread.join() {
            self.base = queue.next_avail();
        }
    }

    /// Starts or stops the thread as the ring's state demands.
    pub(crate) fn settle(&mut self, context: &Context<'_>) -> Result<(), StartError> {
        match (self.started && self.enabled, self.is_running()) {
            (true, false) => self.run(context),
            (false, true) => {
                self.halt();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn queue(&self, context: &Context<'_>, memory: &Memory) -> Result<Queue, StartError> {
        let at = self.addresses.ok_or(StartError::NoAddresses)?;
        let guest = |user| -> Result<GuestAddress, StartError> {
            context
                .regions
                .guest_address(user)
                .ok_or(StartError::Addresses)
        };
        let mut queue = Queue::new(QUEUE_SIZE_MAX)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(guest(at.descriptors)?)?;
        queue.try_set_avail_ring_address(guest(at.available)?)?;
        queue.try_set_used_ring_address(guest(at.used)?)?;
        queue.set_event_idx(context.acked & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_next_avail(self.base);
        queue.set_ready(true);
        // virtio-queue takes address zero for "not set".
        let zero = queue.desc_table() == 0 || queue.avail_ring() == 0 || queue.used_ring() == 0;
        if zero || !queue.is_valid(memory) {
            return Err(StartError::Addresses);
        }
        let used_idx = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire)?;
        queue.set_next_used(used_idx.0);
        Ok(queue)
    }

    fn run(&mut self, context: &Context<'_>) -> Result<(), StartError> {
        let memory = context.memory.ok_or(StartError::NoMemory)?;
        let mut queue = self.queue(context, memory)?;
        let mut tracker = context
            .inflight
            .and_then(|region| region.queue(self.index, self.size));
        let mut resubmit = Vec::new();
        if let Some(tracker) = &mut tracker
            && let Recovered::InFlight(heads) = tracker.recover(queue.next_used())
        {
            // Every head that was fetched is in flight or used.
            queue.set_next_avail(queue.next_used().wrapping_add(heads.len() as u16));
            resubmit = heads;
        }
        let stop = Arc::new(Stop::new()?);
        let worker = Worker::new(Parts {
            index: self.index,
            device: context.device.clone(),
            memory: memory.clone(),
            log: context.log.clone(),
            queue,
            tracker,
            doorbell: self
                .doorbell
                .as_ref()
                .map(Doorbell::try_clone)
                .transpose()?,
            call: self.call.clone(),
            error: self.error.clone(),
            stop: stop.clone(),
            acked: context.acked,
        })?;
        let thread = std::thread::Builder::new()
            .name(format!("vring{}", self.index))
            .spawn(move || worker.run(&resubmit))?;
        self.running = Some(Running { thread, stop });
        Ok(())
    }
}

impl Drop for Vring {
    fn drop(&mut self) {
        self.halt();
    }
}
