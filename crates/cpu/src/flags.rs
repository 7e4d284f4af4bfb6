//! The six status bits of RFLAGS, computed when somebody reads them.
//!
//! An operation that sets them leaves its kind, its operands and its result; the next one that does
//! so overwrites them, mostly unread. What sets only some of them (INC, rotates, BT) first makes the
//! old ones whole.

use crate::state::{State, rflags};

/// How a [`Lazy`]'s bits follow from its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// They are in [`State::flags`].
    #[default]
    Known,
    /// `left + right`.
    Add,
    /// `left + right + 1`.
    AddCarry,
    /// `left - right`: SUB, CMP, NEG.
    Sub,
    /// `left - right - 1`.
    SubBorrow,
    /// AND, OR, XOR, TEST: CF and OF are zero, AF is.
    Logic,
    /// `left + 1`; CF is as before, in bit 0 of `right`.
    Increment,
    /// `left - 1`; CF is as before, in bit 0 of `right`.
    Decrement,
    /// Shifts and multiplications: CF is bit 0 and OF bit 1 of `right`; AF is zero.
    Carried,
}

/// The operation that last set all status bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lazy {
    pub(crate) kind: Kind,
    /// Operand size in bytes: 1, 2, 4, 8.
    pub(crate) size: u8,
    pub(crate) left: u64,
    pub(crate) right: u64,
    /// Zero-extended to 64 bits.
    pub(crate) result: u64,
}

/// A condition code of Jcc, SETcc and CMOVcc, by its encoding (SDM volume 1, appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub(crate) enum Condition {
    O = 0,
    No = 1,
    B = 2,
    Ae = 3,
    E = 4,
    Ne = 5,
    Be = 6,
    A = 7,
    S = 8,
    Ns = 9,
    P = 10,
    Np = 11,
    L = 12,
    Ge = 13,
    Le = 14,
    G = 15,
}

impl Condition {
    /// By the low four bits of the opcode.
    pub(crate) const fn from_bits(bits: u8) -> Self {
        use Condition as C;
        const ALL: [Condition; 16] = [
            C::O,
            C::No,
            C::B,
            C::Ae,
            C::E,
            C::Ne,
            C::Be,
            C::A,
            C::S,
            C::Ns,
            C::P,
            C::Np,
            C::L,
            C::Ge,
            C::Le,
            C::G,
        ];
        ALL[(bits & 15) as usize]
    }
}

/// All ones in an operand of `size` bytes.
pub(crate) const fn mask(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * size as u32)
}

/// The top bit of an operand of `size` bytes.
pub(crate) const fn sign(size: u8) -> u64 {
    1 << (8 * size as u32 - 1)
}

impl Lazy {
    fn carry(&self) -> bool {
        match self.kind {
            Kind::Known | Kind::Logic => false,
            Kind::Add => self.result < self.left,
            Kind::AddCarry => self.result <= self.left,
            Kind::Sub => self.left < self.right,
            Kind::SubBorrow => self.left <= self.right,
            Kind::Increment | Kind::Decrement | Kind::Carried => self.right & 1 != 0,
        }
    }

    fn overflow(&self) -> bool {
        let signs = match self.kind {
            Kind::Known | Kind::Logic => 0,
            Kind::Add | Kind::AddCarry => (self.left ^ self.result) & (self.right ^ self.result),
            Kind::Sub | Kind::SubBorrow => (self.left ^ self.right) & (self.left ^ self.result),
            Kind::Increment => self.result & !self.left,
            Kind::Decrement => self.left & !self.result,
            Kind::Carried => return self.right & 2 != 0,
        };
        signs & sign(self.size) != 0
    }

    /// The six bits in RFLAGS's places.
    fn bits(&self) -> u64 {
        let mut bits = 0;
        let mut set = |condition: bool, bit: u64| bits |= if condition { bit } else { 0 };
        set(self.carry(), rflags::CF);
        set(
            (self.result as u8).count_ones().is_multiple_of(2),
            rflags::PF,
        );
        let logic = matches!(self.kind, Kind::Logic | Kind::Carried);
        set(
            !logic && (self.left ^ self.right ^ self.result) & 0x10 != 0,
            rflags::AF,
        );
        set(self.result == 0, rflags::ZF);
        set(self.result & sign(self.size) != 0, rflags::SF);
        set(self.overflow(), rflags::OF);
        bits
    }
}

impl State {
    /// RFLAGS, whole.
    #[must_use]
    pub fn rflags(&self) -> u64 {
        match self.lazy.kind {
            Kind::Known => self.flags,
            _ => self.flags & !rflags::STATUS | self.lazy.bits(),
        }
    }

    /// Sets RFLAGS, whole.
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = value | rflags::FIXED;
        self.lazy.kind = Kind::Known;
    }

    /// Sets the status bits of `bits` that are in `which`; the others keep their values.
    pub(crate) fn set_status(&mut self, which: u64, bits: u64) {
        self.flags = self.rflags() & !which | bits & which;
        self.lazy.kind = Kind::Known;
    }

    /// Sets all status bits by an operation whose `left`, `right` and `result` are zero-extended.
    #[inline]
    pub(crate) fn set_lazy(&mut self, kind: Kind, size: u8, left: u64, right: u64, result: u64) {
        self.lazy = Lazy {
            kind,
            size,
            left,
            right,
            result,
        };
    }

    /// CF.
    #[inline]
    pub(crate) fn carry(&self) -> bool {
        match self.lazy.kind {
            Kind::Known => self.flags & rflags::CF != 0,
            _ => self.lazy.carry(),
        }
    }

    /// Whether a condition holds.
    #[inline]
    pub(crate) fn condition(&self, condition: Condition) -> bool {
        if self.lazy.kind == Kind::Known {
            return known_condition(self.flags, condition);
        }
        let lazy = &self.lazy;
        let signed = lazy.result & sign(lazy.size) != 0;
        let zero = lazy.result == 0;
        match condition {
            Condition::O => lazy.overflow(),
            Condition::No => !lazy.overflow(),
            Condition::B => lazy.carry(),
            Condition::Ae => !lazy.carry(),
            Condition::E => zero,
            Condition::Ne => !zero,
            Condition::Be => zero || lazy.carry(),
            Condition::A => !zero && !lazy.carry(),
            Condition::S => signed,
            Condition::Ns => !signed,
            Condition::P => (lazy.result as u8).count_ones().is_multiple_of(2),
            Condition::Np => !(lazy.result as u8).count_ones().is_multiple_of(2),
            Condition::L => signed != lazy.overflow(),
            Condition::Ge => signed == lazy.overflow(),
            Condition::Le => zero || signed != lazy.overflow(),
            Condition::G => !zero && signed == lazy.overflow(),
        }
    }
}

fn known_condition(flags: u64, condition: Condition) -> bool {
    let has = |bits: u64| flags & bits != 0;
    let less = has(rflags::SF) != has(rflags::OF);
    match condition {
        Condition::O => has(rflags::OF),
        Condition::No => !has(rflags::OF),
        Condition::B => has(rflags::CF),
        Condition::Ae => !has(rflags::CF),
        Condition::E => has(rflags::ZF),
        Condition::Ne => !has(rflags::ZF),
        Condition::Be => has(rflags::CF | rflags::ZF),
        Condition::A => !has(rflags::CF | rflags::ZF),
        Condition::S => has(rflags::SF),
        Condition::Ns => !has(rflags::SF),
        Condition::P => has(rflags::PF),
        Condition::Np => !has(rflags::PF),
        Condition::L => less,
        Condition::Ge => !less,
        Condition::Le => less || has(rflags::ZF),
        Condition::G => !less && !has(rflags::ZF),
    }
}
