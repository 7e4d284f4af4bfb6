//! Transfers through call gates (SDM volume 3, 5.8.3 to 5.8.5).

use super::descriptor::{Descriptor, index_of, is_null, kind};
use super::stack::Stack;
use super::transfer::Far;
use crate::error::{Exception, Vector};
use crate::processor::{Environment, Processor};
use crate::state::SegmentName;

impl Processor {
    pub(super) fn through_call_gate(
        &mut self,
        env: &dyn Environment,
        far: Far,
        gate: &Descriptor,
    ) -> Result<(), Exception> {
        self.require_present(gate, far.selector)?;
        let long = self.state.long_mode();
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let refuse = Exception::gp(index_of(selector));
        let mut code = self.descriptor_or(env, selector, Vector::GeneralProtection)?;
        let cpl = self.state.cpl();
        if !code.is_code() || code.dpl() > cpl || long && (!code.is_long() || code.is_big()) {
            return Err(refuse);
        }
        if !far.call && !code.is_conforming() && code.dpl() != cpl {
            return Err(refuse);
        }
        self.require_present(&code, selector)?;
        let wide = gate.kind() == kind::CALL_GATE;
        let offset = match (long, wide) {
            (true, _) => gate.gate_offset() | self.upper_half(env, far.selector)? << 32,
            (false, true) => gate.gate_offset(),
            (false, false) => gate.gate_offset() & 0xffff,
        };
        self.check_offset(&code, offset)?;
        self.mark_accessed(env, &mut code)?;
        let inner = far.call && !code.is_conforming() && code.dpl() < cpl;
        let new_cpl = if inner { code.dpl() } else { cpl };
        if far.call {
            let size = match (long, wide) {
                (true, _) => 8,
                (false, true) => 4,
                (false, false) => 2,
            };
            let parameters = if long {
                0
            } else {
                (gate.raw >> 32 & 31) as i64
            };
            let stack = self.gate_stack(env, &far, size, inner.then_some(new_cpl), parameters)?;
            self.state.set_segment(SegmentName::Ss, stack.segment);
            self.set_stack_pointer(&stack);
        }
        let code = code.segment(selector & !3 | u16::from(new_cpl));
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = offset;
        Ok(())
    }

    /// The stack after the call: that of the inner level with the old stack and the parameters on it,
    /// or the current one; CS and the return offset on top.
    fn gate_stack(
        &mut self,
        env: &dyn Environment,
        far: &Far,
        size: u8,
        inner: Option<u8>,
        parameters: i64,
    ) -> Result<Stack, Exception> {
        let old = self.current_stack();
        let mut stack = match inner {
            None => old,
            Some(cpl) if self.state.long_mode() => {
                let pointer = self.task_stack_64(env, 4 + 8 * u64::from(cpl))?;
                Stack::long(self.null_stack(cpl.into(), cpl), pointer, cpl)
            }
            Some(cpl) => {
                let (segment, pointer) = self.task_stack(env, cpl)?;
                Stack::short(segment, pointer, cpl)
            }
        };
        if inner.is_some() {
            self.push_on(env, &mut stack, size, old.segment.selector.into())?;
            self.push_on(env, &mut stack, size, old.pointer)?;
            for index in (0..parameters).rev() {
                let value = self.peek_at(env, &old, index * i64::from(size), size)?;
                self.push_on(env, &mut stack, size, value)?;
            }
        }
        let selector = self.state.segment(SegmentName::Cs).selector;
        self.push_on(env, &mut stack, size, selector.into())?;
        self.push_on(env, &mut stack, size, far.next_rip)?;
        Ok(stack)
    }
}
