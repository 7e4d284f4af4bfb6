//! Registers and immediate values for an operand.

use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind as K, OpKind, Register};

use super::operands::Builder;

impl Builder<'_> {
    /// A register where the operand is one, or may be one and the dice say so.
    pub(super) fn register(&mut self, kind: K) -> Option<Register> {
        let (first, count) = match kind {
            K::al => return Some(Register::AL),
            K::cl => return Some(Register::CL),
            K::ax => return Some(Register::AX),
            K::dx => return Some(Register::DX),
            K::eax => return Some(Register::EAX),
            K::rax => return Some(Register::RAX),
            K::st0 => return Some(Register::ST0),
            K::es => return Some(Register::ES),
            K::cs => return Some(Register::CS),
            K::ss => return Some(Register::SS),
            K::ds => return Some(Register::DS),
            K::fs => return Some(Register::FS),
            K::gs => return Some(Register::GS),
            K::r8_reg | K::r8_opcode | K::r8_or_mem => (Register::AL, 20),
            K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode | K::r16_or_mem => {
                (Register::AX, 16)
            }
            K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_or_mem => {
                (Register::EAX, 16)
            }
            K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_or_mem => {
                (Register::RAX, 16)
            }
            K::seg_reg => (Register::ES, 6),
            K::mm_reg | K::mm_rm | K::mm_or_mem => (Register::MM0, 8),
            K::xmm_reg | K::xmm_rm | K::xmm_or_mem => (Register::XMM0, 16),
            K::sti_opcode => (Register::ST0, 8),
            _ => return None,
        };
        let either = matches!(
            kind,
            K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
        );
        if either && self.random.chance(55) {
            return None;
        }
        Some(first + self.random.below(count) as u32)
    }

    pub(super) fn immediate(
        &mut self,
        instruction: &mut Instruction,
        kind: K,
        index: u32,
    ) -> Option<OpKind> {
        let value = self.random.integer();
        // ENTER's frame stays inside the data, mostly.
        let enter = instruction.mnemonic() == Mnemonic::Enter && self.random.chance(90);
        let shifts = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
        Some(match kind {
            K::imm8_const_1 => {
                instruction.set_immediate8(1);
                OpKind::Immediate8
            }
            K::imm8 if index > 0 && instruction.op_kind(index - 1) == OpKind::Immediate16 => {
                instruction.set_immediate8_2nd(if enter { value as u8 & 7 } else { value as u8 });
                OpKind::Immediate8_2nd
            }
            K::imm8 => {
                let value = if shifts { value % 17 } else { value };
                instruction.set_immediate8(value as u8);
                OpKind::Immediate8
            }
            K::imm8sex16 => {
                instruction.set_immediate8to16((value as i8).into());
                OpKind::Immediate8to16
            }
            K::imm8sex32 => {
                instruction.set_immediate8to32((value as i8).into());
                OpKind::Immediate8to32
            }
            K::imm8sex64 => {
                instruction.set_immediate8to64((value as i8).into());
                OpKind::Immediate8to64
            }
            K::imm16 => {
                instruction.set_immediate16(if enter {
                    value as u16 & 0x1ff
                } else {
                    value as u16
                });
                OpKind::Immediate16
            }
            K::imm32 => {
                instruction.set_immediate32(value as u32);
                OpKind::Immediate32
            }
            K::imm32sex64 => {
                instruction.set_immediate32to64((value as i32).into());
                OpKind::Immediate32to64
            }
            K::imm64 => {
                instruction.set_immediate64(value);
                OpKind::Immediate64
            }
            _ => return None,
        })
    }
}
