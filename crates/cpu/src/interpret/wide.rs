//! Multiplication to, and division of, twice the operand size: RDX and RAX.

use super::arithmetic::signed;
use super::{Frame, Step};
use crate::error::{Exception, Vector};
use crate::flags::mask;
use crate::microop::MicroOp;

const RAX: u8 = 0;
const RDX: u8 = 2;

impl Frame<'_> {
    #[inline(always)]
    fn put_wide<const S: u8>(&mut self, low: u64, high: u64) {
        self.put::<S>(RAX, low);
        self.put::<S>(RDX, high);
    }

    /// RDX:RAX as one number of twice the size.
    #[inline(always)]
    fn dividend<const S: u8>(&self) -> u128 {
        let (low, high) = (self.get(RAX) & mask(S), self.get(RDX) & mask(S));
        u128::from(high) << (8 * u32::from(S)) | u128::from(low)
    }

    #[inline(always)]
    pub(super) fn mul_wide<const S: u8>(&mut self, op: &MicroOp) {
        let product = u128::from(self.get(RAX) & mask(S)) * u128::from(self.left::<S>(op));
        let (low, high) = (product as u64 & mask(S), (product >> (8 * S)) as u64);
        self.put_wide::<S>(low, high);
        self.set_product::<S>(high != 0, low);
    }

    #[inline(always)]
    pub(super) fn imul_wide<const S: u8>(&mut self, op: &MicroOp) {
        let (left, right) = (signed::<S>(self.get(RAX)), signed::<S>(self.get(op.b)));
        let product = i128::from(left) * i128::from(right);
        let low = product as u64 & mask(S);
        self.put_wide::<S>(low, (product >> (8 * S)) as u64);
        self.set_product::<S>(i128::from(signed::<S>(low)) != product, low);
    }

    #[inline(always)]
    pub(super) fn divide<const S: u8>(&mut self, op: &MicroOp) -> Step {
        let (dividend, divisor) = (self.dividend::<S>(), u128::from(self.left::<S>(op)));
        let fail = Exception::new(Vector::DivideError);
        // Most dividends fit in 64 bits, whose division is a tenth of the price.
        if let (Ok(small), Some(divisor)) = (u64::try_from(dividend), self.nonzero::<S>(op)) {
            let quotient = small / divisor;
            if quotient > mask(S) {
                return self.fault(op, fail);
            }
            self.put_wide::<S>(quotient, small % divisor);
            return Ok(());
        }
        match dividend.checked_div(divisor) {
            Some(quotient) if quotient <= mask(S).into() => {
                self.put_wide::<S>(quotient as u64, (dividend % divisor) as u64);
                Ok(())
            }
            _ => self.fault(op, fail),
        }
    }

    #[inline(always)]
    fn nonzero<const S: u8>(&self, op: &MicroOp) -> Option<u64> {
        Some(self.left::<S>(op)).filter(|&divisor| divisor != 0)
    }

    #[inline(always)]
    pub(super) fn divide_signed<const S: u8>(&mut self, op: &MicroOp) -> Step {
        let unused = 128 - 16 * u32::from(S);
        let dividend = (self.dividend::<S>() << unused) as i128 >> unused;
        let divisor = i128::from(signed::<S>(self.get(op.b)));
        match dividend.checked_div(divisor) {
            Some(quotient) if i128::from(signed::<S>(quotient as u64)) == quotient => {
                self.put_wide::<S>(quotient as u64, (dividend % divisor) as u64);
                Ok(())
            }
            _ => self.fault(op, Exception::new(Vector::DivideError)),
        }
    }
}
