//! From linear addresses to RAM: segment and paging checks, page walks, the TLB.

#![allow(unsafe_code)] // dereferences the host addresses that TLB entries hold

mod fast;

use crate::error::{Exception, Vector};
use crate::memory::{self, PAGE, PAGE_SHIFT};
use crate::processor::{Environment, Processor};
use crate::state::{Mode, Segment, SegmentName, rflags};

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// Error code bits of a page fault.
mod fault {
    pub(super) const PRESENT: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const USER: u32 = 4;
    pub(super) const RESERVED: u32 = 8;
    pub(super) const FETCH: u32 = 16;
}

/// Entries of the TLB; direct mapped by page number.
const ENTRIES: usize = 1024;

/// One cached translation, for one privilege (user or supervisor).
#[derive(Clone, Copy)]
struct Entry {
    /// Linear page number that may be read; `u64::MAX` for none.
    read: u64,
    /// The same for writing: only once its dirty bit is set and it holds no translated code.
    write: u64,
    fetch: u64,
    /// Physical page address.
    physical: u64,
    /// Host address of the page; null outside RAM.
    host: *mut u8,
    global: bool,
}

const EMPTY: Entry = Entry {
    read: u64::MAX,
    write: u64::MAX,
    fetch: u64::MAX,
    physical: 0,
    host: std::ptr::null_mut(),
    global: false,
};

/// Cached translations: one array for accesses with supervisor rights, one for user rights.
pub(crate) struct Tlb {
    entries: [Box<[Entry; ENTRIES]>; 2],
    /// Counts flushes: what was derived from translations is valid while it stays.
    pub(crate) generation: u64,
}

// SAFETY: the host addresses point into RAM, which any thread may access.
unsafe impl Send for Tlb {}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            entries: [Box::new([EMPTY; ENTRIES]), Box::new([EMPTY; ENTRIES])],
            generation: 0,
        }
    }
}

impl Tlb {
    /// Forgets everything, global pages too.
    pub(crate) fn flush(&mut self) {
        self.generation += 1;
        self.entries
            .iter_mut()
            .for_each(|entries| entries.fill(EMPTY));
    }

    /// Forgets all but global pages: MOV to CR3.
    pub(crate) fn flush_non_global(&mut self) {
        self.generation += 1;
        for entry in self
            .entries
            .iter_mut()
            .flat_map(|entries| entries.iter_mut())
        {
            if !entry.global {
                *entry = EMPTY;
            }
        }
    }

    /// Forgets the page of a linear address: INVLPG. (A large page may be in many entries.)
    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.generation += 1;
        let index = (linear >> PAGE_SHIFT) as usize % ENTRIES;
        for entries in &mut self.entries {
            entries[index] = EMPTY;
        }
    }
}

/// The result of a page walk.
struct Walk {
    physical: u64,
    writable: bool,
    executable: bool,
    global: bool,
}

/// Where one page of an access is.
#[derive(Clone, Copy)]
pub(crate) struct Location {
    /// Physical address of the access.
    pub(crate) physical: u64,
    /// Host address of it; null outside RAM.
    pub(crate) host: *mut u8,
}

impl Processor {
    /// Translates a linear address for an access that stays in its page. `user`: with CPL 3's rights.
    pub(crate) fn translate(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
    ) -> Result<Location, Exception> {
        let page = linear >> PAGE_SHIFT;
        let entry = &self.tlb.entries[usize::from(user)][page as usize % ENTRIES];
        let hit = match access {
            Access::Read => entry.read,
            Access::Write => entry.write,
            Access::Fetch => entry.fetch,
        } == page;
        if !hit {
            return self.translate_slow(linear, access, user);
        }
        let offset = linear & (PAGE - 1);
        Ok(Location {
            physical: entry.physical + offset,
            host: if entry.host.is_null() {
                entry.host
            } else {
                // SAFETY: inside the page of RAM.
                unsafe { entry.host.add(offset as usize) }
            },
        })
    }

    #[cold]
    fn translate_slow(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
    ) -> Result<Location, Exception> {
        let walk = self.walk(linear, access, user)?;
        let page = linear >> PAGE_SHIFT;
        let physical = walk.physical & !(PAGE - 1);
        let host = self.ram.host_page(physical).unwrap_or(std::ptr::null_mut());
        if access == Access::Write && !host.is_null() {
            self.ram.written(physical);
        }
        let entry = &mut self.tlb.entries[usize::from(user)][page as usize % ENTRIES];
        if entry.read != page && entry.write != page && entry.fetch != page {
            *entry = EMPTY;
        }
        entry.physical = physical;
        entry.host = host;
        entry.global = walk.global;
        entry.read = page;
        // Pages with translated code and device memory are looked at on every write.
        entry.write = if access == Access::Write && walk.writable && !self.ram.is_code(physical) {
            page
        } else {
            u64::MAX
        };
        entry.fetch = if access == Access::Fetch && walk.executable {
            page
        } else {
            entry.fetch
        };
        let offset = linear & (PAGE - 1);
        Ok(Location {
            physical: physical + offset,
            host: if host.is_null() {
                host
            } else {
                host.wrapping_add(offset as usize)
            },
        })
    }

    /// Walks the page tables, checks the access and sets accessed and dirty bits.
    fn walk(&mut self, linear: u64, access: Access, user: bool) -> Result<Walk, Exception> {
        let state = &self.state;
        if state.cr0 >> 31 == 0 {
            return Ok(Walk {
                physical: linear & 0xffff_ffff,
                writable: true,
                executable: true,
                global: false,
            });
        }
        let (pae, long) = (state.cr4 >> 5 & 1 != 0, state.long_mode());
        let nx = state.efer >> 11 & 1 != 0;
        let code = |present: bool, reserved: bool| {
            let mut code = 0;
            code |= if present { fault::PRESENT } else { 0 };
            code |= if access == Access::Write {
                fault::WRITE
            } else {
                0
            };
            code |= if user { fault::USER } else { 0 };
            code |= if reserved { fault::RESERVED } else { 0 };
            let smep = state.cr4 >> 20 & 1 != 0;
            code | if access == Access::Fetch && ((nx && pae) || smep) {
                fault::FETCH
            } else {
                0
            }
        };
        let fail = |present, reserved| Err(Exception::page_fault(linear, code(present, reserved)));
        // (shift of the index, bits of it, entry size)
        let (levels, entry_size): (&[(u32, u32)], u64) = match (pae, long) {
            (_, true) => (&[(39, 9), (30, 9), (21, 9), (12, 9)], 8),
            (true, false) => (&[(30, 2), (21, 9), (12, 9)], 8),
            (false, false) => (&[(22, 10), (12, 10)], 4),
        };
        let mut table = if long {
            state.cr3 & 0x000f_ffff_ffff_f000
        } else if pae {
            state.cr3 & 0xffff_ffe0
        } else {
            state.cr3 & 0xffff_f000
        };
        let (mut writable, mut for_user, mut executable) = (true, true, true);
        let mut visited = [0; 4];
        for (level, &(shift, bits)) in levels.iter().enumerate() {
            let index = linear >> shift & ((1 << bits) - 1);
            let address = table + index * entry_size;
            let Some(word) = self.ram.read_u64(address) else {
                return fail(false, false);
            };
            let entry = if entry_size == 8 {
                word
            } else {
                word >> (8 * (address & 4)) & 0xffff_ffff
            };
            if entry & 1 == 0 {
                return fail(false, false);
            }
            visited[level] = address;
            let pdpte = pae && !long && level == 0;
            if entry_size == 8 && entry >> 63 != 0 {
                if !nx {
                    return fail(true, true);
                }
                executable &= pdpte;
            }
            if !pdpte {
                writable &= entry & 2 != 0;
                for_user &= entry & 4 != 0;
            }
            let large = entry & 0x80 != 0 && shift > 12 && !pdpte;
            if large && shift == 39 {
                return fail(true, true);
            }
            let large = large && (pae || long || state.cr4 >> 4 & 1 != 0);
            if shift > 12 && !large {
                table = entry
                    & if entry_size == 8 {
                        0x000f_ffff_ffff_f000
                    } else {
                        0xffff_f000
                    };
                continue;
            }
            let offset_mask = (1u64 << shift) - 1;
            if large && entry_size == 8 && entry & offset_mask & !0x1fff != 0 {
                return fail(true, true);
            }
            let wp = state.cr0 >> 16 & 1 != 0;
            let writable = writable || (!user && !wp);
            let ac = state.flags & rflags::AC != 0;
            let smap = state.cr4 >> 21 & 1 != 0 && !ac;
            let smep = state.cr4 >> 20 & 1 != 0;
            let allowed = match access {
                Access::Fetch => executable && if user { for_user } else { !(for_user && smep) },
                _ if user => for_user && (access == Access::Read || writable),
                _ => !(for_user && smap) && (access == Access::Read || writable),
            };
            if !allowed {
                return fail(true, false);
            }
            let last = level;
            for (level, &address) in visited[..=last].iter().enumerate() {
                if pae && !long && level == 0 {
                    continue;
                }
                let dirty = level == last && access == Access::Write;
                let wanted = 0x20 | if dirty { 0x40 } else { 0 };
                let now = self.ram.read_u64(address).unwrap_or(0) >> (8 * (address & 4));
                if now & wanted != wanted {
                    self.ram.set_bits_u32(address, wanted as u32);
                }
            }
            let frame = if entry_size == 4 && large {
                entry & 0xffc0_0000 | (entry & 0x1f_e000) << 19
            } else {
                entry & 0x000f_ffff_ffff_f000 & !offset_mask
            };
            return Ok(Walk {
                physical: frame | linear & offset_mask,
                writable,
                executable: executable && if user { for_user } else { !(for_user && smep) },
                global: entry & 0x100 != 0 && state.cr4 >> 7 & 1 != 0,
            });
        }
        fail(false, false)
    }

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

    /// The same with supervisor rights: descriptor tables, task state.
    pub(crate) fn load_system(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
    ) -> Result<u64, Exception> {
        self.load_as(env, linear, size, false)
    }

    fn load_as(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        user: bool,
    ) -> Result<u64, Exception> {
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

    /// The same with supervisor rights.
    pub(crate) fn store_system(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        value: u64,
    ) -> Result<(), Exception> {
        self.store_as(env, linear, size, value, false)
    }

    fn store_as(
        &mut self,
        env: &dyn Environment,
        linear: u64,
        size: u8,
        value: u64,
        user: bool,
    ) -> Result<(), Exception> {
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
        self.translate(linear, Access::Write, user)?;
        self.translate(linear.wrapping_add(last), Access::Write, user)?;
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
        Ok(old)
    }

    /// The bytes of the instruction at a linear address, as far as its page goes, and its physical
    /// address. At the page's end the next page is fetched, too, if `next` says so.
    pub(crate) fn fetch(&mut self, linear: u64, bytes: &mut [u8]) -> Result<u64, Exception> {
        let user = self.is_user();
        let first = self.translate(linear, Access::Fetch, user)?.physical;
        for (linear, byte) in (0..).map(|offset| linear.wrapping_add(offset)).zip(bytes) {
            let at = self.translate(linear, Access::Fetch, user)?;
            *byte = if at.host.is_null() {
                0xff
            } else {
                // SAFETY: translation gives the host address of RAM.
                unsafe { memory::read(at.host, 1) as u8 }
            };
        }
        Ok(first)
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
        let fail = || {
            let vector = if name == SegmentName::Ss {
                Vector::StackFault
            } else {
                Vector::GeneralProtection
            };
            Err(Exception::with_code(vector, 0))
        };
        if self.state.mode() == Mode::Bits64 {
            let base = if matches!(name, SegmentName::Fs | SegmentName::Gs) {
                segment.base
            } else {
                0
            };
            let linear = base.wrapping_add(offset);
            let last = linear.wrapping_add(size.saturating_sub(1));
            let canonical = |address: u64| (address as i64) << 16 >> 16 == address as i64;
            return if canonical(linear) && canonical(last) {
                Ok(linear)
            } else {
                fail()
            };
        }
        let protected = self.state.cr0 & 1 != 0 && self.state.flags & rflags::VM == 0;
        let kind = segment.attributes & 15;
        if protected {
            if segment.attributes & Segment::UNUSABLE != 0
                || segment.attributes & Segment::PRESENT == 0
            {
                return fail();
            }
            let code = kind & 8 != 0;
            let allowed = match access {
                Access::Read => !code || kind & 2 != 0,
                Access::Write => !code && kind & 2 != 0,
                Access::Fetch => code,
            };
            if !allowed {
                return fail();
            }
        }
        let last = offset.saturating_add(size.saturating_sub(1));
        let limit = u64::from(segment.limit);
        let expand_down = kind & 0xc == 4;
        let inside = if expand_down {
            let top = if segment.attributes & Segment::DEFAULT_BIG != 0 {
                0xffff_ffff
            } else {
                0xffff
            };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if inside {
            Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            fail()
        }
    }
}
