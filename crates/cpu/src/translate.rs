//! From guest bytes to blocks of micro-operations.
//!
//! Only 64-bit mode is lowered; in the other modes, and for every instruction that has no lowering
//! here, the block holds the decoded instruction (`Complex`). A block ends at a branch, at its page's
//! end, or after [`LIMIT`] instructions. An instruction that crosses into the next page is a block of
//! its own and knows both pages.

mod cache;
mod control;
mod flags;
mod lower;
mod moves;
mod vector;

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

pub(crate) use cache::{BlockCache, CodeRights, Key};
pub(crate) use vector::TEMP as VECTOR_TEMP;

use crate::error::Exception;
use crate::memory::PAGE;
use crate::microop::{Block, MicroOp, Op};
use crate::mmu::Access;
use crate::processor::Processor;
use crate::state::{Mode, SegmentName, slot};

/// Instructions in a block at most.
const LIMIT: usize = 64;
/// Bytes of code that are fetched for a block at most.
const WINDOW: u64 = 256;
/// Bytes of an instruction at most.
const LONGEST: usize = 15;

/// A block that is being made.
struct Builder {
    block: Block,
    mode: Mode,
    /// SSE may be used, so that its instructions need not check.
    vectors: bool,
    /// The block's last instruction was lowered to a jump.
    ended: bool,
}

impl Builder {
    fn emit(&mut self, op: Op, a: u8, b: u8, c: u8, imm: i64) {
        self.emit_scaled(op, [a, b, c, 0], imm);
    }

    fn emit_scaled(&mut self, op: Op, [a, b, c, mode]: [u8; 4], imm: i64) {
        let at = self.block.starts.len().saturating_sub(1) as u16;
        self.block.ops.push(MicroOp {
            op,
            a,
            b,
            c,
            mode,
            at,
            imm,
        });
    }

    /// Adds an instruction; says whether the block goes on.
    fn add(&mut self, instruction: &Instruction) -> bool {
        let start = self.block.ops.len();
        self.block.starts.push(start as u16);
        let lowered = self.mode == Mode::Bits64 && self.lower(instruction).is_some();
        if !lowered {
            self.block.ops.truncate(start);
            let index = self.block.complex.len() as i64;
            self.block.complex.push(*instruction);
            self.emit(Op::Complex, 0, slot::ZERO, slot::ZERO, index);
        }
        let offset = instruction.next_ip().wrapping_sub(self.block.rip);
        self.block.offsets.push(offset as u16);
        self.block.privileged = instruction.is_privileged();
        let goes_on = lowered || instruction.flow_control() == FlowControl::Next;
        !self.ended && !self.block.privileged && goes_on
    }

    fn finish(mut self) -> Block {
        self.block.starts.push(self.block.ops.len() as u16);
        flags::drop_dead(&mut self.block);
        self.block
    }
}

impl Processor {
    /// Translates the code at a linear address, which is RIP's, to a block of `limit` instructions at
    /// most. From before its bytes are read, writes to their pages are noticed.
    pub(crate) fn translate_block(
        &mut self,
        linear: u64,
        limit: u64,
    ) -> Result<(Block, u32), Exception> {
        let user = self.state.cpl() == 3;
        let physical = self.translate(linear, Access::Fetch, user)?.physical;
        self.ram.watch_code(physical);
        let generation = self.ram.code_generation(physical);
        let mut bytes = [0; WINDOW as usize];
        let in_page = PAGE - linear % PAGE;
        let length = in_page.min(WINDOW) as usize;
        self.fetch(linear, &mut bytes[..length])?;
        let mode = self.state.mode();
        let mut builder = Builder {
            block: Block {
                rip: self.state.rip,
                offsets: vec![0],
                ..Block::default()
            },
            mode,
            vectors: self.state.vectors_enabled(),
            ended: false,
        };
        let limit = limit.min(LIMIT as u64) as usize;
        let mut decoder = Decoder::with_ip(
            mode.bits(),
            &bytes[..length],
            self.state.rip,
            DecoderOptions::NONE,
        );
        while builder.block.starts.len() < limit {
            let instruction = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            if mode != Mode::Bits64 {
                let len = instruction.len() as u64;
                match self.linear(SegmentName::Cs, instruction.ip(), len, Access::Fetch) {
                    Err(exception) if builder.block.starts.is_empty() => return Err(exception),
                    Err(_) => break,
                    Ok(_) => {}
                }
            }
            if !builder.add(&instruction) || instruction.is_invalid() {
                break;
            }
        }
        if builder.block.starts.is_empty() {
            self.add_crossing(&mut builder, linear)?;
        } else {
            let used = builder.block.offsets.last().copied().unwrap_or_default();
            builder.block.bytes = bytes[..usize::from(used).min(length)].into();
            builder.block.in_first = builder.block.bytes.len() as u16;
        }
        Ok((builder.finish(), generation))
    }

    /// Adds the one instruction that crosses into the next page.
    fn add_crossing(&mut self, builder: &mut Builder, linear: u64) -> Result<(), Exception> {
        let user = self.state.cpl() == 3;
        let next = (linear | (PAGE - 1)).wrapping_add(1);
        let second = self.translate(next, Access::Fetch, user)?.physical;
        self.ram.watch_code(second);
        builder.block.second = Some((second, self.ram.code_generation(second)));
        let mut bytes = [0; LONGEST];
        self.fetch(linear, &mut bytes)?;
        let (bits, rip) = (builder.mode.bits(), self.state.rip);
        let mut decoder = Decoder::with_ip(bits, &bytes, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if decoder.last_error() == DecoderError::NoMoreBytes {
            return Err(Exception::gp(0)); // longer than an instruction may be
        }
        let len = instruction.len() as u64;
        self.linear(SegmentName::Cs, rip, len, Access::Fetch)?;
        builder.add(&instruction);
        builder.block.bytes = bytes[..instruction.len()].into();
        builder.block.in_first = (PAGE - linear % PAGE).min(len) as u16;
        Ok(())
    }
}
