//! What the interpreter does for a load or a store that the TLB knows: aligned, in RAM. Everything
//! else is the slow path's.

use super::{ENTRIES, PAGE, PAGE_SHIFT, Tlb};
use crate::memory::{self, Ram};
use crate::processor::Processor;

impl Tlb {
    /// Host address of an aligned operand that may be read or, with `WRITE`, written unseen.
    #[inline(always)]
    fn probe<const SIZE: u8, const WRITE: bool>(&self, linear: u64, user: bool) -> Option<*mut u8> {
        let page = linear >> PAGE_SHIFT;
        let entry = &self.entries[usize::from(user)][page as usize % ENTRIES];
        let tag = if WRITE { entry.write } else { entry.read };
        if tag != page || linear & u64::from(SIZE - 1) != 0 || entry.host.is_null() {
            return None;
        }
        // SAFETY: the entry's host address is that of a whole page of RAM.
        Some(unsafe { entry.host.add((linear & (PAGE - 1)) as usize) })
    }

    /// Gives up writing pages unseen that hold translated code by now.
    pub(crate) fn see_code_writes(&mut self, ram: &Ram) {
        for entry in self.entries.iter_mut().flat_map(|half| half.iter_mut()) {
            if entry.write != u64::MAX && ram.is_code(entry.physical) {
                entry.write = u64::MAX;
            }
        }
    }
}

impl Processor {
    /// Loads `SIZE` bytes if the TLB knows where.
    #[inline(always)]
    pub(crate) fn fast_load<const SIZE: u8>(&self, linear: u64, user: bool) -> Option<u64> {
        let host = self.tlb.probe::<SIZE, false>(linear, user)?;
        // SAFETY: an aligned operand in a page of RAM.
        Some(unsafe { memory::read(host, SIZE) })
    }

    /// The same of an operand that may be written.
    #[inline(always)]
    pub(crate) fn fast_load_for_write<const SIZE: u8>(
        &self,
        linear: u64,
        user: bool,
    ) -> Option<u64> {
        let host = self.tlb.probe::<SIZE, true>(linear, user)?;
        // SAFETY: an aligned operand in a page of RAM.
        Some(unsafe { memory::read(host, SIZE) })
    }

    /// Stores `SIZE` bytes if the TLB knows where and nobody has to see it; says whether it did.
    #[inline(always)]
    pub(crate) fn fast_store<const SIZE: u8>(&self, linear: u64, user: bool, value: u64) -> bool {
        let Some(host) = self.tlb.probe::<SIZE, true>(linear, user) else {
            return false;
        };
        // SAFETY: an aligned operand in a page of RAM.
        unsafe { memory::write(host, SIZE, value) };
        true
    }
}
