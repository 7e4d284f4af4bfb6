//! The form that hot guest code is translated to.
//!
//! A block is a run of guest instructions from one page, entered at its first; its micro-operations
//! are 16 bytes each and address the register file of [`crate::state::State`] by slot. The form has three
//! properties on which both its interpreter and a code generator rely:
//!
//! 1. *Operands are resolved.* Which register, which size, which displacement is in the operation;
//!    nothing about the guest's encoding is left to find out. The right operand of arithmetic is
//!    always `file[c] + imm`: a register (`imm` is 0) or an immediate (`c` is the zero slot).
//! 2. *Faults are precise.* Only `Load*`, `Store*`, `Push`, `Pop`, `Call*`, `Return`, `JumpTo`,
//!    `Divide*`, `Vector*` and `Complex` can fault, and within one guest instruction nothing that the guest can
//!    see is written before the last of them: a read-modify-write loads with `LoadForWrite*`, which
//!    checks the right to write, so its store cannot fault. [`MicroOp::at`] is the instruction that an
//!    operation belongs to.
//! 3. *Flags are explicit.* Operations that set status flags (`…F`) are distinct from those that do
//!    not; the translator takes the latter if other operations overwrite all the flags before
//!    anything can read them: a later operation, a fault, a store that may hit code, or the block's end.
//!
//! Code positions are relative to the block's first instruction, whose RIP is in slot
//! [`crate::state::slot::START`]: one block serves all linear addresses that its page is mapped at.

use iced_x86::Instruction;

/// One micro-operation.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct MicroOp {
    pub(crate) op: Op,
    /// Slot of the result; of the value for stores and pushes.
    pub(crate) a: u8,
    /// Slot of the left operand or of an address's base.
    pub(crate) b: u8,
    /// Slot of the right operand or of an address's index; a condition.
    pub(crate) c: u8,
    /// Of an address: log2 of the index's scale, and [`STACK`].
    pub(crate) mode: u8,
    /// The guest instruction, counted from the block's first.
    pub(crate) at: u16,
    /// Immediate, displacement or code position.
    pub(crate) imm: i64,
}

/// In [`MicroOp::mode`]: the address is in the stack segment, which decides the vector of its fault.
pub(crate) const STACK: u8 = 4;

const _: () = assert!(size_of::<MicroOp>() == 16);

impl MicroOp {
    /// The upper half of `imm`: the target of a fused compare and jump or of a call.
    #[inline(always)]
    pub(crate) const fn high(&self) -> i64 {
        self.imm >> 32
    }

    /// The lower half of `imm`.
    #[inline(always)]
    pub(crate) const fn low(&self) -> i64 {
        self.imm as i32 as i64
    }
}

/// What a micro-operation does. The number is the operand size in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[rustfmt::skip] // a table
pub(crate) enum Op {
    /// The block's decoded instruction `imm`, by [`crate::processor::Processor::execute`].
    Complex,
    // a = b + right, and so on; F: sets flags.
    Add8, Add16, Add32, Add64, Add8F, Add16F, Add32F, Add64F,
    Sub8, Sub16, Sub32, Sub64, Sub8F, Sub16F, Sub32F, Sub64F,
    And8, And16, And32, And64, And8F, And16F, And32F, And64F,
    Or8, Or16, Or32, Or64, Or8F, Or16F, Or32F, Or64F,
    Xor8, Xor16, Xor32, Xor64, Xor8F, Xor16F, Xor32F, Xor64F,
    // With CF; these always set flags.
    Adc8F, Adc16F, Adc32F, Adc64F,
    Sbb8F, Sbb16F, Sbb32F, Sbb64F,
    // a = b + 1, b - 1; CF stays.
    Inc8F, Inc16F, Inc32F, Inc64F,
    Dec8F, Dec16F, Dec32F, Dec64F,
    // Shifts and rotates of b by right; the count is masked, and flags stay if it is zero.
    Shl8, Shl16, Shl32, Shl64, Shl8F, Shl16F, Shl32F, Shl64F,
    Shr8, Shr16, Shr32, Shr64, Shr8F, Shr16F, Shr32F, Shr64F,
    Sar8, Sar16, Sar32, Sar64, Sar8F, Sar16F, Sar32F, Sar64F,
    Rol8F, Rol16F, Rol32F, Rol64F,
    Ror8F, Ror16F, Ror32F, Ror64F,
    // a = b * right, signed.
    Imul16F, Imul32F, Imul64F,
    // RDX:RAX = RAX * b; RAX, RDX = quotient, remainder of RDX:RAX / b.
    MulWide32F, MulWide64F, ImulWide32F, ImulWide64F,
    Divide32, Divide64, DivideSigned32, DivideSigned64,
    // CF = bit `right` of b.
    BitTest32F, BitTest64F,
    /// a = b.
    Move8, Move16, Move32, Move64,
    /// a = imm.
    Const,
    // a = b, sign-extended from the first size to the second.
    Extend8To16, Extend8To32, Extend8To64, Extend16To32, Extend16To64, Extend32To64,
    // a = b, zero-extended.
    Zero8, Zero16,
    /// a = bits 8 to 15 of b; bits 8 to 15 of a = b.
    ExtractHigh, InsertHigh,
    /// a = b + (c << scale) + imm.
    Lea32, Lea64,
    Swap32, Swap64,
    /// a = condition c.
    SetIf,
    /// a = b if condition c.
    MoveIf16, MoveIf32, MoveIf64,
    // a = memory, zero-extended or sign-extended to the second size.
    Load8, Load16, Load32, Load64,
    LoadSigned8To32, LoadSigned8To64, LoadSigned16To32, LoadSigned16To64, LoadSigned32To64,
    LoadForWrite8, LoadForWrite16, LoadForWrite32, LoadForWrite64,
    // memory = a.
    Store8, Store16, Store32, Store64,
    /// RSP -= 8, the stack's top = a; a = the stack's top, RSP += 8. RSP as it was before.
    Push, Pop,
    // Vector registers: XMM0 to XMM15, and 16 for a value between two operations.
    /// a = memory, the rest of it zero; `A`: #GP unless aligned.
    VectorLoad16, VectorLoad16A, VectorLoad8, VectorLoad4, VectorLoad2,
    /// memory = a.
    VectorStore16, VectorStore16A, VectorStore8, VectorStore4,
    /// a = b; the low bytes of a = those of b; a = the low half of b, the rest zero.
    VectorMove, VectorMoveLow8, VectorMoveLow4, VectorMoveZero8,
    /// a = general register b, the rest zero; general register a = b; a = imm.
    VectorFrom4, VectorFrom8, VectorTo4, VectorTo8, VectorConst,
    /// a = a ∘ b by the mnemonic in `low`: integers and bits; floating point; with an immediate in `high`.
    VectorInteger, VectorFloat, VectorImmediate,
    /// Flags of a compared with b.
    VectorCompareF,
    /// General register a = sign bits of the lanes of c bytes of b.
    VectorMask,
    /// a converted from general register b, general register a from b; c: of 64 bits.
    VectorConvertFrom, VectorConvertTo,
    // Ends of a block. Positions are relative to its start.
    /// To `imm`; to b; pushes low, to high; pushes low, to b; pops and goes there, with `imm` bytes more off
    /// the stack.
    Jump, JumpTo, Call, CallTo, Return,
    /// To `imm` if condition c.
    JumpIf,
    // Flags of b - right (CMP) or b & right (TEST), right being file[c] + low; to high if …
    CmpJumpE32, CmpJumpNe32, CmpJumpB32, CmpJumpAe32, CmpJumpBe32, CmpJumpA32,
    CmpJumpL32, CmpJumpGe32, CmpJumpLe32, CmpJumpG32,
    CmpJumpE64, CmpJumpNe64, CmpJumpB64, CmpJumpAe64, CmpJumpBe64, CmpJumpA64,
    CmpJumpL64, CmpJumpGe64, CmpJumpLe64, CmpJumpG64,
    TestJumpE32, TestJumpNe32, TestJumpS32, TestJumpNs32,
    TestJumpE64, TestJumpNe64, TestJumpS64, TestJumpNs64,
}

/// A translated run of instructions.
#[derive(Debug, Default)]
pub(crate) struct Block {
    pub(crate) ops: Vec<MicroOp>,
    /// Where in `ops` each instruction starts, and the end.
    pub(crate) starts: Vec<u16>,
    /// Where in the code each instruction starts, and the end.
    pub(crate) offsets: Vec<u16>,
    /// What `Complex` refers to, decoded as if the block were at `rip`.
    pub(crate) complex: Vec<Instruction>,
    pub(crate) rip: u64,
    /// Physical page that its only instruction goes on in, and that page's generation.
    pub(crate) second: Option<(u64, u32)>,
    /// What it was translated from.
    pub(crate) bytes: Box<[u8]>,
    /// How many of them are in the first page.
    pub(crate) in_first: u16,
    /// Its last instruction may change what the processor may do next: mode, interrupts, translations.
    pub(crate) privileged: bool,
}

impl Block {
    /// Its bytes in the first and in the second page.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(self.in_first.into())
    }

    /// How many instructions it has.
    pub(crate) fn count(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }
}
