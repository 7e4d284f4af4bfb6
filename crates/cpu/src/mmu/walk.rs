//! Page walks: 32-bit, PAE and 4-level paging (SDM volume 3, 4.3 to 4.6).

use super::{Access, Rights};
use crate::error::Exception;
use crate::memory::PAGE_SHIFT;
use crate::processor::Processor;

/// Error code bits of a page fault (SDM volume 3, figure 4-12).
mod fault {
    pub(super) const PRESENT: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const USER: u32 = 4;
    pub(super) const RESERVED: u32 = 8;
    pub(super) const FETCH: u32 = 16;
}

/// Bits of a paging-structure entry.
mod entry {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const LARGE: u64 = 1 << 7;
    pub(super) const GLOBAL: u64 = 1 << 8;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    /// Where a table or page is, in 8-byte entries.
    pub(super) const FRAME: u64 = 0x000f_ffff_ffff_f000;
}

/// The result of a page walk.
pub(super) struct Walk {
    pub(super) physical: u64,
    pub(super) writable: bool,
    pub(super) executable: bool,
    pub(super) global: bool,
    /// Log2 of the page's size: more than 12 for a large one.
    pub(super) shift: u32,
}

/// What the control registers say about paging.
struct Paging {
    long: bool,
    pae: bool,
    large: bool,
    global: bool,
    nx: bool,
    wp: bool,
    smep: bool,
    /// Supervisor accesses to user pages fault.
    smap: bool,
    /// Bits of an entry that would address more memory than the processor can.
    beyond: u64,
    gib_pages: bool,
}

/// What all entries of a walk together allow.
struct Allowed {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Paging {
    /// Nothing if paging is off.
    fn of(cpu: &Processor, rights: Rights) -> Option<Self> {
        let state = &cpu.state;
        let cr4 = |bit: u32| state.cr4 >> bit & 1 != 0;
        let long = state.long_mode();
        let pae = long || cr4(5);
        (state.cr0 >> 31 & 1 != 0).then(|| Self {
            long,
            pae,
            large: pae || cr4(4),
            global: cr4(7),
            nx: pae && state.efer >> 11 & 1 != 0,
            wp: state.cr0 >> 16 & 1 != 0,
            smep: cr4(20),
            smap: cr4(21) && rights == Rights::Supervisor,
            gib_pages: cpu.gib_pages,
            beyond: if pae {
                entry::FRAME & !((1 << cpu.address_bits) - 1)
            } else {
                0
            },
        })
    }

    /// For each level the shift and the number of the address bits that index its table.
    const fn levels(&self) -> &'static [(u32, u32)] {
        match (self.long, self.pae) {
            (true, _) => &[(39, 9), (30, 9), (21, 9), (12, 9)],
            (false, true) => &[(30, 2), (21, 9), (12, 9)],
            (false, false) => &[(22, 10), (12, 10)],
        }
    }

    const fn root(&self, cr3: u64) -> u64 {
        match (self.long, self.pae) {
            (true, _) => cr3 & entry::FRAME,
            (false, true) => cr3 & 0xffff_ffe0,
            (false, false) => cr3 & 0xffff_f000,
        }
    }

    const fn entry_size(&self) -> u64 {
        if self.pae { 8 } else { 4 }
    }

    /// A page-directory-pointer entry of PAE paging, which has no rights and no accessed bit.
    const fn is_pointer(&self, level: usize) -> bool {
        self.pae && !self.long && level == 0
    }

    fn allows(&self, allowed: &Allowed, access: Access, user: bool) -> bool {
        match access {
            Access::Fetch => self.executable(allowed, user),
            _ if user => allowed.user && (access == Access::Read || allowed.writable),
            _ => {
                !(allowed.user && self.smap)
                    && (access == Access::Read || self.writable(allowed, user))
            }
        }
    }

    const fn writable(&self, allowed: &Allowed, user: bool) -> bool {
        allowed.writable || (!user && !self.wp)
    }

    const fn executable(&self, allowed: &Allowed, user: bool) -> bool {
        allowed.executable
            && if user {
                allowed.user
            } else {
                !(allowed.user && self.smep)
            }
    }

    fn fault(&self, linear: u64, access: Access, user: bool, cause: u32) -> Exception {
        let mut code = cause;
        code |= if access == Access::Write {
            fault::WRITE
        } else {
            0
        };
        code |= if user { fault::USER } else { 0 };
        let says_fetch = access == Access::Fetch && (self.nx || self.smep);
        code |= if says_fetch { fault::FETCH } else { 0 };
        Exception::page_fault(linear, code)
    }

    /// Whether the entry ends the walk with a page, for an entry that is present at `shift`; nothing if
    /// a reserved bit is set.
    fn is_page(&self, value: u64, shift: u32, level: usize) -> Option<bool> {
        if value & entry::NO_EXECUTE != 0 && self.pae && !self.nx || value & self.beyond != 0 {
            return None;
        }
        if shift == 12 {
            return Some(true);
        }
        let large = value & entry::LARGE != 0 && self.large && !self.is_pointer(level);
        let reserved = large && (shift == 39 || shift == 30 && !self.gib_pages)
            || large && self.pae && value & ((1 << shift) - 1) & !0x1fff != 0;
        (!reserved).then_some(large)
    }

    /// The physical address of the page that an entry at `shift` maps.
    const fn frame(&self, value: u64, shift: u32) -> u64 {
        if !self.pae && shift == 22 {
            // PSE-36: bits 13 to 20 are the address's 32 to 39.
            value & 0xffc0_0000 | (value & 0x1f_e000) << 19
        } else {
            value & entry::FRAME & !((1 << shift) - 1)
        }
    }
}

impl Processor {
    /// Walks the page tables, checks the access and sets accessed and dirty bits.
    pub(super) fn walk(
        &self,
        linear: u64,
        access: Access,
        rights: Rights,
    ) -> Result<Walk, Exception> {
        let user = rights == Rights::User;
        let Some(paging) = Paging::of(self, rights) else {
            return Ok(Walk {
                physical: linear & 0xffff_ffff,
                writable: true,
                executable: true,
                global: false,
                shift: PAGE_SHIFT,
            });
        };
        let fail = |cause| Err(paging.fault(linear, access, user, cause));
        let mut allowed = Allowed {
            writable: true,
            user: true,
            executable: true,
        };
        let mut table = paging.root(self.state.cr3);
        let mut visited = [0; 4];
        for (level, &(shift, bits)) in paging.levels().iter().enumerate() {
            let address = table + (linear >> shift & ((1 << bits) - 1)) * paging.entry_size();
            let value = self.read_entry(address, &paging).unwrap_or(0);
            if value & entry::PRESENT == 0 {
                return fail(0);
            }
            visited[level] = address;
            let Some(page) = paging.is_page(value, shift, level) else {
                return fail(fault::PRESENT | fault::RESERVED);
            };
            if !paging.is_pointer(level) {
                allowed.writable &= value & entry::WRITABLE != 0;
                allowed.user &= value & entry::USER != 0;
                allowed.executable &= value & entry::NO_EXECUTE == 0;
            }
            if !page {
                table = value & entry::FRAME;
                continue;
            }
            if !paging.allows(&allowed, access, user) {
                return fail(fault::PRESENT);
            }
            let first = usize::from(paging.is_pointer(0));
            self.mark(&visited[first..=level], access == Access::Write, &paging);
            return Ok(Walk {
                physical: paging.frame(value, shift) | linear & ((1 << shift) - 1),
                writable: paging.writable(&allowed, user),
                executable: paging.executable(&allowed, user),
                global: value & entry::GLOBAL != 0 && paging.global,
                shift,
            });
        }
        fail(0)
    }

    /// The physical address of a page, without checks of rights and without marks.
    pub(crate) fn look_up(&self, linear: u64) -> Option<u64> {
        let Some(paging) = Paging::of(self, Rights::Supervisor) else {
            return Some(linear & 0xffff_ffff);
        };
        let mut table = paging.root(self.state.cr3);
        for (level, &(shift, bits)) in paging.levels().iter().enumerate() {
            let address = table + (linear >> shift & ((1 << bits) - 1)) * paging.entry_size();
            let value = self.read_entry(address, &paging)?;
            if value & entry::PRESENT == 0 {
                return None;
            }
            if paging.is_page(value, shift, level)? {
                return Some(paging.frame(value, shift) | linear & ((1 << shift) - 1));
            }
            table = value & entry::FRAME;
        }
        None
    }

    fn read_entry(&self, address: u64, paging: &Paging) -> Option<u64> {
        let word = self.ram.read_u64(address)?;
        Some(if paging.pae {
            word
        } else {
            word >> (8 * (address & 4)) & 0xffff_ffff
        })
    }

    /// Sets the accessed bits of the entries that a walk has used, and the last one's dirty bit.
    fn mark(&self, visited: &[u64], write: bool, paging: &Paging) {
        for (index, &address) in visited.iter().enumerate() {
            let dirty = write && index + 1 == visited.len();
            let wanted = entry::ACCESSED | if dirty { entry::DIRTY } else { 0 };
            let now = self.read_entry(address, paging).unwrap_or(wanted);
            if now & wanted != wanted {
                self.ram.set_bits_u32(address, wanted as u32);
            }
        }
    }
}
