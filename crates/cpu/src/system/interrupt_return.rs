//! IRET, in all its forms (SDM volume 2, IRET/IRETD/IRETQ).

use iced_x86::{Instruction, Mnemonic};

use super::DATA_SEGMENTS;
use super::descriptor::{index_of, is_null, rpl};
use super::stack::Stack;
use crate::error::{Exception, Vector};
use crate::flags::mask;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{Mode, Segment, SegmentName, rflags};

/// What every IRET pops first.
struct Frame {
    rip: u64,
    code: u16,
    flags: u64,
}

impl Processor {
    pub(super) fn interrupt_return(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Executed {
        let size = match instruction.mnemonic() {
            Mnemonic::Iret => 2,
            Mnemonic::Iretd => 4,
            _ => 8,
        };
        if self.virtual_8086() && self.iopl() < 3 {
            return Err(Exception::gp(0));
        }
        if self.has_descriptors() && self.state.flags & rflags::NT != 0 {
            if self.state.long_mode() {
                return Err(Exception::gp(0));
            }
            self.task_return(env, self.next_rip(instruction))?;
            self.state.nmi_blocked = false;
            return Ok(Flow::Jump);
        }
        let mut stack = self.current_stack();
        let frame = Frame {
            rip: self.pop_from(env, &mut stack, size)?,
            code: self.pop_from(env, &mut stack, size)? as u16,
            flags: self.pop_from(env, &mut stack, size)?,
        };
        if !self.has_descriptors() {
            self.return_real(&frame, &stack, size)?;
        } else if frame.flags & rflags::VM != 0
            && size == 4
            && self.state.cpl() == 0
            && !self.state.long_mode()
        {
            self.return_to_8086(env, &frame, &mut stack)?;
        } else {
            self.return_protected(env, &frame, &mut stack, size)?;
        }
        self.state.nmi_blocked = false;
        Ok(Flow::Jump)
    }

    fn return_real(&mut self, frame: &Frame, stack: &Stack, size: u8) -> Result<(), Exception> {
        if frame.rip > self.state.segment(SegmentName::Cs).limit.into() {
            return Err(Exception::gp(0));
        }
        let kept = if self.virtual_8086() { rflags::IOPL } else { 0 };
        let code = self.real_segment(SegmentName::Cs, frame.code);
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = frame.rip;
        self.set_stack_pointer(stack);
        self.return_flags(frame.flags, size, !kept);
        Ok(())
    }

    fn return_to_8086(
        &mut self,
        env: &dyn Environment,
        frame: &Frame,
        stack: &mut Stack,
    ) -> Result<(), Exception> {
        let mut values = [0; 6];
        for value in &mut values {
            *value = self.pop_from(env, stack, 4)?;
        }
        let [pointer, selectors @ ..] = values;
        self.state.set_rflags(frame.flags & 0x3f_ffff);
        let names = [SegmentName::Ss].into_iter().chain(DATA_SEGMENTS);
        let code = (SegmentName::Cs, u64::from(frame.code));
        for (name, selector) in names.zip(selectors).chain([code]) {
            let segment = self.real_segment(name, selector as u16);
            self.state.set_segment(name, segment);
        }
        self.state.rip = frame.rip & 0xffff;
        self.state.set_register(4, pointer);
        Ok(())
    }

    fn return_protected(
        &mut self,
        env: &dyn Environment,
        frame: &Frame,
        stack: &mut Stack,
        size: u8,
    ) -> Result<(), Exception> {
        let cpl = self.state.cpl();
        let new_cpl = rpl(frame.code);
        let code = self.return_code_segment(env, frame.code, frame.rip)?;
        // 64-bit mode pops the stack whether the privilege changes or not.
        let long = self.state.mode() == Mode::Bits64;
        let outer = long || new_cpl > cpl;
        let new_stack = if outer {
            let pointer = self.pop_from(env, stack, size)?;
            let selector = self.pop_from(env, stack, size)? as u16;
            Some((
                pointer,
                self.return_stack_segment(env, selector, &code, new_cpl)?,
            ))
        } else {
            None
        };
        let mut allowed = !0;
        if cpl > 0 {
            allowed &= !rflags::IOPL;
        }
        if cpl > self.iopl() {
            allowed &= !rflags::IF;
        }
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = frame.rip;
        match new_stack {
            Some((pointer, segment)) => self.take_outer_stack(pointer, segment, size),
            None => self.set_stack_pointer(stack),
        }
        self.return_flags(frame.flags, size, allowed & !rflags::VM);
        if new_cpl > cpl {
            self.drop_inner_segments(new_cpl);
        }
        Ok(())
    }

    /// SS and the stack pointer after a return that popped them. A pointer of fewer bytes than the
    /// register keeps the rest of it only on a 16-bit stack.
    pub(super) fn take_outer_stack(&mut self, pointer: u64, segment: Segment, size: u8) {
        self.state.set_segment(SegmentName::Ss, segment);
        let big = segment.attributes & Segment::DEFAULT_BIG != 0;
        let old = self.state.register(4);
        let pointer = match (size, big) {
            (8, _) => pointer,
            (_, true) => pointer & 0xffff_ffff,
            (_, false) if self.state.mode() == Mode::Bits64 => pointer,
            (_, false) => old & !0xffff | pointer & 0xffff,
        };
        self.state.set_register(4, pointer);
    }

    /// The stack segment that a return pops.
    pub(super) fn return_stack_segment(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        code: &Segment,
        cpl: u8,
    ) -> Result<Segment, Exception> {
        let to_long = self.state.long_mode() && code.attributes & Segment::LONG != 0;
        if is_null(selector) {
            if to_long && cpl < 3 && rpl(selector) == cpl {
                return Ok(self.null_stack(selector, cpl));
            }
            return Err(Exception::gp(0));
        }
        self.stack_segment(env, selector, cpl, Vector::GeneralProtection)
    }

    /// The code segment that a return goes to, with the offset in it checked.
    pub(super) fn return_code_segment(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        rip: u64,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let refuse = Exception::gp(index_of(selector));
        let mut code = self.descriptor_or(env, selector, Vector::GeneralProtection)?;
        let level = rpl(selector);
        let wrong_level = if code.is_conforming() {
            code.dpl() > level
        } else {
            code.dpl() != level
        };
        if level < self.state.cpl() || !code.is_code() || wrong_level || self.is_mixed(&code) {
            return Err(refuse);
        }
        if !code.present() {
            let absent = Vector::SegmentNotPresent;
            return Err(Exception::with_code(absent, index_of(selector)));
        }
        self.check_offset(&code, rip)?;
        self.mark_accessed(env, &mut code)?;
        Ok(code.segment(selector))
    }

    /// After a return to an outer level: data segments that it may not access become null.
    pub(super) fn drop_inner_segments(&mut self, cpl: u8) {
        for name in DATA_SEGMENTS {
            let segment = *self.state.segment(name);
            let usable = segment.attributes & Segment::UNUSABLE == 0;
            let conforming = segment.attributes & 0xc == 0xc;
            if usable && !conforming && segment.dpl() < cpl {
                let null = self.null_segment(name, 0);
                self.state.set_segment(name, null);
            }
        }
    }

    /// Loads the flags of an IRET of `size` bytes, those of `allowed`.
    fn return_flags(&mut self, popped: u64, size: u8, allowed: u64) {
        let mut which = rflags::STATUS
            | rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::RF
            | rflags::AC
            | rflags::ID;
        which &= mask(size) & allowed;
        let old = self.state.rflags();
        self.state.set_rflags(old & !which | popped & which);
    }
}
