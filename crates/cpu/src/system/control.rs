//! Control registers, TLB instructions, HLT, and the instructions on IF and AC (SDM volume 3, 2.5).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{cr0, cr4, efer};
use crate::error::Exception;
use crate::execute::operand::operand_size;
use crate::mmu::Access;
use crate::mmu::access::is_canonical;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{Mode, Segment, SegmentName, rflags};

/// Bits of CR0 that exist.
const CR0_VALID: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// What MOV to CR3 may say with PCIDs: keep the translations of the new one. They are not tagged here
/// and go anyway.
const CR3_KEEP: u64 = 1 << 63;

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn control_register_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Mov => self.move_special(env, instruction),
            Mnemonic::Lmsw => self.load_status_word(env, instruction),
            Mnemonic::Clts => self
                .require_supervisor()
                .map(|()| self.state.cr0 &= !cr0::TS),
            Mnemonic::Invlpg => self.invalidate_page(instruction),
            Mnemonic::Invpcid => self.invalidate_context(env, instruction),
            Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => self.require_supervisor(),
            Mnemonic::Hlt => self.require_supervisor().map(|()| self.state.halted = true),
            Mnemonic::Cli => self.change_interrupts(false),
            Mnemonic::Sti => self.change_interrupts(true),
            Mnemonic::Clac => self.change_alignment(env, 0),
            Mnemonic::Stac => self.change_alignment(env, rflags::AC),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    /// MOV to and from control and debug registers.
    fn move_special(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        if instruction.op_kind(0) != OpKind::Register || instruction.op_kind(1) != OpKind::Register
        {
            return Err(Exception::ud());
        }
        let (target, source) = (instruction.op_register(0), instruction.op_register(1));
        if source.is_dr() {
            let value = self.read_debug_register(source)?;
            self.write_register(target, value);
        } else if target.is_dr() {
            self.write_debug_register(target, self.read_register(source))?;
        } else if source.is_cr() {
            let value = self.read_control_register(env, source)?;
            self.write_register(target, value);
        } else if target.is_cr() {
            self.write_control_register(env, target, self.read_register(source))?;
        } else {
            return Err(Exception::ud());
        }
        Ok(())
    }

    fn read_control_register(
        &self,
        env: &dyn Environment,
        register: Register,
    ) -> Result<u64, Exception> {
        let value = match register {
            Register::CR0 => self.state.cr0,
            Register::CR2 => self.state.cr2,
            Register::CR3 => self.state.cr3,
            Register::CR4 => self.state.cr4,
            Register::CR8 => env.task_priority().into(),
            _ => return Err(Exception::ud()),
        };
        self.require_supervisor()?;
        Ok(value)
    }

    fn write_control_register(
        &mut self,
        env: &dyn Environment,
        register: Register,
        value: u64,
    ) -> Result<(), Exception> {
        if !matches!(
            register,
            Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
        ) {
            return Err(Exception::ud());
        }
        self.require_supervisor()?;
        match register {
            Register::CR0 => self.write_cr0(value),
            Register::CR2 => {
                self.state.cr2 = value;
                Ok(())
            }
            Register::CR3 => self.write_cr3(env, value),
            Register::CR4 => self.write_cr4(env, value),
            _ if value > 15 => Err(Exception::gp(0)),
            _ => {
                env.set_task_priority(value as u8);
                Ok(())
            }
        }
    }

    fn write_cr0(&mut self, value: u64) -> Result<(), Exception> {
        let refuse = Exception::gp(0);
        let has = |bit: u64| value & bit != 0;
        if value >> 32 != 0 || has(cr0::PG) && !has(cr0::PE) || has(cr0::NW) && !has(cr0::CD) {
            return Err(refuse);
        }
        let old = self.state.cr0;
        let code = self.state.segment(SegmentName::Cs).attributes;
        if has(cr0::PG) && old & cr0::PG == 0 && self.state.efer & efer::LME != 0 {
            // SDM volume 3, 9.8.5: activating IA-32e mode.
            if self.state.cr4 & cr4::PAE == 0 || code & Segment::LONG != 0 {
                return Err(refuse);
            }
            self.state.efer |= efer::LMA;
        }
        if !has(cr0::PG) && old & cr0::PG != 0 {
            if self.state.cr4 & cr4::PCIDE != 0 || self.state.mode() == Mode::Bits64 {
                return Err(refuse);
            }
            self.state.efer &= !efer::LMA;
        }
        let keep_cpl = self.state.cpl();
        self.state.cr0 = value & CR0_VALID | cr0::ET;
        if (old ^ value) & cr0::PE != 0 {
            self.set_cpl(keep_cpl);
        }
        if (old ^ value) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush();
        }
        Ok(())
    }

    fn load_status_word(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        self.require_supervisor()?;
        let value = if instruction.op_kind(0) == OpKind::Memory {
            let linear = self.operand_address(instruction, 2, Access::Read)?;
            self.load(env, linear, 2)?
        } else {
            self.read_operand(env, instruction, 0)?
        };
        let low = cr0::MP | cr0::EM | cr0::TS;
        let set = value & (low | cr0::PE); // PE is only ever set
        self.write_cr0(self.state.cr0 & !low | set)
    }

    fn write_cr3(&mut self, env: &dyn Environment, value: u64) -> Result<(), Exception> {
        let pcids = self.state.cr4 & cr4::PCIDE != 0;
        let value = if pcids { value & !CR3_KEEP } else { value };
        if self.state.long_mode() && value & !self.address_mask(env) & !0xfff != 0 {
            return Err(Exception::gp(0));
        }
        self.state.cr3 = value;
        self.tlb.flush_non_global();
        Ok(())
    }

    /// The bits of a physical address that the processor has.
    fn address_mask(&self, env: &dyn Environment) -> u64 {
        let bits = match env.cpuid(0x8000_0008, 0)[0] & 0xff {
            0 => 36,
            bits => bits.min(52),
        };
        (1 << bits) - 1
    }

    /// The bits of CR4 that the CPUID tables allow.
    fn cr4_valid(&self, env: &dyn Environment) -> u64 {
        let [_, _, basic_c, basic] = env.cpuid(1, 0);
        let [_, extended, extended_c, _] = env.cpuid(7, 0);
        let has = |word: u32, bit: u32, mask: u64| if word >> bit & 1 != 0 { mask } else { 0 };
        has(basic, 4, cr4::TSD)
            | has(basic, 2, cr4::DE)
            | has(basic, 3, cr4::PSE)
            | has(basic, 6, cr4::PAE)
            | has(basic, 7, cr4::MCE)
            | has(basic, 13, cr4::PGE)
            | cr4::PCE
            | has(basic, 24, cr4::OSFXSR)
            | has(basic, 25, cr4::OSXMMEXCPT)
            | has(basic_c, 17, cr4::PCIDE)
            | has(extended, 0, cr4::FSGSBASE)
            | has(extended, 7, cr4::SMEP)
            | has(extended, 20, cr4::SMAP)
            | has(extended_c, 2, cr4::UMIP)
    }

    fn write_cr4(&mut self, env: &dyn Environment, value: u64) -> Result<(), Exception> {
        let old = self.state.cr4;
        let rises = value & !old;
        let long = self.state.long_mode();
        if value & !self.cr4_valid(env) != 0
            || long && value & cr4::PAE == 0
            || rises & cr4::PCIDE != 0 && (!long || self.state.cr3 & 0xfff != 0)
        {
            return Err(Exception::gp(0));
        }
        self.state.cr4 = value;
        const PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        if (old ^ value) & PAGING != 0 {
            self.tlb.flush();
        }
        Ok(())
    }

    fn invalidate_page(&mut self, instruction: &Instruction) -> Result<(), Exception> {
        if instruction.op_kind(0) != OpKind::Memory {
            return Err(Exception::ud());
        }
        self.require_supervisor()?;
        // An address that is not canonical has no translation; segment limits are not checked.
        let base = self.base_of(self.operand_segment(instruction));
        let linear = self.wrap_linear(base.wrapping_add(self.effective_address(instruction)));
        self.tlb.flush_page(linear);
        Ok(())
    }

    /// INVPCID (SDM volume 2): every type but the first drops more than it has to, which is allowed.
    fn invalidate_context(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        self.require_supervisor()?;
        if env.cpuid(7, 0)[1] >> 10 & 1 == 0 {
            return Err(Exception::ud());
        }
        let kind = self.read_register(instruction.op_register(0));
        let linear = self.operand_address(instruction, 16, Access::Read)?;
        let mut descriptor = [0; 16];
        self.load_bytes(env, linear, &mut descriptor)?;
        let descriptor = u128::from_le_bytes(descriptor);
        let (context, address) = (descriptor as u64, (descriptor >> 64) as u64);
        let no_contexts = self.state.cr4 & cr4::PCIDE == 0 && context & 0xfff != 0;
        let fine = match kind {
            0 => context >> 12 == 0 && !no_contexts && is_canonical(address),
            1 => context >> 12 == 0 && !no_contexts,
            2 | 3 => true,
            _ => false,
        };
        if !fine {
            return Err(Exception::gp(0));
        }
        if kind == 0 {
            self.tlb.flush_page(address);
        } else if kind == 3 {
            self.tlb.flush_non_global();
        } else {
            self.tlb.flush();
        }
        Ok(())
    }

    fn change_interrupts(&mut self, enable: bool) -> Result<(), Exception> {
        if self.protected() && self.state.cpl() > self.iopl() {
            return Err(Exception::gp(0));
        }
        if enable {
            self.state.shadow = self.state.flags & rflags::IF == 0;
            self.state.flags |= rflags::IF;
        } else {
            self.state.flags &= !rflags::IF;
        }
        Ok(())
    }

    fn change_alignment(&mut self, env: &dyn Environment, value: u64) -> Result<(), Exception> {
        if self.state.cpl() != 0 || env.cpuid(7, 0)[1] >> 20 & 1 == 0 {
            return Err(Exception::ud());
        }
        let flags = self.state.rflags() & !rflags::AC | value;
        self.state.set_rflags(flags);
        Ok(())
    }

    /// SMSW stores 16 bits in memory, and as much of CR0 as a register takes.
    pub(super) fn store_status_word(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        if instruction.op_kind(0) == OpKind::Register {
            let size = operand_size(instruction, 0);
            let value = self.state.cr0 & crate::flags::mask(size);
            self.write_register(instruction.op_register(0), value);
            return Ok(());
        }
        let linear = self.operand_address(instruction, 2, Access::Write)?;
        self.store(env, linear, 2, self.state.cr0 & 0xffff)
    }
}
