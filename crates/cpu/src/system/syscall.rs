//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and SWAPGS (SDM volume 3, 5.8.7 and 5.8.8).

use iced_x86::{Instruction, Mnemonic};

use super::efer;
use crate::error::Exception;
use crate::mmu::access::is_canonical;
use crate::processor::{Executed, Flow, Processor};
use crate::state::{Mode, Segment, SegmentName, rflags};

/// Attributes of a flat, present, accessed code segment.
const CODE: u32 = 0x809b;
/// The same of a data segment, with a 32-bit stack pointer.
const DATA: u32 = 0xc093;

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn syscall_instruction(&mut self, instruction: &Instruction) -> Option<Executed> {
        Some(match instruction.mnemonic() {
            Mnemonic::Syscall => self.system_call(instruction),
            Mnemonic::Sysret => self.system_return(4),
            Mnemonic::Sysretq => self.system_return(8),
            Mnemonic::Sysenter => self.system_enter(),
            Mnemonic::Sysexit => self.system_exit(4),
            Mnemonic::Sysexitq => self.system_exit(8),
            Mnemonic::Swapgs => self.swap_gs(),
            _ => return None,
        })
    }

    /// Flat code and stack segments at a privilege level; `mode` is the code segment's L or D bit.
    fn set_flat(&mut self, code: u16, stack: u16, cpl: u8, mode: u32) {
        let level = u32::from(cpl) << 5;
        let flat = |selector: u16, attributes| Segment {
            selector: selector & !3 | u16::from(cpl),
            base: 0,
            limit: u32::MAX,
            attributes: attributes | level,
        };
        let code = flat(code, CODE | mode);
        let stack = flat(stack, DATA);
        self.state.set_segment(SegmentName::Cs, code);
        self.state.set_segment(SegmentName::Ss, stack);
    }

    fn system_call(&mut self, instruction: &Instruction) -> Executed {
        if self.state.efer & efer::SCE == 0 || self.state.mode() != Mode::Bits64 {
            return Err(Exception::ud());
        }
        let flags = self.state.rflags();
        self.state.set_register(1, self.next_rip(instruction));
        self.state.set_register(11, flags & !rflags::RF);
        let selector = (self.state.star >> 32) as u16;
        self.set_flat(selector, selector.wrapping_add(8), 0, Segment::LONG);
        self.state.rip = self.state.lstar;
        self.state
            .set_rflags(flags & !self.state.sfmask & !rflags::RF | rflags::FIXED);
        Ok(Flow::Jump)
    }

    fn system_return(&mut self, size: u8) -> Executed {
        if self.state.efer & efer::SCE == 0 || self.state.mode() != Mode::Bits64 {
            return Err(Exception::ud());
        }
        self.require_supervisor()?;
        let target = self.state.register(1);
        if size == 8 && !is_canonical(target) {
            return Err(Exception::gp(0));
        }
        let base = (self.state.star >> 48) as u16;
        let stack = base.wrapping_add(8);
        let flags = self.state.register(11);
        if size == 8 {
            self.set_flat(base.wrapping_add(16), stack, 3, Segment::LONG);
            self.state.rip = target;
        } else {
            self.set_flat(base, stack, 3, Segment::DEFAULT_BIG);
            self.state.rip = target & 0xffff_ffff;
        }
        self.state.set_rflags(flags & 0x3c_7fd7 | rflags::FIXED);
        Ok(Flow::Jump)
    }

    fn system_enter(&mut self) -> Executed {
        let [selector, stack_pointer, target] = self.state.sysenter;
        if !self.protected() || selector & 0xfffc == 0 {
            return Err(Exception::gp(0));
        }
        let long = self.state.long_mode();
        let flags = self.state.rflags() & !(rflags::VM | rflags::IF | rflags::RF);
        self.state.set_rflags(flags);
        let mode = if long {
            Segment::LONG
        } else {
            Segment::DEFAULT_BIG
        };
        let selector = selector as u16;
        self.set_flat(selector, selector.wrapping_add(8), 0, mode);
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.state.set_register(4, stack_pointer & mask);
        self.state.rip = target & mask;
        Ok(Flow::Jump)
    }

    fn system_exit(&mut self, size: u8) -> Executed {
        let selector = self.state.sysenter[0] as u16;
        if !self.protected() || selector & 0xfffc == 0 {
            return Err(Exception::gp(0));
        }
        self.require_supervisor()?;
        let (target, stack_pointer) = (self.state.register(2), self.state.register(1));
        if size == 8 {
            if !is_canonical(target) || !is_canonical(stack_pointer) {
                return Err(Exception::gp(0));
            }
            let code = selector.wrapping_add(32);
            self.set_flat(code, code.wrapping_add(8), 3, Segment::LONG);
            self.state.rip = target;
            self.state.set_register(4, stack_pointer);
        } else {
            let code = selector.wrapping_add(16);
            self.set_flat(code, code.wrapping_add(8), 3, Segment::DEFAULT_BIG);
            self.state.rip = target & 0xffff_ffff;
            self.state.set_register(4, stack_pointer & 0xffff_ffff);
        }
        Ok(Flow::Jump)
    }

    fn swap_gs(&mut self) -> Executed {
        if self.state.mode() != Mode::Bits64 {
            return Err(Exception::ud());
        }
        self.require_supervisor()?;
        let base = self.state.segment(SegmentName::Gs).base;
        self.set_base(SegmentName::Gs, self.state.kernel_gs_base);
        self.state.kernel_gs_base = base;
        Ok(Flow::Next)
    }
}
