//! Which status flags anybody reads: the others are not computed.

use crate::flags::Condition;
use crate::microop::{Block, Op};
use crate::state::rflags::{CF, OF, PF, SF, STATUS, ZF};

/// The flags that a condition depends on.
fn condition_flags(bits: u8) -> u64 {
    use Condition as C;
    match Condition::from_bits(bits) {
        C::O | C::No => OF,
        C::B | C::Ae => CF,
        C::E | C::Ne => ZF,
        C::Be | C::A => CF | ZF,
        C::S | C::Ns => SF,
        C::P | C::Np => PF,
        C::L | C::Ge => SF | OF,
        C::Le | C::G => SF | OF | ZF,
    }
}

/// What an operation does with flags.
struct Uses {
    reads: u64,
    /// May change.
    sets: u64,
    /// Surely overwrites.
    kills: u64,
}

#[rustfmt::skip] // tables
fn uses(op: Op, c: u8) -> Uses {
    use Op::*;
    let (reads, sets, kills) = match op {
        SetIf | MoveIf16 | MoveIf32 | MoveIf64 | JumpIf => (condition_flags(c), 0, 0),
        Adc8F | Adc16F | Adc32F | Adc64F | Sbb8F | Sbb16F | Sbb32F | Sbb64F => (CF, STATUS, STATUS),
        Inc8F | Inc16F | Inc32F | Inc64F | Dec8F | Dec16F | Dec32F | Dec64F => {
            (0, STATUS & !CF, STATUS & !CF)
        }
        // None is overwritten if the count is zero.
        Shl8F | Shl16F | Shl32F | Shl64F | Shr8F | Shr16F | Shr32F | Shr64F
        | Sar8F | Sar16F | Sar32F | Sar64F => (0, STATUS, 0),
        Rol8F | Rol16F | Rol32F | Rol64F | Ror8F | Ror16F | Ror32F | Ror64F => (0, CF | OF, 0),
        BitTest32F | BitTest64F => (0, CF, CF),
        VectorCompareF => (0, STATUS, STATUS),
        _ if without_flags(op).is_some() => (0, STATUS, STATUS),
        Imul16F | Imul32F | Imul64F | MulWide32F | MulWide64F | ImulWide32F | ImulWide64F
        | CmpJumpE32 | CmpJumpNe32 | CmpJumpB32 | CmpJumpAe32 | CmpJumpBe32 | CmpJumpA32
        | CmpJumpL32 | CmpJumpGe32 | CmpJumpLe32 | CmpJumpG32
        | CmpJumpE64 | CmpJumpNe64 | CmpJumpB64 | CmpJumpAe64 | CmpJumpBe64 | CmpJumpA64
        | CmpJumpL64 | CmpJumpGe64 | CmpJumpLe64 | CmpJumpG64
        | TestJumpE32 | TestJumpNe32 | TestJumpS32 | TestJumpNs32
        | TestJumpE64 | TestJumpNe64 | TestJumpS64 | TestJumpNs64 => (0, 0, STATUS),
        _ => (0, 0, 0),
    };
    Uses { reads, sets, kills }
}

/// The same operation without its flags, if there is one.
#[rustfmt::skip] // a table
fn without_flags(op: Op) -> Option<Op> {
    use Op::*;
    Some(match op {
        Add8F => Add8, Add16F => Add16, Add32F => Add32, Add64F => Add64,
        Sub8F => Sub8, Sub16F => Sub16, Sub32F => Sub32, Sub64F => Sub64,
        And8F => And8, And16F => And16, And32F => And32, And64F => And64,
        Or8F => Or8, Or16F => Or16, Or32F => Or32, Or64F => Or64,
        Xor8F => Xor8, Xor16F => Xor16, Xor32F => Xor32, Xor64F => Xor64,
        Shl8F => Shl8, Shl16F => Shl16, Shl32F => Shl32, Shl64F => Shl64,
        Shr8F => Shr8, Shr16F => Shr16, Shr32F => Shr32, Shr64F => Shr64,
        Sar8F => Sar8, Sar16F => Sar16, Sar32F => Sar32, Sar64F => Sar64,
        Inc8F => Add8, Inc16F => Add16, Inc32F => Add32, Inc64F => Add64,
        Dec8F => Sub8, Dec16F => Sub16, Dec32F => Sub32, Dec64F => Sub64,
        _ => return None,
    })
}

/// Whether an operation can fault or leave the block, so that all flags must be right before it.
#[rustfmt::skip] // a table
fn may_leave(op: Op) -> bool {
    use Op::*;
    writes_memory(op) || matches!(op,
        Load8 | Load16 | Load32 | Load64 | LoadSigned8To32 | LoadSigned8To64 | LoadSigned16To32
        | LoadSigned16To64 | LoadSigned32To64 | Pop | Return | JumpTo
        | Divide32 | Divide64 | DivideSigned32 | DivideSigned64
        | VectorLoad16 | VectorLoad16A | VectorLoad8 | VectorLoad4 | VectorLoad2
        | VectorFloat | VectorImmediate | VectorCompareF | VectorConvertFrom | VectorConvertTo)
}

/// Whether the block may end after an operation's instruction, because that wrote code.
#[rustfmt::skip] // a table
fn writes_memory(op: Op) -> bool {
    use Op::*;
    matches!(op, LoadForWrite8 | LoadForWrite16 | LoadForWrite32 | LoadForWrite64
        | Store8 | Store16 | Store32 | Store64 | Push | Call | CallTo | Complex
        | VectorStore16 | VectorStore16A | VectorStore8 | VectorStore4)
}

/// Takes flags from the operations whose flags nobody reads.
pub(super) fn drop_dead(block: &mut Block) {
    let mut live = STATUS;
    for index in (0..block.count()).rev() {
        let range = block.starts[index].into()..block.starts[index + 1].into();
        let ops = &mut block.ops[range];
        if ops.iter().any(|op| writes_memory(op.op)) {
            live = STATUS;
        }
        for op in ops.iter_mut().rev() {
            let uses = uses(op.op, op.c);
            if uses.sets & live == 0
                && let Some(plain) = without_flags(op.op)
            {
                op.op = plain;
            } else {
                live = live & !uses.kills | uses.reads;
            }
            if may_leave(op.op) {
                live = STATUS;
            }
        }
    }
}
