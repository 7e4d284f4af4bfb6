//! A debugger's breakpoints, by the processor's debug registers.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};

use crate::engine::DebugRequest;

/// DR7: local exact breakpoint enable, and the bit that reads as one.
const DR7: u64 = 1 << 10;
/// The debug registers that hold addresses.
const REGISTERS: usize = 4;

/// What KVM is told.
pub(super) fn setting(request: &DebugRequest) -> Result<kvm_guest_debug, String> {
    let count = request.breakpoints.len();
    if count > REGISTERS {
        return Err(format!(
            "{count} breakpoints; the processor has {REGISTERS}. --engine soft has as many as you like"
        ));
    }
    let mut setting = kvm_guest_debug::default();
    if request.single_step {
        setting.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    }
    if count > 0 {
        setting.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        let mut dr7 = DR7;
        for (index, &address) in request.breakpoints.iter().enumerate() {
            setting.arch.debugreg[index] = address;
            // On, for instructions.
            dr7 |= 1 << (2 * index);
        }
        setting.arch.debugreg[7] = dr7;
    }
    Ok(setting)
}
