//! What the interpreter does for a load or a store that the TLB knows: in one page of RAM. Everything
//! else is the slow path's.

use super::{ENTRIES, PAGE, PAGE_SHIFT, Rights, Tlb};
use crate::memory::{self, Ram};
use crate::processor::Processor;

impl Tlb {
    /// Host address of an operand in one page that may be read or, with `WRITE`, written unseen.
    #[inline(always)]
    fn probe<const SIZE: u8, const WRITE: bool>(
        &self,
        linear: u64,
        rights: Rights,
    ) -> Option<*mut u8> {
        let page = linear >> PAGE_SHIFT;
        let entry = &self.entries[rights as usize][page as usize % ENTRIES];
        let tag = if WRITE { entry.write } else { entry.read };
        let offset = linear & (PAGE - 1);
        if tag != page || offset > PAGE - SIZE as u64 || entry.host.is_null() {
            return None;
        }
        // SAFETY: the entry's host address is that of a whole page of RAM.
        Some(unsafe { entry.host.add(offset as usize) })
    }

    /// Gives up writing pages unseen of which somebody wants to hear by now. They may just have been
    /// written, so that is said, too.
    #[cold]
    pub(crate) fn see_watched(&mut self, ram: &Ram) {
        for &(rights, index) in &self.used {
            let entry = &mut self.entries[usize::from(rights)][usize::from(index)];
            if entry.write < u64::MAX - 1 && ram.is_watched(entry.physical) {
                entry.write = u64::MAX;
                ram.written(entry.physical);
            }
        }
    }
}

impl Processor {
    /// Loads `SIZE` bytes if the TLB knows where.
    #[inline(always)]
    pub(crate) fn fast_load<const SIZE: u8>(&self, linear: u64, rights: Rights) -> Option<u64> {
        let host = self.tlb.probe::<SIZE, false>(linear, rights)?;
        // SAFETY: an operand in a page of RAM.
        Some(unsafe { memory::read(host, SIZE) })
    }

    /// The same of an operand that may be written.
    #[inline(always)]
    pub(crate) fn fast_load_for_write<const SIZE: u8>(
        &self,
        linear: u64,
        rights: Rights,
    ) -> Option<u64> {
        let host = self.tlb.probe::<SIZE, true>(linear, rights)?;
        // SAFETY: an operand in a page of RAM.
        Some(unsafe { memory::read(host, SIZE) })
    }

    /// Stores `SIZE` bytes if the TLB knows where and nobody has to see it; says whether it did.
    #[inline(always)]
    pub(crate) fn fast_store<const SIZE: u8>(
        &self,
        linear: u64,
        rights: Rights,
        value: u64,
    ) -> bool {
        let Some(host) = self.tlb.probe::<SIZE, true>(linear, rights) else {
            return false;
        };
        // SAFETY: an operand in a page of RAM.
        unsafe { memory::write(host, SIZE, value) };
        true
    }

    /// Loads 16 bytes if the TLB knows where.
    #[inline(always)]
    pub(crate) fn fast_load_16(&self, linear: u64, rights: Rights) -> Option<[u8; 16]> {
        let host = self.tlb.probe::<16, false>(linear, rights)?;
        // SAFETY: an operand in a page of RAM.
        Some(unsafe { memory::read_16(host) })
    }

    /// Stores them if nobody has to see it; says whether it did.
    #[inline(always)]
    pub(crate) fn fast_store_16(&self, linear: u64, rights: Rights, value: &[u8; 16]) -> bool {
        let Some(host) = self.tlb.probe::<16, true>(linear, rights) else {
            return false;
        };
        // SAFETY: an operand in a page of RAM.
        unsafe { memory::write_16(host, value) };
        true
    }

    /// Whether RAM at a physical address still holds these bytes of one page.
    pub(crate) fn holds(&self, physical: u64, bytes: &[u8]) -> bool {
        let Some(page) = self.ram.host_page(physical) else {
            return false;
        };
        let start = (physical % PAGE) as usize;
        if start + bytes.len() > PAGE as usize {
            return false;
        }
        let here = page.wrapping_add(start);
        let (words, rest) = bytes.as_chunks::<8>();
        let rest_at = bytes.len() - rest.len();
        words.iter().enumerate().all(|(index, word)| {
            // SAFETY: bytes of one page of RAM.
            let now = unsafe { memory::read(here.wrapping_add(8 * index), 8) };
            now == u64::from_le_bytes(*word)
        }) && rest.iter().enumerate().all(|(index, &byte)| {
            // SAFETY: as above.
            let now = unsafe { memory::read(here.wrapping_add(rest_at + index), 1) };
            now == byte.into()
        })
    }
}
