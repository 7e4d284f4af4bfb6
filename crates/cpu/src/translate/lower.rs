//! Lowering: operands and arithmetic. What gives `None` is left to `Complex`.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::Builder;
use crate::execute::operand::operand_size;
use crate::microop::{Op, STACK};
use crate::state::slot;

pub(super) const RAX: u8 = 0;
pub(super) const RDX: u8 = 2;

/// Operations of the four operand sizes.
pub(super) type Sizes = [Op; 4];

const ADD: Sizes = [Op::Add8F, Op::Add16F, Op::Add32F, Op::Add64F];
const SUB: Sizes = [Op::Sub8F, Op::Sub16F, Op::Sub32F, Op::Sub64F];
const AND: Sizes = [Op::And8F, Op::And16F, Op::And32F, Op::And64F];
const OR: Sizes = [Op::Or8F, Op::Or16F, Op::Or32F, Op::Or64F];
const XOR: Sizes = [Op::Xor8F, Op::Xor16F, Op::Xor32F, Op::Xor64F];
const NOT: Sizes = [Op::Xor8, Op::Xor16, Op::Xor32, Op::Xor64];
const ADC: Sizes = [Op::Adc8F, Op::Adc16F, Op::Adc32F, Op::Adc64F];
const SBB: Sizes = [Op::Sbb8F, Op::Sbb16F, Op::Sbb32F, Op::Sbb64F];
const INC: Sizes = [Op::Inc8F, Op::Inc16F, Op::Inc32F, Op::Inc64F];
const DEC: Sizes = [Op::Dec8F, Op::Dec16F, Op::Dec32F, Op::Dec64F];
const SHL: Sizes = [Op::Shl8F, Op::Shl16F, Op::Shl32F, Op::Shl64F];
const SHR: Sizes = [Op::Shr8F, Op::Shr16F, Op::Shr32F, Op::Shr64F];
const SAR: Sizes = [Op::Sar8F, Op::Sar16F, Op::Sar32F, Op::Sar64F];
const ROL: Sizes = [Op::Rol8F, Op::Rol16F, Op::Rol32F, Op::Rol64F];
const ROR: Sizes = [Op::Ror8F, Op::Ror16F, Op::Ror32F, Op::Ror64F];
pub(super) const LOAD: Sizes = [Op::Load8, Op::Load16, Op::Load32, Op::Load64];
const LOAD_FOR_WRITE: Sizes = [
    Op::LoadForWrite8,
    Op::LoadForWrite16,
    Op::LoadForWrite32,
    Op::LoadForWrite64,
];
pub(super) const STORE: Sizes = [Op::Store8, Op::Store16, Op::Store32, Op::Store64];
pub(super) const MOVE: Sizes = [Op::Move8, Op::Move16, Op::Move32, Op::Move64];

/// The operation for operands of `size` bytes.
pub(super) fn sized(sizes: Sizes, size: u8) -> Option<Op> {
    match size {
        1 => Some(sizes[0]),
        2 => Some(sizes[1]),
        4 => Some(sizes[2]),
        8 => Some(sizes[3]),
        _ => None,
    }
}

/// Base, index, mode and displacement of a memory operand.
#[derive(Clone, Copy)]
pub(super) struct Address {
    base: u8,
    index: u8,
    mode: u8,
    displacement: i64,
}

/// Where a result goes, and the slot that it is computed in.
pub(super) enum Target {
    Register(u8),
    /// Bits 8 to 15.
    High(u8),
    Memory(Address),
}

impl Target {
    pub(super) fn slot(&self) -> u8 {
        match *self {
            Self::Register(slot) => slot,
            Self::High(_) | Self::Memory(_) => slot::TEMP0,
        }
    }
}

/// A right operand: `file[slot] + immediate`.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) slot: u8,
    pub(super) immediate: i64,
}

/// AH, CH, DH, BH.
pub(super) fn is_high(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// The slot of a general register, of which AH to BH are a part.
pub(super) fn register_slot(register: Register) -> Option<u8> {
    if is_high(register) {
        return Some((register as usize - Register::AH as usize) as u8);
    }
    (register.is_gpr8() || register.is_gpr16() || register.is_gpr32() || register.is_gpr64())
        .then(|| register.full_register().number() as u8)
}

impl Builder {
    /// The memory operand's address; emits what one operation cannot hold.
    pub(super) fn address(&mut self, instruction: &Instruction) -> Option<Address> {
        let segment = match instruction.memory_segment() {
            Register::FS => slot::SEGMENT_BASE + 4,
            Register::GS => slot::SEGMENT_BASE + 5,
            _ => slot::ZERO,
        };
        // Prefixes that name another segment than FS and GS do not count.
        let on_stack = matches!(
            instruction.memory_base().full_register(),
            Register::RSP | Register::RBP
        );
        let stack = if on_stack && segment == slot::ZERO {
            STACK
        } else {
            0
        };
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let mut address = self.offset(instruction, base, index)?;
        let short = base.is_gpr32() || index.is_gpr32();
        if short || (segment != slot::ZERO && address.index != slot::ZERO) {
            let op = if short { Op::Lea32 } else { Op::Lea64 };
            let Address {
                base, index, mode, ..
            } = address;
            let operands = [slot::TEMP2, base, index, mode];
            self.emit_scaled(op, operands, address.displacement);
            address = Address {
                base: slot::TEMP2,
                index: slot::ZERO,
                mode: 0,
                displacement: 0,
            };
        }
        if segment != slot::ZERO {
            address.index = segment;
            address.mode = 0;
        }
        address.mode |= stack;
        Some(address)
    }

    /// The offset in its segment.
    pub(super) fn offset(
        &self,
        instruction: &Instruction,
        base: Register,
        index: Register,
    ) -> Option<Address> {
        let displacement = instruction.memory_displacement64();
        if base == Register::RIP {
            return Some(Address {
                base: slot::START,
                index: slot::ZERO,
                mode: 0,
                displacement: displacement.wrapping_sub(self.block.rip) as i64,
            });
        }
        let part = |register: Register| match register {
            Register::None => Some(slot::ZERO),
            register => register_slot(register),
        };
        Some(Address {
            base: part(base)?,
            index: part(index)?,
            mode: instruction.memory_index_scale().trailing_zeros() as u8,
            displacement: displacement as i64,
        })
    }

    /// Emits an access of memory.
    pub(super) fn access(&mut self, sizes: Sizes, size: u8, value: u8, at: Address) -> Option<()> {
        self.access_by(sized(sizes, size)?, value, at);
        Some(())
    }

    /// The same with one operation.
    pub(super) fn access_by(&mut self, op: Op, value: u8, at: Address) {
        self.emit_scaled(op, [value, at.base, at.index, at.mode], at.displacement);
    }

    /// A register, memory (which is loaded) or immediate operand that is read.
    pub(super) fn source(
        &mut self,
        instruction: &Instruction,
        index: u32,
        size: u8,
    ) -> Option<Source> {
        let from = |slot| Source { slot, immediate: 0 };
        match instruction.op_kind(index) {
            OpKind::Register => {
                let register = instruction.op_register(index);
                let slot = register_slot(register)?;
                if !is_high(register) {
                    return Some(from(slot));
                }
                self.emit(Op::ExtractHigh, slot::TEMP1, slot, slot::ZERO, 0);
                Some(from(slot::TEMP1))
            }
            OpKind::Memory => {
                let address = self.address(instruction)?;
                self.access(LOAD, size, slot::TEMP1, address)?;
                Some(from(slot::TEMP1))
            }
            _ => Some(Source {
                slot: slot::ZERO,
                immediate: instruction.try_immediate(index).ok()? as i64,
            }),
        }
    }

    /// A value of a source in one slot.
    pub(super) fn value(&mut self, source: Source) -> u8 {
        if source.slot != slot::ZERO {
            return source.slot;
        }
        self.emit(
            Op::Const,
            slot::TEMP1,
            slot::ZERO,
            slot::ZERO,
            source.immediate,
        );
        slot::TEMP1
    }

    /// Operand 0, which is read and written: its value is in the target's slot.
    pub(super) fn target(&mut self, instruction: &Instruction, size: u8) -> Option<Target> {
        if instruction.op_kind(0) == OpKind::Memory {
            let address = self.address(instruction)?;
            self.access(LOAD_FOR_WRITE, size, slot::TEMP0, address)?;
            return Some(Target::Memory(address));
        }
        let register = instruction.op_register(0);
        let slot = register_slot(register)?;
        if !is_high(register) {
            return Some(Target::Register(slot));
        }
        self.emit(Op::ExtractHigh, slot::TEMP0, slot, slot::ZERO, 0);
        Some(Target::High(slot))
    }

    /// Writes a target's slot to where it belongs.
    pub(super) fn write_back(&mut self, target: &Target, size: u8) -> Option<()> {
        match *target {
            Target::Register(_) => {}
            Target::High(slot) => self.emit(Op::InsertHigh, slot, slot::TEMP0, slot::ZERO, 0),
            Target::Memory(address) => self.access(STORE, size, slot::TEMP0, address)?,
        }
        Some(())
    }

    /// Operand 0 = operand 0 ∘ operand 1.
    fn binary(&mut self, instruction: &Instruction, sizes: Sizes) -> Option<()> {
        let size = operand_size(instruction, 0);
        let source = self.source(instruction, 1, size)?;
        let target = self.target(instruction, size)?;
        let slot = target.slot();
        self.emit(
            sized(sizes, size)?,
            slot,
            slot,
            source.slot,
            source.immediate,
        );
        self.write_back(&target, size)
    }

    /// CMP and TEST: the result goes nowhere.
    fn compare(&mut self, instruction: &Instruction, sizes: Sizes) -> Option<()> {
        let size = operand_size(instruction, 0);
        let source = self.source(instruction, 1, size)?;
        let left = if instruction.op_kind(0) == OpKind::Memory {
            let address = self.address(instruction)?;
            self.access(LOAD, size, slot::TEMP0, address)?;
            slot::TEMP0
        } else {
            self.target(instruction, size)?.slot()
        };
        self.emit(
            sized(sizes, size)?,
            slot::TEMP3,
            left,
            source.slot,
            source.immediate,
        );
        Some(())
    }

    /// Operand 0 = operand 0 ∘ `immediate`.
    fn unary(&mut self, instruction: &Instruction, sizes: Sizes, immediate: i64) -> Option<()> {
        let size = operand_size(instruction, 0);
        let target = self.target(instruction, size)?;
        let slot = target.slot();
        self.emit(sized(sizes, size)?, slot, slot, slot::ZERO, immediate);
        self.write_back(&target, size)
    }

    fn negate(&mut self, instruction: &Instruction) -> Option<()> {
        let size = operand_size(instruction, 0);
        let target = self.target(instruction, size)?;
        let slot = target.slot();
        self.emit(sized(SUB, size)?, slot, slot::ZERO, slot, 0);
        self.write_back(&target, size)
    }

    /// IMUL with two or three operands.
    fn multiply(&mut self, instruction: &Instruction) -> Option<()> {
        const IMUL: Sizes = [Op::Complex, Op::Imul16F, Op::Imul32F, Op::Imul64F];
        let size = operand_size(instruction, 0);
        let target = register_slot(instruction.op_register(0))?;
        let source = self.source(instruction, 1, size)?;
        let (left, right) = if instruction.op_count() == 3 {
            (source.slot, self.source(instruction, 2, size)?)
        } else {
            (target, source)
        };
        self.emit(
            sized(IMUL, size)?,
            target,
            left,
            right.slot,
            right.immediate,
        );
        Some(())
    }

    /// One-operand MUL, IMUL, DIV, IDIV of 32 or 64 bits.
    fn wide(&mut self, instruction: &Instruction, ops: [Op; 2]) -> Option<()> {
        let size = operand_size(instruction, 0);
        if size < 4 {
            return None;
        }
        let source = self.source(instruction, 0, size)?;
        let op = ops[usize::from(size == 8)];
        self.emit(op, RAX, source.slot, slot::ZERO, 0);
        Some(())
    }

    fn bit_test(&mut self, instruction: &Instruction) -> Option<()> {
        let size = operand_size(instruction, 0);
        if instruction.op0_kind() != OpKind::Register || size < 4 {
            return None;
        }
        let left = register_slot(instruction.op_register(0))?;
        let source = self.source(instruction, 1, size)?;
        let op = if size == 4 {
            Op::BitTest32F
        } else {
            Op::BitTest64F
        };
        self.emit(op, RAX, left, source.slot, source.immediate);
        Some(())
    }

    /// Emits the instruction's operations, if it has a lowering.
    pub(super) fn lower(&mut self, instruction: &Instruction) -> Option<()> {
        if instruction.has_lock_prefix() || instruction.is_invalid() {
            return None;
        }
        match instruction.mnemonic() {
            M::Add => self.binary(instruction, ADD),
            M::Sub => self.binary(instruction, SUB),
            M::And => self.binary(instruction, AND),
            M::Or => self.binary(instruction, OR),
            M::Xor => self.binary(instruction, XOR),
            M::Adc => self.binary(instruction, ADC),
            M::Sbb => self.binary(instruction, SBB),
            M::Shl => self.binary(instruction, SHL),
            M::Shr => self.binary(instruction, SHR),
            M::Sar => self.binary(instruction, SAR),
            M::Rol => self.binary(instruction, ROL),
            M::Ror => self.binary(instruction, ROR),
            M::Cmp => self.compare(instruction, SUB),
            M::Test => self.compare(instruction, AND),
            M::Inc => self.unary(instruction, INC, 1),
            M::Dec => self.unary(instruction, DEC, 1),
            M::Not => self.unary(instruction, NOT, -1),
            M::Neg => self.negate(instruction),
            M::Imul if instruction.op_count() > 1 => self.multiply(instruction),
            M::Imul => self.wide(instruction, [Op::ImulWide32F, Op::ImulWide64F]),
            M::Mul => self.wide(instruction, [Op::MulWide32F, Op::MulWide64F]),
            M::Div => self.wide(instruction, [Op::Divide32, Op::Divide64]),
            M::Idiv => self.wide(instruction, [Op::DivideSigned32, Op::DivideSigned64]),
            M::Bt => self.bit_test(instruction),
            _ => self
                .lower_move(instruction)
                .or_else(|| self.lower_control(instruction))
                .or_else(|| self.lower_vector(instruction)),
        }
    }
}
