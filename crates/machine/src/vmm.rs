//! The VM process: one machine, jailed, driven by a supervisor over a channel and by whoever the
//! supervisor lets connect to its control socket.
//!
//! ```text
//!  supervisor ── channel ──▶ process ── assemble ──▶ machine ── vcpus
//!  clients ── control socket ──▶ operate ────────────────┘
//! ```
//!
//! The main thread is the event loop; each vCPU has a thread of its own. They meet in the devices'
//! locks and in the mailbox (`notice`), by which vCPU threads and devices tell the event loop what
//! to do.

mod assemble;
pub mod channel;
pub mod config;
pub mod console;
pub mod control;
mod debug;
mod gdb;
pub mod jail;
pub mod machine;
mod notice;
mod operate;
mod process;
mod recording;
mod server;
pub mod vcpus;

pub use process::run;
