//! virtio 1.2 devices: what a device is, apart from the transport that presents it.
//!
//! The split: the transport ([`crate::pci`]'s virtio function) owns feature negotiation, the status
//! register, queue addresses, vectors and doorbells; a device gets all of that at once when its
//! driver is ready ([`VirtioDevice::activate`]) and gives it back at reset.

pub mod balloon;
pub mod console;
pub mod entropy;
pub mod fuzz;
mod queue;
pub mod transport;
pub mod vhost_user;
pub mod vsock;

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{Device, DeviceError};
use crate::memory::GuestMemory;

/// How a device tells its driver that something happened.
pub trait VirtioInterrupt: Send + Sync {
    /// Used buffers wait in `queue`.
    fn used(&self, queue: u16);

    /// The device's configuration changed.
    fn config_changed(&self);

    /// The eventfd that does what [`VirtioInterrupt::used`] does, for a backend in another process.
    fn used_eventfd(&self, queue: u16) -> Arc<EventFd>;
}

/// Everything a device gets when its driver has set `DRIVER_OK`.
pub struct Activation {
    /// The guest's RAM.
    pub memory: GuestMemory,
    /// The feature bits both sides agreed on.
    pub features: u64,
    /// The queues by index; `None` where the driver did not enable one. Validated against memory.
    pub queues: Vec<Option<Queue>>,
    /// Signalled when the driver notifies the queue of that index. They are the same from the
    /// device's construction on, see [`VirtioDevice::queue_events`].
    pub events: Vec<Arc<EventFd>>,
    /// The way back.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// A virtio device behind a transport.
///
/// Its event loop half is [`MutEventSubscriber`]: `init` registers the queue events and whatever
/// host descriptors the device watches; events that come before activation or after reset are
/// drained and ignored.
pub trait VirtioDevice: Device + MutEventSubscriber {
    /// The virtio device identifier (virtio 1.2, clause 5).
    fn device_id(&self) -> u16;

    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// One event for each queue, made at construction and kept for good.
    fn queue_events(&self) -> Vec<Arc<EventFd>>;

    /// The feature bits on offer, `VIRTIO_F_VERSION_1` among them.
    fn features(&self) -> u64;

    /// Reads the device configuration. What lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration. What is read-only or beyond it swallows the write.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready.
    ///
    /// # Errors
    ///
    /// The device cannot work; the transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Ends the activation: finish or drop what is in flight, and give back the queues as they are.
    ///
    /// The transport calls it when the driver resets the device, followed by [`Device::reset`]; and
    /// at a pause, after [`Device::pause`], to save the queues' indices. The latter must keep the
    /// device's own state: [`VirtioDevice::activate`] and then [`Device::resume`] go on with it, and
    /// every queue event is signalled once, so that no notification is lost in between.
    fn deactivate(&mut self) -> Vec<Option<Queue>>;
}
