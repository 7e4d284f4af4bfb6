//! The VM descriptor: capabilities, interrupt controllers and memory slots.

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::engine::EngineError;
use crate::layout;
use crate::memory::GuestMemory;

/// A VM and the memory that its slots point into. Whatever can make the kernel touch guest memory
/// holds a reference to this, so the mapping outlives all of them.
pub(super) struct Vm {
    pub(super) fd: VmFd,
    memory: GuestMemory,
    /// Exceptions have a payload of their own in the events.
    pub(super) exception_payload: bool,
    /// A pending triple fault is among the events.
    pub(super) triple_fault_event: bool,
}

impl Vm {
    /// Makes the VM with its interrupt controllers, memory slot `n` for region `n` of `memory`.
    pub(super) fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Self, EngineError> {
        let fd = kvm
            .create_vm()
            .map_err(|error| EngineError::new("KVM_CREATE_VM", error))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(|error| EngineError::new("KVM_SET_IDENTITY_MAP_ADDR", error))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(|error| EngineError::new("KVM_SET_TSS_ADDR", error))?;
        fd.create_irq_chip()
            .map_err(|error| EngineError::new("KVM_CREATE_IRQCHIP", error))?;
        let pit = kvm_pit_config {
            // Port 0x61 too, which is otherwise an exit each time a kernel calibrates by it.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(|error| EngineError::new("KVM_CREATE_PIT2", error))?;
        // An unknown MSR comes out of the kernel for us to name it; without the capability the
        // kernel injects the same fault and it is not counted.
        enable(&fd, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN);
        // What CPUID hides of the paravirtual interface is not there.
        enable(&fd, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1);
        let vm = Self {
            exception_payload: enable(&fd, KVM_CAP_EXCEPTION_PAYLOAD, 1),
            triple_fault_event: enable(&fd, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
            fd,
            memory,
        };
        vm.set_dirty_log(false)?;
        Ok(vm)
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Sets all memory slots, with or without a log of written pages.
    pub(super) fn set_dirty_log(&self, log: bool) -> Result<(), EngineError> {
        let flags = if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is a mapping of exactly this size that `self` keeps alive, and that
            // our code touches only through vm-memory's volatile accesses.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(|error| EngineError::new("KVM_SET_USER_MEMORY_REGION", error))?;
        }
        Ok(())
    }
}

/// Enables a capability if the kernel has it, and says whether it is on.
fn enable(fd: &VmFd, cap: u32, argument: u32) -> bool {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = u64::from(argument);
    fd.check_extension_raw(cap.into()) > 0 && fd.enable_cap(&request).is_ok()
}
