//! Decimal adjustment: AAA, AAS, AAM, AAD, DAA, DAS. They exist outside 64-bit mode only, which the
//! decoder knows.

use iced_x86::{Instruction, Mnemonic, Register};

use crate::error::{Exception, Vector};
use crate::flags::Kind;
use crate::processor::{Executed, Flow, Processor};
use crate::state::rflags;

impl Processor {
    pub(crate) fn decimal_instruction(&mut self, instruction: &Instruction) -> Option<Executed> {
        let base = u64::from(instruction.immediate8());
        match instruction.mnemonic() {
            Mnemonic::Aaa => self.adjust_unpacked(|ax| ax.wrapping_add(0x106)),
            Mnemonic::Aas => self.adjust_unpacked(|ax| ax.wrapping_sub(0x106)),
            Mnemonic::Daa => self.adjust_packed(u64::wrapping_add),
            Mnemonic::Das => self.adjust_packed(u64::wrapping_sub),
            Mnemonic::Aam => {
                let al = self.read_register(Register::AL);
                let (Some(tens), Some(ones)) = (al.checked_div(base), al.checked_rem(base)) else {
                    return Some(Err(Exception::new(Vector::DivideError)));
                };
                self.write_register(Register::AX, tens << 8 | ones);
                self.state.set_lazy(Kind::Logic, 1, ones, ones, ones);
            }
            Mnemonic::Aad => {
                let tens = self.read_register(Register::AH);
                let value = self.read_register(Register::AL).wrapping_add(tens * base) & 0xff;
                self.write_register(Register::AX, value);
                self.state.set_lazy(Kind::Logic, 1, value, value, value);
            }
            _ => return None,
        }
        Some(Ok(Flow::Next))
    }

    /// AAA and AAS.
    fn adjust_unpacked(&mut self, adjust: impl Fn(u64) -> u64) {
        let which = rflags::AF | rflags::CF;
        let ax = self.read_register(Register::AX);
        let needed = ax & 0xf > 9 || self.state.rflags() & rflags::AF != 0;
        let ax = if needed { adjust(ax) } else { ax };
        self.write_register(Register::AX, ax & 0xff0f);
        self.state.set_status(which, if needed { which } else { 0 });
    }

    /// DAA and DAS: `adjust` adds or subtracts.
    fn adjust_packed(&mut self, adjust: impl Fn(u64, u64) -> u64) {
        let al = self.read_register(Register::AL);
        let flags = self.state.rflags();
        let carry = flags & rflags::CF != 0;
        let low = al & 0xf > 9 || flags & rflags::AF != 0;
        let high = al > 0x99 || carry;
        let mut value = al;
        let mut bits = 0;
        if low {
            // DAS borrows out of the low digit's adjustment, too; DAA can only when `high` holds.
            let adjusted = adjust(value, 6);
            bits |= rflags::AF | if adjusted > 0xff { rflags::CF } else { 0 };
            value = adjusted & 0xff;
        }
        if high {
            value = adjust(value, 0x60) & 0xff;
            bits |= rflags::CF;
        }
        self.write_register(Register::AL, value);
        self.state.set_lazy(Kind::Logic, 1, value, value, value);
        self.state.set_status(rflags::AF | rflags::CF, bits);
    }
}
