//! Reading segment registers: MOV from one, and PUSH of one. Loading them is the system's.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::segment_name;
use crate::error::Exception;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn segment_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let operand = match instruction.mnemonic() {
            Mnemonic::Mov => 1,
            Mnemonic::Push => 0,
            _ => return None,
        };
        if instruction.op_kind(operand) != OpKind::Register {
            return None;
        }
        let name = segment_name(instruction.op_register(operand))?;
        let selector = self.state.segment(name).selector;
        let done = if operand == 1 {
            self.store_selector(env, instruction, selector)
        } else {
            let size = instruction.stack_pointer_increment().unsigned_abs();
            self.push(env, size as u8, selector.into())
        };
        Some(done.map(|()| Flow::Next))
    }

    /// A register takes the selector zero-extended to the operand size, memory 16 bits whatever that
    /// size is.
    pub(crate) fn store_selector(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        selector: u16,
    ) -> Result<(), Exception> {
        if instruction.op_kind(0) == OpKind::Register {
            self.write_register(instruction.op_register(0), selector.into());
            return Ok(());
        }
        let linear = self.operand_address(instruction, 2, Access::Write)?;
        self.store(env, linear, 2, selector.into())
    }
}
