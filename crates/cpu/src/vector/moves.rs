//! Data movement between vector registers, memory and general registers.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::native::Xmm;
use crate::error::Exception;
use crate::execute::operand::segment_name;
use crate::mmu::Access;
use crate::processor::{Environment, Processor};
use crate::state::SegmentName;

/// Which bytes a move between an XMM register and memory or a register is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// All 16; memory is aligned unless so marked.
    Whole { unaligned: bool },
    /// The low bytes; a load or a move from another kind of register clears the rest.
    Low(usize),
    /// A scalar: as `Low`, but between XMM registers the rest of the destination stays.
    Scalar(usize),
    /// The low half; the other stays.
    LowHalf,
    /// The high half; the other stays.
    HighHalf,
}

fn part(mnemonic: Mnemonic) -> Option<Part> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Movaps | M::Movapd | M::Movdqa => Part::Whole { unaligned: false },
        M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa => Part::Whole { unaligned: false },
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => Part::Whole { unaligned: true },
        M::Movd => Part::Low(4),
        M::Movq | M::Movntq | M::Movq2dq | M::Movdq2q => Part::Low(8),
        M::Movss => Part::Scalar(4),
        M::Movsd => Part::Scalar(8),
        M::Movlps | M::Movlpd => Part::LowHalf,
        M::Movhps | M::Movhpd => Part::HighHalf,
        _ => return None,
    })
}

impl Processor {
    /// Executes the instruction if it is a move.
    pub(super) fn vector_move(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Result<(), Exception>> {
        use Mnemonic as M;
        let mnemonic = instruction.mnemonic();
        if let Some(part) = part(mnemonic) {
            return Some(if instruction.op0_kind() == OpKind::Memory {
                self.store_part(env, instruction, part)
            } else {
                self.load_part(env, instruction, part)
            });
        }
        match mnemonic {
            M::Movhlps | M::Movlhps => {
                let target = instruction.op0_register();
                let src = self.xmm(instruction.op1_register());
                let mut dst = self.xmm(target);
                if mnemonic == M::Movhlps {
                    dst[..8].copy_from_slice(&src[8..]);
                } else {
                    dst[8..].copy_from_slice(&src[..8]);
                }
                self.set_xmm(target, dst);
                Some(Ok(()))
            }
            M::Maskmovq | M::Maskmovdqu => Some(self.masked_store(env, instruction)),
            M::Ldmxcsr => Some(self.load_mxcsr(env, instruction)),
            M::Stmxcsr => {
                let value = self.state.fx.mxcsr;
                Some(self.write_operand(env, instruction, 0, value.into()))
            }
            M::Emms => {
                self.enter_mmx();
                self.state.fx.ftw = 0;
                Some(Ok(()))
            }
            _ => None,
        }
    }

    fn store_part(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        part: Part,
    ) -> Result<(), Exception> {
        let register = instruction.op1_register();
        let (size, unaligned) = match part {
            Part::Whole { unaligned } => (16, unaligned),
            Part::Low(size) | Part::Scalar(size) => (size, true),
            Part::LowHalf | Part::HighHalf => (8, true),
        };
        let linear = self.vector_address(instruction, size, unaligned, Access::Write)?;
        let mut bytes = [0; 16];
        if register.is_mm() {
            bytes[..8].copy_from_slice(&self.mm(register));
        } else {
            bytes = self.xmm(register);
        }
        if part == Part::HighHalf {
            bytes.rotate_left(8);
        }
        self.store_vector(env, linear, &bytes[..size])?;
        if register.is_mm() {
            self.enter_mmx();
        }
        Ok(())
    }

    /// Moves to a register, from memory or another register.
    fn load_part(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        part: Part,
    ) -> Result<(), Exception> {
        let target = instruction.op0_register();
        let from_memory = instruction.op1_kind() == OpKind::Memory;
        let unaligned = part != Part::Whole { unaligned: false };
        let src = self.vector_operand(env, instruction, 1, unaligned)?;
        let from_mm = !from_memory && instruction.op1_register().is_mm();
        let size = match part {
            Part::Low(size) | Part::Scalar(size) => size,
            Part::LowHalf | Part::HighHalf => 8,
            Part::Whole { .. } => 16,
        };
        let mut low = [0; 16];
        low[..size].copy_from_slice(&src[..size]);
        if target.is_xmm() {
            let mut dst = self.xmm(target);
            match part {
                Part::Scalar(_) if !from_memory => dst[..size].copy_from_slice(&low[..size]),
                Part::LowHalf => dst[..8].copy_from_slice(&low[..8]),
                Part::HighHalf => dst[8..].copy_from_slice(&low[..8]),
                _ => dst = low,
            }
            self.set_xmm(target, dst);
        } else if target.is_mm() {
            self.set_mm(target, std::array::from_fn(|byte| low[byte]));
        } else {
            self.write_register(target, u128::from_le_bytes(low) as u64);
        }
        if from_mm {
            self.enter_mmx();
        }
        Ok(())
    }

    /// MASKMOVQ and MASKMOVDQU: the bytes whose mask byte has its top bit set, at DS:rDI.
    fn masked_store(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let (data, mask) = (instruction.op1_register(), instruction.op2_register());
        let mut bytes: [Xmm; 2] = [[0; 16]; 2];
        let size = if data.is_mm() { 8 } else { 16 };
        for (bytes, register) in bytes.iter_mut().zip([data, mask]) {
            if register.is_mm() {
                bytes[..8].copy_from_slice(&self.mm(register));
            } else {
                *bytes = self.xmm(register);
            }
        }
        let offset = self.read_register(match instruction.op0_kind() {
            OpKind::MemorySegDI => Register::DI,
            OpKind::MemorySegEDI => Register::EDI,
            _ => Register::RDI,
        });
        let name = segment_name(instruction.memory_segment()).unwrap_or(SegmentName::Ds);
        let linear = self.linear(name, offset, size as u64, Access::Write)?;
        let [data_bytes, mask] = bytes;
        let chosen = || (0..size).filter(|&byte| mask[byte] & 0x80 != 0);
        for byte in chosen() {
            self.check_write(linear.wrapping_add(byte as u64), 1)?;
        }
        for byte in chosen() {
            let at = linear.wrapping_add(byte as u64);
            self.store(env, at, 1, data_bytes[byte].into())?;
        }
        if data.is_mm() {
            self.enter_mmx();
        }
        Ok(())
    }

    fn load_mxcsr(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let value = self.read_operand(env, instruction, 0)? as u32;
        if value & !super::MXCSR_BITS != 0 {
            return Err(Exception::gp(0));
        }
        self.state.fx.mxcsr = value;
        Ok(())
    }
}
