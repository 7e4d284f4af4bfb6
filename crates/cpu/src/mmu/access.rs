//! Accesses to linear addresses: loads, stores, atomics and fetches of any alignment, and the check of
//! an offset against its segment.

use super::Access;
use super::Location;
use crate::error::{Exception, Vector};
use crate::memory::{self, PAGE, PAGE_SHIFT};
use crate::processor::{Environment, Processor};
use crate::state::{Mode, Segment, SegmentName, rflags};

impl Processor {
    fn is_user(&self) -> bool {
        self.state.cpl() == 3
    }

    /// Loads 1, 2, 4 or 8 bytes from a linear address with the current privilege.
    #[inline]
    pub(crate) fn load(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
    ) -> Result<u64, Exception> {
        self.load_as(env, linear, size, self.is_user())
    }

    /// The same with or without the rights of CPL 3.
    pub(crate) fn load_as(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        user: bool,
    ) -> Result<u64, Exception> {
        if self.accesses.is_some() {
            self.note_access(linear, size.into(), Access::Read, user)?;
        }
        if (linear & (PAGE - 1)) + u64::from(size) > PAGE {
            let mut bytes = [0; 8];
            self.load_bytes_as(env, linear, &mut bytes[..size.into()], user)?;
            return Ok(u64::from_le_bytes(bytes));
        }
        let at = self.translate(linear, Access::Read, user)?;
        Ok(self.read_at(env, at, size))
    }

    fn read_at(&self, env: &dyn Environment, at: Location, size: u8) -> u64 {
        if at.host.is_null() {
            return env.memory_read(at.physical, size);
        }
        // SAFETY: translation gives the host address of RAM, and the access stays in its page.
        unsafe { memory::read(at.host, size) }
    }

    fn write_at(&self, env: &dyn Environment, at: Location, size: u8, value: u64) {
        if at.host.is_null() {
            return env.memory_write(at.physical, size, value);
        }
        // SAFETY: as above.
        unsafe { memory::write(at.host, size, value) }
        self.report(at);
    }

    /// Says that something was written, to those who want to know. After the write, so that whoever
    /// looks at the page then finds it.
    fn report(&self, at: Location) {
        if at.watched {
            self.ram.written(at.physical);
        }
    }

    /// Stores 1, 2, 4 or 8 bytes. Nothing is written if any byte faults.
    #[inline]
    pub(crate) fn store(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        value: u64,
    ) -> Result<(), Exception> {
        self.store_as(env, linear, size, value, self.is_user())
    }

    /// The same with or without the rights of CPL 3.
    pub(crate) fn store_as(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        value: u64,
        user: bool,
    ) -> Result<(), Exception> {
        if self.accesses.is_some() {
            self.note_access(linear, size.into(), Access::Write, user)?;
        }
        if (linear & (PAGE - 1)) + u64::from(size) > PAGE {
            return self.store_bytes_as(env, linear, &value.to_le_bytes()[..size.into()], user);
        }
        let at = self.translate(linear, Access::Write, user)?;
        self.write_at(env, at, size, value);
        Ok(())
    }

    /// Checks that `size` bytes can be written later in this instruction.
    pub(crate) fn check_write(&mut self, linear: u64, size: u8) -> Result<(), Exception> {
        let user = self.is_user();
        self.translate(linear, Access::Write, user)?;
        if (linear & (PAGE - 1)) + u64::from(size) > PAGE {
            self.translate((linear | (PAGE - 1)).wrapping_add(1), Access::Write, user)?;
        }
        Ok(())
    }

    /// Loads up to a page of bytes.
    pub(crate) fn load_bytes(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        bytes: &mut [u8],
    ) -> Result<(), Exception> {
        self.load_bytes_as(env, linear, bytes, self.is_user())
    }

    fn load_bytes_as(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        bytes: &mut [u8],
        user: bool,
    ) -> Result<(), Exception> {
        if self.accesses.is_some() {
            self.note_access(linear, bytes.len(), Access::Read, user)?;
        }
        for (linear, byte) in (0..).map(|offset| linear.wrapping_add(offset)).zip(bytes) {
            let at = self.translate(linear, Access::Read, user)?;
            *byte = self.read_at(env, at, 1) as u8;
        }
        Ok(())
    }

    /// Stores up to a page of bytes, all or none.
    pub(crate) fn store_bytes(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        bytes: &[u8],
    ) -> Result<(), Exception> {
        self.store_bytes_as(env, linear, bytes, self.is_user())
    }

    fn store_bytes_as(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        bytes: &[u8],
        user: bool,
    ) -> Result<(), Exception> {
        let Some(last) = (bytes.len() as u64).checked_sub(1) else {
            return Ok(());
        };
        if self.accesses.is_some() {
            self.note_access(linear, bytes.len(), Access::Write, user)?;
        }
        self.translate(linear, Access::Write, user)?;
        let end = linear.wrapping_add(last);
        if end >> PAGE_SHIFT != linear >> PAGE_SHIFT {
            // The fault of a second page names its first byte.
            self.translate(end & !(PAGE - 1), Access::Write, user)?;
        }
        for (linear, byte) in (0..).map(|offset| linear.wrapping_add(offset)).zip(bytes) {
            let at = self.translate(linear, Access::Write, user)?;
            self.write_at(env, at, 1, (*byte).into());
        }
        Ok(())
    }

    /// Replaces an operand in memory as one, if `change` gives a new value; says what it was. A locked
    /// access that is not aligned, or crosses a page, or is no RAM is not atomic.
    pub(crate) fn atomic(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        mut change: impl FnMut(u64) -> Option<u64>,
    ) -> Result<u64, Exception> {
        self.check_write(linear, size)?;
        if self.accesses.is_some() {
            self.note_access(linear, size.into(), Access::Write, self.is_user())?;
        }
        let user = self.is_user();
        let at = self.translate(linear, Access::Write, user)?;
        if at.host.is_null() || !linear.is_multiple_of(size.into()) {
            let old = self.load(env, linear, size)?;
            if let Some(new) = change(old) {
                self.store(env, linear, size, new)?;
            }
            return Ok(old);
        }
        // SAFETY: RAM, aligned.
        let mut old = unsafe { memory::read(at.host, size) };
        while let Some(new) = change(old) {
            // SAFETY: RAM, aligned.
            let was = unsafe { memory::compare_exchange(at.host, size, old, new) };
            if was == old {
                break;
            }
            old = was;
        }
        self.report(at);
        Ok(old)
    }

    /// The same for the 16 bytes of CMPXCHG16B at an aligned address: replaces `old` by `new`. What is no
    /// RAM, and anything on a host without the instruction, is not atomic.
    pub(crate) fn atomic_16(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        old: u128,
        new: u128,
    ) -> Result<u128, Exception> {
        if self.accesses.is_some() {
            self.note_access(linear, 16, Access::Write, self.is_user())?;
        }
        let user = self.is_user();
        let at = self.translate(linear, Access::Write, user)?;
        if !at.host.is_null() && linear.is_multiple_of(16) {
            // SAFETY: RAM, aligned.
            if let Some(was) = unsafe { memory::compare_exchange_16(at.host, old, new) } {
                self.report(at);
                return Ok(was);
            }
        }
        let mut bytes = [0; 16];
        self.load_bytes(env, linear, &mut bytes)?;
        let was = u128::from_le_bytes(bytes);
        if was == old {
            self.store_bytes(env, linear, &new.to_le_bytes())?;
        }
        Ok(was)
    }

    /// `rep movs` upwards of elements that stay in one page at either side. Does nothing and says
    /// `false` if any of it faults or is no RAM.
    pub(crate) fn move_run(&mut self, from: u64, to: u64, size: u8, count: u64) -> bool {
        let user = self.is_user();
        let Ok(source) = self.translate(from, Access::Read, user) else {
            return false;
        };
        let Ok(target) = self.translate(to, Access::Write, user) else {
            return false;
        };
        let bytes = count.saturating_mul(size.into());
        let inside = |linear: u64| bytes <= PAGE - linear % PAGE;
        if self.accesses.is_some() {
            return false; // element by element, each of which is noted
        }
        if source.host.is_null() || target.host.is_null() || !inside(from) || !inside(to) {
            return false;
        }
        // SAFETY: both are RAM up to the end of their pages.
        unsafe { memory::move_string(source.host, target.host, size, count) };
        self.report(target);
        true
    }

    /// The same for `rep stos`.
    pub(crate) fn store_run(&mut self, to: u64, size: u8, count: u64, value: u64) -> bool {
        let user = self.is_user();
        let inside = count.saturating_mul(size.into()) <= PAGE - to % PAGE;
        match self.translate(to, Access::Write, user) {
            _ if self.accesses.is_some() => false,
            Ok(target) if inside && !target.host.is_null() => {
                // SAFETY: RAM up to the end of the page.
                unsafe { memory::store_string(target.host, size, count, value) };
                self.report(target);
                true
            }
            _ => false,
        }
    }

    /// The bytes of the instruction at a linear address, as far as its page goes.
    pub(crate) fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Exception> {
        let user = self.is_user();
        for (linear, byte) in (0..).map(|offset| linear.wrapping_add(offset)).zip(bytes) {
            let at = self.translate(linear, Access::Fetch, user)?;
            *byte = if at.host.is_null() {
                0xff
            } else {
                // SAFETY: translation gives the host address of RAM.
                unsafe { memory::read(at.host, 1) as u8 }
            };
        }
        Ok(())
    }

    /// The base that addresses in a segment have.
    pub(crate) fn base_of(&self, name: SegmentName) -> u64 {
        match name {
            SegmentName::Fs | SegmentName::Gs => self.state.segment(name).base,
            _ if self.state.mode() == Mode::Bits64 => 0,
            _ => self.state.segment(name).base,
        }
    }

    /// The linear address of `size` bytes at an offset in a segment, checked against what the
    /// segment allows (SDM volume 3, 5.3) or, in 64-bit mode, for canonical form.
    pub(crate) fn linear(
        &self,
        name: SegmentName,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<u64, Exception> {
        let segment = self.state.segment(name);
        let last = size.saturating_sub(1);
        let linear = if self.state.mode() == Mode::Bits64 {
            let linear = self.base_of(name).wrapping_add(offset);
            (is_canonical(linear) && is_canonical(linear.wrapping_add(last))).then_some(linear)
        } else {
            let protected = self.state.cr0 & 1 != 0 && self.state.flags & rflags::VM == 0;
            let allowed = !protected || allows(segment, access);
            let inside = allowed && contains(segment, offset, offset.saturating_add(last));
            inside.then_some(segment.base.wrapping_add(offset) & 0xffff_ffff)
        };
        linear.ok_or(Exception::with_code(
            if name == SegmentName::Ss {
                Vector::StackFault
            } else {
                Vector::GeneralProtection
            },
            0,
        ))
    }
}

/// Bits 47 to 63 are alike.
#[inline(always)]
pub(crate) const fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// Whether a segment of protected mode may be accessed so.
pub(crate) const fn allows(segment: &Segment, access: Access) -> bool {
    let unusable = segment.attributes & Segment::UNUSABLE != 0;
    if unusable || segment.attributes & Segment::PRESENT == 0 {
        return false;
    }
    let code = segment.attributes & 8 != 0;
    // Readable, of code; writable, of data.
    let more = segment.attributes & 2 != 0;
    match access {
        Access::Read => !code || more,
        Access::Write => !code && more,
        // Checked when CS was loaded. What real mode has left there is no code, and is executed.
        Access::Fetch => true,
    }
}

/// Whether the offsets `first` to `last` are inside the limit, which is below them where the segment
/// expands down.
pub(crate) const fn contains(segment: &Segment, first: u64, last: u64) -> bool {
    let limit = segment.limit as u64;
    if segment.attributes & 0xc != 4 {
        return last <= limit;
    }
    let big = segment.attributes & Segment::DEFAULT_BIG != 0;
    first > limit && last <= if big { 0xffff_ffff } else { 0xffff }
}
