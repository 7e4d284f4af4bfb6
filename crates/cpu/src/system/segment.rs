//! Loads of segment registers: MOV to one, POP of one, LDS and its kin; and the bases of FS and GS.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::cr4;
use super::descriptor::{index_of, is_null, rpl};
use crate::error::{Exception, Vector};
use crate::execute::operand::{operand_size, segment_name};
use crate::mmu::Access;
use crate::mmu::access::is_canonical;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{Mode, Segment, SegmentName};

impl Processor {
    /// Executes the instruction if it loads a segment register or a segment's base.
    pub(super) fn segment_load(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let register = || segment_name(instruction.op_register(0));
        let far_pointer = match instruction.mnemonic() {
            Mnemonic::Mov if instruction.op_kind(0) == OpKind::Register => {
                let name = register()?;
                return Some(self.move_to_segment(env, instruction, name));
            }
            Mnemonic::Pop if instruction.op_kind(0) == OpKind::Register => {
                let name = register()?;
                return Some(self.pop_segment(env, instruction, name));
            }
            Mnemonic::Lds => SegmentName::Ds,
            Mnemonic::Les => SegmentName::Es,
            Mnemonic::Lfs => SegmentName::Fs,
            Mnemonic::Lgs => SegmentName::Gs,
            Mnemonic::Lss => SegmentName::Ss,
            _ => return self.segment_base(instruction),
        };
        Some(self.load_far_pointer(env, instruction, far_pointer))
    }

    fn move_to_segment(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        name: SegmentName,
    ) -> Executed {
        if name == SegmentName::Cs {
            return Err(Exception::ud());
        }
        let selector = self.selector_operand(env, instruction, 1)?;
        self.load_segment(env, name, selector)?;
        self.state.shadow = name == SegmentName::Ss;
        Ok(Flow::Next)
    }

    fn pop_segment(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        name: SegmentName,
    ) -> Executed {
        let size = instruction.stack_pointer_increment().unsigned_abs() as u8;
        // Of a wider stack slot only the selector is read.
        let linear = self.stack_address(0, size, Access::Read)?;
        let selector = self.load(env, linear, 2)?;
        // The stack that is popped is the one before SS changes.
        let mut stack = self.current_stack();
        stack.advance(size.into());
        self.load_segment(env, name, selector as u16)?;
        self.set_stack_pointer(&stack);
        self.state.shadow = name == SegmentName::Ss;
        Ok(Flow::Next)
    }

    fn load_far_pointer(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        name: SegmentName,
    ) -> Executed {
        let size = operand_size(instruction, 0);
        let linear = self.operand_address(instruction, u64::from(size) + 2, Access::Read)?;
        let offset = self.load(env, linear, size)?;
        let second = self.wrap_linear(linear.wrapping_add(size.into()));
        let selector = self.load(env, second, 2)?;
        self.load_segment(env, name, selector as u16)?;
        self.write_register(instruction.op_register(0), offset);
        Ok(Flow::Next)
    }

    /// Loads a data segment register or SS with the checks of the mode.
    pub(super) fn load_segment(
        &mut self,
        env: &dyn Environment,
        name: SegmentName,
        selector: u16,
    ) -> Result<(), Exception> {
        let segment = if self.has_descriptors() {
            let cpl = self.state.cpl();
            if name == SegmentName::Ss {
                self.stack_segment(env, selector, cpl, Vector::GeneralProtection)?
            } else {
                self.data_segment(env, name, selector)?
            }
        } else {
            self.real_segment(name, selector)
        };
        self.state.set_segment(name, segment);
        Ok(())
    }

    fn data_segment(
        &mut self,
        env: &dyn Environment,
        name: SegmentName,
        selector: u16,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Ok(self.null_segment(name, selector));
        }
        let refuse = Exception::gp(index_of(selector));
        let mut descriptor = self.descriptor_or(env, selector, Vector::GeneralProtection)?;
        let dpl = descriptor.dpl();
        let private = !descriptor.is_conforming();
        if !descriptor.is_readable() || private && (rpl(selector) > dpl || self.state.cpl() > dpl) {
            return Err(refuse);
        }
        if !descriptor.present() {
            let absent = Vector::SegmentNotPresent;
            return Err(Exception::with_code(absent, index_of(selector)));
        }
        self.mark_accessed(env, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// What a register holds after it was loaded with a null selector.
    pub(super) fn null_segment(&self, name: SegmentName, selector: u16) -> Segment {
        Segment {
            selector,
            base: 0,
            limit: self.state.segment(name).limit,
            attributes: Segment::UNUSABLE,
        }
    }

    /// The stack segment of a selector for privilege level `cpl`; `vector` (#GP or #TS) says that it is
    /// none. A null one is allowed in 64-bit mode below CPL 3.
    pub(super) fn stack_segment(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        cpl: u8,
        vector: Vector,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            if self.state.mode() == Mode::Bits64 && cpl < 3 && rpl(selector) == cpl {
                return Ok(self.null_stack(selector, cpl));
            }
            return Err(Exception::with_code(vector, 0));
        }
        let mut descriptor = self.descriptor_or(env, selector, vector)?;
        if rpl(selector) != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(Exception::with_code(vector, index_of(selector)));
        }
        if !descriptor.present() {
            let absent = Vector::StackFault;
            return Err(Exception::with_code(absent, index_of(selector)));
        }
        self.mark_accessed(env, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// SS after it was loaded with a null selector in 64-bit mode: its DPL is still the CPL.
    pub(super) fn null_stack(&self, selector: u16, cpl: u8) -> Segment {
        Segment {
            attributes: Segment::UNUSABLE | u32::from(cpl) << 5,
            ..self.null_segment(SegmentName::Ss, selector)
        }
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE.
    fn segment_base(&mut self, instruction: &Instruction) -> Option<Executed> {
        let (name, write) = match instruction.mnemonic() {
            Mnemonic::Rdfsbase => (SegmentName::Fs, false),
            Mnemonic::Rdgsbase => (SegmentName::Gs, false),
            Mnemonic::Wrfsbase => (SegmentName::Fs, true),
            Mnemonic::Wrgsbase => (SegmentName::Gs, true),
            _ => return None,
        };
        let register = instruction.op_register(0);
        Some(self.access_base(name, register, write))
    }

    fn access_base(&mut self, name: SegmentName, register: Register, write: bool) -> Executed {
        if self.state.cr4 & cr4::FSGSBASE == 0 || self.state.mode() != Mode::Bits64 {
            return Err(Exception::ud());
        }
        if !write {
            self.write_register(register, self.state.segment(name).base);
            return Ok(Flow::Next);
        }
        let base = self.read_register(register);
        if !is_canonical(base) {
            return Err(Exception::gp(0));
        }
        self.set_base(name, base);
        Ok(Flow::Next)
    }

    /// Sets a segment's base alone.
    pub(super) fn set_base(&mut self, name: SegmentName, base: u64) {
        let segment = Segment {
            base,
            ..*self.state.segment(name)
        };
        self.state.set_segment(name, segment);
    }
}
