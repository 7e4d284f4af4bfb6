//! Data movement: MOV and its extending forms, LEA, CMOVcc, SETcc, conversions, XLAT, cache hints.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::operand::{operand_size, sign_extend};
use crate::error::Exception;
use crate::flags::{Condition, mask};
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;

/// The condition of Jcc, SETcc and CMOVcc.
pub(crate) fn condition_of(instruction: &Instruction) -> Option<Condition> {
    match instruction.condition_code() {
        ConditionCode::None => None,
        code => Some(Condition::from_bits((code as u8).wrapping_sub(1))),
    }
}

/// Whether operand `index` is something else than a general register where a register is named:
/// MOV, PUSH and POP of segment, control and debug registers are the system's.
pub(crate) fn is_system_register(instruction: &Instruction, index: u32) -> bool {
    instruction.op_kind(index) == OpKind::Register && !instruction.op_register(index).is_gpr()
}

impl Processor {
    pub(crate) fn move_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Mov => {
                if is_system_register(instruction, 0) || is_system_register(instruction, 1) {
                    return None;
                }
                self.copy(env, instruction)
            }
            Mnemonic::Movzx | Mnemonic::Movnti => self.copy(env, instruction),
            Mnemonic::Movsx | Mnemonic::Movsxd => self.sign_extending_move(env, instruction),
            Mnemonic::Lea => self.load_effective_address(instruction),
            Mnemonic::Xlatb => self.translate_byte(env, instruction),
            Mnemonic::Nop
            | Mnemonic::Pause
            | Mnemonic::Reservednop
            | Mnemonic::Endbr32
            | Mnemonic::Endbr64
            | Mnemonic::Rdsspd
            | Mnemonic::Rdsspq
            | Mnemonic::Cldemote
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchit0
            | Mnemonic::Prefetchit1 => Ok(()),
            Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => {
                fence(Ordering::SeqCst);
                Ok(())
            }
            Mnemonic::Clflush => self.flush_line(instruction),
            _ => return self.flag_or_conversion(env, instruction),
        };
        Some(done.map(|()| Flow::Next))
    }

    /// CMOVcc, SETcc, the CBW family and the instructions on single flags.
    fn flag_or_conversion(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let flags = self.state.rflags();
        match instruction.mnemonic() {
            Mnemonic::Cbw
            | Mnemonic::Cwde
            | Mnemonic::Cdqe
            | Mnemonic::Cwd
            | Mnemonic::Cdq
            | Mnemonic::Cqo => self.convert(instruction.mnemonic()),
            Mnemonic::Clc => self.state.set_status(rflags::CF, 0),
            Mnemonic::Stc => self.state.set_status(rflags::CF, rflags::CF),
            Mnemonic::Cmc => self.state.set_status(rflags::CF, !flags),
            Mnemonic::Cld => self.state.flags &= !rflags::DF,
            Mnemonic::Std => self.state.flags |= rflags::DF,
            Mnemonic::Lahf => self.write_register(Register::AH, flags),
            Mnemonic::Sahf => {
                let bits = self.read_register(Register::AH);
                self.state.set_status(rflags::STATUS & !rflags::OF, bits);
            }
            Mnemonic::Salc => {
                let value = if self.state.carry() { 0xff } else { 0 };
                self.write_register(Register::AL, value);
            }
            _ => return self.conditional_move(env, instruction),
        }
        Some(Ok(Flow::Next))
    }

    fn conditional_move(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        if instruction.condition_code() == ConditionCode::None
            || is_system_register(instruction, 0)
            || !matches!(instruction.op_kind(0), OpKind::Register | OpKind::Memory)
        {
            return None;
        }
        let holds = self.state.condition(condition_of(instruction)?);
        let done = if instruction.op_count() == 1 {
            self.write_operand(env, instruction, 0, holds.into())
        } else {
            // The source is read, and the upper half cleared, whether the condition holds or not.
            self.read_operand(env, instruction, 1).map(|value| {
                let register = instruction.op_register(0);
                let old = self.read_register(register);
                self.write_register(register, if holds { value } else { old });
            })
        };
        Some(done.map(|()| Flow::Next))
    }

    fn copy(&mut self, env: &dyn Environment, instruction: &Instruction) -> Result<(), Exception> {
        let value = self.read_operand(env, instruction, 1)?;
        let value = value & mask(operand_size(instruction, 0));
        self.write_operand(env, instruction, 0, value)
    }

    fn sign_extending_move(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let value = self.read_operand(env, instruction, 1)?;
        let value = sign_extend(value, operand_size(instruction, 1)) as u64;
        self.write_operand(env, instruction, 0, value)
    }

    fn load_effective_address(&mut self, instruction: &Instruction) -> Result<(), Exception> {
        let offset = self.effective_address(instruction);
        self.write_register(instruction.op_register(0), offset);
        Ok(())
    }

    fn translate_byte(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let linear = self.operand_address(instruction, 1, Access::Read)?;
        let value = self.load(env, linear, 1)?;
        self.write_register(Register::AL, value);
        Ok(())
    }

    /// CLFLUSH has nothing to flush here, but is checked like a load of a byte.
    fn flush_line(&mut self, instruction: &Instruction) -> Result<(), Exception> {
        let linear = self.operand_address(instruction, 1, Access::Read)?;
        let user = self.state.cpl() == 3;
        self.translate(linear, Access::Read, user).map(|_| ())
    }

    fn convert(&mut self, mnemonic: Mnemonic) {
        let rax = self.read_register(Register::RAX);
        let sign_of = |size| sign_extend(rax, size) >> 63;
        let (target, value) = match mnemonic {
            Mnemonic::Cbw => (Register::AX, sign_extend(rax, 1)),
            Mnemonic::Cwde => (Register::EAX, sign_extend(rax, 2)),
            Mnemonic::Cdqe => (Register::RAX, sign_extend(rax, 4)),
            Mnemonic::Cwd => (Register::DX, sign_of(2)),
            Mnemonic::Cdq => (Register::EDX, sign_of(4)),
            _ => (Register::RDX, sign_of(8)),
        };
        self.write_register(target, value as u64);
    }
}
