//! The state of vCPUs and of the platform around them, in a form that no engine owns.
//!
//! The structures follow the architecture (Intel SDM volume 3, AMD APM volume 2) and the chips'
//! data sheets where those say what there is, and KVM where they do not (pending events, paravirtual
//! clock), so that every engine can fill them and take them. They are stored as CBOR with numbered
//! fields, specified in `docs/formats/machine-state.md`.

pub mod fuzz;
mod platform;
mod vcpu;

pub use platform::{
    ClockState, IO_APIC_PINS, IoApicState, PicState, PitChannelState, PitState, PlatformState,
};
pub use vcpu::{
    DebugRegisters, DescriptorTable, GeneralRegisters, LOCAL_APIC_PAGE, MAX_MSRS, MAX_XSAVE, Msr,
    PendingEvents, PendingException, PendingInterrupt, RunState, Segment, SpecialRegisters,
    VcpuState,
};

/// The version of [`VcpuState`] and [`PlatformState`] in a [`crate::device::SavedState`].
pub const STATE_VERSION: u16 = 1;

#[cfg(test)]
mod tests;
