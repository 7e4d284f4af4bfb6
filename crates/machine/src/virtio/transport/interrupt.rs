//! The transport's interrupt side: MSI-X vectors by queue, or the ISR byte and an INTx pin.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::lock;
use crate::pci::{Intx, Msix};
use crate::virtio::VirtioInterrupt;

/// No vector (virtio 1.2, clause 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Shared by the transport, its device and the relay. Takes no lock but its own, so it may be used
/// under any other.
pub(super) struct Interrupt {
    pub(super) msix: Msix,
    pin: OnceLock<Intx>,
    pin_disabled: AtomicBool,
    isr: Mutex<u8>,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    relay: Arc<EventFd>,
}

impl Interrupt {
    pub(super) fn new(msix: Msix, queues: usize, relay: EventFd) -> Self {
        Self {
            msix,
            pin: OnceLock::new(),
            pin_disabled: AtomicBool::new(false),
            isr: Mutex::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            relay: Arc::new(relay),
        }
    }

    /// Gives the interrupt its pin; the first call counts.
    pub(super) fn connect(&self, pin: Intx) {
        let _ = self.pin.set(pin);
    }

    /// The configuration's generation (clause 4.1.4.3.1).
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::Release);
    }

    /// Vector of the configuration, then of each queue.
    pub(super) fn vectors(&self) -> Vec<u16> {
        [&self.config_vector]
            .into_iter()
            .chain(&self.queue_vectors)
            .map(|vector| vector.load(Ordering::Acquire))
            .collect()
    }

    fn cell(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            None => Some(&self.config_vector),
            Some(queue) => self.queue_vectors.get(usize::from(queue)),
        }
    }

    /// The vector of a queue, or of the configuration.
    pub(super) fn vector(&self, queue: Option<u16>) -> u16 {
        self.cell(queue)
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Sets a vector; one that does not exist reads back as [`NO_VECTOR`], which tells the driver
    /// that it cannot have it.
    pub(super) fn set_vector(&self, queue: Option<u16>, vector: u16) {
        let vector = if vector < self.msix.count() {
            vector
        } else {
            NO_VECTOR
        };
        if let Some(cell) = self.cell(queue) {
            cell.store(vector, Ordering::Release);
        }
    }

    /// Forgets vectors and ISR, as a device reset does.
    pub(super) fn reset(&self) {
        self.set_vector(None, NO_VECTOR);
        for queue in 0..self.queue_vectors.len() {
            self.set_vector(Some(queue as u16), NO_VECTOR);
        }
        self.update(|isr| *isr = 0);
    }

    /// Reads the ISR byte, which clears it and lets the pin go (clause 4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        self.update(std::mem::take)
    }

    pub(super) fn isr(&self) -> u8 {
        *lock(&self.isr)
    }

    pub(super) fn set_isr(&self, value: u8) {
        self.update(|isr| *isr = value & (ISR_QUEUE | ISR_CONFIG));
    }

    /// Takes the command register's INTx disable bit.
    pub(super) fn set_pin_disabled(&self, disabled: bool) {
        self.pin_disabled.store(disabled, Ordering::Release);
        self.update(|_| ());
    }

    fn update<T>(&self, change: impl FnOnce(&mut u8) -> T) -> T {
        let mut isr = lock(&self.isr);
        let result = change(&mut isr);
        if let Some(pin) = self.pin.get() {
            let disabled = self.pin_disabled.load(Ordering::Acquire) || self.msix.enabled();
            pin.set(*isr != 0 && !disabled);
        }
        result
    }

    fn raise(&self, queue: Option<u16>) {
        if self.msix.enabled() {
            self.msix.signal(self.vector(queue));
        } else {
            let bit = queue.map_or(ISR_CONFIG, |_| ISR_QUEUE);
            self.update(|isr| *isr |= bit);
        }
    }
}

impl VirtioInterrupt for Interrupt {
    fn used(&self, queue: u16) {
        self.raise(Some(queue));
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(None);
    }

    /// With MSI-X the vector's own eventfd, as programmed at this moment: a driver sets vectors
    /// before it sets `DRIVER_OK`. Otherwise one that the event loop turns into INTx.
    fn used_eventfd(&self, queue: u16) -> Arc<EventFd> {
        let vector = self.msix.vector(self.vector(Some(queue)));
        match vector {
            Some(vector) if self.msix.enabled() => vector.eventfd().try_clone().map(Arc::new).ok(),
            _ => None,
        }
        .unwrap_or_else(|| self.relay.clone())
    }
}

/// Turns the signals of backends in other processes into interrupts when they cannot be messages.
pub(super) struct Relay(pub(super) Arc<Interrupt>);

impl MutEventSubscriber for Relay {
    fn init(&mut self, ops: &mut EventOps) {
        let events = Events::new_raw(self.0.relay.as_raw_fd(), EventSet::IN);
        ops.add(events)
            .expect("invariant: epoll takes an eventfd that is registered once");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if self.0.relay.read().is_err() {
            return;
        }
        if self.0.msix.enabled() {
            // Which queue it was is not known. A driver copes with an interrupt in vain.
            for vector in &self.0.queue_vectors {
                self.0.msix.signal(vector.load(Ordering::Acquire));
            }
        } else {
            self.0.raise(Some(0));
        }
    }
}
