//! A stack that is not, or not yet, that of SS:RSP: where events and far transfers push and pop.

use super::descriptor::index_of;
use crate::error::{Exception, Vector};
use crate::flags::mask;
use crate::mmu::Access;
use crate::mmu::access::{allows, contains, is_canonical};
use crate::processor::{Environment, Processor};
use crate::state::{Mode, Segment, SegmentName};

/// A stack segment and a pointer into it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    pub(super) segment: Segment,
    pub(super) pointer: u64,
    /// Bytes of the pointer that count: 2, 4 or 8.
    size: u8,
    /// Whether it is accessed with the rights of CPL 3.
    user: bool,
    /// The error code of its faults: the selector of a stack that is switched to.
    code: u32,
}

impl Stack {
    /// A stack of 64-bit mode.
    pub(super) const fn long(segment: Segment, pointer: u64, cpl: u8) -> Self {
        Self {
            segment,
            pointer,
            size: 8,
            user: cpl == 3,
            code: 0,
        }
    }

    /// A stack of another mode; the segment's B bit says how wide the pointer is.
    pub(super) const fn short(segment: Segment, pointer: u64, cpl: u8) -> Self {
        let big = segment.attributes & Segment::DEFAULT_BIG != 0;
        Self {
            segment,
            pointer,
            size: if big { 4 } else { 2 },
            user: cpl == 3,
            code: index_of(segment.selector),
        }
    }

    /// The pointer moved by a number of bytes, in its width.
    pub(super) const fn advance(&mut self, by: i64) {
        let mask = mask(self.size);
        let moved = self.pointer.wrapping_add(by as u64);
        self.pointer = self.pointer & !mask | moved & mask;
    }

    /// The linear address of `size` bytes `by` bytes above the pointer.
    fn linear(&self, by: i64, size: u8, access: Access, checked: bool) -> Result<u64, Exception> {
        let offset = self.pointer.wrapping_add(by as u64) & mask(self.size);
        let last = offset.saturating_add(u64::from(size) - 1);
        let fine = if self.size == 8 {
            is_canonical(offset) && is_canonical(last)
        } else {
            (!checked || allows(&self.segment, access)) && contains(&self.segment, offset, last)
        };
        if !fine {
            return Err(Exception::with_code(Vector::StackFault, self.code));
        }
        Ok(if self.size == 8 {
            offset
        } else {
            self.segment.base.wrapping_add(offset) & 0xffff_ffff
        })
    }
}

impl Processor {
    /// The stack of SS:RSP with the rights of the current privilege level.
    pub(super) fn current_stack(&self) -> Stack {
        let segment = *self.state.segment(SegmentName::Ss);
        let (pointer, cpl) = (self.state.register(4), self.state.cpl());
        if self.state.mode() == Mode::Bits64 {
            Stack::long(segment, pointer, cpl)
        } else {
            Stack {
                code: 0,
                ..Stack::short(segment, pointer, cpl)
            }
        }
    }

    /// Makes the pointer of a stack that belongs to SS the stack pointer.
    pub(super) fn set_stack_pointer(&mut self, stack: &Stack) {
        self.state.set_register(4, stack.pointer);
    }

    /// Pushes `size` bytes.
    pub(super) fn push_on(
        &mut self,
        env: &dyn Environment,
        stack: &mut Stack,
        size: u8,
        value: u64,
    ) -> Result<(), Exception> {
        let by = -i64::from(size);
        let checked = self.has_descriptors();
        let linear = stack.linear(by, size, Access::Write, checked)?;
        self.store_as(env, linear, size, value & mask(size), stack.user)?;
        stack.advance(by);
        Ok(())
    }

    /// Pops `size` bytes.
    pub(super) fn pop_from(
        &mut self,
        env: &dyn Environment,
        stack: &mut Stack,
        size: u8,
    ) -> Result<u64, Exception> {
        let linear = stack.linear(0, size, Access::Read, self.has_descriptors())?;
        let value = self.load_as(env, linear, size, stack.user)?;
        stack.advance(size.into());
        Ok(value)
    }

    /// What `size` bytes `by` bytes above the pointer are.
    pub(super) fn peek_at(
        &mut self,
        env: &dyn Environment,
        stack: &Stack,
        by: i64,
        size: u8,
    ) -> Result<u64, Exception> {
        let linear = stack.linear(by, size, Access::Read, self.has_descriptors())?;
        self.load_as(env, linear, size, stack.user)
    }
}
