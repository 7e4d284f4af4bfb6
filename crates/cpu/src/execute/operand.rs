//! Operands of decoded instructions: registers, memory, immediates.

use iced_x86::{Instruction, OpKind, Register};

use crate::error::Exception;
use crate::flags::mask;
use crate::mmu::Access;
use crate::processor::{Environment, Processor};
use crate::state::{Mode, SegmentName};

/// Bytes of a general register or memory operand.
pub(crate) fn operand_size(instruction: &Instruction, index: u32) -> u8 {
    match instruction.op_kind(index) {
        OpKind::Register => instruction.op_register(index).size() as u8,
        OpKind::Memory => instruction.memory_size().size() as u8,
        OpKind::Immediate8 => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        _ => 8,
    }
}

/// Bytes of the offset that the memory operand's address is computed in.
pub(crate) fn address_size(instruction: &Instruction, mode: Mode) -> u8 {
    let size = match (instruction.memory_base(), instruction.memory_index()) {
        (Register::None, Register::None) => instruction.memory_displ_size() as usize,
        (Register::None, index) => index.size(),
        (base, _) => base.size(),
    };
    match size {
        2 => 2,
        4 => 4,
        _ if mode == Mode::Bits64 => 8,
        _ => 4,
    }
}

/// A value of `size` bytes, sign-extended.
pub(crate) fn sign_extend(value: u64, size: u8) -> i64 {
    let unused = 64 - 8 * u32::from(size.clamp(1, 8));
    (value as i64) << unused >> unused
}

/// The segment register of that iced name.
pub(crate) fn segment_name(register: Register) -> Option<SegmentName> {
    Some(match register {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::DS => SegmentName::Ds,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => return None,
    })
}

impl Processor {
    /// A general register of any width, zero-extended. `AH` to `BH` are what they say.
    pub(crate) fn read_register(&self, register: Register) -> u64 {
        let whole = |register: Register| self.state.file[register.full_register().number() & 15];
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                self.state.file[register as usize - Register::AH as usize] >> 8 & 0xff
            }
            Register::None => 0,
            _ => match register.size() {
                1 => whole(register) & 0xff,
                2 => whole(register) & 0xffff,
                4 => whole(register) & 0xffff_ffff,
                _ => whole(register),
            },
        }
    }

    /// Writes a general register of any width: 32 bits clear the upper half, 8 and 16 keep the rest.
    pub(crate) fn write_register(&mut self, register: Register, value: u64) {
        let file = &mut self.state.file;
        if matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        ) {
            let slot = &mut file[register as usize - Register::AH as usize];
            *slot = *slot & !0xff00 | (value & 0xff) << 8;
            return;
        }
        let slot = &mut file[register.full_register().number() & 15];
        *slot = match register.size() {
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// The offset in its segment that the memory operand names, in the address size.
    pub(crate) fn effective_address(&self, instruction: &Instruction) -> u64 {
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let displacement = instruction.memory_displacement64();
        if matches!(base, Register::RIP | Register::EIP) {
            return displacement; // iced has added the instruction pointer
        }
        let sum = displacement
            .wrapping_add(self.read_register(base))
            .wrapping_add(
                self.read_register(index)
                    .wrapping_mul(instruction.memory_index_scale().into()),
            );
        sum & mask(address_size(instruction, self.state.mode()))
    }

    /// The memory operand's segment. In 64-bit mode prefixes that name another than FS and GS are
    /// ignored (SDM volume 1, 3.3.7.1), also for which exception an address raises.
    pub(crate) fn operand_segment(&self, instruction: &Instruction) -> SegmentName {
        let name = segment_name(instruction.memory_segment()).unwrap_or(SegmentName::Ds);
        let counts = matches!(name, SegmentName::Fs | SegmentName::Gs);
        if self.state.mode() != Mode::Bits64 || counts {
            return name;
        }
        match instruction.memory_base().full_register() {
            Register::RSP | Register::RBP => SegmentName::Ss,
            _ => SegmentName::Ds,
        }
    }

    /// The linear address of the memory operand, checked for an access of `size` bytes.
    pub(crate) fn operand_address(
        &self,
        instruction: &Instruction,
        size: u64,
        access: Access,
    ) -> Result<u64, Exception> {
        let name = self.operand_segment(instruction);
        self.linear(name, self.effective_address(instruction), size, access)
    }

    /// A general register, memory or immediate operand, zero-extended (immediates: sign-extended as the
    /// instruction says, then cut to `operand_size` by who uses them).
    pub(crate) fn read_operand(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        index: u32,
    ) -> Result<u64, Exception> {
        match instruction.op_kind(index) {
            OpKind::Register => Ok(self.read_register(instruction.op_register(index))),
            OpKind::Memory => {
                let size = operand_size(instruction, index);
                let linear = self.operand_address(instruction, size.into(), Access::Read)?;
                self.load(env, linear, size)
            }
            _ => Ok(instruction.try_immediate(index).unwrap_or_default()),
        }
    }

    /// Writes a general register or memory operand.
    pub(crate) fn write_operand(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        index: u32,
        value: u64,
    ) -> Result<(), Exception> {
        if instruction.op_kind(index) == OpKind::Register {
            self.write_register(instruction.op_register(index), value);
            return Ok(());
        }
        let size = operand_size(instruction, index);
        let linear = self.operand_address(instruction, size.into(), Access::Write)?;
        self.store(env, linear, size, value)
    }
}
