//! Instructions by their decoded form, one at a time: everything that is not hot enough to have
//! micro-operations, and everything outside 64-bit mode.

mod integer;
pub(crate) mod operand;

use iced_x86::Instruction;

use crate::error::Exception;
use crate::processor::{Environment, Executed, Processor};

impl Processor {
    /// Executes one instruction. RIP is still at its first byte; on [`crate::processor::Flow::Next`]
    /// the caller moves it on.
    pub(crate) fn execute(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        if let Some(executed) = self.integer_instruction(env, instruction) {
            return executed;
        }
        if let Some(executed) = self.vector_instruction(env, instruction) {
            return executed;
        }
        if let Some(executed) = self.x87_instruction(env, instruction) {
            return executed;
        }
        self.system_instruction(env, instruction)
            .unwrap_or(Err(Exception::ud()))
    }
}
