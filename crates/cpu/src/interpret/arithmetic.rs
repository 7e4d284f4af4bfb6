//! Arithmetic on registers.

use super::Frame;
use crate::flags::{Condition, Kind, mask, sign};
use crate::microop::MicroOp;
use crate::state::rflags;

/// The bits of a [`Kind::Carried`].
#[inline(always)]
const fn carried(carry: bool, overflow: bool) -> u64 {
    carry as u64 | (overflow as u64) << 1
}

/// `value` of `S` bytes, sign-extended.
#[inline(always)]
pub(super) const fn signed<const S: u8>(value: u64) -> i64 {
    let unused = 64 - 8 * S as u32;
    (value << unused) as i64 >> unused
}

/// Defines operations `a = b ∘ right` by the result and the kind of their flags.
macro_rules! binary {
    ($($name:ident, $kind:ident, |$left:ident, $right:ident| $result:expr;)*) => {
        $(#[inline(always)]
        pub(super) fn $name<const S: u8, const F: bool>(&mut self, op: &MicroOp) {
            let ($left, $right) = (self.left::<S>(op), self.right::<S>(op));
            let result = $result & mask(S);
            if F {
                self.cpu.state.set_lazy(Kind::$kind, S, $left, $right, result);
            }
            self.put::<S>(op.a, result);
        })*
    };
}

impl Frame<'_> {
    binary! {
        add, Add, |left, right| left.wrapping_add(right);
        sub, Sub, |left, right| left.wrapping_sub(right);
        and, Logic, |left, right| left & right;
        or, Logic, |left, right| left | right;
        xor, Logic, |left, right| left ^ right;
    }

    #[inline(always)]
    pub(super) fn adc<const S: u8>(&mut self, op: &MicroOp) {
        let (left, right) = (self.left::<S>(op), self.right::<S>(op));
        let carry = self.cpu.state.carry();
        let result = left.wrapping_add(right).wrapping_add(carry.into()) & mask(S);
        let kind = if carry { Kind::AddCarry } else { Kind::Add };
        self.cpu.state.set_lazy(kind, S, left, right, result);
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn sbb<const S: u8>(&mut self, op: &MicroOp) {
        let (left, right) = (self.left::<S>(op), self.right::<S>(op));
        let carry = self.cpu.state.carry();
        let result = left.wrapping_sub(right).wrapping_sub(carry.into()) & mask(S);
        let kind = if carry { Kind::SubBorrow } else { Kind::Sub };
        self.cpu.state.set_lazy(kind, S, left, right, result);
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn inc<const S: u8>(&mut self, op: &MicroOp) {
        let (left, carry) = (self.left::<S>(op), self.cpu.state.carry());
        let result = left.wrapping_add(1) & mask(S);
        let state = &mut self.cpu.state;
        state.set_lazy(Kind::Increment, S, left, carry.into(), result);
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn dec<const S: u8>(&mut self, op: &MicroOp) {
        let (left, carry) = (self.left::<S>(op), self.cpu.state.carry());
        let result = left.wrapping_sub(1) & mask(S);
        let state = &mut self.cpu.state;
        state.set_lazy(Kind::Decrement, S, left, carry.into(), result);
        self.put::<S>(op.a, result);
    }

    /// The count of a shift: five bits, six with 64-bit operands.
    #[inline(always)]
    fn shift_count<const S: u8>(&self, op: &MicroOp) -> u32 {
        (self.right::<1>(op) & if S == 8 { 63 } else { 31 }) as u32
    }

    #[inline(always)]
    fn set_carried<const S: u8>(&mut self, left: u64, bits: u64, result: u64) {
        let state = &mut self.cpu.state;
        state.set_lazy(Kind::Carried, S, left, bits, result);
    }

    #[inline(always)]
    pub(super) fn shl<const S: u8, const F: bool>(&mut self, op: &MicroOp) {
        let (left, count) = (self.left::<S>(op), self.shift_count::<S>(op));
        let result = (left << count) & mask(S);
        if F && count != 0 {
            let before = left << (count - 1);
            let carry = before & sign(S) != 0;
            let overflow = (result & sign(S) != 0) != carry;
            self.set_carried::<S>(left, carried(carry, overflow), result);
        }
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn shr<const S: u8, const F: bool>(&mut self, op: &MicroOp) {
        let (left, count) = (self.left::<S>(op), self.shift_count::<S>(op));
        let result = left >> count;
        if F && count != 0 {
            let before = left >> (count - 1);
            let bits = carried(before & 1 != 0, before & sign(S) != 0);
            self.set_carried::<S>(left, bits, result);
        }
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn sar<const S: u8, const F: bool>(&mut self, op: &MicroOp) {
        let (left, count) = (self.left::<S>(op), self.shift_count::<S>(op));
        let value = signed::<S>(left);
        let result = (value >> count) as u64 & mask(S);
        if F && count != 0 {
            let carry = value >> (count - 1) & 1 != 0;
            self.set_carried::<S>(left, carried(carry, false), result);
        }
        self.put::<S>(op.a, result);
    }

    /// CF and OF after a rotate; the others stay.
    #[inline(always)]
    fn set_rotated(&mut self, carry: bool, overflow: bool) {
        let bits = if carry { rflags::CF } else { 0 } | if overflow { rflags::OF } else { 0 };
        let state = &mut self.cpu.state;
        state.set_status(rflags::CF | rflags::OF, bits);
    }

    #[inline(always)]
    pub(super) fn rol<const S: u8>(&mut self, op: &MicroOp) {
        let (left, count) = (self.left::<S>(op), self.shift_count::<S>(op));
        let bits = 8 * u32::from(S);
        let turn = count % bits;
        let result = (left << turn | left >> 1 >> (bits - 1 - turn)) & mask(S);
        if count != 0 {
            let carry = result & 1 != 0;
            self.set_rotated(carry, (result & sign(S) != 0) != carry);
        }
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn ror<const S: u8>(&mut self, op: &MicroOp) {
        let (left, count) = (self.left::<S>(op), self.shift_count::<S>(op));
        let bits = 8 * u32::from(S);
        let turn = count % bits;
        let result = (left >> turn | left << 1 << (bits - 1 - turn)) & mask(S);
        if count != 0 {
            let top = result & sign(S) != 0;
            self.set_rotated(top, top != (result & sign(S) >> 1 != 0));
        }
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn imul<const S: u8>(&mut self, op: &MicroOp) {
        let (left, right) = (self.left::<S>(op), self.right::<S>(op));
        let product = i128::from(signed::<S>(left)) * i128::from(signed::<S>(right));
        let result = product as u64 & mask(S);
        let lost = i128::from(signed::<S>(result)) != product;
        self.set_carried::<S>(left, carried(lost, lost), result);
        self.put::<S>(op.a, result);
    }

    #[inline(always)]
    pub(super) fn bit_test<const S: u8>(&mut self, op: &MicroOp) {
        let bit = self.right::<1>(op) & (8 * u64::from(S) - 1);
        let carry = self.left::<S>(op) >> bit & 1;
        self.cpu.state.set_status(rflags::CF, carry * rflags::CF);
    }

    #[inline(always)]
    pub(super) fn lea<const S: u8>(&mut self, op: &MicroOp) {
        let address = self.address(op);
        self.put::<S>(op.a, address);
    }

    #[inline(always)]
    pub(super) fn swap<const S: u8>(&mut self, op: &MicroOp) {
        let swapped = self.left::<S>(op).swap_bytes() >> (64 - 8 * u32::from(S));
        self.put::<S>(op.a, swapped);
    }

    #[inline(always)]
    pub(super) fn set_if(&mut self, op: &MicroOp) {
        let holds = self.cpu.state.condition(Condition::from_bits(op.c));
        self.put::<1>(op.a, holds.into());
    }

    #[inline(always)]
    pub(super) fn move_if<const S: u8>(&mut self, op: &MicroOp) {
        let holds = self.cpu.state.condition(Condition::from_bits(op.c));
        let value = self.get(if holds { op.b } else { op.a });
        self.put::<S>(op.a, value);
    }

    /// Sets flags as a full-width multiplication does.
    #[inline(always)]
    pub(super) fn set_product<const S: u8>(&mut self, lost: bool, low: u64) {
        self.set_carried::<S>(low, carried(lost, lost), low);
    }
}
