//! Exports over vhost-user: a store becomes a virtio-blk device of Mica's own machine, of QEMU or of
//! Cloud Hypervisor.
//!
//! ```text
//!   frontend ──socket──▶ export ─▶ session ─▶ vring ─▶ worker (a thread for each running queue)
//!                        accepts   protocol   state      chain ─▶ request ─▶ store
//!                                                        used ring ◀─ completion
//! ```
//!
//! The messages are handled by rust-vmm's `vhost`; rings are `virtio-queue`'s. Three promises:
//!
//! - **Nothing is lost with this process.** The frontend keeps the record of what is in flight
//!   ([`inflight`]), so that a successor resubmits it in its order. What the kernel still has of the
//!   process before keeps the image's lock ([`crate::store`]), so that it cannot overtake the successor.
//! - **A guest harms only itself.** Every index, address, length and sector is checked; memory is bounded
//!   by the ring; a broken driver stops its queue.
//! - **An acknowledged flush is durable**, and so is every write while the guest has the write cache off.

mod chain;
mod device;
mod event;
mod export;
mod inflight;
mod memory;
mod request;
mod session;
mod simulate;
mod socket;
mod stats;
#[cfg(test)]
mod testing;
mod vring;
mod worker;

use std::fmt;
use std::sync::Arc;

pub(crate) use simulate::chains as fuzz_chains;

pub use export::{Export, ExportHandle, QUEUES_MAX};
pub use socket::{SocketError, SocketPath};
pub use stats::Stats;

/// What happens to an export, for its owner's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A client is there.
    Connected,
    /// The client is gone, by itself or for the reason given.
    Disconnected {
        /// What it did wrong, or what failed.
        reason: Option<String>,
    },
    /// A queue has stopped until the driver resets it.
    QueueBroken {
        /// Its index.
        queue: u16,
        /// What the driver did wrong, or what failed.
        reason: String,
    },
}

/// Called from the export's threads; must not wait.
pub type Observer = Arc<dyn Fn(&Event) + Send + Sync>;

/// How to export a store.
#[derive(Clone)]
pub struct ExportOptions {
    /// The most queues a client may use. Each one that runs has a thread.
    pub queues: u16,
    /// What the device says its serial number is, at most 20 bytes.
    pub serial: String,
    /// Refuse shared memory that the client could shrink, see the memory module. Mica's own frontend
    /// seals its memory; QEMU does with `memory-backend-memfd`.
    pub require_sealed_memory: bool,
    /// Told what happens.
    pub observer: Option<Observer>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            queues: 16,
            serial: String::new(),
            require_sealed_memory: false,
            observer: None,
        }
    }
}

impl fmt::Debug for ExportOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportOptions")
            .field("queues", &self.queues)
            .field("serial", &self.serial)
            .field("require_sealed_memory", &self.require_sealed_memory)
            .finish_non_exhaustive()
    }
}
