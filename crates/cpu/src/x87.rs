//! x87, and FXSAVE and FXRSTOR.
//!
//! Arithmetic, loads and stores are the host's instructions on the guest's registers (`native`);
//! what loads and stores control words and whole states works on the image (`image`).
//!
//! Exceptions: an instruction that flags one which the control word does not mask leaves it pending,
//! and the next waiting instruction raises #MF, whether CR0.NE is set or not (the external interrupt
//! that CR0.NE = 0 asks for does not exist here). The last instruction's pointers (FIP, FDP) are
//! offsets, kept for every instruction but control ones; selectors and FOP are zero, as on hosts that
//! have given them up.

mod forms;
mod image;
mod native;
#[cfg(test)]
pub(crate) mod tests;

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind, Register};

use crate::error::{Exception, Vector};
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{FxState, rflags};
use crate::vector::MXCSR_BITS;
use image::Layout;

/// CR0.MP, EM and TS.
const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(crate) fn x87_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let code = instruction.code();
        if code == Code::Wait {
            return Some(self.wait());
        }
        let features = code.cpuid_features();
        let x87 = features.iter().any(|feature| {
            use CpuidFeature as F;
            matches!(feature, F::FPU | F::FPU287 | F::FPU387 | F::FXSR)
        });
        if !x87 {
            return None;
        }
        if self.state.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Some(Err(Exception::new(Vector::DeviceNotAvailable)));
        }
        let executed = if let Some((escape, modrm)) = forms::register_form(code) {
            self.x87_registers(instruction, escape, modrm)
        } else if let Some((escape, reg)) = forms::memory_form(code) {
            self.x87_memory(env, instruction, escape, reg)
        } else {
            self.x87_control(env, instruction)?
        };
        Some(executed.map(|()| Flow::Next))
    }

    fn wait(&self) -> Executed {
        if self.state.cr0 & CR0_MP != 0 && self.state.cr0 & CR0_TS != 0 {
            return Err(Exception::new(Vector::DeviceNotAvailable));
        }
        self.check_pending().map(|()| Flow::Next)
    }

    /// #MF if an exception is pending: what waiting x87 instructions and MMX begin with.
    pub(crate) fn check_pending(&self) -> Result<(), Exception> {
        if self.state.fx.pending() != 0 {
            return Err(Exception::new(Vector::FloatingPoint));
        }
        Ok(())
    }

    /// Takes over what an instruction has done to a copy of the registers.
    fn commit_x87(&mut self, image: &FxState, data: Option<u64>) {
        let fx = &mut self.state.fx;
        (fx.fcw, fx.fsw, fx.ftw, fx.st) = (image.fcw, image.fsw, image.ftw, image.st);
        for register in &mut fx.st {
            register[10..].fill(0);
        }
        fx.fop = 0;
        fx.fip = self.state.rip;
        if let Some(data) = data {
            fx.fdp = data;
        }
    }

    fn x87_registers(
        &mut self,
        instruction: &Instruction,
        escape: u8,
        modrm: u8,
    ) -> Result<(), Exception> {
        self.check_pending()?;
        // At most one operand is not ST(0).
        let i = (0..instruction.op_count())
            .filter(|&index| instruction.op_kind(index) == OpKind::Register)
            .map(|index| instruction.op_register(index))
            .filter(|register| register.is_st())
            .map(|register| register.number() as u8)
            .max()
            .unwrap_or(0);
        let mut image = self.state.fx;
        let before = self.state.rflags();
        let flags = native::register_form(&mut image, escape, modrm + i, before as u8);
        let compares = matches!((escape, modrm), (0xdb | 0xdf, 0xe8 | 0xf0));
        // An invalid comparison that is not masked leaves the flags.
        if compares && image.pending() == 0 {
            let set = u64::from(flags) & (rflags::ZF | rflags::PF | rflags::CF);
            self.state.set_status(rflags::STATUS, set);
        }
        self.commit_x87(&image, None);
        Ok(())
    }

    fn x87_memory(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        escape: u8,
        reg: u8,
    ) -> Result<(), Exception> {
        self.check_pending()?;
        let size = forms::operand_size(escape, reg);
        let stores = forms::stores(escape, reg);
        let access = if stores { Access::Write } else { Access::Read };
        let linear = self.operand_address(instruction, size as u64, access)?;
        let mut operand = [0; 16];
        if !stores {
            self.load_vector(env, linear, &mut operand[..size])?;
        }
        let mut image = self.state.fx;
        native::memory_form(&mut image, escape, reg, &mut operand);
        // Of the exceptions that are not masked only precision lets the store happen.
        if stores && image.pending() & !0x20 == 0 {
            self.store_vector(env, linear, &operand[..size])?;
        } else if stores {
            self.check_write(linear, size as u8)?;
        }
        let data = self.effective_address(instruction);
        self.commit_x87(&image, Some(data));
        Ok(())
    }

    /// Control instructions. The waiting names exist for assemblers; decoded, they are FWAIT and the
    /// instruction that does not wait.
    fn x87_control(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Result<(), Exception>> {
        use Mnemonic as M;
        let mnemonic = instruction.mnemonic();
        let waits = matches!(
            mnemonic,
            M::Fldcw | M::Fldenv | M::Frstor | M::Fstenv | M::Fsave | M::Fstcw | M::Fstsw
        ) || matches!(
            mnemonic,
            M::Fclex | M::Finit | M::Feni | M::Fdisi | M::Fsetpm
        );
        if waits && let Err(pending) = self.check_pending() {
            return Some(Err(pending));
        }
        match mnemonic {
            M::Fneni | M::Feni | M::Fndisi | M::Fdisi | M::Fnsetpm | M::Fsetpm => {}
            M::Fnclex | M::Fclex => self.state.fx.clear_exceptions(),
            M::Fninit | M::Finit => self.state.fx.initialize(),
            M::Fnstcw | M::Fstcw => {
                return Some(self.store_word(env, instruction, self.state.fx.fcw));
            }
            M::Fnstsw | M::Fstsw => {
                return Some(self.store_word(env, instruction, self.state.fx.fsw));
            }
            M::Fldcw => return Some(self.load_control(env, instruction)),
            M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave => {
                return Some(self.store_environment(env, instruction));
            }
            M::Fldenv | M::Frstor => return Some(self.load_environment(env, instruction)),
            M::Fxsave | M::Fxsave64 => return Some(self.fxsave(env, instruction)),
            M::Fxrstor | M::Fxrstor64 => return Some(self.fxrstor(env, instruction)),
            _ => return None,
        }
        Some(Ok(()))
    }

    fn store_word(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        word: u16,
    ) -> Result<(), Exception> {
        if instruction.op0_kind() == OpKind::Register {
            self.write_register(Register::AX, word.into());
            return Ok(());
        }
        let linear = self.operand_address(instruction, 2, Access::Write)?;
        self.store(env, linear, 2, word.into())
    }

    fn load_control(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let linear = self.operand_address(instruction, 2, Access::Read)?;
        let word = self.load(env, linear, 2)?;
        self.state.fx.set_control(word as u16);
        Ok(())
    }

    /// The layout of an instruction's environment, and whether registers follow it.
    fn layout(&self, instruction: &Instruction) -> (Layout, bool) {
        use Code as C;
        let code = instruction.code();
        let narrow = matches!(
            code,
            C::Fldenv_m14byte | C::Fnstenv_m14byte | C::Fstenv_m14byte | C::Frstor_m94byte
        ) || matches!(code, C::Fnsave_m94byte | C::Fsave_m94byte);
        let whole = matches!(
            instruction.mnemonic(),
            Mnemonic::Fnsave | Mnemonic::Fsave | Mnemonic::Frstor
        );
        let layout = Layout {
            wide: !narrow,
            real: self.state.cr0 & 1 == 0 || self.state.flags & rflags::VM != 0,
        };
        (layout, whole)
    }

    fn store_environment(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let (layout, whole) = self.layout(instruction);
        let fx = &self.state.fx;
        let mut bytes = [0; 108];
        bytes[..28].copy_from_slice(&fx.environment(layout));
        let mut size = layout.size();
        if whole {
            for register in &fx.st {
                bytes[size..size + 10].copy_from_slice(&register[..10]);
                size += 10;
            }
        }
        let linear = self.operand_address(instruction, size as u64, Access::Write)?;
        self.store_bytes(env, linear, &bytes[..size])?;
        let fx = &mut self.state.fx;
        if whole {
            fx.initialize();
        } else {
            fx.set_control(fx.fcw | image::status::EXCEPTIONS);
        }
        Ok(())
    }

    fn load_environment(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let (layout, whole) = self.layout(instruction);
        let size = layout.size();
        let total = if whole { size + 80 } else { size };
        let linear = self.operand_address(instruction, total as u64, Access::Read)?;
        let mut bytes = [0; 108];
        self.load_bytes(env, linear, &mut bytes[..total])?;
        let mut environment = [0; 28];
        environment[..size].copy_from_slice(&bytes[..size]);
        let fx = &mut self.state.fx;
        fx.set_environment(layout, &environment);
        if whole {
            for (register, at) in fx.st.iter_mut().zip(bytes[size..total].chunks_exact(10)) {
                register[..10].copy_from_slice(at);
            }
        }
        Ok(())
    }

    /// The address of FXSAVE's operand, which is aligned.
    fn image_address(&self, instruction: &Instruction, access: Access) -> Result<u64, Exception> {
        let linear = self.operand_address(instruction, 512, access)?;
        if linear & 15 != 0 {
            return Err(Exception::gp(0));
        }
        Ok(linear)
    }

    fn fxsave(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let linear = self.image_address(instruction, Access::Write)?;
        let mut fx = self.state.fx;
        if instruction.mnemonic() == Mnemonic::Fxsave {
            fx.fip &= 0xffff_ffff;
            fx.fdp &= 0xffff_ffff;
        }
        let size = image::image_size(&self.state);
        self.store_vector(env, linear, &fx.to_bytes()[..size])
    }

    fn fxrstor(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let linear = self.image_address(instruction, Access::Read)?;
        let mut bytes = [0; 512];
        self.load_vector(env, linear, &mut bytes)?;
        let mxcsr = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        if mxcsr & !MXCSR_BITS != 0 {
            return Err(Exception::gp(0));
        }
        if instruction.mnemonic() == Mnemonic::Fxrstor {
            bytes[12..16].fill(0);
            bytes[20..24].fill(0);
        }
        let size = image::image_size(&self.state);
        self.state.fx.set_bytes(&bytes, size);
        Ok(())
    }
}
