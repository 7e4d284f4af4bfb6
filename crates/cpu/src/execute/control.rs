//! Near jumps, calls and returns, loops, and the instructions that raise exceptions. Far transfers
//! are the system's.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::moves::condition_of;
use super::operand::{operand_size, sign_extend};
use crate::error::{Exception, Vector};
use crate::flags::Condition;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{Mode, SegmentName, rflags};

/// The counter of LOOP and its forms: as wide as the address size.
fn loop_counter(code: Code) -> Register {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => Register::CX,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => Register::RCX,
        _ => Register::ECX,
    }
}

impl Processor {
    /// Checks that a near transfer may go to an offset in CS.
    pub(crate) fn check_target(&self, target: u64) -> Result<(), Exception> {
        let inside = if self.state.mode() == Mode::Bits64 {
            (target as i64) << 16 >> 16 == target as i64
        } else {
            target <= self.state.segment(SegmentName::Cs).limit.into()
        };
        if inside {
            Ok(())
        } else {
            Err(Exception::gp(0))
        }
    }

    fn jump(&mut self, target: u64) -> Executed {
        self.check_target(target)?;
        self.state.rip = target;
        Ok(Flow::Jump)
    }

    /// The target that operand 0 gives: relative ones are resolved by the decoder.
    fn target(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<u64, Exception> {
        match instruction.op_kind(0) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                Ok(instruction.near_branch_target())
            }
            _ => self.read_operand(env, instruction, 0),
        }
    }

    pub(crate) fn control_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let code = instruction.code();
        Some(match instruction.mnemonic() {
            Mnemonic::Jmp | Mnemonic::Call
                if code.is_jmp_far()
                    || code.is_jmp_far_indirect()
                    || code.is_call_far()
                    || code.is_call_far_indirect() =>
            {
                return None;
            }
            Mnemonic::Jmp => self
                .target(env, instruction)
                .and_then(|target| self.jump(target)),
            Mnemonic::Call => self.call(env, instruction),
            Mnemonic::Ret => self.return_near(env, instruction),
            Mnemonic::Jcxz => self.jump_if_zero(instruction, Register::CX),
            Mnemonic::Jecxz => self.jump_if_zero(instruction, Register::ECX),
            Mnemonic::Jrcxz => self.jump_if_zero(instruction, Register::RCX),
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => self.loop_near(instruction),
            Mnemonic::Int3 => self.trap(instruction, Vector::Breakpoint),
            Mnemonic::Int1 => self.trap(instruction, Vector::Debug),
            Mnemonic::Into if self.state.condition(Condition::O) => {
                self.trap(instruction, Vector::Overflow)
            }
            Mnemonic::Into => Ok(Flow::Next),
            Mnemonic::Bound => self.bound(env, instruction),
            _ if code.is_jcc_short_or_near() => {
                if self.state.condition(condition_of(instruction)?) {
                    self.jump(instruction.near_branch_target())
                } else {
                    Ok(Flow::Next)
                }
            }
            _ => return None,
        })
    }

    /// Raises a trap, whose RIP is the next instruction's.
    fn trap(&mut self, instruction: &Instruction, vector: Vector) -> Executed {
        self.state.rip = self.next_rip(instruction);
        Err(Exception::new(vector))
    }

    fn call(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        let target = self.target(env, instruction)?;
        self.check_target(target)?;
        let size = instruction.stack_pointer_increment().unsigned_abs() as u8;
        self.push(env, size, self.next_rip(instruction))?;
        self.state.rip = target;
        Ok(Flow::Jump)
    }

    fn return_near(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        let size = match instruction.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let target = self.peek(env, size)?;
        self.check_target(target)?;
        let parameters = match instruction.op_count() {
            0 => 0,
            _ => i64::from(instruction.immediate16()),
        };
        self.move_stack(i64::from(size) + parameters);
        self.state.rip = target;
        Ok(Flow::Jump)
    }

    fn jump_if_zero(&mut self, instruction: &Instruction, counter: Register) -> Executed {
        if self.read_register(counter) == 0 {
            self.jump(instruction.near_branch_target())
        } else {
            Ok(Flow::Next)
        }
    }

    fn loop_near(&mut self, instruction: &Instruction) -> Executed {
        let counter = loop_counter(instruction.code());
        let left = self.read_register(counter).wrapping_sub(1);
        let left = left & crate::flags::mask(counter.size() as u8);
        let zero = self.state.rflags() & rflags::ZF != 0;
        let goes_on = left != 0
            && match instruction.mnemonic() {
                Mnemonic::Loope => zero,
                Mnemonic::Loopne => !zero,
                _ => true,
            };
        let flow = if goes_on {
            self.jump(instruction.near_branch_target())?
        } else {
            Flow::Next
        };
        self.write_register(counter, left);
        Ok(flow)
    }

    fn bound(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        let size = operand_size(instruction, 0);
        let linear = self.operand_address(instruction, 2 * u64::from(size), Access::Read)?;
        let low = self.load(env, linear, size)?;
        let high = self.load(env, linear.wrapping_add(size.into()) & 0xffff_ffff, size)?;
        let index = self.read_register(instruction.op_register(0));
        let range = sign_extend(low, size)..=sign_extend(high, size);
        if range.contains(&sign_extend(index, size)) {
            Ok(Flow::Next)
        } else {
            Err(Exception::new(Vector::BoundRange))
        }
    }
}
