//! The KVM engine: vCPUs and interrupt controllers of the host kernel.
//!
//! The kernel owns the local APICs, the I/O APIC, the 8259s and the 8254, so that an interrupt from
//! an eventfd reaches a vCPU without passing through this process, and a doorbell leaves the guest
//! the same way.
//!
//! ```text
//!  vm         VM descriptor, capabilities, memory slots
//!  vcpu       run loop, exits to the buses      kick     leaving it from another thread
//!  irq        lines, routes, MSI vectors        doorbell writes that signal an eventfd
//!  *_state    out to the neutral structures and in again
//!  dirty      the kernel's log of written pages
//!  probe      is this /dev/kvm fit to run a guest at all?
//! ```
//!
//! The engine is made from an open descriptor of `/dev/kvm`, so that a jailed process needs no path
//! to it. Once all vCPUs exist it uses the system calls of [`RUNTIME_IOCTLS`], and, for kicking,
//! `gettid`, `tgkill`, `rt_sigaction` and `rt_sigprocmask` (each vCPU thread, once) and
//! `rt_sigreturn`.

#![allow(unsafe_code)] // ioctls on structures that the kernel defines, and the page shared with it

mod convert;
mod cpuid;
mod debug;
mod dirty;
mod doorbell;
mod irq;
mod kick;
mod msr;
mod platform_state;
mod probe;
mod run_page;
mod runtime;
mod vcpu;
mod vcpu_state;
mod vm;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

pub use cpuid::supported_cpuid;
pub use probe::{LEAST_MIPS, ProbeError, ProbeReport, open, probe};
pub use runtime::RUNTIME_IOCTLS;

use crate::cpu_profile::{CpuProfile, CpuidTable};
use crate::engine::state::PlatformState;
use crate::engine::{
    DoorbellAddress, Engine, EngineError, InterruptLine, InterruptSource, MAX_VCPUS, MsiVector,
    UnknownMsrs, Vcpu, invalid,
};
use crate::memory::GuestMemory;
use crate::memory::dirty::DirtySource;
use dirty::KvmDirtyLog;
use doorbell::Doorbells;
use irq::Interrupts;
use vcpu::{KvmVcpu, VcpuContext};
use vm::Vm;

/// What a [`KvmEngine`] executes.
pub struct KvmConfig {
    /// The guest's RAM, which becomes its memory slots.
    pub memory: GuestMemory,
    /// How many vCPUs it will have, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// The processor that the guest sees.
    pub profile: CpuProfile,
}

/// One VM on KVM.
pub struct KvmEngine {
    vm: Arc<Vm>,
    interrupts: Arc<Interrupts>,
    doorbells: Doorbells,
    cpuid: CpuidTable,
    vcpus: u32,
    context: Arc<VcpuContext>,
    power_on: PlatformState,
}

impl KvmEngine {
    /// Makes a VM with `config`'s memory and an interrupt controller, and no vCPU yet. `kvm` is a
    /// descriptor of `/dev/kvm`.
    ///
    /// # Errors
    ///
    /// The kernel lacks a capability, the host's processor cannot give the profile, or the kernel
    /// refuses.
    pub fn new(kvm: OwnedFd, config: KvmConfig) -> Result<Self, EngineError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            let reason = format!("{} vCPUs; possible are 1 to {MAX_VCPUS}", config.vcpus);
            return Err(EngineError::new("create VM", invalid(reason)));
        }
        let kvm = from_descriptor(kvm);
        let supported = supported_cpuid(&kvm)?;
        let cpuid = config
            .profile
            .resolve(&supported, config.vcpus)
            .map_err(|error| EngineError::new("CPU profile", invalid(error.to_string())))?;
        let vm = Arc::new(Vm::new(&kvm, config.memory)?);
        cpuid::check_address_width(&supported, vm.memory())?;
        let power_on = platform_state::save(&vm)?;
        Ok(Self {
            interrupts: Arc::new(Interrupts::new(Arc::clone(&vm))),
            doorbells: Doorbells::new(Arc::clone(&vm)),
            context: Arc::new(VcpuContext::new(&kvm, Arc::clone(&vm))?),
            cpuid,
            vcpus: config.vcpus,
            power_on,
            vm,
        })
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        if index >= self.vcpus {
            let reason = format!("the VM has {} vCPUs", self.vcpus);
            return Err(EngineError::new(
                format!("create vCPU {index}"),
                invalid(reason),
            ));
        }
        let cpuid = self.cpuid.for_vcpu(index);
        Ok(Box::new(KvmVcpu::new(
            Arc::clone(&self.context),
            index,
            &cpuid,
        )?))
    }

    fn dirty_source(&self) -> Arc<dyn DirtySource> {
        Arc::new(KvmDirtyLog::new(Arc::clone(&self.vm)))
    }

    fn save_platform(&self) -> Result<PlatformState, EngineError> {
        platform_state::save(&self.vm)
    }

    fn restore_platform(&self, state: &PlatformState) -> Result<(), EngineError> {
        platform_state::restore_chips(&self.vm, state)?;
        platform_state::restore_clock(&self.vm, &state.clock)
    }

    fn reset_platform(&self) -> Result<(), EngineError> {
        platform_state::restore_chips(&self.vm, &self.power_on)
    }

    fn unknown_msr_accesses(&self) -> u64 {
        self.unknown_msrs().accesses()
    }

    fn take_unknown_msrs(&self) -> Vec<u32> {
        self.unknown_msrs().take_fresh()
    }
}

impl KvmEngine {
    fn unknown_msrs(&self) -> &UnknownMsrs {
        &self.context.unknown_msrs
    }
}

impl InterruptSource for KvmEngine {
    fn line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        self.interrupts.line(gsi)
    }

    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, EngineError> {
        self.interrupts.msi_vector()
    }

    fn add_doorbell(&self, address: DoorbellAddress, eventfd: &EventFd) -> Result<(), EngineError> {
        self.doorbells.add(address, eventfd)
    }

    fn remove_doorbell(
        &self,
        address: DoorbellAddress,
        _eventfd: &EventFd,
    ) -> Result<(), EngineError> {
        self.doorbells.remove(address)
    }
}

/// Takes over a descriptor of `/dev/kvm`.
fn from_descriptor(kvm: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and ours alone; `Kvm` closes it. If it is not one of /dev/kvm,
    // every ioctl fails.
    unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) }
}

/// Locks what stays consistent whatever a panicking thread has left half done: single values and
/// maps that are changed in one step.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
