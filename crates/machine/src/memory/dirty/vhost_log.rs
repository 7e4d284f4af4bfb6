//! The log that vhost-user backends keep.
//!
//! The backends and we share a memfd. Bit `n % 8` of byte `n / 8` is the page at guest physical
//! address `n * 4096`, counted from address zero, holes included (vhost-user specification,
//! "Migration" and `VHOST_USER_SET_LOG_BASE`). A backend sets bits atomically; we take them with an
//! atomic exchange, so neither side loses one. The file is sparse: where no RAM is, no memory is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use mica_base::units::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory,
};

use super::{DirtyPages, DirtySource};
use crate::memory::GuestMemory;

/// A bitmap of dirty pages, shared with vhost-user backends.
///
/// As a [`DirtySource`] it only reads the bitmap: whoever owns the backends tells them to start and
/// to stop logging (`VHOST_F_LOG_ALL`).
pub struct VhostLog {
    file: File,
    mapping: MmapRegion,
    /// Guest physical ranges of RAM.
    ram: Vec<Range<u64>>,
}

impl VhostLog {
    /// An empty log for all of `memory`.
    ///
    /// # Errors
    ///
    /// The kernel gives no memory.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let ram: Vec<_> = memory
            .iter()
            .map(|region| region.start_addr().0..region.start_addr().0 + region.len())
            .collect();
        let end = ram.last().map_or(0, |range| range.end);
        // Whole words, so that the last bits can be taken like all others.
        let size = (end / PAGE_SIZE).div_ceil(64) * 8;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file: File = rustix::fs::memfd_create("mica-dirty-log", flags)?.into();
        file.set_len(size)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        let mapping = MmapRegionBuilder::new(size as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone()?, 0))
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { file, mapping, ram })
    }

    /// The size of the log in bytes: the `mmap size` of `VHOST_USER_SET_LOG_BASE`, whose
    /// `mmap offset` is zero.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.mapping.size() as u64
    }

    /// Takes the bits of a RAM range, 64 pages at a time from its start.
    fn take(&self, range: &Range<u64>) -> io::Result<Vec<u64>> {
        let words = (range.end - range.start).div_ceil(64 * PAGE_SIZE);
        let first = range.start / PAGE_SIZE / 64;
        (first..first + words)
            .map(|word| {
                let bits: &AtomicU64 = self
                    .mapping
                    .get_atomic_ref(word as usize * 8)
                    .map_err(io::Error::other)?;
                // Reading first leaves the pages of an untouched log unallocated.
                Ok(match bits.load(Ordering::Acquire) {
                    0 => 0,
                    _ => u64::from_le(bits.swap(0, Ordering::AcqRel)),
                })
            })
            .collect()
    }
}

impl AsFd for VhostLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl DirtySource for VhostLog {
    fn start(&self) -> io::Result<()> {
        self.ram
            .iter()
            .try_for_each(|range| self.take(range).map(drop))
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }

    fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
        for range in &self.ram {
            into.add_words(GuestAddress(range.start), &self.take(range)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use mica_base::units::Bytes;

    use super::*;
    use crate::layout;
    use crate::memory::{MemoryOptions, allocate};

    #[test]
    fn a_backend_s_bits_come_out_once_as_pages() {
        let ram = Bytes(layout::LOW_RAM_END + (1 << 20));
        let memory = allocate(ram, &MemoryOptions::default()).unwrap();
        let log = VhostLog::new(&memory).unwrap();
        assert_eq!(log.size(), ((1 << 32) + (1 << 20)) / 4096 / 8);

        // As a backend sees it: bytes of the file.
        let pages = [0, 9, layout::HIGH_RAM_START / 4096 + 255];
        for page in pages {
            log.file.write_all_at(&[1 << (page % 8)], page / 8).unwrap();
        }
        let mut dirty = DirtyPages::new(&memory);
        log.drain(&mut dirty).unwrap();
        let found: Vec<_> = dirty.runs().map(|(at, len)| (at.0 / 4096, len)).collect();
        assert_eq!(found, pages.map(|page| (page, 4096)));

        dirty.clear();
        log.drain(&mut dirty).unwrap();
        assert_eq!(dirty.count(), 0);
    }

    #[test]
    fn starting_forgets_what_was_logged() {
        let memory = allocate(Bytes::mib(1), &MemoryOptions::default()).unwrap();
        let log = VhostLog::new(&memory).unwrap();
        log.file.write_all_at(&[0xff], 3).unwrap();
        log.start().unwrap();
        let mut dirty = DirtyPages::new(&memory);
        log.drain(&mut dirty).unwrap();
        assert_eq!(dirty.count(), 0);
    }
}
