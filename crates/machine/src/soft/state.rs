//! A vCPU's registers: out to the neutral state and in again.

use mica_cpu::{FxState, SegmentName};

use super::board::Local;
use super::clock::msr as pv_msr;
use super::local_apic::Events;
use super::msr;
use super::paravirtual;
use super::platform::{LocalApicState, MSR_TSC_DEADLINE};
use super::tsc::Tsc;
use super::vcpu::SoftVcpu;
use crate::engine::EngineError;
use crate::engine::state::{
    DebugRegisters, DescriptorTable, GeneralRegisters, LOCAL_APIC_PAGE, Msr, PendingEvents,
    PendingInterrupt, RunState, Segment, SpecialRegisters, VcpuState,
};

/// The legacy region and the header of an XSAVE area.
const XSAVE_LEN: usize = 576;
const SHORT_XSAVE: &str = "its XSAVE area is too short";
/// Where the header says which components are not in their initial state.
const XSTATE_BV: usize = 512;
const X87_AND_SSE: u8 = 3;
/// Interrupt shadow of STI.
const STI_SHADOW: u8 = 2;
/// As in KVM a counter that is less than a second from the first vCPU's follows that: they are restored
/// one after the other, and the guest is told that they agree.
const SYNCHRONIZED_NS: u64 = 1_000_000_000;

/// MSRs of the core.
mod core_msr {
    pub(super) const SYSENTER: [u32; 3] = [0x174, 0x175, 0x176];
    pub(super) const PAT: u32 = 0x277;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    pub(super) const ALL: [u32; 10] = [
        SYSENTER[0],
        SYSENTER[1],
        SYSENTER[2],
        PAT,
        STAR,
        LSTAR,
        CSTAR,
        SFMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
    ];
}

/// The place of a core MSR in the processor's state.
fn core_register(state: &mut mica_cpu::State, index: u32) -> Option<&mut u64> {
    Some(match index {
        core_msr::PAT => &mut state.pat,
        core_msr::STAR => &mut state.star,
        core_msr::LSTAR => &mut state.lstar,
        core_msr::CSTAR => &mut state.cstar,
        core_msr::SFMASK => &mut state.sfmask,
        core_msr::KERNEL_GS_BASE => &mut state.kernel_gs_base,
        core_msr::TSC_AUX => &mut state.tsc_aux,
        _ => {
            let place = core_msr::SYSENTER.iter().position(|known| *known == index);
            &mut state.sysenter[place?]
        }
    })
}

/// What a vCPU is at `now_ns`. Waiting INITs and start-up messages have been taken.
pub(super) fn save(vcpu: &mut SoftVcpu, now_ns: u64) -> VcpuState {
    vcpu.take_events();
    let apic = vcpu.shared.platform.save_local_apic(vcpu.index, now_ns);
    let msrs = save_msrs(vcpu, &apic);
    let state = &vcpu.processor.state;
    let tsc = vcpu.local.tsc.get();
    let [d0, d1, d2, d3, dr6, dr7] = state.dr;
    VcpuState {
        general: general(state),
        special: special(state, &apic, vcpu.shared.platform.cr8(vcpu.index)),
        debug: DebugRegisters {
            addresses: [d0, d1, d2, d3],
            dr6,
            dr7,
        },
        xcr0: 1,
        xsave: xsave(&state.fx),
        msrs,
        local_apic: apic.page.to_vec(),
        events: PendingEvents {
            interrupt: vcpu.local.interrupt.get().map(|vector| PendingInterrupt {
                vector,
                software: false,
            }),
            shadow: if state.shadow { STI_SHADOW } else { 0 },
            nmi_pending: vcpu.local.nmi_pending.get(),
            nmi_masked: state.nmi_blocked,
            kicked: vcpu.local.paravirtual.kicked.get(),
            ..PendingEvents::default()
        },
        run_state: match vcpu.run_state {
            RunState::Running if state.halted => RunState::Halted,
            run_state => run_state,
        },
        tsc_khz: tsc.khz(),
        tsc: tsc.at(now_ns),
    }
}

fn save_msrs(vcpu: &mut SoftVcpu, apic: &LocalApicState) -> Vec<Msr> {
    let mut msrs = Vec::new();
    for index in core_msr::ALL {
        if let Some(value) = core_register(&mut vcpu.processor.state, index) {
            let value = *value;
            msrs.push(Msr { index, value });
        }
    }
    let stored = vcpu.local.msrs.borrow();
    let clock = vcpu.local.pv_clock.borrow();
    for index in msr::indices() {
        let value = stored.read(index).unwrap_or_default();
        msrs.push(Msr { index, value });
    }
    for index in [pv_msr::WALL_CLOCK, pv_msr::SYSTEM_TIME] {
        let value = clock.read_msr(index).unwrap_or_default();
        msrs.push(Msr { index, value });
    }
    for index in paravirtual::MSRS {
        let value = vcpu.local.paravirtual.read_msr(index).unwrap_or_default();
        msrs.push(Msr { index, value });
    }
    msrs.push(Msr {
        index: MSR_TSC_DEADLINE,
        value: apic.deadline_tsc,
    });
    msrs
}

/// Takes a state at `now_ns`.
pub(super) fn restore(
    vcpu: &mut SoftVcpu,
    saved: &VcpuState,
    now_ns: u64,
) -> Result<(), EngineError> {
    check(vcpu, saved)?;
    let mut tsc = Tsc::new(saved.tsc_khz, saved.tsc, now_ns);
    let khz = tsc.khz();
    let first = vcpu.shared.platform.tsc(0);
    let apart = first.at(now_ns).abs_diff(saved.tsc);
    if vcpu.index != 0 && first.khz() == khz && apart < SYNCHRONIZED_NS * u64::from(khz) / 1_000_000
    {
        tsc = first;
    }
    restore_local_apic(vcpu, saved, tsc, now_ns)?;
    let state = &mut vcpu.processor.state;
    *state = mica_cpu::State::default();
    restore_general(state, &saved.general);
    restore_special(state, &saved.special);
    let [d0, d1, d2, d3] = saved.debug.addresses;
    state.dr = [d0, d1, d2, d3, saved.debug.dr6, saved.debug.dr7];
    restore_xsave(state, &saved.xsave);
    state.shadow = saved.events.shadow != 0;
    state.nmi_blocked = saved.events.nmi_masked;
    state.halted = saved.run_state == RunState::Halted;
    vcpu.run_state = match saved.run_state {
        RunState::Halted => RunState::Running,
        run_state => run_state,
    };
    let local = &vcpu.local;
    local.paravirtual.reset();
    local.paravirtual.kicked.set(saved.events.kicked);
    local.nmi_pending.set(saved.events.nmi_pending);
    local
        .interrupt
        .set(saved.events.interrupt.map(|it| it.vector));
    local.refresh(&vcpu.shared, vcpu.index);
    restore_msrs(vcpu, saved)?;
    vcpu.processor.state_changed();
    Ok(())
}

/// Sets the registers that a debugger may write.
pub(super) fn set_registers(
    vcpu: &mut SoftVcpu,
    general: &GeneralRegisters,
    xsave: &[u8],
) -> Result<(), EngineError> {
    if xsave.len() < XSAVE_LEN {
        return Err(vcpu.refuse(SHORT_XSAVE.to_owned()));
    }
    let state = &mut vcpu.processor.state;
    restore_general(state, general);
    restore_xsave(state, xsave);
    vcpu.processor.state_changed();
    Ok(())
}

/// Refuses what a processor in software cannot go on from.
fn check(vcpu: &SoftVcpu, saved: &VcpuState) -> Result<(), EngineError> {
    let events = &saved.events;
    let reason = if events.exception.is_some() {
        "an exception is being delivered"
    } else if events.nmi_injected {
        "an NMI is being delivered"
    } else if events.interrupt.is_some_and(|it| it.software) {
        "a software interrupt is being delivered"
    } else if events.smm || events.smi_pending {
        "it is in system management mode"
    } else if saved.xsave.len() < XSAVE_LEN {
        SHORT_XSAVE
    } else if saved.xcr0 & !1 != 0 {
        "it has more state than x87 and SSE"
    } else {
        impossible(&saved.special).unwrap_or_default()
    };
    if reason.is_empty() {
        return Ok(());
    }
    Err(vcpu.refuse(reason.to_owned()))
}

/// What no processor's control registers can be (SDM volume 3, 2.5 and 2.2.1).
fn impossible(special: &SpecialRegisters) -> Option<&'static str> {
    const PG: u64 = 1 << 31;
    const PE: u64 = 1;
    const PAE: u64 = 1 << 5;
    const CR0_BITS: u64 = 0xe005_003f;
    // TSD to OSXMMEXCPT, UMIP, FSGSBASE, PCIDE, SMEP, SMAP.
    const CR4_BITS: u64 = 0x33_0ffc;
    const EFER_BITS: u64 = 0xd01;
    let (lme, lma) = (special.efer >> 8 & 1 != 0, special.efer >> 10 & 1 != 0);
    let paging = special.cr0 & PG != 0;
    if special.cr0 & !CR0_BITS != 0 || paging && special.cr0 & PE == 0 {
        Some("no CR0 can be so")
    } else if special.cr4 & !CR4_BITS != 0 {
        Some("no CR4 can be so")
    } else if special.efer & !EFER_BITS != 0
        || lma != (lme && paging)
        || lma && special.cr4 & PAE == 0
    {
        Some("no EFER can be so")
    } else if special.cr8 > 15 {
        Some("no CR8 can be so")
    } else {
        None
    }
}

impl SoftVcpu {
    fn refuse(&self, reason: String) -> EngineError {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, reason);
        EngineError::new(format!("restore vCPU {}", self.index), source)
    }
}

fn restore_local_apic(
    vcpu: &SoftVcpu,
    saved: &VcpuState,
    tsc: Tsc,
    now_ns: u64,
) -> Result<(), EngineError> {
    let page: [u8; LOCAL_APIC_PAGE] = saved
        .local_apic
        .as_slice()
        .try_into()
        .map_err(|_| vcpu.refuse("its local APIC is no page".into()))?;
    let apic = LocalApicState {
        page,
        base: saved.special.apic_base,
        deadline_tsc: saved.msr(MSR_TSC_DEADLINE).unwrap_or(0),
        events: Events::default(),
    };
    vcpu.shared
        .platform
        .restore_local_apic(vcpu.index, &apic, tsc, now_ns)
        .map_err(|_| vcpu.refuse("no local APIC can be in that state".into()))
}

fn restore_msrs(vcpu: &mut SoftVcpu, saved: &VcpuState) -> Result<(), EngineError> {
    for &Msr { index, value } in &saved.msrs {
        if !restore_msr(vcpu, index, value) && value != 0 {
            return Err(vcpu.refuse(format!(
                "the software engine has no MSR {index:#x}, which is {value:#x}"
            )));
        }
    }
    Ok(())
}

fn restore_msr(vcpu: &mut SoftVcpu, index: u32, value: u64) -> bool {
    if let Some(register) = core_register(&mut vcpu.processor.state, index) {
        *register = value;
        return true;
    }
    let shared = &vcpu.shared;
    let local: &Local = &vcpu.local;
    if super::clock::PvClock::owns_msr(index) {
        let instant = local.instant(shared);
        let mut clock = local.pv_clock.borrow_mut();
        return clock
            .write_msr(index, value, &shared.memory, &instant)
            .is_ok();
    }
    if paravirtual::MSRS.contains(&index) {
        let own = &local.paravirtual;
        return own.restore_msr(index, value, &shared.memory).is_ok();
    }
    // The deadline came with the local APIC.
    index == MSR_TSC_DEADLINE || local.msrs.borrow_mut().restore(index, value)
}

fn general(state: &mica_cpu::State) -> GeneralRegisters {
    let r = |index| state.register(index);
    GeneralRegisters {
        rax: r(0),
        rcx: r(1),
        rdx: r(2),
        rbx: r(3),
        rsp: r(4),
        rbp: r(5),
        rsi: r(6),
        rdi: r(7),
        r8: r(8),
        r9: r(9),
        r10: r(10),
        r11: r(11),
        r12: r(12),
        r13: r(13),
        r14: r(14),
        r15: r(15),
        rip: state.rip,
        rflags: state.rflags(),
    }
}

/// A checksum of the general registers, for comparing a run with its recording.
pub(super) fn checksum(state: &mica_cpu::State) -> u32 {
    let bytes = minicbor::to_vec(general(state));
    crc32fast::hash(&bytes.expect("a Vec takes every byte, so encoding cannot fail"))
}

fn restore_general(state: &mut mica_cpu::State, general: &GeneralRegisters) {
    let g = general;
    let registers = [
        g.rax, g.rcx, g.rdx, g.rbx, g.rsp, g.rbp, g.rsi, g.rdi, g.r8, g.r9, g.r10, g.r11, g.r12,
        g.r13, g.r14, g.r15,
    ];
    for (index, value) in registers.into_iter().enumerate() {
        state.set_register(index, value);
    }
    state.rip = g.rip;
    state.set_rflags(g.rflags);
}

fn restore_xsave(state: &mut mica_cpu::State, xsave: &[u8]) {
    if let Some(image) = xsave.first_chunk::<512>() {
        state.fx = FxState::from_image(image);
    }
}

fn from_core(segment: &mica_cpu::Segment) -> Segment {
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        attributes: segment.attributes,
    }
}

fn to_core(segment: &Segment) -> mica_cpu::Segment {
    mica_cpu::Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        attributes: segment.attributes,
    }
}

fn special(state: &mica_cpu::State, apic: &LocalApicState, cr8: u8) -> SpecialRegisters {
    let segment = |name| from_core(state.segment(name));
    let table = |table: &mica_cpu::DescriptorTable| DescriptorTable {
        base: table.base,
        limit: table.limit,
    };
    SpecialRegisters {
        cs: segment(SegmentName::Cs),
        ds: segment(SegmentName::Ds),
        es: segment(SegmentName::Es),
        fs: segment(SegmentName::Fs),
        gs: segment(SegmentName::Gs),
        ss: segment(SegmentName::Ss),
        tr: from_core(&state.tr),
        ldt: from_core(&state.ldt),
        gdt: table(&state.gdt),
        idt: table(&state.idt),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: cr8.into(),
        efer: state.efer,
        apic_base: apic.base,
    }
}

fn restore_special(state: &mut mica_cpu::State, special: &SpecialRegisters) {
    for (name, segment) in [
        (SegmentName::Cs, &special.cs),
        (SegmentName::Ds, &special.ds),
        (SegmentName::Es, &special.es),
        (SegmentName::Fs, &special.fs),
        (SegmentName::Gs, &special.gs),
        (SegmentName::Ss, &special.ss),
    ] {
        state.set_segment(name, to_core(segment));
    }
    state.tr = to_core(&special.tr);
    state.ldt = to_core(&special.ldt);
    let table = |table: &DescriptorTable| mica_cpu::DescriptorTable {
        base: table.base,
        limit: table.limit,
    };
    state.gdt = table(&special.gdt);
    state.idt = table(&special.idt);
    state.cr0 = special.cr0;
    state.cr2 = special.cr2;
    state.cr3 = special.cr3;
    state.cr4 = special.cr4;
    state.efer = special.efer;
}

fn xsave(fx: &FxState) -> Vec<u8> {
    let mut area = vec![0; XSAVE_LEN];
    area[..XSTATE_BV].copy_from_slice(&fx.to_image());
    area[XSTATE_BV] = X87_AND_SSE;
    area
}
