//! The ioctls that a running VM needs, for the jail's filter.

use std::os::raw::{c_uint, c_ulong};

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_debugregs, kvm_dirty_log, kvm_guest_debug, kvm_ioeventfd,
    kvm_irq_level, kvm_irq_routing, kvm_irqchip, kvm_irqfd, kvm_lapic_state, kvm_mp_state,
    kvm_msrs, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_translation, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const fn plain(number: c_uint) -> c_ulong {
    ioctl_expr(_IOC_NONE, KVMIO, number, 0)
}

const fn typed<T>(direction: c_uint, number: c_uint) -> c_ulong {
    ioctl_expr(direction, KVMIO, number, size_of::<T>() as c_uint)
}

const BOTH: c_uint = _IOC_READ | _IOC_WRITE;

pub(super) const KVM_RUN: c_ulong = plain(0x80);

/// Every KVM ioctl that an engine uses after its vCPUs have been created, as the second argument of
/// `ioctl`. With `KVM_RUN` and `KVM_IRQ_LINE` foremost: a filter is read in this order.
pub const RUNTIME_IOCTLS: &[u64] = &[
    KVM_RUN,
    typed::<kvm_irq_level>(_IOC_WRITE, 0x61), // KVM_IRQ_LINE
    typed::<kvm_irqfd>(_IOC_WRITE, 0x76),     // KVM_IRQFD: a vector is masked or unmasked
    typed::<kvm_irq_routing>(_IOC_WRITE, 0x6a), // KVM_SET_GSI_ROUTING: a vector is programmed
    typed::<kvm_ioeventfd>(_IOC_WRITE, 0x79), // KVM_IOEVENTFD: a BAR moves
    plain(0xad),                              // KVM_KVMCLOCK_CTRL: a vCPU goes on after a stop
    // The dirty log.
    typed::<kvm_userspace_memory_region>(_IOC_WRITE, 0x46), // KVM_SET_USER_MEMORY_REGION
    typed::<kvm_dirty_log>(_IOC_WRITE, 0x42),               // KVM_GET_DIRTY_LOG
    // The platform: save, restore, reset.
    typed::<kvm_irqchip>(BOTH, 0x62),          // KVM_GET_IRQCHIP
    typed::<kvm_irqchip>(_IOC_READ, 0x63),     // KVM_SET_IRQCHIP
    typed::<kvm_pit_state2>(_IOC_READ, 0x9f),  // KVM_GET_PIT2
    typed::<kvm_pit_state2>(_IOC_WRITE, 0xa0), // KVM_SET_PIT2
    typed::<kvm_clock_data>(_IOC_WRITE, 0x7b), // KVM_SET_CLOCK
    typed::<kvm_clock_data>(_IOC_READ, 0x7c),  // KVM_GET_CLOCK
    // A vCPU: the same.
    typed::<kvm_regs>(_IOC_READ, 0x81),         // KVM_GET_REGS
    typed::<kvm_regs>(_IOC_WRITE, 0x82),        // KVM_SET_REGS
    typed::<kvm_sregs>(_IOC_READ, 0x83),        // KVM_GET_SREGS
    typed::<kvm_sregs>(_IOC_WRITE, 0x84),       // KVM_SET_SREGS
    typed::<kvm_msrs>(BOTH, 0x88),              // KVM_GET_MSRS
    typed::<kvm_msrs>(_IOC_WRITE, 0x89),        // KVM_SET_MSRS
    typed::<kvm_lapic_state>(_IOC_READ, 0x8e),  // KVM_GET_LAPIC
    typed::<kvm_lapic_state>(_IOC_WRITE, 0x8f), // KVM_SET_LAPIC
    typed::<kvm_mp_state>(_IOC_READ, 0x98),     // KVM_GET_MP_STATE
    typed::<kvm_mp_state>(_IOC_WRITE, 0x99),    // KVM_SET_MP_STATE
    typed::<kvm_vcpu_events>(_IOC_READ, 0x9f),  // KVM_GET_VCPU_EVENTS
    typed::<kvm_vcpu_events>(_IOC_WRITE, 0xa0), // KVM_SET_VCPU_EVENTS
    typed::<kvm_debugregs>(_IOC_READ, 0xa1),    // KVM_GET_DEBUGREGS
    typed::<kvm_debugregs>(_IOC_WRITE, 0xa2),   // KVM_SET_DEBUGREGS
    typed::<kvm_xsave>(_IOC_READ, 0xcf),        // KVM_GET_XSAVE2
    typed::<kvm_xsave>(_IOC_WRITE, 0xa5),       // KVM_SET_XSAVE
    typed::<kvm_xcrs>(_IOC_READ, 0xa6),         // KVM_GET_XCRS
    typed::<kvm_xcrs>(_IOC_WRITE, 0xa7),        // KVM_SET_XCRS
    typed::<kvm_guest_debug>(_IOC_WRITE, 0x9b), // KVM_SET_GUEST_DEBUG
    typed::<kvm_translation>(BOTH, 0x85),       // KVM_TRANSLATE
    plain(0xa3),                                // KVM_GET_TSC_KHZ
    plain(0xa2),                                // KVM_SET_TSC_KHZ
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernel_s() {
        // As strace prints them.
        assert_eq!(KVM_RUN, 0xae80);
        for number in [0x4008_ae61, 0x4020_ae46, 0x8090_ae81, 0x4140_aea0_u64] {
            let known = RUNTIME_IOCTLS.contains(&number);
            assert_eq!(known, number != 0x4140_aea0, "{number:#x}");
        }
        let distinct: std::collections::HashSet<_> = RUNTIME_IOCTLS.iter().collect();
        assert_eq!(distinct.len(), RUNTIME_IOCTLS.len());
    }
}
