//! What micro-operations on vector registers do: the same arithmetic with operands found beforehand.

use iced_x86::Mnemonic;

use super::native;
use crate::error::Exception;
use crate::processor::Processor;
use crate::state::rflags;
use crate::translate::VECTOR_TEMP;

/// The kind of an arithmetic instruction `a = a ∘ b` on XMM registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Integers and bits: cannot fault.
    Integer,
    /// Floating point.
    Float,
    /// A comparison that sets flags.
    Compare,
    /// With an immediate.
    Immediate,
}

/// The shape of a mnemonic, if it has one of these.
pub(crate) fn shape(mnemonic: Mnemonic) -> Option<Shape> {
    use Mnemonic as M;
    match mnemonic {
        M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd => return Some(Shape::Compare),
        // These have operands of their own.
        M::Ptest
        | M::Pcmpestri
        | M::Pcmpestri64
        | M::Pcmpestrm
        | M::Pcmpestrm64
        | M::Pcmpistri
        | M::Pcmpistrm => return None,
        _ if native::has_immediate(mnemonic) => return Some(Shape::Immediate),
        _ => {}
    }
    let mut scratch = [0; 16];
    if native::integer(mnemonic, &mut scratch, &[0; 16]) {
        return Some(Shape::Integer);
    }
    let mut csr = 0x1f80;
    native::float(mnemonic, &mut scratch, &[0; 16], &mut csr).then_some(Shape::Float)
}

/// The mnemonic in a micro-operation.
fn mnemonic_of(number: i64) -> Mnemonic {
    usize::try_from(number & 0xffff)
        .ok()
        .and_then(|number| Mnemonic::try_from(number).ok())
        .unwrap_or(Mnemonic::INVALID)
}

impl Processor {
    /// A vector register by number, or the value between two operations.
    #[inline(always)]
    pub(crate) fn vector_slot(&self, slot: u8) -> &[u8; 16] {
        if slot == VECTOR_TEMP {
            &self.vector_temp
        } else {
            &self.state.fx.xmm[usize::from(slot & 15)]
        }
    }

    #[inline(always)]
    pub(crate) fn vector_slot_mut(&mut self, slot: u8) -> &mut [u8; 16] {
        if slot == VECTOR_TEMP {
            &mut self.vector_temp
        } else {
            &mut self.state.fx.xmm[usize::from(slot & 15)]
        }
    }

    pub(crate) fn vector_integer(&mut self, mnemonic: i64, to: u8, from: u8) {
        let source = *self.vector_slot(from);
        native::integer(mnemonic_of(mnemonic), self.vector_slot_mut(to), &source);
    }

    /// Changes a register by another one and MXCSR, if that raises nothing.
    #[inline(always)]
    fn change_vector(
        &mut self,
        to: u8,
        from: u8,
        change: impl Fn(&mut [u8; 16], &[u8; 16], &mut u32),
    ) -> Result<(), Exception> {
        let (source, target) = (*self.vector_slot(from), *self.vector_slot(to));
        let result = self.float(|csr| {
            let mut result = target;
            change(&mut result, &source, csr);
            result
        })?;
        *self.vector_slot_mut(to) = result;
        Ok(())
    }

    pub(crate) fn vector_float(
        &mut self,
        mnemonic: i64,
        to: u8,
        from: u8,
    ) -> Result<(), Exception> {
        let mnemonic = mnemonic_of(mnemonic);
        self.change_vector(to, from, |target, source, csr| {
            native::float(mnemonic, target, source, csr);
        })
    }

    pub(crate) fn vector_immediate(
        &mut self,
        mnemonic: i64,
        immediate: u8,
        to: u8,
        from: u8,
    ) -> Result<(), Exception> {
        let mnemonic = mnemonic_of(mnemonic);
        self.change_vector(to, from, |target, source, csr| {
            let mut beside = native::Beside::default();
            native::immediate(mnemonic, immediate, target, source, csr, &mut beside);
        })
    }

    pub(crate) fn vector_compare(
        &mut self,
        mnemonic: i64,
        left: u8,
        right: u8,
    ) -> Result<(), Exception> {
        let mnemonic = mnemonic_of(mnemonic);
        let (left, right) = (*self.vector_slot(left), *self.vector_slot(right));
        let flags = self.float(|csr| native::compare(mnemonic, &left, &right, csr))?;
        let flags = u64::from(flags.ok_or(Exception::ud())?);
        let kept = flags & (rflags::ZF | rflags::PF | rflags::CF);
        self.state.set_status(rflags::STATUS, kept);
        Ok(())
    }

    /// Between a general register's value and an XMM register.
    pub(crate) fn vector_convert(
        &mut self,
        mnemonic: i64,
        wide: bool,
        vector: u8,
        value: u64,
    ) -> Result<([u8; 16], u64), Exception> {
        let mnemonic = mnemonic_of(mnemonic);
        let register = *self.vector_slot(vector);
        self.float(|csr| {
            let (mut register, mut value) = (register, value);
            native::convert(mnemonic, wide, &mut register, &mut value, csr);
            (register, value)
        })
    }

    /// The sign bits of lanes.
    pub(crate) fn vector_mask(&self, from: u8, lane: u8) -> u64 {
        super::lanes::sign_bits(self.vector_slot(from), usize::from(lane.max(1)))
    }
}
