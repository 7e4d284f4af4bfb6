//! What a kernel sees: exceptions, interrupts, segments, privileged registers.

use iced_x86::Instruction;

use crate::error::Exception;
use crate::processor::{Environment, Executed, Processor};

/// An event could not be delivered, nor the double fault for that: the processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(crate) fn system_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let _ = (env, instruction);
        None
    }

    /// Takes the guest to its handler of an exception.
    pub(crate) fn deliver_exception(
        &mut self,
        env: &dyn Environment,
        exception: Exception,
    ) -> Result<(), TripleFault> {
        let _ = (env, exception);
        Err(TripleFault)
    }

    /// Takes the guest to its handler of an interrupt.
    pub(crate) fn deliver_interrupt(
        &mut self,
        env: &dyn Environment,
        vector: u8,
    ) -> Result<(), TripleFault> {
        let _ = (env, vector);
        Err(TripleFault)
    }
}
