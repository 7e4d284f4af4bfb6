//! XCHG, XADD and the compare-and-exchange instructions. Memory forms of XCHG are locked without a
//! prefix; the compare-and-exchange ones are done as one always, which is not wrong.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::operand::operand_size;
use crate::error::Exception;
use crate::flags::{Kind, mask};
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;

impl Processor {
    pub(crate) fn exchange_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Xchg => self.exchange(env, instruction),
            Mnemonic::Xadd => self.exchange_add(env, instruction),
            Mnemonic::Cmpxchg => self.compare_exchange(env, instruction),
            Mnemonic::Cmpxchg8b => self.compare_exchange_8(env, instruction),
            Mnemonic::Cmpxchg16b => self.compare_exchange_16(env, instruction),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    fn exchange(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        // The decoder may name memory first or second.
        let (memory, register) = if instruction.op_kind(1) == OpKind::Memory {
            (1, 0)
        } else {
            (0, 1)
        };
        let register = instruction.op_register(register);
        let value = self.read_register(register);
        let old = if instruction.op_kind(memory) == OpKind::Memory {
            let size = operand_size(instruction, memory);
            let linear = self.operand_address(instruction, size.into(), Access::Write)?;
            self.atomic(env, linear, size, |_| Some(value))?
        } else {
            let other = instruction.op_register(memory);
            let old = self.read_register(other);
            self.write_register(other, value);
            old
        };
        self.write_register(register, old);
        Ok(())
    }

    fn exchange_add(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let register = instruction.op_register(1);
        let right = self.read_register(register);
        let (left, sum) = self.modify(env, instruction, |left| left.wrapping_add(right))?;
        let same =
            instruction.op_kind(0) == OpKind::Register && instruction.op_register(0) == register;
        if !same {
            self.write_register(register, left);
        }
        self.state.set_lazy(Kind::Add, size, left, right, sum);
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let accumulator = match size {
            1 => Register::AL,
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        let expected = self.read_register(accumulator);
        let new = self.read_register(instruction.op_register(1));
        let old = if instruction.op_kind(0) == OpKind::Register {
            // Without equality the register is not written: its upper half stays.
            let register = instruction.op_register(0);
            let old = self.read_register(register);
            if old == expected {
                self.write_register(register, new);
            }
            old
        } else {
            let linear = self.operand_address(instruction, size.into(), Access::Write)?;
            self.atomic(env, linear, size, |old| (old == expected).then_some(new))?
        };
        if old != expected {
            self.write_register(accumulator, old);
        }
        let difference = expected.wrapping_sub(old) & mask(size);
        self.state
            .set_lazy(Kind::Sub, size, expected, old, difference);
        Ok(())
    }

    fn set_zero_flag(&mut self, equal: bool) {
        self.state
            .set_status(rflags::ZF, if equal { rflags::ZF } else { 0 });
    }

    fn compare_exchange_8(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let two = |high, low| self.read_register(high) << 32 | self.read_register(low);
        let expected = two(Register::EDX, Register::EAX);
        let new = two(Register::ECX, Register::EBX);
        let linear = self.operand_address(instruction, 8, Access::Write)?;
        let old = self.atomic(env, linear, 8, |old| (old == expected).then_some(new))?;
        if old != expected {
            self.write_register(Register::EDX, old >> 32);
            self.write_register(Register::EAX, old & 0xffff_ffff);
        }
        self.set_zero_flag(old == expected);
        Ok(())
    }

    fn compare_exchange_16(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let two = |high, low| {
            u128::from(self.read_register(high)) << 64 | u128::from(self.read_register(low))
        };
        let expected = two(Register::RDX, Register::RAX);
        let new = two(Register::RCX, Register::RBX);
        let linear = self.operand_address(instruction, 16, Access::Write)?;
        if !linear.is_multiple_of(16) {
            return Err(Exception::gp(0));
        }
        let old = self.atomic_16(env, linear, expected, new)?;
        if old != expected {
            self.write_register(Register::RDX, (old >> 64) as u64);
            self.write_register(Register::RAX, old as u64);
        }
        self.set_zero_flag(old == expected);
        Ok(())
    }
}
