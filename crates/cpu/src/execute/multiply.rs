//! MUL, IMUL, DIV, IDIV. Multiplications set CF and OF; the flags that the manual leaves undefined
//! keep their values.

use iced_x86::{Instruction, Mnemonic, Register};

use super::operand::{operand_size, sign_extend};
use crate::error::{Exception, Vector};
use crate::flags::mask;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;

/// The registers of a double-width value: low and high. For bytes both are in AX.
fn pair(size: u8) -> (Register, Register) {
    match size {
        1 => (Register::AL, Register::AH),
        2 => (Register::AX, Register::DX),
        4 => (Register::EAX, Register::EDX),
        _ => (Register::RAX, Register::RDX),
    }
}

impl Processor {
    pub(crate) fn multiply_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Mul => self.multiply_wide(env, instruction, false),
            Mnemonic::Imul if instruction.op_count() == 1 => {
                self.multiply_wide(env, instruction, true)
            }
            Mnemonic::Imul => self.multiply(env, instruction),
            Mnemonic::Div => self.divide(env, instruction, false),
            Mnemonic::Idiv => self.divide(env, instruction, true),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    fn set_carry_and_overflow(&mut self, both: bool) {
        let which = rflags::CF | rflags::OF;
        self.state.set_status(which, if both { which } else { 0 });
    }

    /// The accumulator times operand 0, into the register pair.
    fn multiply_wide(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        signed: bool,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let (low, high) = pair(size);
        let right = self.read_operand(env, instruction, 0)?;
        let left = self.read_register(low);
        let (product, fits) = if signed {
            let product =
                i128::from(sign_extend(left, size)) * i128::from(sign_extend(right, size));
            let fits = product == i128::from(sign_extend(product as u64, size));
            (product as u128, fits)
        } else {
            let product = u128::from(left) * u128::from(right);
            (product, product <= mask(size).into())
        };
        self.write_register(low, product as u64 & mask(size));
        self.write_register(high, (product >> (8 * u32::from(size))) as u64 & mask(size));
        self.set_carry_and_overflow(!fits);
        Ok(())
    }

    /// IMUL of two and three operands.
    fn multiply(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let last = instruction.op_count() - 1;
        let left = self.read_operand(env, instruction, last - 1)?;
        let right = self.read_operand(env, instruction, last)?;
        let product = i128::from(sign_extend(left, size)) * i128::from(sign_extend(right, size));
        let fits = product == i128::from(sign_extend(product as u64, size));
        self.write_register(instruction.op_register(0), product as u64);
        self.set_carry_and_overflow(!fits);
        Ok(())
    }

    fn divide(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        signed: bool,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let bits = 8 * u32::from(size);
        let (low, high) = pair(size);
        let divisor = self.read_operand(env, instruction, 0)?;
        let dividend =
            u128::from(self.read_register(high)) << bits | u128::from(self.read_register(low));
        let error = Exception::new(Vector::DivideError);
        let (quotient, remainder) = if signed {
            let unused = 128 - 2 * bits;
            let dividend = (dividend as i128) << unused >> unused;
            let divisor = i128::from(sign_extend(divisor, size));
            let quotient = dividend.checked_div(divisor).ok_or(error)?;
            let remainder = dividend.checked_rem(divisor).ok_or(error)?;
            if quotient != i128::from(sign_extend(quotient as u64, size)) {
                return Err(error);
            }
            (quotient as u64, remainder as u64)
        } else {
            let quotient = dividend.checked_div(divisor.into()).ok_or(error)?;
            let remainder = dividend.checked_rem(divisor.into()).ok_or(error)?;
            if quotient > mask(size).into() {
                return Err(error);
            }
            (quotient as u64, remainder as u64)
        };
        self.write_register(low, quotient & mask(size));
        self.write_register(high, remainder & mask(size));
        Ok(())
    }
}
