//! MMX and SSE, up to SSE4.2.
//!
//! Arithmetic is the host's own, on the guest's operands (`native`); movements between registers and
//! memory (`moves`), and what mixes vector and general registers (`lanes`), are Rust. An instruction
//! loads and checks everything before it writes anything, save MXCSR's flags, which an unmasked
//! exception sets while the destination stays.

mod direct;
mod lanes;
mod moves;
mod native;
#[cfg(test)]
mod tests;

use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register};

use crate::error::{Exception, Vector};
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;
pub(crate) use direct::{Shape, shape};
use native::{Beside, Xmm};

/// MXCSR's bits: with denormals-are-zero, as every processor of the profile.
pub(crate) const MXCSR_BITS: u32 = 0xffff;
/// Exceptions that are found before an operation: invalid, denormal, zero-divide.
const BEFORE: u32 = 7;
/// All exceptions of MXCSR.
const EXCEPTIONS: u32 = 0x3f;
/// Underflow.
const UNDERFLOW: u32 = 1 << 4;
/// Results that underflow are zero.
const FLUSH: u32 = 1 << 15;

/// Whether an instruction belongs to MMX or SSE.
fn is_vector(features: &[CpuidFeature]) -> bool {
    use CpuidFeature as F;
    let vector = |feature: &F| {
        matches!(
            feature,
            F::MMX | F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2
        )
    };
    features.iter().any(vector) && !features.contains(&F::FPU)
}

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(crate) fn vector_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        use Mnemonic as M;
        if !is_vector(instruction.cpuid_features()) {
            return None;
        }
        match instruction.mnemonic() {
            M::Crc32 => return None,
            M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => {
                return Some(Ok(Flow::Next));
            }
            M::Lfence | M::Mfence | M::Sfence => {
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                return Some(Ok(Flow::Next));
            }
            M::Movnti => {
                let value = self.read_register(instruction.op1_register());
                let stored = self.write_operand(env, instruction, 0, value);
                return Some(stored.map(|()| Flow::Next));
            }
            _ => {}
        }
        let executed = self.check_vector(instruction).and_then(|()| {
            if let Some(moved) = self.vector_move(env, instruction) {
                return moved;
            }
            if let Some(done) = self.vector_lanes(env, instruction) {
                return done;
            }
            if instruction.op0_register().is_mm() {
                return self.mmx_arithmetic(env, instruction);
            }
            self.sse_arithmetic(env, instruction)
        });
        Some(executed.map(|()| Flow::Next))
    }

    /// The control-register checks, and for MMX the x87 exception that may be pending.
    fn check_vector(&self, instruction: &Instruction) -> Result<(), Exception> {
        let registers = || {
            (0..instruction.op_count())
                .filter(|&index| instruction.op_kind(index) == OpKind::Register)
                .map(|index| instruction.op_register(index))
        };
        let mmx = registers().any(Register::is_mm) || instruction.mnemonic() == Mnemonic::Emms;
        // CVTSD2SI of memory and the like name no XMM register.
        let sse = !mmx || registers().any(Register::is_xmm);
        let state = &self.state;
        if state.cr0 & 1 << 2 != 0 || (sse && state.cr4 & 1 << 9 == 0) {
            return Err(Exception::ud());
        }
        if state.cr0 & 1 << 3 != 0 {
            return Err(Exception::new(Vector::DeviceNotAvailable));
        }
        if mmx {
            self.check_pending()?;
        }
        Ok(())
    }

    /// An XMM register's bytes.
    fn xmm(&self, register: Register) -> Xmm {
        self.state.fx.xmm[register.number() & 15]
    }

    fn set_xmm(&mut self, register: Register, value: Xmm) {
        self.state.fx.xmm[register.number() & 15] = value;
    }

    /// An MM register's bytes.
    fn mm(&self, register: Register) -> [u8; 8] {
        let fx = &self.state.fx;
        let at = (register.number() + 8 - fx.top()) & 7;
        std::array::from_fn(|byte| fx.st[at][byte])
    }

    /// What every MMX instruction does to the x87 state: TOP is zero, all registers are in use.
    fn enter_mmx(&mut self) {
        self.state.fx.rotate_to_zero();
        self.state.fx.ftw = 0xff;
    }

    fn set_mm(&mut self, register: Register, value: [u8; 8]) {
        self.enter_mmx();
        let slot = &mut self.state.fx.st[register.number() & 7];
        slot[..8].copy_from_slice(&value);
        slot[8..10].fill(0xff);
    }

    /// An MM or XMM register, or a memory operand, in the low bytes of 16. Memory operands of 16 bytes
    /// are aligned unless `unaligned`.
    fn vector_operand(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        index: u32,
        unaligned: bool,
    ) -> Result<Xmm, Exception> {
        let mut bytes = [0; 16];
        if instruction.op_kind(index) == OpKind::Register {
            let register = instruction.op_register(index);
            if register.is_xmm() {
                return Ok(self.xmm(register));
            } else if register.is_mm() {
                bytes[..8].copy_from_slice(&self.mm(register));
            } else {
                bytes[..8].copy_from_slice(&self.read_register(register).to_le_bytes());
            }
            return Ok(bytes);
        }
        let size = instruction.memory_size().size().min(16);
        let linear = self.vector_address(instruction, size, unaligned, Access::Read)?;
        self.load_vector(env, linear, &mut bytes[..size])?;
        Ok(bytes)
    }

    /// The linear address of a memory operand, its alignment checked.
    fn vector_address(
        &self,
        instruction: &Instruction,
        size: usize,
        unaligned: bool,
        access: Access,
    ) -> Result<u64, Exception> {
        let linear = self.operand_address(instruction, size as u64, access)?;
        if size == 16 && !unaligned && linear & 15 != 0 {
            return Err(Exception::gp(0));
        }
        Ok(linear)
    }

    /// Loads by eight bytes (what is left by 1, 2 or 4): each of those is one access.
    pub(crate) fn load_vector(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        bytes: &mut [u8],
    ) -> Result<(), Exception> {
        let addresses = (0..).map(|index: u64| linear.wrapping_add(index * 8));
        for (linear, chunk) in addresses.zip(bytes.chunks_mut(8)) {
            let value = self.load(env, linear, chunk.len() as u8)?;
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }

    /// Stores likewise, all or nothing.
    pub(crate) fn store_vector(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        bytes: &[u8],
    ) -> Result<(), Exception> {
        let address = |index: usize| linear.wrapping_add(index as u64 * 8);
        for (index, chunk) in bytes.chunks(8).enumerate() {
            self.check_write(address(index), chunk.len() as u8)?;
        }
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let mut value = [0; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            let value = u64::from_le_bytes(value);
            self.store(env, address(index), chunk.len() as u8, value)?;
        }
        Ok(())
    }

    fn mmx_arithmetic(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let target = instruction.op0_register();
        let mut dst = self.mm(target);
        let src = self.source(env, instruction)?;
        let src = std::array::from_fn(|byte| src[byte]);
        if !native::mmx(instruction.mnemonic(), &mut dst, &src) {
            return Err(Exception::ud());
        }
        self.set_mm(target, dst);
        Ok(())
    }

    /// The second operand; a shift's immediate count as a number of 64 bits.
    fn source(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<Xmm, Exception> {
        use Mnemonic as M;
        if instruction.op1_kind() == OpKind::Immediate8 {
            return Ok(u128::from(instruction.immediate8()).to_le_bytes());
        }
        let unaligned = matches!(
            instruction.mnemonic(),
            M::Pcmpestri | M::Pcmpestri64 | M::Pcmpestrm | M::Pcmpestrm64 | M::Pcmpistri
        ) || instruction.mnemonic() == M::Pcmpistrm;
        self.vector_operand(env, instruction, 1, unaligned)
    }

    fn sse_arithmetic(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        use Mnemonic as M;
        let mnemonic = instruction.mnemonic();
        let target = instruction.op0_register();
        let src = self.source(env, instruction)?;
        let mut dst = self.xmm(target);
        if native::integer(mnemonic, &mut dst, &src) {
            self.set_xmm(target, dst);
            return Ok(());
        }
        match mnemonic {
            M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd | M::Ptest => {
                let flags = self.float(|csr| native::compare(mnemonic, &dst, &src, csr))?;
                let flags = u64::from(flags.ok_or(Exception::ud())?);
                let kept = flags & (rflags::ZF | rflags::PF | rflags::CF);
                self.state.set_status(rflags::STATUS, kept);
            }
            _ if native::has_immediate(mnemonic) => {
                return self.sse_immediate(instruction, dst, src);
            }
            _ => {
                let done = self.float(|csr| {
                    let mut result = dst;
                    native::float(mnemonic, &mut result, &src, csr).then_some(result)
                })?;
                self.set_xmm(target, done.ok_or(Exception::ud())?);
            }
        }
        Ok(())
    }

    fn sse_immediate(
        &mut self,
        instruction: &Instruction,
        dst: Xmm,
        src: Xmm,
    ) -> Result<(), Exception> {
        use Mnemonic as M;
        let mnemonic = instruction.mnemonic();
        let mut value = instruction.immediate8();
        if mnemonic == M::Insertps && instruction.op1_kind() == OpKind::Memory {
            value &= 0x3f; // memory has one element only
        }
        let before = Beside {
            rax: self.state.register(0),
            rdx: self.state.register(2),
            ..Beside::default()
        };
        let (result, beside) = self.float(|csr| {
            let (mut result, mut beside) = (dst, before);
            native::immediate(mnemonic, value, &mut result, &src, csr, &mut beside);
            (result, beside)
        })?;
        match mnemonic {
            M::Pcmpestri | M::Pcmpestri64 | M::Pcmpistri => {
                self.write_register(Register::RCX, beside.rcx & 0xffff_ffff);
                self.state.set_status(rflags::STATUS, beside.flags);
            }
            M::Pcmpestrm | M::Pcmpestrm64 | M::Pcmpistrm => {
                self.set_xmm(Register::XMM0, result);
                self.state.set_status(rflags::STATUS, beside.flags);
            }
            _ => self.set_xmm(instruction.op0_register(), result),
        }
        Ok(())
    }

    /// Runs a floating-point operation under the guest's rounding and with its exceptions.
    ///
    /// `operation` takes MXCSR with flags clear and all exceptions masked, and leaves new flags in it.
    /// It may run twice.
    fn float<T>(&mut self, operation: impl Fn(&mut u32) -> T) -> Result<T, Exception> {
        let mxcsr = self.state.fx.mxcsr;
        let clear = mxcsr & !EXCEPTIONS;
        let unmasked = !(mxcsr >> 7) & EXCEPTIONS;
        // Unmasked, underflow is raised by exact results too; masked, only flushing to zero tells.
        let underflows = unmasked & UNDERFLOW != 0;
        let mut csr = if underflows { clear | FLUSH } else { clear };
        let result = operation(&mut csr);
        let mut flags = csr & EXCEPTIONS;
        if flags & unmasked == 0 {
            self.state.fx.mxcsr |= flags;
            return Ok(result);
        }
        if underflows && flags & UNDERFLOW != 0 {
            // Whether it was exact, flushing has hidden.
            let mut csr = clear & !FLUSH;
            operation(&mut csr);
            flags = csr & EXCEPTIONS | UNDERFLOW;
        }
        if flags & unmasked & BEFORE != 0 {
            flags &= BEFORE;
        }
        self.state.fx.mxcsr |= flags;
        Err(if self.state.cr4 & 1 << 10 != 0 {
            Exception::new(Vector::SimdFloatingPoint)
        } else {
            Exception::ud()
        })
    }
}
