//! The seam between a machine and what executes its guest's instructions.
//!
//! An [`Engine`] is one VM's execution: vCPUs, interrupt controllers and the clock. KVM is the first
//! implementation ([`crate::kvm`]); a processor in software is the second. Devices see only the
//! interrupt and notification traits, so the same device runs on both.
//!
//! An engine calls the machine's buses from inside [`Vcpu::run`], which therefore returns only when
//! the vCPU has to stop.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Where a vCPU's accesses outside RAM go.
pub trait BusAccess: Send + Sync {
    /// An `in` instruction of 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// An `out` instruction of 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load of 1 to 8 bytes from a guest physical address outside RAM.
    fn memory_read(&self, address: u64, data: &mut [u8]);
    /// A store of 1 to 8 bytes to a guest physical address outside RAM.
    fn memory_write(&self, address: u64, data: &[u8]);
}

/// Why a vCPU came back from [`Vcpu::run`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Its [`Kick`] was used, before or while it ran.
    Kicked,
    /// A triple fault: a PC resets then.
    TripleFault,
    /// The guest cannot go on; the text names the engine's reason and the guest's instruction
    /// pointer.
    Fatal(String),
}

/// Makes a vCPU leave [`Vcpu::run`] soon, from any thread; if it is not in there, at its next entry.
pub trait Kick: Send + Sync {
    /// Asks for one [`Exit::Kicked`]. Several kicks before the exit are one.
    fn kick(&self);
}

/// An interrupt pin: ISA IRQ or PCI INTx, by its global system interrupt number.
pub trait InterruptLine: Send + Sync {
    /// Drives the line high or low. An edge-triggered input sees the rise.
    fn set(&self, level: bool);
}

/// One message-signalled interrupt source: a vector of a device's MSI-X table.
///
/// Signalling the eventfd raises the interrupt without passing through our code where the engine
/// can do that; so it can be handed to a backend in another process.
pub trait MsiVector: Send + Sync {
    /// Written to raise the interrupt. A signal that comes while the vector is masked is kept and
    /// delivered at unmasking.
    fn eventfd(&self) -> &EventFd;

    /// Where the message goes: the MSI address and data that the guest has programmed.
    ///
    /// # Errors
    ///
    /// The engine cannot route this message.
    fn route(&self, address: u64, data: u32) -> Result<(), EngineError>;

    /// Masks or unmasks. A vector starts masked.
    ///
    /// # Errors
    ///
    /// The engine refuses.
    fn set_masked(&self, masked: bool) -> Result<(), EngineError>;

    /// Whether a signal waits for unmasking (the pending bit of the MSI-X table).
    fn pending(&self) -> bool;
}

/// An address at which a guest's write does nothing but signal an eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorbellAddress {
    /// An I/O port.
    Port(u16),
    /// A guest physical address outside RAM.
    Memory(u64),
}

/// What of an engine a device may use.
pub trait InterruptSource: Send + Sync {
    /// The line with that global system interrupt number (0 to 23).
    fn line(&self, gsi: u32) -> Arc<dyn InterruptLine>;

    /// A new, masked vector.
    ///
    /// # Errors
    ///
    /// The engine has no more vectors.
    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, EngineError>;

    /// From now on a write of any width and value to `address` signals `eventfd` and does not reach
    /// the bus.
    ///
    /// # Errors
    ///
    /// The engine has no more doorbells, or the address has one.
    fn add_doorbell(&self, address: DoorbellAddress, eventfd: &EventFd) -> Result<(), EngineError>;

    /// Undoes [`InterruptSource::add_doorbell`].
    ///
    /// # Errors
    ///
    /// There was no such doorbell.
    fn remove_doorbell(
        &self,
        address: DoorbellAddress,
        eventfd: &EventFd,
    ) -> Result<(), EngineError>;
}

/// An engine's refusal.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {source}")]
pub struct EngineError {
    /// What was asked of the engine, in its own words: `KVM_SET_MSRS of vCPU 0`.
    pub operation: String,
    /// The system's answer.
    pub source: std::io::Error,
}
