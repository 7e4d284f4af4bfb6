//! Debug registers and what a debug exception does to them (SDM volume 3, 17.2 and 17.3).

use iced_x86::Register;

use super::cr4;
use crate::error::{Exception, Vector};
use crate::interpret::Ended;
use crate::mmu::Access;
use crate::processor::{Environment, Processor};
use crate::state::{Mode, rflags};

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

/// The bits of DR7 that turn breakpoints on, two for each.
const ENABLED: u64 = 0xff;

/// The breakpoints that an instruction's accesses have met: bit n for DRn.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hits(u64);

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

/// What the address of an operand of so many bytes has to be a multiple of (SDM volume 3, table 6-7). For
/// 16 bytes a processor may choose not to check, where the instruction does not by itself.
const fn alignment(len: usize) -> u64 {
    match len {
        2 => 2,
        4 | 6 => 4,
        8 | 10 => 8,
        _ => 1,
    }
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

    /// Whether addresses have to be compared with the debug registers.
    #[inline]
    pub(crate) fn has_breakpoints(&self) -> bool {
        self.state.dr[5] & ENABLED != 0
    }

    /// The breakpoints of some kinds (DR7.R/W) that `len` bytes at a linear address touch.
    fn breakpoints_at(&self, linear: u64, len: u64, kinds: &[u64]) -> u64 {
        let control = self.state.dr[5];
        (0..4)
            .filter(|&index| {
                let field = control >> (16 + 4 * index) & 0xf;
                let size = match field >> 2 {
                    0 => 1,
                    1 => 2,
                    2 => 8,
                    _ => 4,
                };
                // Lower bits of the address do not count.
                let start = self.state.dr[index as usize] & !(size - 1);
                let meets =
                    linear < start.saturating_add(size) && start < linear.saturating_add(len);
                control >> (2 * index) & 3 != 0 && kinds.contains(&(field & 3)) && meets
            })
            .fold(0, |hits, index| hits | 1 << index)
    }

    /// Whether the program's accesses have to be aligned (SDM volume 3, 6.15, interrupt 17).
    #[inline]
    pub(crate) fn checks_alignment(&self) -> bool {
        const AM: u64 = 1 << 18;
        self.state.flags & rflags::AC != 0 && self.state.cr0 & AM != 0 && self.state.cpl() == 3
    }

    /// Whether each access to data has to be looked at.
    #[inline]
    pub(crate) fn is_watched(&self) -> bool {
        self.has_breakpoints() || self.checks_alignment()
    }

    /// Notes an access to data, for its breakpoints. One with the rights of CPL 3 faults if it has to be
    /// aligned and is not.
    #[cold]
    pub(crate) fn note_access(
        &mut self,
        linear: u64,
        len: usize,
        access: Access,
        user: bool,
    ) -> Result<(), Exception> {
        const WRITE: u64 = 1;
        const ACCESS: u64 = 3;
        let kinds: &[u64] = match access {
            Access::Write => &[WRITE, ACCESS],
            Access::Read => &[ACCESS],
            Access::Fetch => return Ok(()),
        };
        if user && self.checks_alignment() && !linear.is_multiple_of(alignment(len)) {
            return Err(Exception::with_code(Vector::AlignmentCheck, 0));
        }
        let hits = self.breakpoints_at(linear, len as u64, kinds);
        if let Some(noted) = &mut self.accesses {
            noted.0 |= hits;
        }
        Ok(())
    }

    /// Executes one instruction while its accesses are looked at; `resumed`: with RF, which passes one on
    /// the instruction itself.
    pub(crate) fn run_watched(&mut self, env: &dyn Environment, resumed: bool) -> Ended {
        const EXECUTE: u64 = 0;
        let linear = self.code_linear();
        let hits = self.breakpoints_at(linear, 1, &[EXECUTE]);
        if hits != 0 && !resumed {
            self.state.dr[4] |= hits;
            return Ended::fault(Exception::new(Vector::Debug));
        }
        let before = self.state.rip;
        self.accesses = Some(Hits::default());
        let fault = self.step(env).err();
        let hits = self.accesses.take().unwrap_or_default().0;
        let again = fault.is_none() && self.state.rip == before;
        let mut ended = Ended {
            retired: u64::from(fault.is_none() && !again),
            fault,
            again,
            look: true,
            ..Ended::default()
        };
        if hits != 0 && ended.fault.is_none() {
            // A trap after the instruction.
            self.state.dr[4] |= hits;
            ended.fault = Some(Exception::new(Vector::Debug));
        }
        self.spend(ended.retired);
        ended
    }
}
