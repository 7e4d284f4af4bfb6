//! The processor, what surrounds it, and its step from one instruction to the next.

use std::sync::Arc;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};

use crate::error::Exception;
use crate::memory::{PAGE, Ram};
use crate::mmu::{Access, Tlb};
use crate::state::{Mode, SegmentName, State};

/// The longest instruction in bytes (SDM volume 2, 2.3.11).
const MAX_INSTRUCTION: usize = 15;

/// What is around the processor's core. Called from inside [`Processor::step`].
pub trait Environment {
    /// A load of 1, 2, 4 or 8 bytes from a physical address outside RAM.
    fn memory_read(&self, address: u64, size: u8) -> u64;
    /// A store of 1, 2, 4 or 8 bytes to a physical address outside RAM.
    fn memory_write(&self, address: u64, size: u8, value: u64);
}

/// One processor core.
pub struct Processor {
    /// Its registers. After a change from outside call [`Processor::state_changed`].
    pub state: State,
    pub(crate) ram: Arc<Ram>,
    pub(crate) tlb: Tlb,
}

/// How an instruction went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next instruction follows; the caller advances RIP.
    Next,
    /// RIP is set.
    Jump,
    /// A string instruction with iterations left: RIP stays, interrupts may come in between.
    Again,
}

/// What every instruction's execution gives.
pub(crate) type Executed = Result<Flow, Exception>;

impl Processor {
    /// A processor after power-on.
    #[must_use]
    pub fn new(ram: Arc<Ram>) -> Self {
        Self {
            state: State::default(),
            ram,
            tlb: Tlb::default(),
        }
    }

    /// Call after changing [`Processor::state`] from outside: drops what was derived from it.
    pub fn state_changed(&mut self) {
        self.tlb.flush();
    }

    /// Executes one instruction, or a part of a repeated string instruction, which then stays where
    /// it is.
    ///
    /// # Errors
    ///
    /// The exception that it raised, for the caller to deliver. After a fault RIP is the
    /// instruction's own; after a trap (INT3, INTO) the next one's.
    pub fn step(&mut self, env: &dyn Environment) -> Result<(), Exception> {
        let instruction = self.decode()?;
        self.state.shadow = false;
        if self.execute(env, &instruction)? == Flow::Next {
            self.state.rip = self.next_rip(&instruction);
        }
        Ok(())
    }

    /// Fetches and decodes the instruction at RIP. The next page is touched only by an instruction
    /// that reaches into it.
    fn decode(&mut self) -> Result<Instruction, Exception> {
        let rip = self.state.rip;
        let start = self.linear(SegmentName::Cs, rip, 1, Access::Fetch)?;
        let first = MAX_INSTRUCTION.min((PAGE - start % PAGE) as usize);
        let mut bytes = [0; MAX_INSTRUCTION];
        self.fetch(start, &mut bytes[..first])?;
        let (mut instruction, mut error) = decode(self.state.mode(), rip, &bytes[..first]);
        if error == DecoderError::NoMoreBytes && first < MAX_INSTRUCTION {
            let rest = self.linear(SegmentName::Cs, rip + first as u64, 1, Access::Fetch)?;
            self.fetch(rest, &mut bytes[first..])?;
            (instruction, error) = decode(self.state.mode(), rip, &bytes);
        }
        if error == DecoderError::NoMoreBytes {
            return Err(Exception::gp(0)); // longer than an instruction may be
        }
        let len = instruction.len() as u64;
        if instruction.code() == Code::INVALID {
            return Err(Exception::ud());
        }
        self.linear(SegmentName::Cs, rip, len, Access::Fetch)?;
        Ok(instruction)
    }
}

fn decode(mode: Mode, rip: u64, bytes: &[u8]) -> (Instruction, DecoderError) {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (instruction, decoder.last_error())
}
