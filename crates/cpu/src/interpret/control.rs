//! What ends blocks: jumps, calls, and instructions by their decoded form.

use std::sync::atomic::Ordering;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Exit, Frame, Step};
use crate::error::Exception;
use crate::flags::{Condition, Kind, mask};
use crate::microop::MicroOp;
use crate::mmu::access::is_canonical;
use crate::processor::Flow;
use crate::state::{Mode, slot};

const RSP: u8 = 4;

/// Whether an instruction calls the kernel, whose way in takes a pending single-step trap with it.
fn enters_kernel(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysenter
    )
}

impl Frame<'_> {
    /// RIP of a position in the block.
    #[inline(always)]
    fn position(&self, offset: i64) -> u64 {
        self.get(slot::START).wrapping_add(offset as u64)
    }

    /// RIP of the block's end.
    #[inline(always)]
    fn fall_through(&self) -> u64 {
        let length = self.block.offsets.last().copied().unwrap_or_default();
        self.position(length.into())
    }

    /// #GP for a target that no RIP can have.
    #[inline(always)]
    fn check_target(&mut self, op: &MicroOp, target: u64) -> Step {
        if is_canonical(target) {
            return Ok(());
        }
        self.fault(op, Exception::gp(0))
    }

    #[inline(always)]
    pub(super) fn jump(&mut self, op: &MicroOp) -> Step {
        self.leave(op, self.position(op.imm))
    }

    #[inline(always)]
    pub(super) fn jump_to(&mut self, op: &MicroOp) -> Step {
        let target = self.get(op.b);
        self.check_target(op, target)?;
        self.leave(op, target)
    }

    #[inline(always)]
    pub(super) fn call(&mut self, op: &MicroOp) -> Step {
        let target = self.position(op.high());
        self.check_target(op, target)?;
        self.push_value(op, self.position(op.low()))?;
        self.leave(op, target)
    }

    #[inline(always)]
    pub(super) fn call_to(&mut self, op: &MicroOp) -> Step {
        let target = self.get(op.b);
        self.check_target(op, target)?;
        self.push_value(op, self.position(op.low()))?;
        self.leave(op, target)
    }

    #[inline(always)]
    pub(super) fn return_to(&mut self, op: &MicroOp) -> Step {
        let top = self.get(RSP);
        let target = self.load_at::<8>(op, top)?;
        self.check_target(op, target)?;
        self.set(RSP, top.wrapping_add(8).wrapping_add(op.imm as u64));
        self.leave(op, target)
    }

    #[inline(always)]
    fn branch(&mut self, op: &MicroOp, taken: bool, offset: i64) -> Step {
        let rip = if taken {
            self.position(offset)
        } else {
            self.fall_through()
        };
        self.leave(op, rip)
    }

    #[inline(always)]
    pub(super) fn jump_if(&mut self, op: &MicroOp) -> Step {
        let taken = self.cpu.state.condition(Condition::from_bits(op.c));
        self.branch(op, taken, op.imm)
    }

    #[inline(always)]
    fn fused_operands<const S: u8>(&self, op: &MicroOp) -> (u64, u64) {
        let right = self.get(op.c).wrapping_add(op.low() as u64) & mask(S);
        (self.left::<S>(op), right)
    }

    #[inline(always)]
    pub(super) fn compare_jump<const S: u8>(
        &mut self,
        op: &MicroOp,
        holds: impl Fn(u64, u64) -> bool,
    ) -> Step {
        let (left, right) = self.fused_operands::<S>(op);
        let result = left.wrapping_sub(right) & mask(S);
        let state = &mut self.cpu.state;
        state.set_lazy(Kind::Sub, S, left, right, result);
        self.branch(op, holds(left, right), op.high())
    }

    #[inline(always)]
    pub(super) fn test_jump<const S: u8>(
        &mut self,
        op: &MicroOp,
        holds: impl Fn(u64) -> bool,
    ) -> Step {
        let (left, right) = self.fused_operands::<S>(op);
        let result = left & right;
        let state = &mut self.cpu.state;
        state.set_lazy(Kind::Logic, S, left, right, result);
        self.branch(op, holds(result), op.high())
    }

    /// The instruction as decoded where the block is executed now.
    fn decoded(&self, op: &MicroOp) -> Option<Instruction> {
        let mut instruction = *self.block.complex.get(op.imm as usize)?;
        let moved = self.get(slot::START).wrapping_sub(self.block.rip);
        if moved != 0 && self.cpu.state.mode() == Mode::Bits64 {
            instruction.set_next_ip(instruction.next_ip().wrapping_add(moved));
            if instruction.is_ip_rel_memory_operand() {
                let address = instruction.memory_displacement64();
                instruction.set_memory_displacement64(address.wrapping_add(moved));
            }
            if instruction.op0_kind() == OpKind::NearBranch64 {
                let target = instruction.near_branch64();
                instruction.set_near_branch64(target.wrapping_add(moved));
            }
        }
        Some(instruction)
    }

    #[inline(never)]
    pub(super) fn complex(&mut self, op: &MicroOp) -> Step {
        self.cpu.state.rip = self.rip_of(op.at);
        let decoded = self.decoded(op);
        let executed = match decoded {
            Some(instruction) => self.cpu.execute(self.env, &instruction),
            None => Err(Exception::ud()),
        };
        match executed {
            Ok(Flow::Next) => {
                let written = self.cpu.ram.code_epoch.load(Ordering::SeqCst) != self.epoch;
                let last = usize::from(op.at) + 1 == self.block.count();
                // POPF may have asked for aligned accesses, which micro-operations do not check.
                let watched = self.cpu.checks_alignment();
                if written || watched || self.cpu.state.shadow || last && self.block.privileged {
                    self.ended.look = true;
                    self.stop_before(op.at + 1);
                }
                return Ok(());
            }
            Ok(Flow::Jump) => {
                self.ended.retired = u64::from(op.at) + 1;
                self.ended.no_trap = decoded.is_some_and(|decoded| enters_kernel(&decoded));
            }
            Ok(Flow::Again) => {
                self.ended.retired = op.at.into();
                self.ended.again = true;
            }
            Err(exception) => {
                self.ended.retired = op.at.into();
                self.ended.fault = Some(exception);
            }
        }
        self.ended.look = true;
        self.left = true;
        Err(Exit)
    }
}
