//! MMX and SSE.

use iced_x86::Instruction;

use crate::processor::{Environment, Executed, Processor};

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(crate) fn vector_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let _ = (env, instruction);
        None
    }
}
