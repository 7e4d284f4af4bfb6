//! PUSH, POP and their kin, ENTER and LEAVE, and the stack for the other groups.
//!
//! The stack pointer is as wide as the stack: 64 bits in 64-bit mode, else as SS's B bit says.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::moves::is_system_register;
use crate::error::Exception;
use crate::flags::mask;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{Mode, Segment, SegmentName, rflags};

/// General registers in the order of PUSHA.
const ALL: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
/// RSP's place in it.
const SP: usize = 4;

impl Processor {
    /// Bytes of the stack pointer.
    pub(crate) fn stack_size(&self) -> u8 {
        let big = self.state.segment(SegmentName::Ss).attributes & Segment::DEFAULT_BIG != 0;
        match self.state.mode() {
            Mode::Bits64 => 8,
            _ if big => 4,
            _ => 2,
        }
    }

    /// RSP, ESP or SP.
    fn stack_register(&self) -> Register {
        match self.stack_size() {
            2 => Register::SP,
            4 => Register::ESP,
            _ => Register::RSP,
        }
    }

    /// Moves the stack pointer by a number of bytes.
    pub(crate) fn move_stack(&mut self, by: i64) {
        let register = self.stack_register();
        let value = self.read_register(register).wrapping_add(by as u64);
        self.write_register(register, value);
    }

    /// The linear address of `size` bytes that are `by` bytes above the stack pointer.
    pub(crate) fn stack_address(
        &self,
        by: i64,
        size: u8,
        access: Access,
    ) -> Result<u64, Exception> {
        let offset = self
            .read_register(self.stack_register())
            .wrapping_add(by as u64)
            & mask(self.stack_size());
        self.linear(SegmentName::Ss, offset, size.into(), access)
    }

    /// Pushes `size` bytes.
    pub(crate) fn push(
        &mut self,
        env: &dyn Environment,
        size: u8,
        value: u64,
    ) -> Result<(), Exception> {
        let by = -i64::from(size);
        let linear = self.stack_address(by, size, Access::Write)?;
        self.store(env, linear, size, value & mask(size))?;
        self.move_stack(by);
        Ok(())
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, env: &dyn Environment, size: u8) -> Result<u64, Exception> {
        let value = self.peek(env, size)?;
        self.move_stack(size.into());
        Ok(value)
    }

    /// What [`Processor::pop`] would give, for who can still fault.
    pub(crate) fn peek(&mut self, env: &dyn Environment, size: u8) -> Result<u64, Exception> {
        let linear = self.stack_address(0, size, Access::Read)?;
        self.load(env, linear, size)
    }

    pub(crate) fn stack_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let size = instruction.stack_pointer_increment().unsigned_abs() as u8;
        let done = match instruction.mnemonic() {
            Mnemonic::Push | Mnemonic::Pop if is_system_register(instruction, 0) => return None,
            Mnemonic::Push => self
                .read_operand(env, instruction, 0)
                .and_then(|value| self.push(env, size, value)),
            Mnemonic::Pop => self.pop_operand(env, instruction, size),
            Mnemonic::Pusha => self.push_all(env, 2),
            Mnemonic::Pushad => self.push_all(env, 4),
            Mnemonic::Popa => self.pop_all(env, 2),
            Mnemonic::Popad => self.pop_all(env, 4),
            Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => self.push_flags(env, size),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
                return Some(self.pop_flags(env, instruction, size));
            }
            Mnemonic::Enter => self.enter(env, instruction),
            Mnemonic::Leave => self.leave(env, instruction),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    fn pop_operand(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        size: u8,
    ) -> Result<(), Exception> {
        let before = self.state.register(SP);
        // The stack pointer in the operand's address is the one after the pop.
        let value = self.pop(env, size)?;
        if instruction.op_kind(0) == OpKind::Register {
            self.write_register(instruction.op_register(0), value);
            return Ok(());
        }
        self.write_operand(env, instruction, 0, value)
            .inspect_err(|_| self.state.set_register(SP, before))
    }

    fn push_all(&mut self, env: &dyn Environment, size: u8) -> Result<(), Exception> {
        let at = |index: usize| -(index as i64 + 1) * i64::from(size);
        for index in ALL {
            let linear = self.stack_address(at(index), size, Access::Write)?;
            self.check_write(linear, size)?;
        }
        for index in ALL {
            let linear = self.stack_address(at(index), size, Access::Write)?;
            let value = self.state.register(index) & mask(size);
            self.store(env, linear, size, value)?;
        }
        self.move_stack(at(7));
        Ok(())
    }

    fn pop_all(&mut self, env: &dyn Environment, size: u8) -> Result<(), Exception> {
        let mut values = [0; 8];
        for index in ALL {
            let by = (7 - index as i64) * i64::from(size);
            let linear = self.stack_address(by, size, Access::Read)?;
            values[index] = self.load(env, linear, size)?;
        }
        self.move_stack(8 * i64::from(size));
        for index in ALL.into_iter().filter(|index| *index != SP) {
            let old = self.state.register(index);
            let kept = if size == 2 { old & !0xffff } else { 0 };
            self.state.set_register(index, kept | values[index]);
        }
        Ok(())
    }

    /// Whether the I/O privilege level allows what virtual-8086 mode may not do by itself.
    fn flags_allowed(&self) -> bool {
        let virtual_8086 = self.state.cr0 & 1 != 0 && self.state.flags & rflags::VM != 0;
        !virtual_8086 || self.state.flags & rflags::IOPL == rflags::IOPL
    }

    fn push_flags(&mut self, env: &dyn Environment, size: u8) -> Result<(), Exception> {
        if !self.flags_allowed() {
            return Err(Exception::gp(0));
        }
        let value = self.state.rflags() & !(rflags::VM | rflags::RF);
        self.push(env, size, value)
    }

    fn pop_flags(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        size: u8,
    ) -> Executed {
        if !self.flags_allowed() {
            return Err(Exception::gp(0));
        }
        let value = self.pop(env, size)?;
        let cpl = u64::from(self.state.cpl());
        let mut writable =
            rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
        if cpl <= (self.state.flags & rflags::IOPL) >> 12 {
            writable |= rflags::IF;
        }
        if cpl == 0 {
            writable |= rflags::IOPL;
        }
        writable &= mask(size);
        let old = self.state.rflags();
        let mut new = old & !writable | value & writable;
        if size > 2 {
            new &= !rflags::RF;
        }
        self.state.set_rflags(new);
        self.state.rip = self.next_rip(instruction);
        Ok(Flow::Jump) // TF or IF may be new
    }

    fn enter(&mut self, env: &dyn Environment, instruction: &Instruction) -> Result<(), Exception> {
        let before = [self.state.register(SP), self.state.register(5)];
        self.enter_frame(env, instruction).inspect_err(|_| {
            self.state.set_register(SP, before[0]);
            self.state.set_register(5, before[1]);
        })
    }

    fn enter_frame(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let (size, base) = match instruction.code() {
            Code::Enterw_imm16_imm8 => (2, Register::BP),
            Code::Enterd_imm16_imm8 => (4, Register::EBP),
            _ => (8, Register::RBP),
        };
        let frame_base = self.state.register(5);
        let level = i64::from(instruction.immediate8_2nd() & 31);
        self.push(env, size, frame_base)?;
        let frame = self.read_register(self.stack_register());
        for outer in 1..level {
            let offset =
                frame_base.wrapping_sub((outer * i64::from(size)) as u64) & mask(self.stack_size());
            let linear = self.linear(SegmentName::Ss, offset, size.into(), Access::Read)?;
            let pointer = self.load(env, linear, size)?;
            self.push(env, size, pointer)?;
        }
        if level > 0 {
            self.push(env, size, frame)?;
        }
        self.move_stack(-i64::from(instruction.immediate16()));
        // The new frame has to be writable, though nothing is written.
        let linear = self.stack_address(0, size, Access::Write)?;
        self.check_write(linear, size)?;
        self.write_register(base, frame);
        Ok(())
    }

    fn leave(&mut self, env: &dyn Environment, instruction: &Instruction) -> Result<(), Exception> {
        let (size, base) = match instruction.code() {
            Code::Leavew => (2, Register::BP),
            Code::Leaved => (4, Register::EBP),
            _ => (8, Register::RBP),
        };
        let offset = self.state.register(5) & mask(self.stack_size());
        let linear = self.linear(SegmentName::Ss, offset, size.into(), Access::Read)?;
        let value = self.load(env, linear, size)?;
        self.write_register(self.stack_register(), offset);
        self.move_stack(size.into());
        self.write_register(base, value);
        Ok(())
    }
}
