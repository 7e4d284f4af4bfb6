//! Descriptor-table registers, and the instructions that ask about descriptors (SDM volume 3, 2.4 and
//! 5.10).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::cr4;
use super::descriptor::{Descriptor, index_of, is_null, kind, rpl};
use crate::error::{Exception, Vector};
use crate::execute::operand::operand_size;
use crate::mmu::Access;
use crate::mmu::access::is_canonical;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{DescriptorTable, Mode, Segment, rflags};

impl Processor {
    /// Executes the instruction if it is one on GDTR, IDTR, LDTR, TR or the machine status word.
    pub(super) fn table_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Lgdt | Mnemonic::Lidt => self.load_table(env, instruction),
            Mnemonic::Arpl => self.adjust_rpl(env, instruction),
            Mnemonic::Lldt | Mnemonic::Ltr => self.load_system_segment(env, instruction),
            Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => {
                self.store_table(env, instruction)
            }
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    fn load_table(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        self.require_supervisor()?;
        let long = self.state.mode() == Mode::Bits64;
        let size = if long { 8 } else { 4 };
        let linear = self.operand_address(instruction, u64::from(size) + 2, Access::Read)?;
        let limit = self.load(env, linear, 2)? as u16;
        let second = self.wrap_linear(linear.wrapping_add(2));
        let mut base = self.load(env, second, size)?;
        let three_bytes = matches!(
            instruction.code(),
            iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16
        );
        if three_bytes {
            base &= 0xff_ffff;
        }
        if long && !is_canonical(base) {
            return Err(Exception::gp(0));
        }
        let table = DescriptorTable { base, limit };
        if instruction.mnemonic() == Mnemonic::Lgdt {
            self.state.gdt = table;
        } else {
            self.state.idt = table;
        }
        Ok(())
    }

    fn store_table(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let mnemonic = instruction.mnemonic();
        if matches!(mnemonic, Mnemonic::Sldt | Mnemonic::Str) && !self.has_descriptors() {
            return Err(Exception::ud());
        }
        if self.state.cr4 & cr4::UMIP != 0 && self.protected() && self.state.cpl() > 0 {
            return Err(Exception::gp(0));
        }
        let table = match mnemonic {
            Mnemonic::Sgdt => self.state.gdt,
            Mnemonic::Sidt => self.state.idt,
            Mnemonic::Sldt => {
                let selector = self.state.ldt.selector;
                return self.store_selector(env, instruction, selector);
            }
            Mnemonic::Str => {
                let selector = self.state.tr.selector;
                return self.store_selector(env, instruction, selector);
            }
            _ => return self.store_status_word(env, instruction),
        };
        let bytes = if self.state.mode() == Mode::Bits64 {
            10
        } else {
            6
        };
        let linear = self.operand_address(instruction, bytes, Access::Write)?;
        let mut image = [0; 10];
        image[..2].copy_from_slice(&table.limit.to_le_bytes());
        image[2..].copy_from_slice(&table.base.to_le_bytes());
        self.store_bytes(env, linear, &image[..bytes as usize])
    }

    /// A selector operand: 16 bits of a register or of memory.
    pub(super) fn selector_operand(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        index: u32,
    ) -> Result<u16, Exception> {
        if instruction.op_kind(index) == OpKind::Register {
            return Ok(self.read_register(instruction.op_register(index)) as u16);
        }
        let linear = self.operand_address(instruction, 2, Access::Read)?;
        Ok(self.load(env, linear, 2)? as u16)
    }

    fn load_system_segment(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        if !self.has_descriptors() {
            return Err(Exception::ud());
        }
        self.require_supervisor()?;
        let selector = self.selector_operand(env, instruction, 0)?;
        if instruction.mnemonic() == Mnemonic::Lldt {
            self.load_ldt(env, selector, Vector::GeneralProtection)
        } else {
            self.load_task_register(env, selector)
        }
    }

    /// Loads LDTR; `vector` says that the selector is none of an LDT.
    pub(super) fn load_ldt(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        vector: Vector,
    ) -> Result<(), Exception> {
        if is_null(selector) {
            self.state.ldt = Segment {
                selector,
                attributes: Segment::UNUSABLE,
                ..self.state.ldt
            };
            return Ok(());
        }
        let refuse = Exception::with_code(vector, index_of(selector));
        if selector & 4 != 0 {
            return Err(refuse);
        }
        let descriptor = self.descriptor_or(env, selector, vector)?;
        if !descriptor.is_system() || descriptor.kind() != kind::LDT {
            return Err(refuse);
        }
        self.require_present(&descriptor, selector)?;
        let base = self.system_base(env, selector, &descriptor)?;
        self.state.ldt = Segment {
            base,
            ..descriptor.segment(selector)
        };
        Ok(())
    }

    fn load_task_register(
        &mut self,
        env: &dyn Environment,
        selector: u16,
    ) -> Result<(), Exception> {
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let refuse = Exception::gp(index_of(selector));
        if selector & 4 != 0 {
            return Err(refuse);
        }
        let mut descriptor = self.descriptor_or(env, selector, Vector::GeneralProtection)?;
        let known = match descriptor.kind() {
            kind::TSS => true,
            kind::TSS_16 => !self.state.long_mode(),
            _ => false,
        };
        if !descriptor.is_system() || !known {
            return Err(refuse);
        }
        self.require_present(&descriptor, selector)?;
        let base = self.system_base(env, selector, &descriptor)?;
        let busy = descriptor.kind() | kind::BUSY;
        self.set_kind(env, &mut descriptor, busy)?;
        self.state.tr = Segment {
            base,
            ..descriptor.segment(selector)
        };
        Ok(())
    }

    /// ARPL raises the RPL of operand 0 to that of operand 1, and says by ZF whether it had to.
    fn adjust_rpl(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        if !self.has_descriptors() {
            return Err(Exception::ud());
        }
        let wanted = self.read_register(instruction.op_register(1)) & 3;
        let raised = |selector: u64| {
            if selector & 3 < wanted {
                selector & !3 | wanted
            } else {
                selector
            }
        };
        let (old, new) = self.modify(env, instruction, raised)?;
        let zero = if old & 0xffff != new & 0xffff {
            rflags::ZF
        } else {
            0
        };
        self.state.set_status(rflags::ZF, zero);
        Ok(())
    }

    /// LAR, LSL, VERR and VERW, which say by ZF whether a selector may be used.
    pub(super) fn descriptor_query(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let mnemonic = instruction.mnemonic();
        let operand = match mnemonic {
            Mnemonic::Lar | Mnemonic::Lsl => 1,
            Mnemonic::Verr | Mnemonic::Verw => 0,
            _ => return None,
        };
        if !self.has_descriptors() {
            return Some(Err(Exception::ud()));
        }
        let answer = self
            .selector_operand(env, instruction, operand)
            .and_then(|selector| self.query(env, mnemonic, selector));
        Some(answer.map(|value| {
            let zero = if value.is_some() { rflags::ZF } else { 0 };
            self.state.set_status(rflags::ZF, zero);
            if let Some(value) = value.filter(|_| operand == 1) {
                let value = value & crate::flags::mask(operand_size(instruction, 0));
                self.write_register(instruction.op_register(0), value);
            }
            Flow::Next
        }))
    }

    /// What a query says of a selector's descriptor; nothing if it may not be used so.
    fn query(
        &mut self,
        env: &dyn Environment,
        mnemonic: Mnemonic,
        selector: u16,
    ) -> Result<Option<u64>, Exception> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(descriptor) = self.find_descriptor(env, selector)? else {
            return Ok(None);
        };
        let level = self.state.cpl().max(rpl(selector));
        let reachable = descriptor.is_conforming() || descriptor.dpl() >= level;
        let known = match mnemonic {
            Mnemonic::Verr => descriptor.is_readable(),
            Mnemonic::Verw => descriptor.is_writable_data(),
            _ => self.has_rights_or_limit(&descriptor, mnemonic == Mnemonic::Lsl),
        };
        let value = match mnemonic {
            Mnemonic::Lsl => descriptor.limit().into(),
            _ => descriptor.raw >> 32 & 0x00ff_ff00,
        };
        Ok((reachable && known).then_some(value))
    }

    /// Whether LAR or, with a limit, LSL knows this type (SDM volume 2, tables 3-53 and 3-56).
    fn has_rights_or_limit(&self, descriptor: &Descriptor, limit: bool) -> bool {
        const TSS_BUSY: u8 = kind::TSS | kind::BUSY;
        const TSS_16_BUSY: u8 = kind::TSS_16 | kind::BUSY;
        if !descriptor.is_system() {
            return true;
        }
        match descriptor.kind() {
            kind::LDT | kind::TSS | TSS_BUSY => true,
            kind::TSS_16 | TSS_16_BUSY => !self.state.long_mode(),
            kind::CALL_GATE => !limit,
            kind::CALL_GATE_16 | kind::TASK_GATE => !limit && !self.state.long_mode(),
            _ => false,
        }
    }
}
