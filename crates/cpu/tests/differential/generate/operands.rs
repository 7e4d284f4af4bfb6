//! Operands, and the registers and memory that they need.

use iced_x86::{
    Code, FlowControl, Instruction, Mnemonic, OpCodeOperandKind as K, OpKind, Register,
};

use super::RSP;
use crate::case::{CODE, CODE_LEN, Case, DATA, DATA_LEN, PAGE, RODATA};
use crate::catalogue::Entry;
use crate::random::Random;

/// A case in the making.
pub(super) struct Builder<'a> {
    pub(super) random: &'a mut Random,
    pub(super) case: Case,
    /// Registers that an address or a count depends on.
    pinned: [bool; 16],
    /// Where the last memory operand points.
    target: u64,
}

const RAX: usize = 0;
const RCX: usize = 1;
const RBX: usize = 3;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

impl<'a> Builder<'a> {
    pub(super) fn new(random: &'a mut Random) -> Self {
        let mut case = Case::default();
        for register in &mut case.registers {
            *register = random.integer();
        }
        // CF, PF, AF, ZF, SF, OF, seldom DF; IF is set in every process.
        case.rflags = 0x202 | random.next() & 0x8d5 | if random.chance(8) { 0x400 } else { 0 };
        let mut builder = Self {
            random,
            case,
            pinned: [false; 16],
            target: DATA,
        };
        let stack = builder.address(8);
        builder.pin(RSP, stack);
        builder.floating_point();
        builder
    }

    fn pin(&mut self, register: usize, value: u64) {
        self.case.registers[register] = value;
        self.pinned[register] = true;
    }

    fn floating_point(&mut self) {
        let random = &mut *self.random;
        let fx = &mut self.case.fx;
        for register in &mut fx.xmm {
            *register = random.vector();
        }
        for register in &mut fx.st {
            *register = if random.chance(90) {
                random.float80()
            } else {
                random.vector()
            };
            register[10..].fill(0);
        }
        let masks = if random.chance(80) {
            0x3f
        } else {
            random.next() as u16 & 0x3f
        };
        let precision = random.pick(&[0u16, 2, 3, 3, 3]) << 8;
        fx.fcw = 0x40 | masks | precision | (random.below(4) as u16) << 10;
        // No exception is pending at the start: FXRSTOR of one behaves differently per model.
        let flags = random.next() as u16 & masks & 0x3f;
        let top = random.below(8) as u16;
        fx.fsw = top << 11
            | random.next() as u16 & 0x4700
            | flags
            | (flags & 1) << 6 & (random.next() as u16);
        fx.ftw = match random.below(4) {
            0 => random.next() as u8,
            1 => 0,
            _ => 0xff,
        };
        let masks = if random.chance(85) {
            0x1f80
        } else {
            random.next() as u32 & 0x1f80
        };
        let modes = random.pick(&[0u32, 0, 0, 0x40, 0x8000, 0x8040]);
        fx.mxcsr = masks | modes | (random.below(4) as u32) << 13 | random.next() as u32 & 0x3f;
    }

    /// An address for an operand, aligned to `align` mostly.
    fn address(&mut self, align: u64) -> u64 {
        let random = &mut *self.random;
        let data_end = DATA + DATA_LEN as u64;
        let near =
            |random: &mut Random, at: u64| at.wrapping_sub(40).wrapping_add(random.below(56));
        let address = match random.below(100) {
            0..=4 => near(random, DATA),
            5..=7 => near(random, RODATA),
            8..=10 => near(random, data_end),
            11..=13 => RODATA + random.below(PAGE),
            14 => random.pick(&[0x8000_0000_0000, u64::MAX - 7, 1 << 63, 0x7fff_ffff_f800]),
            15..=24 => near(random, DATA + PAGE),
            _ => DATA + 64 + random.below(DATA_LEN as u64 - 1024),
        };
        if random.chance(75) {
            address & !(align - 1)
        } else {
            address
        }
    }

    /// Builds an instruction; pins the registers that its addresses are made of.
    pub(super) fn instruction(&mut self, entry: &Entry, ip: u64) -> Instruction {
        let mut instruction = Instruction::default();
        instruction.set_code(entry.code);
        self.implicit(entry.code);
        let info = entry.code.op_code();
        for (index, &kind) in entry.operands.iter().enumerate() {
            self.operand(&mut instruction, index as u32, kind, ip);
        }
        let memory = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Memory;
        if info.can_use_lock_prefix() && memory && self.random.chance(25) {
            instruction.set_has_lock_prefix(true);
        }
        if info.can_use_rep_prefix() && self.random.chance(50) {
            instruction.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix() && self.random.chance(50) {
            instruction.set_has_repne_prefix(true);
        }
        instruction
    }

    /// Registers that an instruction uses without naming them.
    fn implicit(&mut self, code: Code) {
        use Mnemonic as M;
        let count = match self.random.below(10) {
            0 => 0,
            1 => 300,
            _ => self.random.below(20),
        };
        match code.mnemonic() {
            M::Movsb
            | M::Movsw
            | M::Movsq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq => self.string(count),
            M::Movsd | M::Cmpsd if code.op_code().can_use_rep_prefix() => self.string(count),
            M::Maskmovq | M::Maskmovdqu => {
                // Whether bytes that are not written can fault is the model's own.
                let to = DATA + self.random.below(DATA_LEN as u64 - 16);
                self.pin(RDI, to);
            }
            M::Enter | M::Leave => {
                let frame = self.address(8);
                self.pin(RBP, frame);
            }
            M::Xlatb => {
                let table = self.address(8);
                self.pin(RBX, table);
            }
            M::Shld | M::Shrd => {
                let count = self.random.next() & !0x1f | self.random.below(17);
                self.pin(RCX, count);
            }
            M::Shl | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr if !self.pinned[RCX] => {
                let count = self.random.below(72);
                self.pin(RCX, count);
            }
            M::Div | M::Idiv if self.random.chance(70) => {
                // Quotients that fit are rare among random numbers.
                let high = self.random.pick(&[0, 0, u64::MAX]);
                self.pin(2, high);
            }
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
                let count = self.random.pick(&[0, 1, 2, 1 << 32, 1 << 16]);
                self.pin(RCX, count);
            }
            _ => {}
        }
    }

    fn string(&mut self, count: u64) {
        self.pin(RCX, count);
        let (from, to) = (self.address(8), self.address(8));
        self.pin(RSI, from);
        // Overlapping copies have their own results.
        let near = from.wrapping_add(self.random.below(17)).wrapping_sub(8);
        let to = if self.random.chance(25) { near } else { to };
        self.pin(RDI, to);
        if self.random.chance(40) {
            // Something for REPE to be equal about.
            let bytes = [self.random.next() as u8; 32];
            self.case.patch(from, &bytes);
            self.case.patch(to, &bytes);
            self.case.registers[RAX] = u64::from_le_bytes([bytes[0]; 8]);
        }
    }

    fn operand(&mut self, instruction: &mut Instruction, index: u32, kind: K, ip: u64) {
        if let Some(register) = self.register(kind) {
            instruction.set_op_kind(index, OpKind::Register);
            return instruction.set_op_register(index, register);
        }
        let narrow = self.random.chance(15);
        let op = match kind {
            K::seg_rSI if narrow => OpKind::MemorySegESI,
            K::seg_rSI => OpKind::MemorySegRSI,
            K::es_rDI if narrow => OpKind::MemoryESEDI,
            K::es_rDI => OpKind::MemoryESRDI,
            K::seg_rDI if narrow => OpKind::MemorySegEDI,
            K::seg_rDI => OpKind::MemorySegRDI,
            K::seg_rBX_al => {
                instruction.set_memory_base(if narrow { Register::EBX } else { Register::RBX });
                instruction.set_memory_index(Register::AL);
                OpKind::Memory
            }
            K::mem_offs => {
                let at = self.address(8);
                self.target = at;
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(at);
                OpKind::Memory
            }
            K::br64_1 | K::br64_4 => {
                instruction.set_near_branch64(self.branch_target(ip, kind == K::br64_1));
                OpKind::NearBranch64
            }
            _ => match self.immediate(instruction, kind, index) {
                Some(op) => op,
                None => {
                    self.memory(instruction, ip);
                    OpKind::Memory
                }
            },
        };
        instruction.set_op_kind(index, op);
    }

    fn branch_target(&mut self, ip: u64, short: bool) -> u64 {
        if short {
            return ip.wrapping_add(self.random.below(224)).wrapping_sub(96);
        }
        match self.random.below(20) {
            // Not mapped, not executable.
            0 => CODE + CODE_LEN + self.random.below(PAGE),
            1 => DATA + self.random.below(PAGE),
            _ => CODE + self.random.below(CODE_LEN),
        }
    }

    /// A memory operand of any form, whose registers make it point to [`Builder::address`].
    fn memory(&mut self, instruction: &mut Instruction, ip: u64) {
        let mut target = self.address(16);
        match self.random.below(20) {
            0 if target < 1 << 31 => {
                instruction.set_memory_displ_size(4);
                instruction.set_memory_displacement64(target);
            }
            1 if target.abs_diff(ip) < 1 << 30 => {
                instruction.set_memory_base(Register::RIP);
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(target);
            }
            _ => target = self.based(instruction, target),
        }
        let prefix = self.random.below(100);
        if prefix < 6 {
            // These add FS_BASE or GS_BASE: somewhere in the data, or behind it.
            instruction.set_segment_prefix(if prefix < 3 {
                Register::FS
            } else {
                Register::GS
            });
            self.unsegment(instruction, prefix < 3);
        } else if prefix < 8 {
            instruction.set_segment_prefix(Register::DS);
        }
        self.target = target;
        if self.random.chance(40) {
            let bytes = self.random.vector();
            self.case.patch(target, &bytes);
        } else if self.random.chance(30) {
            let bytes = self.random.float80();
            self.case.patch(target, &bytes);
        }
    }

    /// Takes the segment's base out of a base register that is not used for anything else.
    fn unsegment(&mut self, instruction: &Instruction, fs: bool) {
        let base = instruction.memory_base();
        if base.is_gpr64() && base.number() != RSP && instruction.memory_index() != base {
            let segment = if fs {
                crate::case::FS_BASE
            } else {
                crate::case::GS_BASE
            };
            let register = &mut self.case.registers[base.number()];
            *register = register.wrapping_sub(segment);
        }
    }

    fn based(&mut self, instruction: &mut Instruction, target: u64) -> u64 {
        let narrow = target < 1 << 32 && self.random.chance(10);
        let first = if narrow { Register::EAX } else { Register::RAX };
        let base = self.random.below(16) as usize;
        let mut offset: u64 = match self.random.below(4) {
            0 => 0,
            1 => (self.random.next() as i8) as u64,
            _ => (self.random.next() as i32 >> self.random.below(20)) as u64,
        };
        instruction.set_memory_base(first + base as u32);
        let index = self.random.below(16) as usize;
        let mut sum = offset;
        if self.random.chance(40) && index != RSP && index != base {
            let scale = 1 << self.random.below(4);
            if !self.pinned[index] {
                let value = self.random.below(64).wrapping_sub(16);
                self.pin(index, value);
            }
            instruction.set_memory_index(first + index as u32);
            instruction.set_memory_index_scale(scale);
            sum = sum.wrapping_add(self.case.registers[index].wrapping_mul(scale.into()));
        }
        if self.pinned[base] {
            // Its value is needed: what it points to then is the target.
            offset = (offset as i8) as u64;
            instruction.set_memory_displ_size(if offset == 0 { 0 } else { 8 });
            instruction.set_memory_displacement64(offset);
            return self.case.registers[base].wrapping_add(offset);
        }
        let mut value = target.wrapping_sub(sum);
        if narrow {
            // What is above the low half of the registers must not matter.
            value = value & 0xffff_ffff | self.random.next() << 32;
        }
        self.pin(base, value);
        instruction.set_memory_displ_size(match (offset, narrow) {
            (0, _) => 0,
            (_, true) => 4,
            _ => 8,
        });
        let mask = if narrow { 0xffff_ffff } else { u64::MAX };
        instruction.set_memory_displacement64(offset & mask);
        target
    }

    /// Last touches once the instruction is known: targets of indirect branches, flags to pop, bit
    /// offsets that stay near. `false`: such a case is not wanted.
    pub(super) fn aim(&mut self, instruction: &Instruction, ip: u64, len: u64) -> bool {
        use FlowControl as F;
        let mut to = CODE + self.random.below(CODE_LEN);
        if (ip..ip + len).contains(&to) {
            to = ip + len;
        }
        let pops_flags = matches!(instruction.mnemonic(), Mnemonic::Popf | Mnemonic::Popfq);
        let memory = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Memory;
        let from = match instruction.flow_control() {
            F::Return => self.case.registers[RSP],
            F::IndirectBranch | F::IndirectCall if memory => self.target,
            F::IndirectBranch | F::IndirectCall => {
                self.case.registers[instruction.op0_register().number()] = to;
                return true;
            }
            _ if pops_flags => self.case.registers[RSP],
            _ => {
                self.near_bits(instruction, memory);
                return true;
            }
        };
        // Neither TF, NT, AC nor ID, which would change the host's own way out.
        let value = if pops_flags {
            self.random.next() & 0xed5
        } else {
            to
        };
        self.case.patch_count = 0;
        self.case.patch(from, &value.to_le_bytes());
        // From elsewhere comes anything, or a fault.
        let readable = RODATA - 8..DATA + DATA_LEN as u64;
        let segment = instruction.segment_prefix() == Register::FS
            || instruction.segment_prefix() == Register::GS;
        !segment && (self.case.patch_count == 1 || !readable.contains(&from))
    }

    fn near_bits(&mut self, instruction: &Instruction, memory: bool) {
        let bits = matches!(
            instruction.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        );
        if bits && memory && instruction.op1_kind() == OpKind::Register && self.random.chance(90) {
            let register = instruction.op1_register().number();
            if !self.pinned[register] {
                let offset = self.random.below(512).wrapping_sub(256);
                self.case.registers[register] = offset;
            }
        }
    }

    pub(super) fn finish(self) -> Case {
        self.case
    }
}
