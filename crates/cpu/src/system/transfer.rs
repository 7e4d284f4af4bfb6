//! Far JMP and far CALL (SDM volume 2, JMP and CALL; volume 3, 5.8).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::descriptor::{Descriptor, index_of, is_null, kind, rpl};
use super::task::Entry;
use crate::error::{Exception, Vector};
use crate::mmu::Access;
use crate::mmu::access::is_canonical;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::SegmentName;

/// A far transfer as the instruction names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Far {
    pub(super) selector: u16,
    pub(super) offset: u64,
    /// Bytes of an operand: 2, 4 or 8.
    pub(super) size: u8,
    pub(super) call: bool,
    /// Where a call returns to.
    pub(super) next_rip: u64,
}

impl Processor {
    /// Executes the instruction if it is a far JMP, CALL or RET.
    pub(super) fn far_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let call = match instruction.mnemonic() {
            Mnemonic::Jmp => false,
            Mnemonic::Call => true,
            Mnemonic::Retf => return Some(self.far_return(env, instruction)),
            _ => return None,
        };
        let far = self.far_target(env, instruction, call);
        Some(far.and_then(|far| self.far_transfer(env, far)))
    }

    fn far_target(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        call: bool,
    ) -> Result<Far, Exception> {
        let size = far_offset_size(instruction.code());
        let (offset, selector) = match instruction.op_kind(0) {
            OpKind::FarBranch16 => (
                u64::from(instruction.far_branch16()),
                instruction.far_branch_selector(),
            ),
            OpKind::FarBranch32 => (
                u64::from(instruction.far_branch32()),
                instruction.far_branch_selector(),
            ),
            _ => {
                let bytes = u64::from(size) + 2;
                let linear = self.operand_address(instruction, bytes, Access::Read)?;
                let offset = self.load(env, linear, size)?;
                let second = self.wrap_linear(linear.wrapping_add(size.into()));
                (offset, self.load(env, second, 2)? as u16)
            }
        };
        Ok(Far {
            selector,
            offset,
            size,
            call,
            next_rip: self.next_rip(instruction),
        })
    }

    fn far_transfer(&mut self, env: &dyn Environment, far: Far) -> Executed {
        if self.has_descriptors() {
            self.far_protected(env, far)?;
        } else {
            self.far_real(env, far)?;
        }
        Ok(Flow::Jump)
    }

    fn far_real(&mut self, env: &dyn Environment, far: Far) -> Result<(), Exception> {
        let code = self.real_segment(SegmentName::Cs, far.selector);
        if far.offset > code.limit.into() {
            return Err(Exception::gp(0));
        }
        if far.call {
            self.push_return(env, &far)?;
        }
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = far.offset;
        Ok(())
    }

    /// Pushes CS and the next instruction's offset on the current stack.
    fn push_return(&mut self, env: &dyn Environment, far: &Far) -> Result<(), Exception> {
        let mut stack = self.current_stack();
        let selector = self.state.segment(SegmentName::Cs).selector;
        self.push_on(env, &mut stack, far.size, selector.into())?;
        self.push_on(env, &mut stack, far.size, far.next_rip)?;
        self.set_stack_pointer(&stack);
        Ok(())
    }

    fn far_protected(&mut self, env: &dyn Environment, far: Far) -> Result<(), Exception> {
        if is_null(far.selector) {
            return Err(Exception::gp(0));
        }
        let descriptor = self.descriptor_or(env, far.selector, Vector::GeneralProtection)?;
        if descriptor.is_system() {
            return self.far_by_system_descriptor(env, far, descriptor);
        }
        let cpl = self.state.cpl();
        let refuse = Exception::gp(index_of(far.selector));
        let allowed = if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            descriptor.dpl() == cpl && rpl(far.selector) <= cpl
        };
        if !descriptor.is_code() || !allowed || self.is_mixed(&descriptor) {
            return Err(refuse);
        }
        self.require_present(&descriptor, far.selector)?;
        self.check_offset(&descriptor, far.offset)?;
        let mut descriptor = descriptor;
        self.mark_accessed(env, &mut descriptor)?;
        if far.call {
            self.push_return(env, &far)?;
        }
        let code = descriptor.segment(far.selector & !3 | u16::from(cpl));
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = far.offset;
        Ok(())
    }

    pub(super) fn require_present(
        &self,
        descriptor: &Descriptor,
        selector: u16,
    ) -> Result<(), Exception> {
        if descriptor.present() {
            return Ok(());
        }
        let absent = Vector::SegmentNotPresent;
        Err(Exception::with_code(absent, index_of(selector)))
    }

    /// Code that claims to be 64-bit and 32-bit at once, in IA-32e mode.
    pub(super) fn is_mixed(&self, code: &Descriptor) -> bool {
        self.state.long_mode() && code.is_long() && code.is_big()
    }

    /// An offset in a code segment that a transfer goes to.
    pub(super) fn check_offset(&self, code: &Descriptor, offset: u64) -> Result<(), Exception> {
        let inside = if self.state.long_mode() && code.is_long() {
            is_canonical(offset)
        } else {
            offset <= code.limit().into()
        };
        if inside {
            Ok(())
        } else {
            Err(Exception::gp(0))
        }
    }

    fn far_by_system_descriptor(
        &mut self,
        env: &dyn Environment,
        far: Far,
        descriptor: Descriptor,
    ) -> Result<(), Exception> {
        let refuse = Exception::gp(index_of(far.selector));
        let long = self.state.long_mode();
        let level = self.state.cpl().max(rpl(far.selector));
        let entry = if far.call { Entry::Nested } else { Entry::Jump };
        match descriptor.kind() {
            _ if descriptor.dpl() < level => Err(refuse),
            kind::CALL_GATE => self.through_call_gate(env, far, &descriptor),
            kind::CALL_GATE_16 if !long => self.through_call_gate(env, far, &descriptor),
            kind::TASK_GATE if !long => {
                self.require_present(&descriptor, far.selector)?;
                let selector = descriptor.gate_selector();
                let task = self.task_descriptor(env, selector, false)?;
                self.switch_task(env, selector, task, entry, far.next_rip)
            }
            kind::TSS | kind::TSS_16 if !long => {
                let task = self.task_descriptor(env, far.selector, false)?;
                self.switch_task(env, far.selector, task, entry, far.next_rip)
            }
            _ => Err(refuse),
        }
    }
}

/// Bytes of the offset in a far pointer: 2, 4 or 8.
fn far_offset_size(code: Code) -> u8 {
    match code {
        Code::Jmp_m1616 | Code::Call_m1616 | Code::Jmp_ptr1616 | Code::Call_ptr1616 => 2,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => 4,
    }
}
