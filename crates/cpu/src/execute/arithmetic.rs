//! Binary and unary arithmetic and logic: ADD to XOR, CMP, TEST, INC, DEC, NEG, NOT.

use iced_x86::{Instruction, Mnemonic};

use super::operand::operand_size;
use crate::error::Exception;
use crate::flags::{Kind, mask};
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;

/// The result of a binary operation, before it is cut to its size.
fn compute(kind: Kind, mnemonic: Mnemonic, left: u64, right: u64) -> u64 {
    match (kind, mnemonic) {
        (Kind::Add, _) => left.wrapping_add(right),
        (Kind::AddCarry, _) => left.wrapping_add(right).wrapping_add(1),
        (Kind::Sub, _) => left.wrapping_sub(right),
        (Kind::SubBorrow, _) => left.wrapping_sub(right).wrapping_sub(1),
        (_, Mnemonic::Or) => left | right,
        (_, Mnemonic::Xor) => left ^ right,
        _ => left & right,
    }
}

impl Processor {
    pub(crate) fn arithmetic_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Add => self.binary(env, instruction, Kind::Add),
            Mnemonic::Adc if self.state.carry() => self.binary(env, instruction, Kind::AddCarry),
            Mnemonic::Adc => self.binary(env, instruction, Kind::Add),
            Mnemonic::Sub => self.binary(env, instruction, Kind::Sub),
            Mnemonic::Sbb if self.state.carry() => self.binary(env, instruction, Kind::SubBorrow),
            Mnemonic::Sbb => self.binary(env, instruction, Kind::Sub),
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => {
                self.binary(env, instruction, Kind::Logic)
            }
            Mnemonic::Cmp => self.compare(env, instruction, Kind::Sub),
            Mnemonic::Test => self.compare(env, instruction, Kind::Logic),
            Mnemonic::Inc => self.add_one(env, instruction, Kind::Add),
            Mnemonic::Dec => self.add_one(env, instruction, Kind::Sub),
            Mnemonic::Neg => self.negate(env, instruction),
            Mnemonic::Not => self.modify(env, instruction, |old| !old).map(|_| ()),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    fn binary(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        kind: Kind,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let right = self.read_operand(env, instruction, 1)? & mask(size);
        let mnemonic = instruction.mnemonic();
        let (left, result) = self.modify(env, instruction, |left| {
            compute(kind, mnemonic, left, right)
        })?;
        self.state.set_lazy(kind, size, left, right, result);
        Ok(())
    }

    /// CMP and TEST.
    fn compare(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        kind: Kind,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let left = self.read_operand(env, instruction, 0)? & mask(size);
        let right = self.read_operand(env, instruction, 1)? & mask(size);
        let result = compute(kind, instruction.mnemonic(), left, right) & mask(size);
        self.state.set_lazy(kind, size, left, right, result);
        Ok(())
    }

    /// INC and DEC: CF stays.
    fn add_one(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        kind: Kind,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let carry = if self.state.carry() { rflags::CF } else { 0 };
        let mnemonic = instruction.mnemonic();
        let (left, result) =
            self.modify(env, instruction, |left| compute(kind, mnemonic, left, 1))?;
        self.state.set_lazy(kind, size, left, 1, result);
        self.state.set_status(rflags::CF, carry);
        Ok(())
    }

    fn negate(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let (old, result) = self.modify(env, instruction, u64::wrapping_neg)?;
        self.state.set_lazy(Kind::Sub, size, 0, old, result);
        Ok(())
    }
}
