//! Instructions between vector and general registers, conversions of MM registers, and the few
//! whose second operand the host's form does not have: byte shifts, blends by XMM0, MMX immediates.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::native::{self, Xmm};
use crate::error::Exception;
use crate::execute::operand::operand_size;
use crate::processor::{Environment, Processor};

/// A byte for each lane of `size` bytes: whether its top bit is set, from lane 0 in bit 0.
pub(super) fn sign_bits(bytes: &[u8], size: usize) -> u64 {
    let lanes = bytes.chunks_exact(size).enumerate();
    lanes.fold(0, |mask, (lane, bytes)| {
        mask | u64::from(bytes[size - 1] >> 7) << lane
    })
}

/// PSHUFW: word `i` is the source's word that bits `2 i` and `2 i + 1` of the immediate name.
fn shuffle_words(src: u64, immediate: u8) -> u64 {
    (0..4).fold(0, |result, lane| {
        let from = u32::from(immediate >> (2 * lane) & 3);
        result | (src >> (16 * from) & 0xffff) << (16 * lane)
    })
}

/// PALIGNR on MM registers: eight bytes from byte `immediate` of `dst` above `src`.
fn align(dst: u64, src: u64, immediate: u8) -> u64 {
    let both = u128::from(dst) << 64 | u128::from(src);
    both.checked_shr(u32::from(immediate) * 8).unwrap_or(0) as u64
}

/// PSRLDQ and PSLLDQ.
fn shift_bytes(value: Xmm, immediate: u8, left: bool) -> Xmm {
    let (value, bits) = (u128::from_le_bytes(value), u32::from(immediate) * 8);
    let shifted = if left {
        value.checked_shl(bits)
    } else {
        value.checked_shr(bits)
    };
    shifted.unwrap_or(0).to_le_bytes()
}

/// PEXTRx, PINSRx and EXTRACTPS: bytes of the element.
const fn element(mnemonic: Mnemonic) -> Option<usize> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Pextrb | M::Pinsrb => 1,
        M::Pextrw | M::Pinsrw => 2,
        M::Pextrd | M::Pinsrd | M::Extractps => 4,
        M::Pextrq | M::Pinsrq => 8,
        _ => return None,
    })
}

/// The conversion between XMM registers that does an MMX conversion's work.
const fn xmm_conversion(mnemonic: Mnemonic) -> Option<Mnemonic> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Cvtpi2ps => M::Cvtdq2ps,
        M::Cvtpi2pd => M::Cvtdq2pd,
        M::Cvtps2pi => M::Cvtps2dq,
        M::Cvttps2pi => M::Cvttps2dq,
        M::Cvtpd2pi => M::Cvtpd2dq,
        M::Cvttpd2pi => M::Cvttpd2dq,
        _ => return None,
    })
}

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn vector_lanes(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Result<(), Exception>> {
        use Mnemonic as M;
        let mnemonic = instruction.mnemonic();
        if let Some(size) = element(mnemonic) {
            let inserts = matches!(mnemonic, M::Pinsrb | M::Pinsrw | M::Pinsrd | M::Pinsrq);
            return Some(if inserts {
                self.insert(env, instruction, size)
            } else {
                self.extract(env, instruction, size)
            });
        }
        if let Some(conversion) = xmm_conversion(mnemonic) {
            return Some(self.convert_mmx(env, instruction, conversion));
        }
        Some(match mnemonic {
            M::Movmskps => self.move_mask(instruction, 4),
            M::Movmskpd => self.move_mask(instruction, 8),
            M::Pmovmskb => self.move_mask(instruction, 1),
            M::Blendvps => self.blend(env, instruction, 4),
            M::Blendvpd => self.blend(env, instruction, 8),
            M::Pblendvb => self.blend(env, instruction, 1),
            M::Psrldq | M::Pslldq => {
                let target = instruction.op0_register();
                let left = mnemonic == M::Pslldq;
                let value = shift_bytes(self.xmm(target), instruction.immediate8(), left);
                self.set_xmm(target, value);
                Ok(())
            }
            M::Pshufw => self.mmx_immediate(env, instruction),
            M::Palignr if instruction.op0_register().is_mm() => {
                self.mmx_immediate(env, instruction)
            }
            M::Cvtsi2ss | M::Cvtsi2sd => self.convert_from_register(env, instruction),
            M::Cvtss2si | M::Cvttss2si | M::Cvtsd2si | M::Cvttsd2si => {
                self.convert_to_register(env, instruction)
            }
            _ => return None,
        })
    }

    fn move_mask(&mut self, instruction: &Instruction, size: usize) -> Result<(), Exception> {
        let register = instruction.op1_register();
        let mask = if register.is_mm() {
            let mask = sign_bits(&self.mm(register), size);
            self.enter_mmx();
            mask
        } else {
            sign_bits(&self.xmm(register), size)
        };
        self.write_register(instruction.op0_register(), mask);
        Ok(())
    }

    fn insert(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        size: usize,
    ) -> Result<(), Exception> {
        let target = instruction.op0_register();
        let src = self.vector_operand(env, instruction, 1, true)?;
        let lanes = if target.is_mm() { 8 } else { 16 } / size;
        let at = usize::from(instruction.immediate8()) % lanes * size;
        if target.is_mm() {
            let mut dst = self.mm(target);
            dst[at..at + size].copy_from_slice(&src[..size]);
            self.set_mm(target, dst);
        } else {
            let mut dst = self.xmm(target);
            dst[at..at + size].copy_from_slice(&src[..size]);
            self.set_xmm(target, dst);
        }
        Ok(())
    }

    fn extract(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        size: usize,
    ) -> Result<(), Exception> {
        let register = instruction.op1_register();
        let src = self.vector_operand(env, instruction, 1, true)?;
        let lanes = if register.is_mm() { 8 } else { 16 } / size;
        let at = usize::from(instruction.immediate8()) % lanes * size;
        let mut value = [0; 8];
        value[..size].copy_from_slice(&src[at..at + size]);
        self.write_operand(env, instruction, 0, u64::from_le_bytes(value))?;
        if register.is_mm() {
            self.enter_mmx();
        }
        Ok(())
    }

    /// BLENDVPS, BLENDVPD, PBLENDVB: lanes of the source where XMM0's lane has its top bit set.
    fn blend(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        size: usize,
    ) -> Result<(), Exception> {
        let target = instruction.op0_register();
        let src = self.vector_operand(env, instruction, 1, false)?;
        let mask = sign_bits(&self.xmm(Register::XMM0), size);
        let mut dst = self.xmm(target);
        for (lane, bytes) in dst.chunks_exact_mut(size).enumerate() {
            if mask >> lane & 1 != 0 {
                bytes.copy_from_slice(&src[lane * size..][..size]);
            }
        }
        self.set_xmm(target, dst);
        Ok(())
    }

    fn mmx_immediate(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let target = instruction.op0_register();
        let dst = u64::from_le_bytes(self.mm(target));
        let src = u128::from_le_bytes(self.vector_operand(env, instruction, 1, true)?) as u64;
        let immediate = instruction.immediate8();
        let result = if instruction.mnemonic() == Mnemonic::Pshufw {
            shuffle_words(src, immediate)
        } else {
            align(dst, src, immediate)
        };
        self.set_mm(target, result.to_le_bytes());
        Ok(())
    }

    /// Conversions with an MM register on one side. Only the low two lanes of the XMM form count.
    fn convert_mmx(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        conversion: Mnemonic,
    ) -> Result<(), Exception> {
        let target = instruction.op0_register();
        let mut src = self.vector_operand(env, instruction, 1, false)?;
        if matches!(conversion, Mnemonic::Cvtps2dq | Mnemonic::Cvttps2dq) {
            src[8..].fill(0);
        }
        let result = self.float(|csr| {
            let mut result = [0; 16];
            native::float(conversion, &mut result, &src, csr);
            result
        })?;
        if target.is_mm() {
            self.set_mm(target, std::array::from_fn(|byte| result[byte]));
            return Ok(());
        }
        let mut dst = self.xmm(target);
        let size = if conversion == Mnemonic::Cvtdq2ps {
            8
        } else {
            16
        };
        dst[..size].copy_from_slice(&result[..size]);
        self.set_xmm(target, dst);
        if instruction.op1_kind() == OpKind::Register {
            self.enter_mmx();
        }
        Ok(())
    }

    fn convert_from_register(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let (mnemonic, target) = (instruction.mnemonic(), instruction.op0_register());
        let wide = operand_size(instruction, 1) == 8;
        let value = self.read_operand(env, instruction, 1)?;
        let dst = self.xmm(target);
        let result = self.float(|csr| {
            let (mut result, mut value) = (dst, value);
            native::convert(mnemonic, wide, &mut result, &mut value, csr);
            result
        })?;
        self.set_xmm(target, result);
        Ok(())
    }

    fn convert_to_register(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let (mnemonic, target) = (instruction.mnemonic(), instruction.op0_register());
        let wide = target.size() == 8;
        let src = self.vector_operand(env, instruction, 1, true)?;
        let value = self.float(|csr| {
            let (mut src, mut value) = (src, 0);
            native::convert(mnemonic, wide, &mut src, &mut value, csr);
            value
        })?;
        self.write_register(target, value);
        Ok(())
    }
}
