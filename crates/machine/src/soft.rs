//! The software engine: [`mica_cpu`]'s processors, and around them the interrupt controllers and timers
//! that KVM has in the host kernel.
//!
//! ```text
//!   lines 0-23 ──┬──▶ pic (0-15) ── ExtINT ──▶ LINT0 ┐
//!                └──▶ io_apic ── messages ──▶ local_apic, one a vCPU ──▶ flag, Wake
//!   MSI ────────────────────────────────────▶        │
//!   pit ── IRQ 0 ──▶ lines            timers ────────┘
//! ```
//!
//! What KVM's guests have beside chips is in `paravirtual`, `steal`, `pv_eoi` and `hypercall`.
//!
//! Each chip is a core without threads and without a clock: its methods take the time in nanoseconds
//! of the machine's monotonic clock. [`platform::Platform`] joins them and is what a vCPU's thread, a
//! device and a timer thread share.
//!
//! With [`turns`] the vCPUs run one at a time and by the count of their instructions, so that a run can be
//! recorded and replayed.
//!
//! Guests are tested on KVM, so where the kernel's chips differ from the data sheet these follow the
//! kernel, and say so. The state is that of [`crate::engine::state`], so that a machine may move
//! between the engines.

pub mod apic_timer;
mod board;
pub mod clock;
mod dirty;
pub mod engine;
mod hypercall;
pub mod io_apic;
mod line;
pub mod local_apic;
pub mod message;
mod msi;
mod msr;
mod paravirtual;
pub mod pic;
pub mod pit;
pub mod platform;
pub mod pv_eoi;
mod signals;
mod state;
pub mod steal;
mod time;
pub mod tsc;
pub mod turns;
mod vcpu;
mod waker;

pub use engine::{SoftConfig, SoftEngine};
pub(crate) use time::realtime_ns;

/// A guest's access that the processor answers with a general protection fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;
