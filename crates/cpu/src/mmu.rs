//! From linear addresses to RAM: segment and paging checks, page walks, the TLB.

#![allow(unsafe_code)] // accesses RAM by the host addresses that TLB entries hold

pub(crate) mod access;
mod walk;

use crate::error::Exception;
use crate::memory::{PAGE, PAGE_SHIFT};
use crate::processor::Processor;

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// Entries of the TLB; direct mapped by page number.
const ENTRIES: usize = 1024;

/// One cached translation, for one privilege (user or supervisor).
#[derive(Clone, Copy)]
struct Entry {
    /// Linear page number that may be read; `u64::MAX` for none.
    read: u64,
    /// The same for writing: only once its dirty bit is set.
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
}

// SAFETY: the host addresses point into RAM, which any thread may access.
unsafe impl Send for Tlb {}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            entries: [Box::new([EMPTY; ENTRIES]), Box::new([EMPTY; ENTRIES])],
        }
    }
}

impl Tlb {
    /// Forgets everything, global pages too.
    pub(crate) fn flush(&mut self) {
        self.entries
            .iter_mut()
            .for_each(|entries| entries.fill(EMPTY));
    }
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
                entry.host.wrapping_add(offset as usize)
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
        let entry = &mut self.tlb.entries[usize::from(user)][page as usize % ENTRIES];
        if entry.read != page && entry.write != page && entry.fetch != page {
            *entry = EMPTY;
        }
        entry.physical = physical;
        entry.host = host;
        entry.global = walk.global;
        // A page that may be fetched from may be closed to reading (SMAP).
        if access != Access::Fetch {
            entry.read = page;
        }
        // Only a walk that sets the dirty bit allows writing.
        entry.write = if access == Access::Write && walk.writable {
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
}
