//! A vCPU's registers: out of KVM and in again.
//!
//! The order of setting is the kernel's wish: the run state before all; control registers before
//! what they give a meaning to (XCR0, the local APIC's base); the time-stamp counter before the
//! timers that compare with it; events last, because setting registers drops them.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs,
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_vcpu_events, kvm_xcrs,
};

use super::convert;
use super::msr;
use super::vcpu::KvmVcpu;
use crate::engine::state::{
    DebugRegisters, GeneralRegisters, Msr, PendingEvents, PendingException, PendingInterrupt,
    RunState, VcpuState,
};
use crate::engine::{EngineError, invalid};

/// How many MSRs go into one ioctl; the kernel takes 256.
const MSRS_AT_ONCE: usize = 128;
/// The standard XSAVE area's legacy region and header: what a state has at the least.
const XSAVE_MIN: usize = 576;
/// How far a time-stamp counter may be off before the guest's timers are wrong, in parts per
/// million: NTP corrects as much.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Days, in cycles of any processor.
const FAR_AWAY_TSC: u64 = 1 << 50;

pub(super) fn save(vcpu: &KvmVcpu) -> Result<VcpuState, EngineError> {
    let fd = &vcpu.fd;
    let error = |operation: &'static str| move |source| vcpu.error(operation, source);
    // First, because the kernel takes pending INITs and SIPIs into account on this occasion.
    let run_state = fd.get_mp_state().map_err(error("KVM_GET_MP_STATE"))?;
    let sregs = fd.get_sregs().map_err(error("KVM_GET_SREGS"))?;
    let debug = fd.get_debug_regs().map_err(error("KVM_GET_DEBUGREGS"))?;
    let xcrs = fd.get_xcrs().map_err(error("KVM_GET_XCRS"))?;
    let lapic = fd.get_lapic().map_err(error("KVM_GET_LAPIC"))?;
    let msrs = vcpu.get_msrs(vcpu.state_msrs())?;
    let events = fd.get_vcpu_events().map_err(error("KVM_GET_VCPU_EVENTS"))?;
    let tsc = vcpu.get_msrs(&[msr::TSC])?;
    Ok(VcpuState {
        general: convert::general(&fd.get_regs().map_err(error("KVM_GET_REGS"))?),
        special: convert::special(&sregs),
        debug: DebugRegisters {
            addresses: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
        },
        xcr0: xcr0(&xcrs),
        xsave: vcpu.get_xsave()?,
        msrs,
        local_apic: lapic.regs.iter().map(|&byte| byte as u8).collect(),
        events: from_kvm_events(&events, vcpu.context.vm.exception_payload),
        run_state: from_mp_state(run_state.mp_state),
        // A host whose counter is not stable has no frequency to tell.
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        tsc: tsc.first().map_or(0, |msr| msr.value),
    })
}

/// Sets `state`, with its time-stamp counter if `with_tsc`.
pub(super) fn restore(
    vcpu: &KvmVcpu,
    state: &VcpuState,
    with_tsc: bool,
) -> Result<(), EngineError> {
    let fd = &vcpu.fd;
    let error = |operation: &'static str| move |source| vcpu.error(operation, source);
    let mp_state = kvm_mp_state {
        mp_state: to_mp_state(state.run_state),
    };
    fd.set_mp_state(mp_state)
        .map_err(error("KVM_SET_MP_STATE"))?;
    if with_tsc {
        vcpu.set_tsc_frequency(state.tsc_khz)?;
    }
    fd.set_regs(&convert::kvm_regs(&state.general))
        .map_err(error("KVM_SET_REGS"))?;
    fd.set_sregs(&convert::kvm_sregs(&state.special))
        .map_err(error("KVM_SET_SREGS"))?;
    vcpu.set_xsave(&state.xsave)?;
    fd.set_xcrs(&to_xcrs(state.xcr0))
        .map_err(error("KVM_SET_XCRS"))?;
    let debug = kvm_debugregs {
        db: state.debug.addresses,
        dr6: state.debug.dr6,
        dr7: state.debug.dr7,
        ..Default::default()
    };
    fd.set_debug_regs(&debug)
        .map_err(error("KVM_SET_DEBUGREGS"))?;
    if with_tsc {
        vcpu.set_tsc(state.tsc)?;
    }
    let mut lapic = kvm_lapic_state::default();
    for (register, &byte) in lapic.regs.iter_mut().zip(&state.local_apic) {
        *register = byte as _;
    }
    fd.set_lapic(&lapic).map_err(error("KVM_SET_LAPIC"))?;
    vcpu.set_msrs(&state.msrs)?;
    fd.set_vcpu_events(&to_kvm_events(&state.events, vcpu))
        .map_err(error("KVM_SET_VCPU_EVENTS"))
}

/// Sets the registers that a debugger may write. Pending events are read before and set again behind
/// them, because setting registers drops them.
pub(super) fn set_registers(
    vcpu: &KvmVcpu,
    general: &GeneralRegisters,
    xsave: &[u8],
) -> Result<(), EngineError> {
    let fd = &vcpu.fd;
    let error = |operation: &'static str| move |source| vcpu.error(operation, source);
    let events = fd.get_vcpu_events().map_err(error("KVM_GET_VCPU_EVENTS"))?;
    let events = from_kvm_events(&events, vcpu.context.vm.exception_payload);
    vcpu.set_xsave(xsave)?;
    fd.set_regs(&convert::kvm_regs(general))
        .map_err(error("KVM_SET_REGS"))?;
    fd.set_vcpu_events(&to_kvm_events(&events, vcpu))
        .map_err(error("KVM_SET_VCPU_EVENTS"))
}

impl KvmVcpu {
    /// Which of the candidates for MSR state exist.
    pub(super) fn readable_msrs(&self) -> Result<Vec<u32>, EngineError> {
        let capabilities = self.get_msrs(&[msr::MCG_CAP])?;
        let banks = capabilities.first().map_or(0, |msr| msr.value as u8);
        let candidates = msr::candidates(&self.context.listed_msrs, banks);
        let readable = self.get_msrs(&candidates)?;
        Ok(readable.into_iter().map(|msr| msr.index).collect())
    }

    /// Reads the MSRs of `indices` that can be read.
    fn get_msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, EngineError> {
        let mut found = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(MSRS_AT_ONCE)];
            let entries: Vec<_> = chunk
                .iter()
                .map(|&index| kvm_msr_entry {
                    index,
                    ..Default::default()
                })
                .collect();
            let mut entries = Msrs::from_entries(&entries)
                .expect("invariant: MSRS_AT_ONCE is below the kernel's limit");
            let read = self
                .fd
                .get_msrs(&mut entries)
                .map_err(|source| self.error("KVM_GET_MSRS", source))?;
            let values = entries.as_slice()[..read].iter();
            found.extend(values.map(|entry| Msr {
                index: entry.index,
                value: entry.data,
            }));
            // The kernel stops at the first that it cannot read.
            let skipped = usize::from(read < chunk.len());
            rest = &rest[read + skipped..];
        }
        Ok(found)
    }

    /// Sets all of `msrs`, in their order.
    fn set_msrs(&self, msrs: &[Msr]) -> Result<(), EngineError> {
        for chunk in msrs.chunks(MSRS_AT_ONCE) {
            let entries: Vec<_> = chunk
                .iter()
                .map(|msr| kvm_msr_entry {
                    index: msr.index,
                    data: msr.value,
                    ..Default::default()
                })
                .collect();
            let entries = Msrs::from_entries(&entries)
                .expect("invariant: MSRS_AT_ONCE is below the kernel's limit");
            let set = self
                .fd
                .set_msrs(&entries)
                .map_err(|source| self.error("KVM_SET_MSRS", source))?;
            if let Some(refused) = chunk.get(set) {
                let reason = format!(
                    "the host does not take {:#x} in MSR {:#x}",
                    refused.value, refused.index
                );
                return Err(self.error("KVM_SET_MSRS", invalid(reason)));
            }
        }
        Ok(())
    }

    /// A guest counts on the frequency it has measured.
    fn set_tsc_frequency(&self, khz: u32) -> Result<(), EngineError> {
        let host = self.fd.get_tsc_khz().unwrap_or(0);
        let difference = u64::from(khz.abs_diff(host));
        if khz == 0 || difference * 1_000_000 <= u64::from(host) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        self.fd.set_tsc_khz(khz).map_err(|_| {
            let reason = format!(
                "the guest's time-stamp counter runs at {khz} kHz, the host's at {host} kHz and \
                 without scaling"
            );
            self.error("KVM_SET_TSC_KHZ", invalid(reason))
        })
    }

    /// Sets the time-stamp counter.
    ///
    /// KVM takes a value that is within a second of what the VM's last counter to be set must have
    /// reached for an attempt to synchronize the two, and makes them equal. That is what we want of
    /// all vCPUs but the first. The first must not be synchronized with the counter that it had, so
    /// it is set to somewhere else in between.
    fn set_tsc(&self, value: u64) -> Result<(), EngineError> {
        let tsc = |value| Msr {
            index: msr::TSC,
            value,
        };
        if self.index == 0 {
            self.set_msrs(&[tsc(value.wrapping_add(FAR_AWAY_TSC))])?;
        }
        self.set_msrs(&[tsc(value)])
    }

    fn get_xsave(&self) -> Result<Vec<u8>, EngineError> {
        let mut area = self.xsave_area();
        // SAFETY: the area has the length that the kernel said it needs, and this process enables
        // no processor feature that would make it longer.
        unsafe { self.fd.get_xsave2(&mut area) }
            .map_err(|source| self.error("KVM_GET_XSAVE2", source))?;
        let words = area.as_fam_struct_ref().xsave.region.iter();
        let all = words.chain(area.as_slice());
        Ok(all.flat_map(|word| word.to_le_bytes()).collect())
    }

    fn set_xsave(&self, bytes: &[u8]) -> Result<(), EngineError> {
        let possible = XSAVE_MIN..=self.context.xsave_len;
        if !possible.contains(&bytes.len()) {
            let reason = format!(
                "an XSAVE area of {} bytes, the host's has {}",
                bytes.len(),
                self.context.xsave_len
            );
            return Err(self.error("KVM_SET_XSAVE", invalid(reason)));
        }
        let mut words = bytes.chunks_exact(4).map(|word| {
            u32::from_le_bytes(word.try_into().expect("invariant: chunks of four bytes"))
        });
        let mut area = self.xsave_area();
        // SAFETY: only the content changes, not the length.
        let header = unsafe { area.as_mut_fam_struct() };
        for word in &mut header.xsave.region {
            *word = words.next().unwrap_or(0);
        }
        for word in area.as_mut_slice() {
            *word = words.next().unwrap_or(0);
        }
        // SAFETY: as in `get_xsave`.
        unsafe { self.fd.set_xsave2(&area) }.map_err(|source| self.error("KVM_SET_XSAVE", source))
    }

    /// An empty area of the length that the kernel reads and writes.
    fn xsave_area(&self) -> Xsave {
        let beyond = self.context.xsave_len - size_of::<kvm_bindings::kvm_xsave>();
        Xsave::new(beyond.div_ceil(4)).expect("invariant: far below the wrapper's limit")
    }
}

fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    let valid = &xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())];
    valid
        .iter()
        .find(|xcr| xcr.xcr == 0)
        .map_or(1, |xcr| xcr.value)
}

fn to_xcrs(xcr0: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = xcr0;
    xcrs
}

fn from_mp_state(state: u32) -> RunState {
    match state {
        KVM_MP_STATE_UNINITIALIZED => RunState::WaitForInit,
        KVM_MP_STATE_INIT_RECEIVED => RunState::WaitForSipi,
        KVM_MP_STATE_HALTED => RunState::Halted,
        // The other states are of other architectures or end before the ioctl returns.
        _ => RunState::Running,
    }
}

fn to_mp_state(state: RunState) -> u32 {
    match state {
        RunState::Running => KVM_MP_STATE_RUNNABLE,
        RunState::WaitForInit => KVM_MP_STATE_UNINITIALIZED,
        RunState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        RunState::Halted => KVM_MP_STATE_HALTED,
    }
}

fn from_kvm_events(events: &kvm_vcpu_events, payload: bool) -> PendingEvents {
    let exception = &events.exception;
    let interrupt = &events.interrupt;
    PendingEvents {
        exception: (exception.injected != 0 || payload && exception.pending != 0).then(|| {
            PendingException {
                vector: exception.nr,
                error_code: (exception.has_error_code != 0).then_some(exception.error_code),
                payload: (payload && events.exception_has_payload != 0)
                    .then_some(events.exception_payload),
                injected: exception.injected != 0,
            }
        }),
        interrupt: (interrupt.injected != 0).then_some(PendingInterrupt {
            vector: interrupt.nr,
            software: interrupt.soft != 0,
        }),
        shadow: interrupt.shadow,
        nmi_injected: events.nmi.injected != 0,
        nmi_pending: events.nmi.pending != 0,
        nmi_masked: events.nmi.masked != 0,
        smm: events.smi.smm != 0,
        smi_pending: events.smi.pending != 0,
        smm_inside_nmi: events.smi.smm_inside_nmi != 0,
        init_latched: events.smi.latched_init != 0,
        triple_fault: events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0
            && events.triple_fault.pending != 0,
        kicked: false,
    }
}

fn to_kvm_events(state: &PendingEvents, vcpu: &KvmVcpu) -> kvm_vcpu_events {
    let vm = &vcpu.context.vm;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(exception) = state.exception {
        // A kernel without payloads knows one form: it delivers the exception at the next entry.
        let injected = exception.injected || !vm.exception_payload;
        events.exception.injected = injected.into();
        events.exception.pending = (!injected).into();
        events.exception.nr = exception.vector;
        events.exception.has_error_code = exception.error_code.is_some().into();
        events.exception.error_code = exception.error_code.unwrap_or(0);
        events.exception_has_payload = exception.payload.is_some().into();
        events.exception_payload = exception.payload.unwrap_or(0);
    }
    if vm.exception_payload {
        events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(interrupt) = state.interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = interrupt.vector;
        events.interrupt.soft = interrupt.software.into();
    }
    events.interrupt.shadow = state.shadow;
    events.nmi.injected = state.nmi_injected.into();
    events.nmi.pending = state.nmi_pending.into();
    events.nmi.masked = state.nmi_masked.into();
    // Only where there is something to say: a kernel built without SMM refuses the flag.
    if state.smm || state.smi_pending || state.smm_inside_nmi || state.init_latched {
        events.flags |= KVM_VCPUEVENT_VALID_SMM;
        events.smi.smm = state.smm.into();
        events.smi.pending = state.smi_pending.into();
        events.smi.smm_inside_nmi = state.smm_inside_nmi.into();
        events.smi.latched_init = state.init_latched.into();
    }
    if vm.triple_fault_event {
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = state.triple_fault.into();
    }
    events
}
