//! Vector registers.

use super::{Frame, Step};
use crate::error::Exception;
use crate::microop::MicroOp;

impl Frame<'_> {
    fn vector_step(&mut self, op: &MicroOp, done: Result<(), Exception>) -> Step {
        done.or_else(|exception| self.fault(op, exception))
    }

    #[inline(always)]
    pub(super) fn vector_load<const ALIGNED: bool>(&mut self, op: &MicroOp) -> Step {
        let linear = self.address(op);
        if ALIGNED && linear & 15 != 0 {
            return self.misaligned(op, linear);
        }
        if let Some(value) = self.cpu.fast_load_16(linear, self.rights) {
            *self.cpu.vector_slot_mut(op.a) = value;
            return Ok(());
        }
        let mut value = [0; 16];
        let loaded = self
            .canonical(op, linear, 16)
            .and_then(|()| self.cpu.load_vector(self.env, linear, &mut value));
        self.vector_step(op, loaded)?;
        *self.cpu.vector_slot_mut(op.a) = value;
        Ok(())
    }

    /// An address that is not canonical is reported before one that is not aligned.
    #[cold]
    fn misaligned(&mut self, op: &MicroOp, linear: u64) -> Step {
        let fault = self
            .canonical(op, linear, 16)
            .err()
            .unwrap_or(Exception::gp(0));
        self.fault(op, fault)
    }

    #[inline(always)]
    pub(super) fn vector_load_part<const S: u8>(&mut self, op: &MicroOp) -> Step {
        let value = self.load_at::<S>(op, self.address(op))?;
        *self.cpu.vector_slot_mut(op.a) = u128::from(value).to_le_bytes();
        Ok(())
    }

    #[inline(always)]
    pub(super) fn vector_store<const ALIGNED: bool>(&mut self, op: &MicroOp) -> Step {
        let linear = self.address(op);
        if ALIGNED && linear & 15 != 0 {
            return self.misaligned(op, linear);
        }
        let value = *self.cpu.vector_slot(op.a);
        if self.cpu.fast_store_16(linear, self.rights, &value) {
            return Ok(());
        }
        let stored = self
            .canonical(op, linear, 16)
            .and_then(|()| self.cpu.store_vector(self.env, linear, &value));
        self.look_at_code(op);
        self.vector_step(op, stored)
    }

    #[inline(always)]
    pub(super) fn vector_store_part<const S: u8>(&mut self, op: &MicroOp) -> Step {
        let value = self.vector_low(op.a);
        self.store_at::<S>(op, self.address(op), value)
    }

    /// The low half of a register.
    #[inline(always)]
    fn vector_low(&self, slot: u8) -> u64 {
        u128::from_le_bytes(*self.cpu.vector_slot(slot)) as u64
    }

    #[inline(always)]
    fn set_vector(&mut self, slot: u8, value: u64) {
        *self.cpu.vector_slot_mut(slot) = u128::from(value).to_le_bytes();
    }

    #[inline(always)]
    pub(super) fn vector_move(&mut self, op: &MicroOp) {
        *self.cpu.vector_slot_mut(op.a) = *self.cpu.vector_slot(op.b);
    }

    #[inline(always)]
    pub(super) fn vector_move_low<const S: usize>(&mut self, op: &MicroOp) {
        let source = *self.cpu.vector_slot(op.b);
        self.cpu.vector_slot_mut(op.a)[..S].copy_from_slice(&source[..S]);
    }

    #[inline(always)]
    pub(super) fn vector_move_zero(&mut self, op: &MicroOp) {
        self.set_vector(op.a, self.vector_low(op.b));
    }

    #[inline(always)]
    pub(super) fn vector_from<const S: u8>(&mut self, op: &MicroOp) {
        let value = self.left::<S>(op);
        self.set_vector(op.a, value);
    }

    #[inline(always)]
    pub(super) fn vector_to<const S: u8>(&mut self, op: &MicroOp) {
        let value = self.vector_low(op.b);
        self.put::<S>(op.a, value);
    }

    #[inline(always)]
    pub(super) fn vector_const(&mut self, op: &MicroOp) {
        self.set_vector(op.a, op.imm as u64);
    }

    #[inline(always)]
    pub(super) fn vector_integer(&mut self, op: &MicroOp) {
        self.cpu.vector_integer(op.imm, op.a, op.b);
    }

    #[inline(always)]
    pub(super) fn vector_float(&mut self, op: &MicroOp) -> Step {
        let done = self.cpu.vector_float(op.imm, op.a, op.b);
        self.vector_step(op, done)
    }

    #[inline(always)]
    pub(super) fn vector_immediate(&mut self, op: &MicroOp) -> Step {
        let immediate = op.high() as u8;
        let done = self.cpu.vector_immediate(op.imm, immediate, op.a, op.b);
        self.vector_step(op, done)
    }

    #[inline(always)]
    pub(super) fn vector_compare(&mut self, op: &MicroOp) -> Step {
        let done = self.cpu.vector_compare(op.imm, op.a, op.b);
        self.vector_step(op, done)
    }

    #[inline(always)]
    pub(super) fn vector_mask(&mut self, op: &MicroOp) {
        let mask = self.cpu.vector_mask(op.b, op.c);
        self.set(op.a, mask);
    }

    pub(super) fn vector_convert_from(&mut self, op: &MicroOp) -> Step {
        let value = self.get(op.b);
        let converted = self.cpu.vector_convert(op.imm, op.c != 0, op.a, value);
        match converted {
            Ok((register, _)) => *self.cpu.vector_slot_mut(op.a) = register,
            Err(exception) => return self.fault(op, exception),
        }
        Ok(())
    }

    pub(super) fn vector_convert_to(&mut self, op: &MicroOp) -> Step {
        let converted = self.cpu.vector_convert(op.imm, op.c != 0, op.b, 0);
        match converted {
            Ok((_, value)) if op.c != 0 => self.put::<8>(op.a, value),
            Ok((_, value)) => self.put::<4>(op.a, value),
            Err(exception) => return self.fault(op, exception),
        }
        Ok(())
    }
}
