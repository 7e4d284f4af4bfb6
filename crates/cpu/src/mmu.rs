//! From linear addresses to RAM: segment and paging checks, page walks, the TLB.

#![allow(unsafe_code)] // accesses RAM by the host addresses that TLB entries hold

pub(crate) mod access;
mod fast;
mod walk;

use crate::error::Exception;
use crate::memory::{PAGE, PAGE_SHIFT};
use crate::processor::Processor;
use crate::state::rflags;

/// The offset in a page.
pub(crate) const PAGE_MASK: u64 = PAGE - 1;

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// Entries of the TLB for each kind of access; direct mapped by page number.
const ENTRIES: usize = 1024;

/// Whose rights an access has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Rights {
    /// A supervisor's, to whom SMAP closes user pages if it is on.
    Supervisor = 0,
    /// Those of CPL 3.
    User = 1,
    /// A supervisor's with EFLAGS.AC, to whom user pages are open.
    Privileged = 2,
}

/// One cached translation, for one kind of rights.
#[derive(Clone, Copy)]
struct Entry {
    /// Linear page number that may be read; `u64::MAX` for none.
    read: u64,
    /// The same for writing: only once its dirty bit is set and nobody has to hear of the write.
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

/// An entry that INVLPG has emptied; it is in [`Tlb::used`] still.
const DROPPED: Entry = Entry {
    read: u64::MAX - 1,
    write: u64::MAX - 1,
    fetch: u64::MAX - 1,
    ..EMPTY
};

/// A span of linear addresses, both ends included; at first there is none in it.
#[derive(Clone, Copy)]
struct Span {
    first: u64,
    last: u64,
}

impl Default for Span {
    fn default() -> Self {
        Self {
            first: u64::MAX,
            last: 0,
        }
    }
}

impl Span {
    const fn contains(&self, linear: u64) -> bool {
        self.first <= linear && linear <= self.last
    }

    /// Takes in the page of `1 << shift` bytes that an address is in.
    fn extend(&mut self, linear: u64, shift: u32) {
        let inside = (1 << shift) - 1;
        self.first = self.first.min(linear & !inside);
        self.last = self.last.max(linear | inside);
    }
}

/// Which half of the address space an address is in.
const fn half(linear: u64) -> usize {
    (linear >> 63) as usize
}

/// Cached translations: an array for each kind of rights.
pub(crate) struct Tlb {
    entries: [Box<[Entry; ENTRIES]>; 3],
    /// The entries that are not empty, so that a flush does not visit the others.
    used: Vec<(u8, u16)>,
    /// Where the large pages are of which they are parts, in each half of the address space: a kernel
    /// has its in the upper half, and programs' small pages are in the lower.
    large: [Span; 2],
    /// Count flushes: what was derived from translations is valid while it stays; the second is for
    /// what was derived from global pages.
    pub(crate) generation: u64,
    pub(crate) global_generation: u64,
}

// SAFETY: the host addresses point into RAM, which any thread may access.
unsafe impl Send for Tlb {}

impl Default for Tlb {
    fn default() -> Self {
        let empty = || Box::new([EMPTY; ENTRIES]);
        Self {
            entries: [empty(), empty(), empty()],
            used: Vec::new(),
            large: [Span::default(); 2],
            generation: 0,
            global_generation: 0,
        }
    }
}

impl Tlb {
    /// Forgets everything, global pages too.
    pub(crate) fn flush(&mut self) {
        self.generation += 1;
        self.global_generation += 1;
        for (rights, index) in self.used.drain(..) {
            self.entries[usize::from(rights)][usize::from(index)] = EMPTY;
        }
        self.large = [Span::default(); 2];
    }

    /// Forgets all but global pages: MOV to CR3.
    pub(crate) fn flush_non_global(&mut self) {
        self.generation += 1;
        let entries = &mut self.entries;
        self.used.retain(|&(rights, index)| {
            let entry = &mut entries[usize::from(rights)][usize::from(index)];
            if !entry.global {
                *entry = EMPTY;
            }
            entry.global
        });
    }

    /// Forgets the page of a linear address: INVLPG. A large page may be in many entries, so all go if
    /// it may be one.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        if self.large[half(linear)].contains(linear) {
            return self.flush();
        }
        self.generation += 1;
        self.global_generation += 1;
        let page = linear >> PAGE_SHIFT;
        for entries in &mut self.entries {
            let entry = &mut entries[page as usize % ENTRIES];
            if [entry.read, entry.write, entry.fetch].contains(&page) {
                *entry = DROPPED;
            }
        }
    }

    /// The entry for a page in a frame, made free for it. What is known of the page in another frame
    /// goes: a guest may change an entry of its tables without telling, and has the old translation or
    /// the new one then, but not the rights of one to the frame of the other.
    fn claim(&mut self, rights: Rights, page: u64, physical: u64) -> &mut Entry {
        let index = page as usize % ENTRIES;
        let entry = &mut self.entries[rights as usize][index];
        let known = [entry.read, entry.write, entry.fetch];
        if known == [u64::MAX; 3] {
            self.used.push((rights as u8, index as u16));
        } else if !known.contains(&page) || entry.physical != physical {
            *entry = EMPTY;
        }
        entry.physical = physical;
        entry
    }
}

/// Where one page of an access is.
#[derive(Clone, Copy)]
pub(crate) struct Location {
    /// Physical address of the access.
    pub(crate) physical: u64,
    /// Host address of it; null outside RAM.
    pub(crate) host: *mut u8,
    /// [`crate::memory::Ram::written`] has to hear of a write.
    pub(crate) watched: bool,
    /// The page is global.
    pub(crate) global: bool,
}

impl Processor {
    /// The rights of the program's own accesses.
    #[inline]
    pub(crate) fn rights(&self) -> Rights {
        const SMAP: u64 = 1 << 21;
        if self.state.cpl() == 3 {
            Rights::User
        } else if self.state.flags & rflags::AC != 0 && self.state.cr4 & SMAP != 0 {
            Rights::Privileged
        } else {
            Rights::Supervisor
        }
    }

    /// The rights of an access with or without those of CPL 3; what the processor itself accesses is
    /// subject to SMAP whatever AC says (SDM volume 3, 4.6.1).
    #[inline]
    fn rights_as(&self, user: bool) -> Rights {
        if user {
            Rights::User
        } else if self.state.cpl() == 3 {
            Rights::Supervisor
        } else {
            self.rights()
        }
    }

    /// Translates a linear address for an access that stays in its page. `user`: with CPL 3's rights.
    pub(crate) fn translate(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
    ) -> Result<Location, Exception> {
        let rights = self.rights_as(user);
        let page = linear >> PAGE_SHIFT;
        let entry = &self.tlb.entries[rights as usize][page as usize % ENTRIES];
        let hit = match access {
            Access::Read => entry.read,
            Access::Write => entry.write,
            Access::Fetch => entry.fetch,
        } == page;
        if !hit {
            return self.translate_slow(linear, access, rights);
        }
        let offset = linear & (PAGE - 1);
        Ok(Location {
            physical: entry.physical + offset,
            host: in_page(entry.host, offset),
            watched: false,
            global: entry.global,
        })
    }

    #[cold]
    fn translate_slow(
        &mut self,
        linear: u64,
        access: Access,
        rights: Rights,
    ) -> Result<Location, Exception> {
        let walk = self.walk(linear, access, rights)?;
        let page = linear >> PAGE_SHIFT;
        let physical = walk.physical & !(PAGE - 1);
        let host = self.ram.host_page(physical).unwrap_or(std::ptr::null_mut());
        let watched = access == Access::Write && self.ram.is_watched(physical);
        if walk.shift > PAGE_SHIFT {
            self.tlb.large[half(linear)].extend(linear, walk.shift);
        }
        let entry = self.tlb.claim(rights, page, physical);
        entry.host = host;
        entry.global = walk.global;
        // A page that may be fetched from may be closed to reading (SMAP).
        if access != Access::Fetch {
            entry.read = page;
        }
        // Only a walk that sets the dirty bit allows writing.
        let unseen = access == Access::Write && walk.writable && !watched;
        entry.write = if unseen { page } else { u64::MAX };
        if access == Access::Fetch && walk.executable {
            entry.fetch = page;
        }
        let offset = linear & (PAGE - 1);
        Ok(Location {
            physical: physical + offset,
            host: in_page(host, offset),
            watched,
            global: walk.global,
        })
    }
}

/// The host address at an offset in a page, if the page has one.
fn in_page(host: *mut u8, offset: u64) -> *mut u8 {
    if host.is_null() {
        host
    } else {
        host.wrapping_add(offset as usize)
    }
}
