//! Bit tests and scans, POPCNT, CRC32, BSWAP.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{address_size, operand_size, sign_extend};
use crate::error::Exception;
use crate::flags::mask;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::rflags;

/// CRC-32C (polynomial 11EDC6F41, reflected) of each byte.
const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// What BT, BTS, BTR and BTC leave of a value whose bit `bit` they test.
fn changed(mnemonic: Mnemonic, value: u64, bit: u32) -> u64 {
    match mnemonic {
        Mnemonic::Bts => value | 1 << bit,
        Mnemonic::Btr => value & !(1 << bit),
        Mnemonic::Btc => value ^ 1 << bit,
        _ => value,
    }
}

impl Processor {
    pub(crate) fn bit_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let done = match instruction.mnemonic() {
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => {
                self.bit_test(env, instruction)
            }
            // Without BMI1 and LZCNT their encodings are BSF and BSR with a prefix that means nothing.
            Mnemonic::Bsf | Mnemonic::Tzcnt => {
                self.bit_scan(env, instruction, |value| value.trailing_zeros())
            }
            Mnemonic::Bsr | Mnemonic::Lzcnt => {
                self.bit_scan(env, instruction, |value| 63 - value.leading_zeros())
            }
            Mnemonic::Popcnt => self.population_count(env, instruction),
            Mnemonic::Crc32 => self.crc32(env, instruction),
            Mnemonic::Bswap => self.swap_bytes(instruction),
            _ => return None,
        };
        Some(done.map(|()| Flow::Next))
    }

    fn bit_test(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let size = operand_size(instruction, 0);
        let mnemonic = instruction.mnemonic();
        let index = self.read_operand(env, instruction, 1)?;
        let bit = index as u32 & (8 * u32::from(size) - 1);
        let access = if mnemonic == Mnemonic::Bt {
            Access::Read
        } else {
            Access::Write
        };
        let old = match instruction.op_kind(0) {
            OpKind::Register if access == Access::Read => self.read_operand(env, instruction, 0)?,
            OpKind::Register => {
                self.modify(env, instruction, |value| changed(mnemonic, value, bit))?
                    .0
            }
            _ => {
                let linear = self.bit_address(instruction, size, index, access)?;
                if access == Access::Read {
                    self.load(env, linear, size)?
                } else {
                    let locked = instruction.has_lock_prefix();
                    self.modify_at(env, linear, size, locked, |value| {
                        changed(mnemonic, value, bit)
                    })?
                    .0
                }
            }
        };
        let carry = if old >> bit & 1 != 0 { rflags::CF } else { 0 };
        self.state.set_status(rflags::CF, carry);
        Ok(())
    }

    /// The address of the word with the tested bit: a register's index is signed and reaches beyond
    /// the operand, an immediate one does not.
    fn bit_address(
        &self,
        instruction: &Instruction,
        size: u8,
        index: u64,
        access: Access,
    ) -> Result<u64, Exception> {
        let mut offset = self.effective_address(instruction);
        if instruction.op_kind(1) == OpKind::Register {
            let words = sign_extend(index, size) >> (8 * u32::from(size)).trailing_zeros();
            let address_mask = mask(address_size(instruction, self.state.mode()));
            offset = offset.wrapping_add(words.wrapping_mul(size.into()) as u64) & address_mask;
        }
        let name = self.operand_segment(instruction);
        self.linear(name, offset, size.into(), access)
    }

    /// A source of zero sets ZF and leaves the destination.
    fn bit_scan(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
        scan: impl Fn(u64) -> u32,
    ) -> Result<(), Exception> {
        let source = self.read_operand(env, instruction, 1)?;
        let mut index = 0;
        if source != 0 {
            index = scan(source);
            self.write_register(instruction.op_register(0), index.into());
        }
        // All but ZF are undefined; AMD's processors clear them and set PF by the index.
        let zero = if source == 0 { rflags::ZF } else { 0 };
        let even = index.count_ones().is_multiple_of(2);
        let parity = if even { rflags::PF } else { 0 };
        self.state.set_status(rflags::STATUS, zero | parity);
        Ok(())
    }

    fn population_count(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Result<(), Exception> {
        let source = self.read_operand(env, instruction, 1)?;
        self.write_register(instruction.op_register(0), source.count_ones().into());
        let zero = if source == 0 { rflags::ZF } else { 0 };
        self.state.set_status(rflags::STATUS, zero);
        Ok(())
    }

    fn crc32(&mut self, env: &dyn Environment, instruction: &Instruction) -> Result<(), Exception> {
        let size = operand_size(instruction, 1);
        let source = self.read_operand(env, instruction, 1)?;
        let target = instruction.op_register(0);
        let mut crc = self.read_register(target) as u32;
        for byte in source.to_le_bytes().into_iter().take(size.into()) {
            crc = crc >> 8 ^ CRC32C[usize::from(crc as u8 ^ byte)];
        }
        self.write_register(target, crc.into());
        Ok(())
    }

    fn swap_bytes(&mut self, instruction: &Instruction) -> Result<(), Exception> {
        let register = instruction.op_register(0);
        let value = self.read_register(register);
        let swapped = match register.size() {
            8 => value.swap_bytes(),
            4 => (value as u32).swap_bytes().into(),
            _ => 0, // undefined; processors clear it
        };
        self.write_register(register, swapped);
        Ok(())
    }
}
