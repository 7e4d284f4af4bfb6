//! Shifts and rotates.
//!
//! Where the manual leaves OF undefined (counts other than one) it follows the same formula as for a
//! count of one, and shifts set AF, as AMD's processors do.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{operand_size, sign_extend};
use crate::error::Exception;
use crate::flags::{Kind, mask, sign};
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;

/// A shifted value with the bit that went out last and the overflow flag.
#[derive(Clone, Copy)]
struct Shifted {
    result: u64,
    carry: bool,
    overflow: bool,
}

/// Whether the two top bits of a value differ.
fn top_bits_differ(value: u64, size: u8) -> bool {
    (value ^ value << 1) & sign(size) != 0
}

/// SHL, SHR and SAR by a count from 1 to 63.
fn shift(mnemonic: Mnemonic, size: u8, value: u64, count: u32) -> Shifted {
    let bits = 8 * u32::from(size);
    match mnemonic {
        Mnemonic::Shl | Mnemonic::Sal => {
            let result = value << count & mask(size);
            let carry = count <= bits && value >> (bits - count.min(bits)) & 1 != 0;
            let overflow = carry != (result & sign(size) != 0);
            Shifted {
                result,
                carry,
                overflow,
            }
        }
        Mnemonic::Shr => {
            let result = value >> count;
            Shifted {
                result,
                carry: value >> (count - 1) & 1 != 0,
                overflow: top_bits_differ(result, size),
            }
        }
        _ => {
            let value = sign_extend(value, size);
            Shifted {
                result: (value >> count) as u64 & mask(size),
                carry: value >> (count - 1) & 1 != 0,
                overflow: false,
            }
        }
    }
}

/// ROL, ROR, RCL and RCR by a count that is not zero, though it may be once it is reduced.
fn rotate(mnemonic: Mnemonic, size: u8, value: u64, count: u32, carry: bool) -> Shifted {
    let bits = 8 * u32::from(size);
    let through_carry = matches!(mnemonic, Mnemonic::Rcl | Mnemonic::Rcr);
    let width = bits + u32::from(through_carry);
    let all = u128::MAX >> (128 - width);
    // With RCL and RCR, CF is the bit above the value.
    let whole = u128::from(value) | u128::from(through_carry && carry) << bits;
    let left = match mnemonic {
        Mnemonic::Rol | Mnemonic::Rcl => count % width,
        _ => (width - count % width) % width,
    };
    let turned = (whole << left | whole >> (width - left)) & all;
    let result = turned as u64 & mask(size);
    let top = result & sign(size) != 0;
    let carry = match mnemonic {
        Mnemonic::Rol => result & 1 != 0,
        Mnemonic::Ror => top,
        _ => turned >> bits & 1 != 0,
    };
    let overflow = match mnemonic {
        Mnemonic::Rol | Mnemonic::Rcl => top != carry,
        _ => top_bits_differ(result, size),
    };
    Shifted {
        result,
        carry,
        overflow,
    }
}

/// SHLD and SHRD by a count from 1 to 63. A 16-bit operand by more than 16 goes on with the
/// destination's bits after the source's.
fn double_shift(left: bool, size: u8, target: u64, source: u64, count: u32) -> Shifted {
    let bits = 8 * u32::from(size);
    let (target, source, count) = if count > bits {
        (source, target, count - bits)
    } else {
        (target, source, count)
    };
    let rest = bits - count;
    let (high, low, carry) = if left {
        (target << count, source >> rest, target >> rest)
    } else {
        (source << rest, target >> count, target >> (count - 1))
    };
    let result = (high | low) & mask(size);
    let carry = carry & 1 != 0;
    let overflow = if left {
        carry != (result & sign(size) != 0)
    } else {
        top_bits_differ(result, size)
    };
    Shifted {
        result,
        carry,
        overflow,
    }
}

/// Flags that rotates set.
const CARRY_OVERFLOW: u64 = rflags::CF | rflags::OF;

impl Processor {
    pub(crate) fn shift_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let mnemonic = instruction.mnemonic();
        let size = operand_size(instruction, 0);
        let carry = self.state.carry();
        let done = match mnemonic {
            Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar => {
                let by = move |value, count, _| shift(mnemonic, size, value, count);
                self.shifted(env, instruction, 1, true, by)
            }
            Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr => {
                let by = move |value, count, _| rotate(mnemonic, size, value, count, carry);
                self.shifted(env, instruction, 1, false, by)
            }
            Mnemonic::Shld | Mnemonic::Shrd => {
                let left = mnemonic == Mnemonic::Shld;
                let by = move |value, count, source| double_shift(left, size, value, source, count);
                self.shifted(env, instruction, 2, true, by)
            }
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    /// Shifts operand 0 by what operand `count_index` says. `by` gets the value, the count and the
    /// value of operand 1. A count of zero leaves value and flags, but writes.
    fn shifted(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        count_index: u32,
        by_result: bool,
        by: impl Fn(u64, u32, u64) -> Shifted,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let source = self.read_operand(env, instruction, 1)? & mask(size);
        let count = self.read_operand(env, instruction, count_index)?;
        let count = count as u32 & if size == 8 { 63 } else { 31 };
        let (old, _) = self.modify(env, instruction, |value| {
            if count == 0 {
                value
            } else {
                by(value, count, source).result
            }
        })?;
        if count == 0 {
            return Ok(());
        }
        let shifted = by(old, count, source);
        if by_result {
            let result = shifted.result;
            self.state
                .set_lazy(Kind::Logic, size, result, result, result);
            self.state.set_status(rflags::AF, rflags::AF);
        }
        let carry = if shifted.carry { rflags::CF } else { 0 };
        let overflow = if shifted.overflow { rflags::OF } else { 0 };
        self.state.set_status(CARRY_OVERFLOW, carry | overflow);
        Ok(())
    }
}
