//! The seam between a machine and what executes its guest's instructions.
//!
//! An [`Engine`] is one VM's execution: vCPUs, interrupt controllers and the clock. KVM is the first
//! implementation ([`crate::kvm`]); a processor in software is the second ([`crate::soft`]). Devices see only the
//! interrupt and notification traits, so the same device runs on both.
//!
//! An engine calls the machine's buses from inside [`Vcpu::run`], which therefore returns only when
//! the vCPU has to stop.

mod boot_state;
pub mod state;
mod unknown_msrs;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::cpu_profile::CpuidTable;
use crate::memory::dirty::DirtySource;
use state::{GeneralRegisters, PlatformState, VcpuState};
pub(crate) use unknown_msrs::UnknownMsrs;

/// The most vCPUs of a guest: an APIC ID is the vCPU's index and a byte, of which 255 addresses all.
pub const MAX_VCPUS: u32 = 254;

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
    /// A debugger's breakpoint is at the next instruction, or its single step is done.
    Debug,
    /// A replayed recording says what is done to the machine here.
    Recorded,
    /// The guest cannot go on; the text names the engine's reason and the guest's instruction
    /// pointer.
    Fatal(String),
}

/// What a debugger wants of a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugRequest {
    /// Stop after one instruction.
    pub single_step: bool,
    /// Stop before the instructions at these linear addresses. The guest's memory and debug registers
    /// stay as they are.
    pub breakpoints: Vec<u64>,
}

/// Makes a vCPU leave [`Vcpu::run`] soon, from any thread; if it is not in there, at its next entry.
pub trait Kick: Send + Sync {
    /// Asks for one [`Exit::Kicked`]. Several kicks before the exit are one.
    fn kick(&self);
}

/// One driver of an interrupt pin: ISA IRQ or PCI INTx, by its global system interrupt number.
///
/// Several devices may drive the same pin; it is high while any of them drives it high.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DoorbellAddress {
    /// An I/O port.
    Port(u16),
    /// A guest physical address outside RAM.
    Memory(u64),
}

/// What of an engine a device may use.
pub trait InterruptSource: Send + Sync {
    /// A driver of its own for the line with that global system interrupt number (0 to 23).
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

/// One virtual processor. It belongs to the thread that runs it; others reach it by its [`Kick`].
pub trait Vcpu: Send {
    /// Executes the guest until the vCPU has to stop; what it accesses outside RAM goes to `bus`,
    /// from inside this call.
    ///
    /// An application processor waits in here for its start-up message, and a halted one for an
    /// interrupt. When this returns [`Exit::Kicked`] the state is between two instructions.
    ///
    /// # Errors
    ///
    /// The engine itself fails; the guest cannot go on.
    fn run(&mut self, bus: &dyn BusAccess) -> Result<Exit, EngineError>;

    /// What makes [`Vcpu::run`] return. It may outlive the vCPU.
    fn kick_handle(&self) -> Arc<dyn Kick>;

    /// Everything the guest can observe of the vCPU.
    ///
    /// # Errors
    ///
    /// The engine refuses.
    fn save(&mut self) -> Result<VcpuState, EngineError>;

    /// Takes a state that a vCPU of the same index and CPU profile has saved, here or elsewhere. The
    /// platform is restored before the vCPUs, vCPU 0 before the others (their time-stamp counters
    /// follow its), all of them before any runs.
    ///
    /// # Errors
    ///
    /// The engine does not take part of the state; the vCPU must not run then.
    fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError>;

    /// Sets the general registers with RIP and RFLAGS, and those in an XSAVE area as
    /// [`VcpuState::xsave`] has them. The rest stays, and time goes on: what a debugger changes is no
    /// state of another moment.
    ///
    /// # Errors
    ///
    /// The engine does not take the area, or refuses.
    fn set_registers(
        &mut self,
        general: &GeneralRegisters,
        xsave: &[u8],
    ) -> Result<(), EngineError>;

    /// From the next run on, stops as a debugger wants; [`Vcpu::run`] returns [`Exit::Debug`] then.
    ///
    /// # Errors
    ///
    /// The engine has not that many breakpoints.
    fn set_debug(&mut self, request: &DebugRequest) -> Result<(), EngineError>;

    /// The physical address behind a linear one by the vCPU's page tables; nothing if it is not mapped.
    /// The guest does not notice.
    ///
    /// # Errors
    ///
    /// The engine refuses.
    fn translate(&mut self, linear: u64) -> Result<Option<u64>, EngineError>;

    /// Back to the state after power-on, as a PC's reset line does, but for the time-stamp counter,
    /// which runs on.
    ///
    /// # Errors
    ///
    /// The engine refuses.
    fn reset(&mut self) -> Result<(), EngineError>;
}

/// What executes one VM's guest. It is shared by the VM process's threads.
pub trait Engine: InterruptSource {
    /// As a user names it: `kvm` or `soft`.
    fn name(&self) -> &'static str;

    /// The CPUID table of the guest, but for what differs between its vCPUs. What a migration
    /// compares.
    fn cpuid(&self) -> &CpuidTable;

    /// Makes the vCPU of that index, once for each index from zero; the index is its APIC ID. vCPU 0
    /// starts running, the others wait for INIT and SIPI.
    ///
    /// # Errors
    ///
    /// The engine has no such vCPU, or has it already.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;

    /// The log of the pages that vCPUs write.
    fn dirty_source(&self) -> Arc<dyn DirtySource>;

    /// The interrupt controllers, the interval timer and the clock. No vCPU runs meanwhile.
    ///
    /// # Errors
    ///
    /// The engine refuses.
    fn save_platform(&self) -> Result<PlatformState, EngineError>;

    /// Takes what [`Engine::save_platform`] has given. Devices drive their lines again after that.
    ///
    /// # Errors
    ///
    /// The engine does not take it; the machine must not run then.
    fn restore_platform(&self, state: &PlatformState) -> Result<(), EngineError>;

    /// Interrupt controllers and the interval timer as after power-on; the clock runs on.
    ///
    /// # Errors
    ///
    /// The engine refuses.
    fn reset_platform(&self) -> Result<(), EngineError>;

    /// Accesses to model-specific registers that do not exist, so far. Each has faulted in the
    /// guest.
    fn unknown_msr_accesses(&self) -> u64;

    /// The distinct unknown registers seen since the last call, for the log.
    fn take_unknown_msrs(&self) -> Vec<u32>;
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

impl EngineError {
    /// `operation` failed with `source`.
    pub fn new(operation: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self {
            operation: operation.into(),
            source: source.into(),
        }
    }
}

/// A refusal of what an engine was asked for.
pub(crate) fn invalid(
    reason: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, reason)
}
