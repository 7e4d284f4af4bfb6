//! Model-specific registers of the core, the time-stamp counter, and CPUID (SDM volume 4).

use iced_x86::{Instruction, Mnemonic, Register};

use super::{cr0, cr4, efer};
use crate::error::Exception;
use crate::mmu::access::is_canonical;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::SegmentName;

/// Numbers of the registers that the core itself has.
mod index {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
}

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn msr_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Cpuid => {
                self.identify(env);
                Ok(())
            }
            Mnemonic::Rdmsr => self.read_msr_instruction(env),
            Mnemonic::Wrmsr => self.write_msr_instruction(env),
            Mnemonic::Rdtsc => self.read_time_stamp(env, false),
            Mnemonic::Rdtscp => self.read_time_stamp(env, true),
            // There are no performance counters.
            Mnemonic::Rdpmc => Err(Exception::gp(0)),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    /// EDX:EAX.
    fn set_pair(&mut self, value: u64) {
        self.write_register(Register::EAX, value & 0xffff_ffff);
        self.write_register(Register::EDX, value >> 32);
    }

    fn read_time_stamp(
        &mut self,
        env: &dyn Environment,
        with_processor: bool,
    ) -> Result<(), Exception> {
        if self.state.cr4 & cr4::TSD != 0 && self.protected() && self.state.cpl() > 0 {
            return Err(Exception::gp(0));
        }
        self.set_pair(env.tsc());
        if with_processor {
            self.write_register(Register::ECX, self.state.tsc_aux);
        }
        Ok(())
    }

    fn read_msr_instruction(&mut self, env: &dyn Environment) -> Result<(), Exception> {
        self.require_supervisor()?;
        let number = self.read_register(Register::ECX) as u32;
        let value = self.read_msr(env, number).ok_or(Exception::gp(0))?;
        self.set_pair(value);
        Ok(())
    }

    fn write_msr_instruction(&mut self, env: &dyn Environment) -> Result<(), Exception> {
        self.require_supervisor()?;
        let number = self.read_register(Register::ECX) as u32;
        let value = self.read_register(Register::EDX) << 32 | self.read_register(Register::EAX);
        self.write_msr(env, number, value).ok_or(Exception::gp(0))
    }

    /// Reads a register as RDMSR does; nothing if there is none.
    fn read_msr(&self, env: &dyn Environment, number: u32) -> Option<u64> {
        let state = &self.state;
        Some(match number {
            index::TSC => env.tsc(),
            index::SYSENTER_CS => state.sysenter[0],
            index::SYSENTER_ESP => state.sysenter[1],
            index::SYSENTER_EIP => state.sysenter[2],
            index::PAT => state.pat,
            index::EFER => state.efer,
            index::STAR => state.star,
            index::LSTAR => state.lstar,
            index::CSTAR => state.cstar,
            index::SFMASK => state.sfmask,
            index::FS_BASE => state.segment(SegmentName::Fs).base,
            index::GS_BASE => state.segment(SegmentName::Gs).base,
            index::KERNEL_GS_BASE => state.kernel_gs_base,
            index::TSC_AUX => state.tsc_aux,
            _ => return env.read_msr(number),
        })
    }

    /// Writes a register as WRMSR does; nothing if there is none, or it does not take the value.
    fn write_msr(&mut self, env: &dyn Environment, number: u32, value: u64) -> Option<()> {
        let address = is_canonical(value).then_some(value);
        let state = &mut self.state;
        match number {
            index::TSC => env.set_tsc(value),
            index::SYSENTER_CS => state.sysenter[0] = value & 0xffff_ffff,
            index::SYSENTER_ESP => state.sysenter[1] = address?,
            index::SYSENTER_EIP => state.sysenter[2] = address?,
            index::PAT => state.pat = valid_pat(value)?,
            index::EFER => return self.write_efer(env, value),
            index::STAR => state.star = value,
            index::LSTAR => state.lstar = address?,
            index::CSTAR => state.cstar = address?,
            index::SFMASK => state.sfmask = value & 0xffff_ffff,
            index::FS_BASE => self.set_base(SegmentName::Fs, address?),
            index::GS_BASE => self.set_base(SegmentName::Gs, address?),
            index::KERNEL_GS_BASE => state.kernel_gs_base = address?,
            index::TSC_AUX if value >> 32 != 0 => return None,
            index::TSC_AUX => state.tsc_aux = value,
            _ => return env.write_msr(number, value).then_some(()),
        }
        Some(())
    }

    fn write_efer(&mut self, env: &dyn Environment, value: u64) -> Option<()> {
        let [.., features] = env.cpuid(0x8000_0001, 0);
        let has = |bit: u32, mask: u64| if features >> bit & 1 != 0 { mask } else { 0 };
        let valid = has(11, efer::SCE) | has(29, efer::LME | efer::LMA) | has(20, efer::NXE);
        if value & !valid != 0 {
            return None;
        }
        let old = self.state.efer;
        if (old ^ value) & efer::LME != 0 && self.state.cr0 & cr0::PG != 0 {
            return None;
        }
        // LMA follows CR0.PG and LME.
        self.state.efer = value & !efer::LMA | old & efer::LMA;
        if (old ^ value) & efer::NXE != 0 {
            self.tlb.flush();
        }
        Some(())
    }
}

/// A page-attribute table with known memory types (SDM volume 3, table 11-10).
fn valid_pat(value: u64) -> Option<u64> {
    value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
        .then_some(value)
}
