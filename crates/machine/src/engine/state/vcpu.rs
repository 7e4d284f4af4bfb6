//! One virtual processor.

use minicbor::{Decode, Encode};

use crate::device::{RestoreError, SavedState};

/// The bytes of a local APIC's register page that hold registers.
pub const LOCAL_APIC_PAGE: usize = 1024;
/// More than any processor's XSAVE area (AMX included).
pub const MAX_XSAVE: usize = 64 << 10;
/// More MSRs than any engine knows.
pub const MAX_MSRS: usize = 4096;

/// Everything a guest can observe of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct VcpuState {
    /// General registers.
    #[n(0)]
    pub general: GeneralRegisters,
    /// Segments, descriptor tables and control registers.
    #[n(1)]
    pub special: SpecialRegisters,
    /// Debug registers.
    #[n(2)]
    pub debug: DebugRegisters,
    /// XCR0; 1 on a processor without XSAVE.
    #[n(3)]
    pub xcr0: u64,
    /// The XSAVE area in its standard format (SDM volume 1, 13.4): x87 and SSE in the legacy region,
    /// then the header, then what XSTATE_BV says. A processor without XSAVE has the first two.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub xsave: Vec<u8>,
    /// Model-specific registers that exist and can be read, in an order in which they can be
    /// written. EFER and the APIC base are in [`Self::special`].
    #[n(5)]
    pub msrs: Vec<Msr>,
    /// The local APIC's registers: the first 1024 bytes of its page, as the guest would read them.
    #[cbor(n(6), with = "minicbor::bytes")]
    pub local_apic: Vec<u8>,
    /// What is on its way to the processor's core.
    #[n(7)]
    pub events: PendingEvents,
    /// Whether it runs.
    #[n(8)]
    pub run_state: RunState,
    /// The frequency of its time-stamp counter in kHz; 0 if the host cannot say.
    #[n(9)]
    pub tsc_khz: u32,
    /// Its time-stamp counter when the state was taken. It stands still until the state is restored.
    #[n(10)]
    pub tsc: u64,
}

/// RAX to R15, RIP and RFLAGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[allow(missing_docs)] // the names are the registers'
pub struct GeneralRegisters {
    #[n(0)]
    pub rax: u64,
    #[n(1)]
    pub rbx: u64,
    #[n(2)]
    pub rcx: u64,
    #[n(3)]
    pub rdx: u64,
    #[n(4)]
    pub rsi: u64,
    #[n(5)]
    pub rdi: u64,
    #[n(6)]
    pub rsp: u64,
    #[n(7)]
    pub rbp: u64,
    #[n(8)]
    pub r8: u64,
    #[n(9)]
    pub r9: u64,
    #[n(10)]
    pub r10: u64,
    #[n(11)]
    pub r11: u64,
    #[n(12)]
    pub r12: u64,
    #[n(13)]
    pub r13: u64,
    #[n(14)]
    pub r14: u64,
    #[n(15)]
    pub r15: u64,
    #[n(16)]
    pub rip: u64,
    #[n(17)]
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Segment {
    /// The visible part.
    #[n(0)]
    pub selector: u16,
    /// Linear address of its first byte.
    #[n(1)]
    pub base: u64,
    /// Its last offset, in bytes whatever the granularity.
    #[n(2)]
    pub limit: u32,
    /// The descriptor's attributes as VMX has them (SDM volume 3, table 25-2): type in bits 0-3,
    /// S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    #[n(3)]
    pub attributes: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct DescriptorTable {
    /// Linear address.
    #[n(0)]
    pub base: u64,
    /// Its last byte's offset.
    #[n(1)]
    pub limit: u16,
}

/// Segments, descriptor tables, control registers, EFER and the APIC base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[allow(missing_docs)] // the names are the registers'
pub struct SpecialRegisters {
    #[n(0)]
    pub cs: Segment,
    #[n(1)]
    pub ds: Segment,
    #[n(2)]
    pub es: Segment,
    #[n(3)]
    pub fs: Segment,
    #[n(4)]
    pub gs: Segment,
    #[n(5)]
    pub ss: Segment,
    #[n(6)]
    pub tr: Segment,
    #[n(7)]
    pub ldt: Segment,
    #[n(8)]
    pub gdt: DescriptorTable,
    #[n(9)]
    pub idt: DescriptorTable,
    #[n(10)]
    pub cr0: u64,
    #[n(11)]
    pub cr2: u64,
    #[n(12)]
    pub cr3: u64,
    #[n(13)]
    pub cr4: u64,
    #[n(14)]
    pub cr8: u64,
    #[n(15)]
    pub efer: u64,
    #[n(16)]
    pub apic_base: u64,
}

/// DR0 to DR3, DR6 and DR7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct DebugRegisters {
    /// DR0 to DR3.
    #[n(0)]
    pub addresses: [u64; 4],
    /// DR6.
    #[n(1)]
    pub dr6: u64,
    /// DR7.
    #[n(2)]
    pub dr7: u64,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Msr {
    /// What RDMSR takes in ECX.
    #[n(0)]
    pub index: u32,
    /// Its content.
    #[n(1)]
    pub value: u64,
}

/// Events between their cause and the guest's handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PendingEvents {
    /// A fault or trap.
    #[n(0)]
    pub exception: Option<PendingException>,
    /// An external or software interrupt that was acknowledged.
    #[n(1)]
    pub interrupt: Option<PendingInterrupt>,
    /// Interrupt shadow: bit 0 after MOV SS, bit 1 after STI.
    #[n(2)]
    pub shadow: u8,
    /// An NMI is being delivered.
    #[n(3)]
    pub nmi_injected: bool,
    /// An NMI waits.
    #[n(4)]
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    #[n(5)]
    pub nmi_masked: bool,
    /// In system management mode.
    #[n(6)]
    pub smm: bool,
    /// An SMI waits.
    #[n(7)]
    pub smi_pending: bool,
    /// NMIs were blocked when the SMI came.
    #[n(8)]
    pub smm_inside_nmi: bool,
    /// An INIT waits for the end of system management mode.
    #[n(9)]
    pub init_latched: bool,
    /// A triple fault waits to be reported.
    #[n(10)]
    pub triple_fault: bool,
    /// It was kicked (`KVM_HC_KICK_CPU`) since its last HLT, so that the next one returns at once. KVM
    /// tells it of halted vCPUs only, by their run state, and takes it in no other way.
    #[n(11)]
    #[cbor(default)]
    pub kicked: bool,
}

/// A fault or trap on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PendingException {
    /// 0 to 31.
    #[n(0)]
    pub vector: u8,
    /// If the vector has one.
    #[n(1)]
    pub error_code: Option<u32>,
    /// The side effects on CR2 or DR6 that its delivery will have, if they are still to come.
    #[n(2)]
    pub payload: Option<u64>,
    /// Its delivery has begun (an engine that delivers it again must not call it a double fault).
    #[n(3)]
    pub injected: bool,
}

/// An interrupt whose delivery has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PendingInterrupt {
    /// 0 to 255.
    #[n(0)]
    pub vector: u8,
    /// By INT n rather than from a controller.
    #[n(1)]
    pub software: bool,
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum RunState {
    /// It executes instructions.
    #[default]
    #[n(0)]
    Running,
    /// An application processor before its INIT.
    #[n(1)]
    WaitForInit,
    /// After INIT, before its SIPI.
    #[n(2)]
    WaitForSipi,
    /// It has executed HLT.
    #[n(3)]
    Halted,
}

impl VcpuState {
    /// In the form of a device's state.
    #[must_use]
    pub fn to_saved(&self) -> SavedState {
        SavedState::new(super::STATE_VERSION, self)
    }

    /// Reads and checks what [`Self::to_saved`] has made, here or elsewhere.
    ///
    /// # Errors
    ///
    /// See [`RestoreError`].
    pub fn from_saved(saved: &SavedState) -> Result<Self, RestoreError> {
        let state: Self = saved.read(super::STATE_VERSION)?;
        state.check().map_err(RestoreError::Impossible)?;
        Ok(state)
    }

    /// What every engine may rely on: sizes, and registers that address an engine's own tables.
    fn check(&self) -> Result<(), String> {
        if self.local_apic.len() != LOCAL_APIC_PAGE {
            return Err(format!("{} bytes of local APIC", self.local_apic.len()));
        }
        // Legacy region and header are 576 bytes; the rest comes in words.
        if !(576..=MAX_XSAVE).contains(&self.xsave.len()) || !self.xsave.len().is_multiple_of(4) {
            return Err(format!("{} bytes of XSAVE area", self.xsave.len()));
        }
        if self.msrs.len() > MAX_MSRS {
            return Err(format!("{} MSRs", self.msrs.len()));
        }
        if let Some(exception) = self.events.exception
            && exception.vector > 31
        {
            return Err(format!("exception {}", exception.vector));
        }
        Ok(())
    }

    /// The MSR of that index, if the state has it.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut found = self.msrs.iter().filter(|msr| msr.index == index);
        found.next().map(|msr| msr.value)
    }

    /// Changes the MSR of that index, if the state has it.
    pub fn set_msr(&mut self, index: u32, value: u64) {
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == index) {
            msr.value = value;
        }
    }
}
