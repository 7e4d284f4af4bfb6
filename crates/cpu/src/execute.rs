//! Instructions by their decoded form, one at a time, in every mode. Here are the general-purpose
//! ones; [`crate::vector`] and [`crate::x87`] have the others.

mod arithmetic;
mod bits;
mod control;
mod decimal;
mod exchange;
mod integer;
mod moves;
mod multiply;
pub(crate) mod operand;
mod segment;
mod shift;
pub(crate) mod stack;
mod strings;
#[cfg(test)]
mod tests;

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
        if let Some(executed) = self.system_instruction(env, instruction) {
            return executed;
        }
        Err(Exception::ud())
    }
}
