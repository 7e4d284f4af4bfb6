//! Debug registers and what a debug exception does to them (SDM volume 3, 17.2 and 17.3).

use iced_x86::Register;

use super::cr4;
use crate::error::{Exception, Vector};
use crate::processor::Processor;
use crate::state::Mode;

/// DR7.GD: MOV to and from debug registers raises #DB.
const GENERAL_DETECT: u64 = 1 << 13;
/// DR6.BD says that it did.
const DETECTED: u64 = 1 << 13;
/// Bits of DR6 that are always set.
const DR6_FIXED: u64 = 0xffff_0ff0;
/// Bits of DR6 that exist.
const DR6_VALID: u64 = 0xe00f;
/// Bits of DR7 that exist.
const DR7_VALID: u64 = 0xffff_2bff;
const DR7_FIXED: u64 = 0x400;

/// Which element of `State::dr` a debug register is, without the aliases of DR4 and DR5.
fn index_of(register: Register) -> Option<usize> {
    const NAMES: [Register; 6] = [
        Register::DR0,
        Register::DR1,
        Register::DR2,
        Register::DR3,
        Register::DR6,
        Register::DR7,
    ];
    NAMES.iter().position(|name| *name == register)
}

impl Processor {
    /// The element of `State::dr` that an instruction at this privilege may access.
    fn debug_register(&mut self, register: Register) -> Result<usize, Exception> {
        let register = match register {
            Register::DR4 if self.state.cr4 & cr4::DE == 0 => Register::DR6,
            Register::DR5 if self.state.cr4 & cr4::DE == 0 => Register::DR7,
            register => register,
        };
        let index = index_of(register).ok_or(Exception::ud())?;
        self.require_supervisor()?;
        if self.state.dr[5] & GENERAL_DETECT != 0 {
            self.state.dr[4] |= DETECTED;
            return Err(Exception::new(Vector::Debug));
        }
        Ok(index)
    }

    pub(super) fn read_debug_register(&mut self, register: Register) -> Result<u64, Exception> {
        let index = self.debug_register(register)?;
        Ok(self.state.dr[index])
    }

    pub(super) fn write_debug_register(
        &mut self,
        register: Register,
        value: u64,
    ) -> Result<(), Exception> {
        let index = self.debug_register(register)?;
        let value = if self.state.mode() == Mode::Bits64 {
            value
        } else {
            value & 0xffff_ffff
        };
        if index >= 4 && value >> 32 != 0 {
            return Err(Exception::gp(0));
        }
        self.state.dr[index] = match index {
            4 => value & DR6_VALID | DR6_FIXED,
            5 => value & DR7_VALID | DR7_FIXED,
            _ => value,
        };
        Ok(())
    }

    /// A debug exception clears general detection, so that its handler can use the registers.
    pub(super) fn debug_exception_begins(&mut self) {
        self.state.dr[5] &= !GENERAL_DETECT;
    }
}
