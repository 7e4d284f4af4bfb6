//! Lowering: moves, extensions, the stack.

use iced_x86::{ConditionCode, Instruction, Mnemonic as M, OpKind};

use super::Builder;
use super::lower::{
    LOAD, MOVE, RAX, RDX, STORE, Sizes, Source, Target, is_high, register_slot, sized,
};
use crate::execute::operand::operand_size;
use crate::microop::Op;
use crate::state::slot;

const RSP: u8 = 4;
const RBP: u8 = 5;

/// A condition's encoding.
pub(super) fn condition_bits(code: ConditionCode) -> Option<u8> {
    use ConditionCode as C;
    Some(match code {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        _ => return None,
    })
}

impl Builder {
    fn move_slot(&mut self, size: u8, to: u8, from: u8) -> Option<()> {
        self.emit(sized(MOVE, size)?, to, from, slot::ZERO, 0);
        Some(())
    }

    /// Moves a slot's value to operand 0, which is only written.
    fn assign(&mut self, instruction: &Instruction, size: u8, value: u8) -> Option<()> {
        if instruction.op0_kind() == OpKind::Memory {
            let address = self.address(instruction)?;
            return self.access(STORE, size, value, address);
        }
        let register = instruction.op_register(0);
        let to = register_slot(register)?;
        if is_high(register) {
            self.emit(Op::InsertHigh, to, value, slot::ZERO, 0);
            return Some(());
        }
        self.move_slot(size, to, value)
    }

    fn mov(&mut self, instruction: &Instruction) -> Option<()> {
        let size = operand_size(instruction, 0);
        let register = instruction.op_register(0);
        let whole = instruction.op0_kind() == OpKind::Register && size >= 4;
        if whole && instruction.op_kind(1) == OpKind::Memory {
            let to = register_slot(register)?;
            let address = self.address(instruction)?;
            return self.access(LOAD, size, to, address);
        }
        let source = self.source(instruction, 1, size)?;
        if whole && source.slot == slot::ZERO {
            let mask = if size == 4 { 0xffff_ffff } else { -1 };
            let to = register_slot(register)?;
            self.emit(Op::Const, to, 0, 0, source.immediate & mask);
            return Some(());
        }
        let value = self.value(source);
        self.assign(instruction, size, value)
    }

    /// MOVZX, MOVSX, MOVSXD by their operations on registers and memory, by destination size.
    fn extend(&mut self, instruction: &Instruction, signed: bool) -> Option<()> {
        let to = register_slot(instruction.op_register(0))?;
        let (size, from) = (operand_size(instruction, 0), operand_size(instruction, 1));
        let (load, extend) = match (signed, from, size) {
            (false, 1, 4 | 8) => (Op::Load8, Op::Zero8),
            (false, 2, 4 | 8) => (Op::Load16, Op::Zero16),
            (true, 1, 4) => (Op::LoadSigned8To32, Op::Extend8To32),
            (true, 1, 8) => (Op::LoadSigned8To64, Op::Extend8To64),
            (true, 2, 4) => (Op::LoadSigned16To32, Op::Extend16To32),
            (true, 2, 8) => (Op::LoadSigned16To64, Op::Extend16To64),
            (true, 4, 8) => (Op::LoadSigned32To64, Op::Extend32To64),
            _ => return None,
        };
        if instruction.op1_kind() == OpKind::Memory {
            let address = self.address(instruction)?;
            self.access_by(load, to, address);
            return Some(());
        }
        let Source { slot: value, .. } = self.source(instruction, 1, from)?;
        self.emit(extend, to, value, slot::ZERO, 0);
        Some(())
    }

    fn lea(&mut self, instruction: &Instruction) -> Option<()> {
        let size = operand_size(instruction, 0);
        let to = register_slot(instruction.op_register(0))?;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if size < 4 || (size == 8 && (base.is_gpr32() || index.is_gpr32())) {
            return None;
        }
        let address = self.offset(instruction, base, index)?;
        let op = if size == 4 { Op::Lea32 } else { Op::Lea64 };
        self.access_by(op, to, address);
        Some(())
    }

    fn push(&mut self, instruction: &Instruction) -> Option<()> {
        let operand = match instruction.op0_kind() {
            OpKind::Register | OpKind::Memory => operand_size(instruction, 0),
            _ => instruction.stack_pointer_increment().unsigned_abs() as u8,
        };
        if operand != 8 || instruction.stack_pointer_increment() != -8 {
            return None;
        }
        let source = self.source(instruction, 0, 8)?;
        let value = self.value(source);
        self.emit(Op::Push, value, slot::ZERO, slot::ZERO, 0);
        Some(())
    }

    fn pop(&mut self, instruction: &Instruction) -> Option<()> {
        if instruction.op0_kind() != OpKind::Register || operand_size(instruction, 0) != 8 {
            return None;
        }
        let to = register_slot(instruction.op_register(0))?;
        self.emit(Op::Pop, to, slot::ZERO, slot::ZERO, 0);
        Some(())
    }

    /// LEAVE: RSP follows RBP only once the load has succeeded.
    fn leave(&mut self, instruction: &Instruction) -> Option<()> {
        if instruction.code() != iced_x86::Code::Leaveq {
            return None;
        }
        let operands = [slot::TEMP0, RBP, slot::ZERO, crate::microop::STACK];
        self.emit_scaled(Op::Load64, operands, 0);
        self.emit(Op::Lea64, RSP, RBP, slot::ZERO, 8);
        self.move_slot(8, RBP, slot::TEMP0)
    }

    fn exchange(&mut self, instruction: &Instruction) -> Option<()> {
        let size = operand_size(instruction, 0);
        let (left, right) = (instruction.op_register(0), instruction.op_register(1));
        if is_high(left) || is_high(right) {
            return None;
        }
        let (left, right) = (register_slot(left)?, register_slot(right)?);
        self.move_slot(8, slot::TEMP0, left)?;
        self.move_slot(size, left, right)?;
        self.move_slot(size, right, slot::TEMP0)
    }

    fn conditional(&mut self, instruction: &Instruction) -> Option<()> {
        const MOVE_IF: Sizes = [Op::Complex, Op::MoveIf16, Op::MoveIf32, Op::MoveIf64];
        let condition = condition_bits(instruction.condition_code())?;
        let size = operand_size(instruction, 0);
        if instruction.op_count() == 2 {
            let to = register_slot(instruction.op_register(0))?;
            let source = self.source(instruction, 1, size)?;
            self.emit(sized(MOVE_IF, size)?, to, source.slot, condition, 0);
            return Some(());
        }
        let plain = instruction.op0_kind() == OpKind::Register;
        let target = match instruction.op_register(0) {
            register if plain && !is_high(register) => Target::Register(register_slot(register)?),
            _ => Target::High(0), // only its slot is used
        };
        let value = target.slot();
        self.emit(Op::SetIf, value, slot::ZERO, condition, 0);
        if value == slot::TEMP0 {
            return self.assign(instruction, 1, value);
        }
        Some(())
    }

    fn swap(&mut self, instruction: &Instruction) -> Option<()> {
        let op = match operand_size(instruction, 0) {
            4 => Op::Swap32,
            8 => Op::Swap64,
            _ => return None,
        };
        let to = register_slot(instruction.op_register(0))?;
        self.emit(op, to, to, slot::ZERO, 0);
        Some(())
    }

    /// An operation whose operands the instruction implies.
    fn fixed(&mut self, op: Op, to: u8, from: u8, right: u8, imm: i64) -> Option<()> {
        self.emit(op, to, from, right, imm);
        Some(())
    }

    /// Emits the instruction's operations, if it is one of these.
    pub(super) fn lower_move(&mut self, instruction: &Instruction) -> Option<()> {
        let mnemonic = instruction.mnemonic();
        match mnemonic {
            M::Mov => self.mov(instruction),
            M::Movzx => self.extend(instruction, false),
            M::Movsx | M::Movsxd => self.extend(instruction, true),
            M::Lea => self.lea(instruction),
            M::Push => self.push(instruction),
            M::Pop => self.pop(instruction),
            M::Leave => self.leave(instruction),
            M::Xchg => self.exchange(instruction),
            M::Bswap => self.swap(instruction),
            M::Nop | M::Endbr64 | M::Endbr32 | M::Pause => Some(()),
            M::Cdqe => self.fixed(Op::Extend32To64, RAX, RAX, slot::ZERO, 0),
            M::Cwde => self.fixed(Op::Extend16To32, RAX, RAX, slot::ZERO, 0),
            M::Cbw => self.fixed(Op::Extend8To16, RAX, RAX, slot::ZERO, 0),
            M::Cqo => self.fixed(Op::Sar64, RDX, RAX, slot::ZERO, 63),
            M::Cdq => self.fixed(Op::Sar32, RDX, RAX, slot::ZERO, 31),
            M::Cwd => self.fixed(Op::Sar16, RDX, RAX, slot::ZERO, 15),
            _ => self.conditional_move(instruction),
        }
    }

    fn conditional_move(&mut self, instruction: &Instruction) -> Option<()> {
        let code = instruction.code();
        if code.is_jcc_short_or_near() || code.is_jcc_short() || code.is_jcc_near() {
            return None;
        }
        condition_bits(instruction.condition_code())?;
        match instruction.op_count() {
            1 if operand_size(instruction, 0) == 1 => self.conditional(instruction),
            2 => self.conditional(instruction),
            _ => None,
        }
    }
}
