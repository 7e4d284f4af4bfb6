//! Segments and interrupts of real mode; virtual-8086 mode loads segments the same way (SDM volume 3,
//! 21.1 and 21.2).

use super::stack::Stack;
use crate::error::{Exception, Vector};
use crate::processor::{Environment, Processor};
use crate::state::{Segment, SegmentName, rflags};

impl Processor {
    /// A segment register loaded with a selector in real or virtual-8086 mode. The limit stays what it
    /// was in real mode.
    pub(super) fn real_segment(&self, name: SegmentName, selector: u16) -> Segment {
        let old = self.state.segment(name);
        let base = u64::from(selector) << 4;
        if self.virtual_8086() {
            return Segment {
                selector,
                base,
                limit: 0xffff,
                attributes: 0xf3,
            };
        }
        let kept = old.attributes & 0xd000;
        let access = if name == SegmentName::Cs { 0x9b } else { 0x93 };
        Segment {
            selector,
            base,
            limit: old.limit,
            attributes: kept | access,
        }
    }

    /// Delivers an event through the vector table of real mode.
    pub(super) fn deliver_real(
        &mut self,
        env: &dyn Environment,
        vector: u8,
    ) -> Result<(), Exception> {
        let offset = u64::from(vector) * 4;
        if offset + 3 > self.state.idt.limit.into() {
            let code = u32::from(vector) * 8 + 2;
            return Err(Exception::with_code(Vector::GeneralProtection, code));
        }
        let entry = self.wrap_linear(self.state.idt.base.wrapping_add(offset));
        let target = self.load_as(env, entry, 4, false)?;
        let mut stack: Stack = self.current_stack();
        let values = [
            self.state.rflags(),
            self.state.segment(SegmentName::Cs).selector.into(),
            self.state.rip,
        ];
        for value in values {
            self.push_on(env, &mut stack, 2, value)?;
        }
        self.set_stack_pointer(&stack);
        self.state.flags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        let code = self.real_segment(SegmentName::Cs, (target >> 16) as u16);
        self.state.set_segment(SegmentName::Cs, code);
        self.state.rip = target & 0xffff;
        Ok(())
    }
}
