//! PCI: one root bus of conventional functions behind a host bridge.
//!
//! ```text
//!  ports CF8/CFC ─┐            ┌── 00:00.0 host bridge
//!  ECAM ──────────┼─ PciRoot ──┼── 00:01.0 virtio function ── VirtioDevice
//!  32/64-bit MMIO ┘            └── …
//! ```
//!
//! The root owns both memory windows as a whole, so that the machine's buses never change; where a
//! BAR answers inside a window is read from the function's own [`BarDecode`], without a lock. BARs
//! are assigned when the machine is assembled, so a guest that keeps what it finds has nothing to
//! do; it may move them all the same.
//!
//! Locks are taken in this order: the bus adaptor, the function, the device behind it, then the
//! interrupt state ([`Msix`], [`Intx`]), which takes nothing further. A device may therefore raise
//! its interrupt under its own lock.

mod config;
pub mod fuzz;
mod host_bridge;
mod intx;
pub(crate) mod msix;
mod ports;
mod root;

pub use config::{BarDecode, BarSpec, ConfigSpace, Identity, command};
pub use intx::Intx;
pub use msix::{Msix, MsixState};
pub use root::{PciError, PciRoot, Subscriber};

use std::ops::Range;

use crate::device::Device;

/// One PCI function: configuration space, and what answers behind its BARs.
pub trait PciFunction: Device {
    /// The configuration space.
    fn config(&mut self) -> &mut ConfigSpace;

    /// Called once, when the function gets its place in the machine.
    fn connect(&mut self, wiring: Wiring);

    /// Fills `data`, of 1, 2 or 4 bytes, with the configuration space at `offset` (0 to 255).
    fn read_config(&mut self, offset: u8, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// Takes a write of 1, 2 or 4 bytes to the configuration space at `offset`.
    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// Fills `data` with what is at `offset` of BAR `bar`.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// Takes a write to BAR `bar` at `offset`.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);

    /// What of the function runs on the event loop.
    fn subscribers(&self) -> Vec<Subscriber> {
        Vec::new()
    }
}

/// What a function gets from the root it is plugged into.
pub struct Wiring {
    /// The function's share of its INTx line.
    pub intx: Intx,
    /// The address ranges in which a BAR answers.
    pub windows: [Range<u64>; 2],
}
