//! Lowering: jumps, calls, returns.

use iced_x86::{Code, Instruction, OpKind};

use super::Builder;
use super::moves::condition_bits;
use crate::microop::Op;
use crate::state::slot;

/// The fused form of a comparison and a conditional jump.
#[rustfmt::skip] // a table
fn fused(compare: Op, condition: u8) -> Option<Op> {
    use Op::*;
    const NO: Op = Op::Complex;
    // By the condition's encoding.
    let ops = match compare {
        Sub32F => [NO, NO, CmpJumpB32, CmpJumpAe32, CmpJumpE32, CmpJumpNe32, CmpJumpBe32, CmpJumpA32,
            NO, NO, NO, NO, CmpJumpL32, CmpJumpGe32, CmpJumpLe32, CmpJumpG32],
        Sub64F => [NO, NO, CmpJumpB64, CmpJumpAe64, CmpJumpE64, CmpJumpNe64, CmpJumpBe64, CmpJumpA64,
            NO, NO, NO, NO, CmpJumpL64, CmpJumpGe64, CmpJumpLe64, CmpJumpG64],
        And32F => [NO, NO, NO, NO, TestJumpE32, TestJumpNe32, NO, NO,
            TestJumpS32, TestJumpNs32, NO, NO, TestJumpS32, TestJumpNs32, NO, NO],
        And64F => [NO, NO, NO, NO, TestJumpE64, TestJumpNe64, NO, NO,
            TestJumpS64, TestJumpNs64, NO, NO, TestJumpS64, TestJumpNs64, NO, NO],
        _ => return None,
    };
    Some(ops[usize::from(condition & 15)]).filter(|&op| op != NO)
}

/// Two code positions, or a constant and one, in an immediate.
fn halves(low: i64, high: i64) -> Option<i64> {
    let (low, high) = (i32::try_from(low).ok()?, i32::try_from(high).ok()?);
    Some(i64::from(high) << 32 | i64::from(low) & 0xffff_ffff)
}

impl Builder {
    /// A RIP relative to the block.
    fn position(&self, rip: u64) -> i64 {
        rip.wrapping_sub(self.block.rip) as i64
    }

    fn end(&mut self, op: Op, b: u8, c: u8, imm: i64) {
        self.emit(op, 0, b, c, imm);
        self.ended = true;
    }

    fn jump_if(&mut self, instruction: &Instruction) -> Option<()> {
        if instruction.op0_kind() != OpKind::NearBranch64 {
            return None;
        }
        let condition = condition_bits(instruction.condition_code())?;
        let target = self.position(instruction.near_branch64());
        let at = self.block.starts.len() - 1;
        if let Some(&last) = self.block.ops.last()
            && usize::from(last.at) + 1 == at
            && last.a == slot::TEMP3
            && let Some(op) = fused(last.op, condition)
            && let Some(imm) = halves(last.imm, target)
        {
            self.block.ops.pop();
            self.block.starts[at] = self.block.ops.len() as u16;
            self.end(op, last.b, last.c, imm);
        } else {
            self.end(Op::JumpIf, slot::ZERO, condition, target);
        }
        Some(())
    }

    /// Emits the instruction's operations, if it is one of these.
    pub(super) fn lower_control(&mut self, instruction: &Instruction) -> Option<()> {
        let code = instruction.code();
        if code.is_jcc_short_or_near() {
            return self.jump_if(instruction);
        }
        let next = self.position(instruction.next_ip());
        match code {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => {
                let target = self.position(instruction.near_branch64());
                self.end(Op::Jump, slot::ZERO, slot::ZERO, target);
            }
            Code::Jmp_rm64 => {
                let source = self.source(instruction, 0, 8)?;
                self.end(Op::JumpTo, source.slot, slot::ZERO, 0);
            }
            Code::Call_rel32_64 => {
                let target = self.position(instruction.near_branch64());
                self.end(Op::Call, slot::ZERO, slot::ZERO, halves(next, target)?);
            }
            Code::Call_rm64 => {
                let source = self.source(instruction, 0, 8)?;
                self.end(Op::CallTo, source.slot, slot::ZERO, next);
            }
            Code::Retnq => self.end(Op::Return, slot::ZERO, slot::ZERO, 0),
            Code::Retnq_imm16 => {
                let bytes = instruction.immediate16().into();
                self.end(Op::Return, slot::ZERO, slot::ZERO, bytes);
            }
            _ => return None,
        }
        Some(())
    }
}
