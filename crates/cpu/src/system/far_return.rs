//! Far RET (SDM volume 2, RET).

use iced_x86::{Code, Instruction};

use super::descriptor::rpl;
use crate::error::Exception;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::SegmentName;

impl Processor {
    pub(super) fn far_return(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Executed {
        let size = match instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let parameters = match instruction.op_count() {
            0 => 0,
            _ => i64::from(instruction.immediate16()),
        };
        let mut stack = self.current_stack();
        let rip = self.pop_from(env, &mut stack, size)?;
        let selector = self.pop_from(env, &mut stack, size)? as u16;
        stack.advance(parameters);
        if !self.has_descriptors() {
            let code = self.real_segment(SegmentName::Cs, selector);
            if rip > code.limit.into() {
                return Err(Exception::gp(0));
            }
            self.state.set_segment(SegmentName::Cs, code);
            self.state.rip = rip;
            self.set_stack_pointer(&stack);
            return Ok(Flow::Jump);
        }
        let cpl = self.state.cpl();
        let code = self.return_code_segment(env, selector, rip)?;
        if rpl(selector) == cpl {
            self.state.set_segment(SegmentName::Cs, code);
            self.state.rip = rip;
            self.set_stack_pointer(&stack);
            return Ok(Flow::Jump);
        }
        let outer = rpl(selector);
        let pointer = self.pop_from(env, &mut stack, size)?;
        let outer_selector = self.pop_from(env, &mut stack, size)? as u16;
        let segment = self.return_stack_segment(env, outer_selector, &code, outer)?;
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = rip;
        self.take_outer_stack(pointer, segment, size);
        self.move_stack(parameters);
        self.drop_inner_segments(outer);
        Ok(Flow::Jump)
    }
}
