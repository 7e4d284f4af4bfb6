//! The form that hot guest code is translated to.
//!
//! A block is a run of guest instructions from one page, entered at its first; its micro-operations
//! are 16 bytes each and address the register file of [`crate::state::State`] by slot. The form has three
//! properties on which both its interpreter and a code generator rely:
//!
//! 1. *Operands are resolved.* Which register, which size, which displacement is in the operation;
//!    nothing about the guest's encoding is left to find out.
//! 2. *Faults are precise.* Only `Load*`, `Store*`, `Divide*` and `Complex` can fault, and within one
//!    guest instruction nothing that the guest can see is written before the last of them: a
//!    read-modify-write loads with [`Op::LoadForWrite`], which checks the right to write, so its store
//!    cannot fault. The instruction that an operation belongs to is found by [`Block::starts`].
//! 3. *Flags are explicit.* Operations that set status flags are distinct from those that do not
//!    (`flags` bit of [`MicroOp::mode`]); the translator drops the flags of an operation if another
//!    overwrites all of them before anything can read them: a later operation, a fault, or the block's end.

/// What a micro-operation does. `a`, `b`, `c` are slots; `size` is in `mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    /// Placeholder until the translator's owner lists them.
    Complex,
}
