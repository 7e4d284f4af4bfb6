//! Loads and stores: the TLB is asked in line, everything else is out of the way.

use std::sync::atomic::Ordering;

use super::arithmetic::signed;
use super::{Exit, Frame, Step};
use crate::error::{Exception, Vector};
use crate::microop::{MicroOp, Op, STACK};
use crate::mmu::access::is_canonical;

const RSP: u8 = 4;

impl Frame<'_> {
    /// The address that an operation names.
    #[inline(always)]
    pub(super) fn address(&self, op: &MicroOp) -> u64 {
        self.get(op.b)
            .wrapping_add(self.get(op.c) << (op.mode & 3))
            .wrapping_add(op.imm as u64)
    }

    /// Checks that the operand's address is canonical. The TLB knows no others.
    pub(super) fn canonical(&self, op: &MicroOp, linear: u64, size: u8) -> Result<(), Exception> {
        if is_canonical(linear) && is_canonical(linear.wrapping_add(u64::from(size) - 1)) {
            return Ok(());
        }
        let implied = matches!(
            op.op,
            Op::Push | Op::Pop | Op::Call | Op::CallTo | Op::Return
        );
        let vector = if implied || op.mode & STACK != 0 {
            Vector::StackFault
        } else {
            Vector::GeneralProtection
        };
        Err(Exception::with_code(vector, 0))
    }

    #[inline(never)]
    fn slow_load(&mut self, op: &MicroOp, linear: u64, size: u8) -> Result<u64, Exit> {
        let loaded = self
            .canonical(op, linear, size)
            .and_then(|()| self.cpu.load(self.env, linear, size));
        loaded.or_else(|exception| self.fault(op, exception))
    }

    #[inline(never)]
    fn slow_load_for_write(&mut self, op: &MicroOp, linear: u64, size: u8) -> Result<u64, Exit> {
        let loaded = self
            .canonical(op, linear, size)
            .and_then(|()| self.cpu.check_write(linear, size))
            .and_then(|()| self.cpu.load(self.env, linear, size));
        self.look_at_code(op);
        loaded.or_else(|exception| self.fault(op, exception))
    }

    #[inline(never)]
    fn slow_store(&mut self, op: &MicroOp, linear: u64, size: u8, value: u64) -> Step {
        let stored = self
            .canonical(op, linear, size)
            .and_then(|()| self.cpu.store(self.env, linear, size, value));
        self.look_at_code(op);
        stored.or_else(|exception| self.fault(op, exception))
    }

    /// Ends the block after this instruction if code was written: it may be the block's.
    pub(super) fn look_at_code(&mut self, op: &MicroOp) {
        if self.cpu.ram.code_epoch.load(Ordering::SeqCst) != self.epoch {
            self.stop_before(op.at + 1);
        }
    }

    #[inline(always)]
    pub(super) fn load_at<const S: u8>(&mut self, op: &MicroOp, linear: u64) -> Result<u64, Exit> {
        match self.cpu.fast_load::<S>(linear, self.rights) {
            Some(value) => Ok(value),
            None => self.slow_load(op, linear, S),
        }
    }

    #[inline(always)]
    pub(super) fn store_at<const S: u8>(&mut self, op: &MicroOp, linear: u64, value: u64) -> Step {
        if self.cpu.fast_store::<S>(linear, self.rights, value) {
            return Ok(());
        }
        self.slow_store(op, linear, S, value)
    }

    #[inline(always)]
    pub(super) fn load<const S: u8>(&mut self, op: &MicroOp) -> Step {
        let value = self.load_at::<S>(op, self.address(op))?;
        self.set(op.a, value);
        Ok(())
    }

    #[inline(always)]
    pub(super) fn load_signed<const S: u8, const TO: u8>(&mut self, op: &MicroOp) -> Step {
        let value = self.load_at::<S>(op, self.address(op))?;
        self.put::<TO>(op.a, signed::<S>(value) as u64);
        Ok(())
    }

    #[inline(always)]
    pub(super) fn load_for_write<const S: u8>(&mut self, op: &MicroOp) -> Step {
        let linear = self.address(op);
        let value = match self.cpu.fast_load_for_write::<S>(linear, self.rights) {
            Some(value) => value,
            None => self.slow_load_for_write(op, linear, S)?,
        };
        self.set(op.a, value);
        Ok(())
    }

    #[inline(always)]
    pub(super) fn store<const S: u8>(&mut self, op: &MicroOp) -> Step {
        self.store_at::<S>(op, self.address(op), self.get(op.a))
    }

    /// Pushes eight bytes.
    #[inline(always)]
    pub(super) fn push_value(&mut self, op: &MicroOp, value: u64) -> Step {
        let top = self.get(RSP).wrapping_sub(8);
        self.store_at::<8>(op, top, value)?;
        self.set(RSP, top);
        Ok(())
    }

    #[inline(always)]
    pub(super) fn push(&mut self, op: &MicroOp) -> Step {
        self.push_value(op, self.get(op.a))
    }

    #[inline(always)]
    pub(super) fn pop(&mut self, op: &MicroOp) -> Step {
        let top = self.get(RSP);
        let value = self.load_at::<8>(op, top)?;
        self.set(RSP, top.wrapping_add(8));
        self.set(op.a, value); // after RSP: POP RSP
        Ok(())
    }
}
