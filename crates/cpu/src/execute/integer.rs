//! General-purpose instructions: the dispatch to their groups, and what the groups share.
//!
//! Every group computes first, lets memory accept the result, and writes registers and flags last:
//! a fault leaves all of them as they were.

use iced_x86::{Instruction, OpKind};

use super::operand::operand_size;
use crate::error::Exception;
use crate::flags::mask;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Processor};
use crate::state::Mode;

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(crate) fn integer_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        if instruction.has_lock_prefix() && instruction.op_kind(0) != OpKind::Memory {
            return None; // #UD, unless the system's own LOCK forms want it
        }
        self.move_instruction(env, instruction)
            .or_else(|| self.arithmetic_instruction(env, instruction))
            .or_else(|| self.control_instruction(env, instruction))
            .or_else(|| self.stack_instruction(env, instruction))
            .or_else(|| self.shift_instruction(env, instruction))
            .or_else(|| self.bit_instruction(env, instruction))
            .or_else(|| self.multiply_instruction(env, instruction))
            .or_else(|| self.exchange_instruction(env, instruction))
            .or_else(|| self.string_instruction(env, instruction))
            .or_else(|| self.decimal_instruction(instruction))
            .or_else(|| self.segment_instruction(env, instruction))
    }

    /// Replaces operand 0, a general register or memory, by `change` of it; gives the old and the new
    /// value. `change` may be asked more than once when the access is locked.
    pub(crate) fn modify(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        change: impl Fn(u64) -> u64,
    ) -> Result<(u64, u64), Exception> {
        let size = operand_size(instruction, 0);
        if instruction.op_kind(0) == OpKind::Register {
            let register = instruction.op_register(0);
            let old = self.read_register(register);
            let new = change(old) & mask(size);
            self.write_register(register, new);
            return Ok((old, new));
        }
        let linear = self.operand_address(instruction, size.into(), Access::Write)?;
        let locked = instruction.has_lock_prefix();
        self.modify_at(env, linear, size, locked, change)
    }

    /// The same for memory at a linear address.
    pub(crate) fn modify_at(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        locked: bool,
        change: impl Fn(u64) -> u64,
    ) -> Result<(u64, u64), Exception> {
        let change = |old| change(old) & mask(size);
        if locked {
            let old = self.atomic(env, linear, size, |old| Some(change(old)))?;
            return Ok((old, change(old)));
        }
        // A fault of a read-modify-write is a write's fault.
        self.check_write(linear, size)?;
        let old = self.load(env, linear, size)?;
        let new = change(old);
        self.store(env, linear, size, new)?;
        Ok((old, new))
    }

    /// The offset of the instruction after this one.
    pub(crate) fn next_rip(&self, instruction: &Instruction) -> u64 {
        let next = self.state.rip.wrapping_add(instruction.len() as u64);
        if self.state.mode() == Mode::Bits64 {
            next
        } else {
            next & 0xffff_ffff
        }
    }
}
