//! What a kernel sees: exceptions and interrupts, segment loads and far transfers, tasks, system
//! calls, privileged registers, ports.
//!
//! Every instruction reads and checks all that it needs before it changes a register, so that a fault
//! finds the state as it was; [`Processor::deliver_exception`] relies on that.

mod call_gate;
mod control;
mod cpuid;
mod debug;
mod deliver;
mod descriptor;
mod far_return;
mod hypercall;
mod interrupt_return;
mod msr;
mod port;
mod real_mode;
mod segment;
mod stack;
mod syscall;
mod table;
mod task;
mod transfer;

use iced_x86::Instruction;

use crate::error::Exception;
use crate::processor::{Environment, Executed, Processor};
use crate::state::{Segment, SegmentName, rflags};

pub(crate) use debug::Hits;
pub(crate) use deliver::TripleFault;
pub use hypercall::Hypercall;

/// The registers of data segments but for SS, in the order in which IRET pops them.
const DATA_SEGMENTS: [SegmentName; 4] = [
    SegmentName::Es,
    SegmentName::Ds,
    SegmentName::Fs,
    SegmentName::Gs,
];

/// Bits of CR0.
mod cr0 {
    pub(super) const PE: u64 = 1 << 0;
    pub(super) const MP: u64 = 1 << 1;
    pub(super) const EM: u64 = 1 << 2;
    pub(super) const TS: u64 = 1 << 3;
    pub(super) const ET: u64 = 1 << 4;
    pub(super) const NE: u64 = 1 << 5;
    pub(super) const WP: u64 = 1 << 16;
    pub(super) const AM: u64 = 1 << 18;
    pub(super) const NW: u64 = 1 << 29;
    pub(super) const CD: u64 = 1 << 30;
    pub(super) const PG: u64 = 1 << 31;
}

/// Bits of CR4.
mod cr4 {
    pub(super) const TSD: u64 = 1 << 2;
    pub(super) const DE: u64 = 1 << 3;
    pub(super) const PSE: u64 = 1 << 4;
    pub(super) const PAE: u64 = 1 << 5;
    pub(super) const MCE: u64 = 1 << 6;
    pub(super) const PGE: u64 = 1 << 7;
    pub(super) const PCE: u64 = 1 << 8;
    pub(super) const OSFXSR: u64 = 1 << 9;
    pub(super) const OSXMMEXCPT: u64 = 1 << 10;
    pub(super) const UMIP: u64 = 1 << 11;
    pub(super) const FSGSBASE: u64 = 1 << 16;
    pub(super) const PCIDE: u64 = 1 << 17;
    pub(super) const SMEP: u64 = 1 << 20;
    pub(super) const SMAP: u64 = 1 << 21;
}

/// Bits of EFER.
mod efer {
    pub(super) const SCE: u64 = 1 << 0;
    pub(super) const LME: u64 = 1 << 8;
    pub(super) const LMA: u64 = 1 << 10;
    pub(super) const NXE: u64 = 1 << 11;
}

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(crate) fn system_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        self.segment_load(env, instruction)
            .or_else(|| self.syscall_instruction(instruction))
            .or_else(|| self.port_instruction(env, instruction))
            .or_else(|| self.control_register_instruction(env, instruction))
            .or_else(|| self.far_instruction(env, instruction))
            .or_else(|| self.interrupt_instruction(env, instruction))
            .or_else(|| self.msr_instruction(env, instruction))
            .or_else(|| self.hypercall_instruction(env, instruction))
            .or_else(|| self.table_instruction(env, instruction))
            .or_else(|| self.descriptor_query(env, instruction))
    }

    fn protected(&self) -> bool {
        self.state.cr0 & cr0::PE != 0
    }

    fn virtual_8086(&self) -> bool {
        self.protected() && self.state.flags & rflags::VM != 0
    }

    /// Protected mode without virtual-8086 mode: selectors name descriptors.
    fn has_descriptors(&self) -> bool {
        self.protected() && self.state.flags & rflags::VM == 0
    }

    fn iopl(&self) -> u8 {
        (self.state.flags >> 12 & 3) as u8
    }

    /// #GP(0) above CPL 0.
    fn require_supervisor(&self) -> Result<(), Exception> {
        if self.state.cpl() == 0 {
            Ok(())
        } else {
            Err(Exception::gp(0))
        }
    }

    /// Sets the CPL, which is SS's DPL.
    fn set_cpl(&mut self, cpl: u8) {
        let mut stack = *self.state.segment(SegmentName::Ss);
        stack.attributes = stack.attributes & !Segment::DPL | u32::from(cpl) << 5;
        self.state.set_segment(SegmentName::Ss, stack);
    }
}
