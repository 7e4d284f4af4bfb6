//! Block and network devices whose data path runs in another process: vhost-user front-ends.
//!
//! ```text
//!  driver ── virtqueues in guest memory ── backend process
//!    │                                       │
//!    └─ registers ─ Block │ Net ─ Frontend ──┘  one UNIX socket: vhost-user messages
//!                            │
//!                        Inflight              what the backend works on, kept over its death
//! ```
//!
//! The VM process is jailed and opens nothing: it is handed a connected socket, and asks for the
//! next one through [`BackendSource`] when the backend is lost. The guest keeps running meanwhile;
//! its requests wait in the rings.
//!
//! ```text
//!               handshake            rings set up
//!   (stream) ─▶ ┌───────────┐ ─────▶ ┌─────────┐
//!               │ connected │        │ serving │
//!               └───────────┘ ◀───── └─────────┘
//!                  │  ▲        stop       │  hang-up, refusal, silence
//!                  ▼  │ reconnect         │
//!               ┌───────────┐ ◀───────────┘
//!               │   lost    │ ── BackendSource::request
//!               └───────────┘
//! ```
//!
//! What holds, against a backend that is hostile too:
//! - No exchange takes longer than [`REPLY_TIMEOUT`]; a backend that is silent for that long, or says
//!   something the protocol does not allow, is hung up on and counts as lost.
//! - A device offers its guest, for its whole life, what its first backend offered. A later backend
//!   that offers less is refused, and the device waits for another.
//! - After a loss each ring goes on from the used index in guest memory, with the in-flight region of
//!   the backend that died; a backend without in-flight tracking that completes out of order can
//!   repeat or forget requests then (vhost-user, "Inflight I/O tracking").
//! - A lost backend has been hung up on, not killed: who owns its process makes sure that it is gone
//!   before handing out the next connection.
//!
//! vRING addresses are sent as guest physical ones: each memory region's "user address" is its guest
//! address, so that a backend learns nothing about this process's address space.

use std::time::Duration;

mod block;
mod channel;
mod control;
mod frontend;
pub mod fuzz;
mod handshake;
mod inflight;
mod net;
mod rings;
mod state;
mod wire;

#[cfg(test)]
mod tests;

pub use block::{Block, BlockOptions};
pub use net::{Net, NetOptions};
pub use wire::BackendError;

/// The longest that one operation on a backend may keep its caller waiting: a handshake, setting up
/// all rings, stopping all rings.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a device gets its backend from.
///
/// Called with the device's lock held, so it must not call the device back, and must not block:
/// it passes the word on, and a new stream arrives later by `reconnect`.
pub trait BackendSource: Send {
    /// `device` has no backend, and `reason` says why: the last one hung up, fell silent, refused a
    /// request, or offered less than the guest has been promised.
    fn request(&self, device: &str, reason: &str);
}
