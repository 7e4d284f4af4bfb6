//! Lowering: SSE. MMX, and what is rare, is left to `Complex`.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::Builder;
use super::lower::register_slot;
use crate::microop::Op;
use crate::state::slot;
use crate::vector::Shape;

/// The vector register for values between two operations.
pub(crate) const TEMP: u8 = 16;

/// The number of an XMM register.
fn xmm(register: Register) -> Option<u8> {
    register.is_xmm().then(|| register.number() as u8)
}

/// The XMM register of an operand that is one.
fn xmm_operand(instruction: &Instruction, index: u32) -> Option<u8> {
    if instruction.op_kind(index) == OpKind::Register {
        xmm(instruction.op_register(index))
    } else {
        None
    }
}

/// The general register of an operand that is one.
fn general_operand(instruction: &Instruction, index: u32) -> Option<u8> {
    if instruction.op_kind(index) == OpKind::Register {
        register_slot(instruction.op_register(index))
    } else {
        None
    }
}

impl Builder {
    /// Emits the instruction's operations, if it is one of SSE's that are lowered.
    pub(super) fn lower_vector(&mut self, instruction: &Instruction) -> Option<()> {
        if !self.vectors {
            return None;
        }
        match instruction.mnemonic() {
            M::Movaps | M::Movapd | M::Movdqa => self.vector_whole(instruction, true),
            M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa => {
                self.vector_whole(instruction, true)
            }
            M::Movups | M::Movupd | M::Movdqu | M::Lddqu => self.vector_whole(instruction, false),
            M::Movsd => self.vector_scalar(instruction, 8),
            M::Movss => self.vector_scalar(instruction, 4),
            M::Movd => self.vector_general(instruction, 4),
            M::Movq => self.vector_general(instruction, 8),
            M::Movmskps => self.vector_mask(instruction, 4),
            M::Movmskpd => self.vector_mask(instruction, 8),
            M::Pmovmskb => self.vector_mask(instruction, 1),
            M::Cvtsi2sd | M::Cvtsi2ss => self.vector_from_integer(instruction),
            M::Cvtsd2si | M::Cvttsd2si | M::Cvtss2si | M::Cvttss2si => {
                self.vector_to_integer(instruction)
            }
            _ => self.vector_arithmetic(instruction),
        }
    }

    fn vector_access(&mut self, op: Op, register: u8, instruction: &Instruction) -> Option<()> {
        let address = self.address(instruction)?;
        self.access_by(op, register, address);
        Some(())
    }

    /// Moves of all 16 bytes.
    fn vector_whole(&mut self, instruction: &Instruction, aligned: bool) -> Option<()> {
        let (load, store) = if aligned {
            (Op::VectorLoad16A, Op::VectorStore16A)
        } else {
            (Op::VectorLoad16, Op::VectorStore16)
        };
        match (xmm_operand(instruction, 0), xmm_operand(instruction, 1)) {
            (Some(to), Some(from)) => self.emit(Op::VectorMove, to, from, 0, 0),
            (Some(to), None) => return self.vector_access(load, to, instruction),
            (None, Some(from)) => return self.vector_access(store, from, instruction),
            (None, None) => return None,
        }
        Some(())
    }

    /// MOVSD and MOVSS.
    fn vector_scalar(&mut self, instruction: &Instruction, size: u8) -> Option<()> {
        let by_size = |eight, four| if size == 8 { eight } else { four };
        match (xmm_operand(instruction, 0), xmm_operand(instruction, 1)) {
            (Some(to), Some(from)) => {
                let op = by_size(Op::VectorMoveLow8, Op::VectorMoveLow4);
                self.emit(op, to, from, 0, 0);
                Some(())
            }
            (Some(to), None) => {
                let op = by_size(Op::VectorLoad8, Op::VectorLoad4);
                self.vector_access(op, to, instruction)
            }
            (None, Some(from)) => {
                let op = by_size(Op::VectorStore8, Op::VectorStore4);
                self.vector_access(op, from, instruction)
            }
            (None, None) => None,
        }
    }

    /// MOVD and MOVQ; a general register's width decides the former's.
    fn vector_general(&mut self, instruction: &Instruction, size: u8) -> Option<()> {
        let by_size = |eight, four| if size == 8 { eight } else { four };
        let (to, from) = (xmm_operand(instruction, 0), xmm_operand(instruction, 1));
        if let (Some(to), Some(from)) = (to, from) {
            self.emit(Op::VectorMoveZero8, to, from, 0, 0);
        } else if let Some(to) = to {
            if let Some(from) = general_operand(instruction, 1) {
                let op = by_size(Op::VectorFrom8, Op::VectorFrom4);
                self.emit(op, to, from, 0, 0);
            } else if instruction.op1_kind() == OpKind::Memory {
                let op = by_size(Op::VectorLoad8, Op::VectorLoad4);
                return self.vector_access(op, to, instruction);
            } else {
                return None;
            }
        } else {
            let from = from?;
            if let Some(to) = general_operand(instruction, 0) {
                let op = by_size(Op::VectorTo8, Op::VectorTo4);
                self.emit(op, to, from, 0, 0);
            } else if instruction.op0_kind() == OpKind::Memory {
                let op = by_size(Op::VectorStore8, Op::VectorStore4);
                return self.vector_access(op, from, instruction);
            } else {
                return None;
            }
        }
        Some(())
    }

    fn vector_mask(&mut self, instruction: &Instruction, lane: u8) -> Option<()> {
        let to = general_operand(instruction, 0)?;
        let from = xmm_operand(instruction, 1)?;
        self.emit(Op::VectorMask, to, from, lane, 0);
        Some(())
    }

    fn vector_from_integer(&mut self, instruction: &Instruction) -> Option<()> {
        let to = xmm_operand(instruction, 0)?;
        let size = crate::execute::operand::operand_size(instruction, 1);
        let source = self.source(instruction, 1, size)?;
        let mnemonic = instruction.mnemonic() as i64;
        let wide = u8::from(size == 8);
        self.emit(Op::VectorConvertFrom, to, source.slot, wide, mnemonic);
        Some(())
    }

    fn vector_to_integer(&mut self, instruction: &Instruction) -> Option<()> {
        let to = general_operand(instruction, 0)?;
        let from = self.vector_source(instruction, true)?;
        let wide = u8::from(instruction.op0_register().is_gpr64());
        let mnemonic = instruction.mnemonic() as i64;
        self.emit(Op::VectorConvertTo, to, from, wide, mnemonic);
        Some(())
    }

    /// The second operand: a register, or memory that is loaded.
    fn vector_source(&mut self, instruction: &Instruction, unaligned: bool) -> Option<u8> {
        if instruction.op1_kind() == OpKind::Register {
            return xmm(instruction.op1_register());
        }
        if instruction.op1_kind() != OpKind::Memory {
            return None;
        }
        let op = match instruction.memory_size().size() {
            16 if unaligned => Op::VectorLoad16,
            16 => Op::VectorLoad16A,
            8 => Op::VectorLoad8,
            4 => Op::VectorLoad4,
            2 => Op::VectorLoad2,
            _ => return None,
        };
        self.vector_access(op, TEMP, instruction)?;
        Some(TEMP)
    }

    fn vector_arithmetic(&mut self, instruction: &Instruction) -> Option<()> {
        let mnemonic = instruction.mnemonic();
        let shape = crate::vector::shape(mnemonic)?;
        let to = xmm_operand(instruction, 0)?;
        if shape == Shape::Integer && instruction.op1_kind() == OpKind::Immediate8 {
            let count = instruction.immediate8().into();
            self.emit(Op::VectorConst, TEMP, slot::ZERO, 0, count);
            self.emit(Op::VectorInteger, to, TEMP, 0, mnemonic as i64);
            return Some(());
        }
        let from = self.vector_source(instruction, false)?;
        let (op, immediate) = match shape {
            Shape::Integer => (Op::VectorInteger, 0),
            Shape::Float => (Op::VectorFloat, 0),
            Shape::Compare => (Op::VectorCompareF, 0),
            Shape::Immediate => {
                let mut immediate = instruction.immediate8();
                if mnemonic == M::Insertps && instruction.op1_kind() == OpKind::Memory {
                    immediate &= 0x3f; // memory has one element only
                }
                (Op::VectorImmediate, i64::from(immediate))
            }
        };
        self.emit(op, to, from, 0, mnemonic as i64 | immediate << 32);
        Some(())
    }
}
