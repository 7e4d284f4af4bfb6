//! Guest memory: a memfd, mapped once here and once in every backend process.
//!
//! The type is vm-memory's, whose rules on aliasing hold everywhere: guest memory is read and
//! written by copies and volatile accesses only, because a vCPU, a device thread and a backend may
//! change it at any moment. A guest address is a [`vm_memory::GuestAddress`] and becomes a host
//! address only inside that crate, after its bounds check.
//!
//! Where backends share a guest's memory, all its regions are ranges of one memfd, sealed at its full
//! size: a backend that has mapped it never takes a `SIGBUS` because somebody shrank the file.
//! Without backends it is this process's own, and [`overlay()`] puts pages of files in its place.
//! Nothing is allocated before the guest touches it, and [`discard`] gives pages back while the guest
//! runs.

#![allow(unsafe_code)] // madvise takes an address; everything else here is safe

pub mod dirty;
mod overlay;
mod processor;

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use mica_base::units::{Bytes, PAGE_SIZE};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::Advice;
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use overlay::Mapping;
pub use overlay::{RegionPages, overlay, populate};
pub use processor::processor_ram;

use crate::layout;

/// All RAM of a guest. Cloning it clones references, not memory.
///
/// Every write through it marks its pages in the region's bitmap, which is the VM process's own
/// share of the dirty log.
pub type GuestMemory = GuestMemoryMmap<RegionPages>;

/// Which host pages back the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// 4 KiB pages.
    #[default]
    None,
    /// Whatever the kernel finds free when a page is touched, if its policy for shared memory
    /// (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`) lets us ask.
    Transparent,
    /// Reserved 2 MiB pages.
    #[serde(rename = "2M")]
    Size2M,
    /// Reserved 1 GiB pages.
    #[serde(rename = "1G")]
    Size1G,
}

impl HugePages {
    /// The size of a host page of this kind; RAM is a multiple of it.
    #[must_use]
    pub const fn page_size(self) -> Bytes {
        match self {
            Self::None | Self::Transparent => Bytes(PAGE_SIZE),
            Self::Size2M => Bytes::mib(2),
            Self::Size1G => Bytes::gib(1),
        }
    }

    const fn reserved(self) -> bool {
        matches!(self, Self::Size2M | Self::Size1G)
    }
}

/// How [`allocate`] backs the RAM.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryOptions {
    /// The kind of host pages.
    pub huge_pages: HugePages,
    /// No other process will look at it.
    pub private: bool,
}

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, too large, or not whole pages.
    #[error(
        "{ram} of RAM is not possible: give a multiple of {multiple}, at most {}",
        Bytes(layout::MAX_RAM)
    )]
    Size {
        /// What was asked for.
        ram: Bytes,
        /// The size of a host page.
        multiple: Bytes,
    },
    /// The kernel has no such file for us.
    #[error("cannot create a memory file with {page_size} pages: {source}")]
    Create {
        /// The size of a host page.
        page_size: Bytes,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel has too few reserved huge pages.
    #[error(
        "{ram} of RAM need {pages} free huge pages of {page_size}: reserve them with \
         `echo {pages} > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages`, or use \
         transparent ones",
        page_size.0 >> 10
    )]
    NoHugePages {
        /// What was asked for.
        ram: Bytes,
        /// How many pages that takes.
        pages: u64,
        /// The size of each.
        page_size: Bytes,
    },
    /// The mapping failed.
    #[error("cannot map {ram} of guest RAM: {source}; is a limit (ulimit -v) set?")]
    Map {
        /// What was asked for.
        ram: Bytes,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Makes `ram` bytes of guest memory at the addresses of [`layout::ram_ranges`].
///
/// # Errors
///
/// See [`MemoryError`].
pub fn allocate(ram: Bytes, options: &MemoryOptions) -> Result<GuestMemory, MemoryError> {
    let page_size = options.huge_pages.page_size();
    if ram.0 == 0 || !ram.0.is_multiple_of(page_size.0) || ram.0 > layout::MAX_RAM {
        return Err(MemoryError::Size {
            ram,
            multiple: page_size,
        });
    }
    let mut regions = Vec::new();
    // The kernel hands out reserved pages by file only.
    if options.private && !options.huge_pages.reserved() {
        for range in layout::ram_ranges(ram.0) {
            regions.push(private_region(range, ram, options.huge_pages)?);
        }
    } else {
        let file = Arc::new(memory_file(ram, options.huge_pages)?);
        let mut file_start = 0;
        for range in layout::ram_ranges(ram.0) {
            let offset = FileOffset::from_arc(Arc::clone(&file), file_start);
            file_start += range.end - range.start;
            regions.push(map_region(range, offset, ram, options.huge_pages)?);
        }
    }
    Ok(GuestMemory::from_regions(regions)
        .expect("invariant: the layout's RAM ranges are sorted and do not overlap"))
}

fn memory_file(ram: Bytes, huge_pages: HugePages) -> Result<File, MemoryError> {
    let page_size = huge_pages.page_size();
    let error = |source: rustix::io::Errno| MemoryError::Create {
        page_size,
        source: source.into(),
    };
    let kind = match huge_pages {
        HugePages::None | HugePages::Transparent => MemfdFlags::empty(),
        HugePages::Size2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        HugePages::Size1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    let file = rustix::fs::memfd_create("mica-ram", flags).map_err(error)?;
    rustix::fs::ftruncate(&file, ram.0).map_err(error)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(error)?;
    Ok(file.into())
}

fn private_region(
    range: std::ops::Range<u64>,
    ram: Bytes,
    huge_pages: HugePages,
) -> Result<GuestRegionMmap<RegionPages>, MemoryError> {
    let (len, written) = tracked(&range);
    let error = |source| MemoryError::Map { ram, source };
    let mapping = Mapping::new(len, huge_pages).map_err(error)?;
    let pointer = mapping.as_ptr();
    let pages = RegionPages::new(written, Some(mapping));
    // SAFETY: the pointer is that of a mapping of this length, which the region's own bitmap keeps.
    let builder =
        unsafe { MmapRegionBuilder::new_with_bitmap(len, pages).with_raw_mmap_pointer(pointer) };
    let region = builder
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| mapping_error(error, ram, huge_pages))?;
    Ok(GuestRegionMmap::new(region, GuestAddress(range.start))
        .expect("invariant: the layout ends far below 2^64"))
}

/// A range's length and an empty record of what is written in it.
fn tracked(range: &std::ops::Range<u64>) -> (usize, AtomicBitmap) {
    let len =
        usize::try_from(range.end - range.start).expect("invariant: an address space of 64 bits");
    let page = NonZeroUsize::new(PAGE_SIZE as usize).expect("invariant: pages have a size");
    (len, AtomicBitmap::new(len, page))
}

fn map_region(
    range: std::ops::Range<u64>,
    offset: FileOffset,
    ram: Bytes,
    huge_pages: HugePages,
) -> Result<GuestRegionMmap<RegionPages>, MemoryError> {
    let (len, written) = tracked(&range);
    // Reserved pages are accounted for at mapping, so that a lack of them is an error here and not
    // a SIGBUS later. Ordinary memory is not: a guest uses less than it is given.
    let reservation = if huge_pages.reserved() {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let pages = RegionPages::new(written, None);
    let mapping = MmapRegionBuilder::new_with_bitmap(len, pages)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | reservation)
        .with_file_offset(offset)
        .with_hugetlbfs(huge_pages.reserved())
        .build()
        .map_err(|error| mapping_error(error, ram, huge_pages))?;

    advise(&mapping, Advice::LinuxDontDump, ram)?;
    if huge_pages == HugePages::Transparent {
        // A kernel built without them has nothing to offer; the guest runs all the same.
        let _ = advise(&mapping, Advice::LinuxHugepage, ram);
    }
    Ok(GuestRegionMmap::new(mapping, GuestAddress(range.start))
        .expect("invariant: the layout ends far below 2^64"))
}

fn mapping_error(
    error: vm_memory::mmap::MmapRegionError,
    ram: Bytes,
    huge_pages: HugePages,
) -> MemoryError {
    match error {
        vm_memory::mmap::MmapRegionError::Mmap(source)
            if huge_pages.reserved() && source.raw_os_error() == Some(libc::ENOMEM) =>
        {
            let page_size = huge_pages.page_size();
            MemoryError::NoHugePages {
                ram,
                pages: ram.0 / page_size.0,
                page_size,
            }
        }
        vm_memory::mmap::MmapRegionError::Mmap(source) => MemoryError::Map { ram, source },
        other => MemoryError::Map {
            ram,
            source: io::Error::other(other),
        },
    }
}

fn advise(
    mapping: &vm_memory::MmapRegion<RegionPages>,
    advice: Advice,
    ram: Bytes,
) -> Result<(), MemoryError> {
    // SAFETY: the range is exactly the mapping, which is alive, and neither advice that we pass
    // changes what the memory contains.
    let advised = unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    advised.map_err(|source| MemoryError::Map {
        ram,
        source: source.into(),
    })
}

/// Gives the host back the pages of `len` bytes at `address`: they read as zeros from now on, here
/// and in every backend, until somebody writes to them.
///
/// Only whole host pages inside the range are given back; what the range covers outside RAM is
/// ignored. Safe against a guest that uses the pages meanwhile: it sees zeros or its own data.
///
/// # Errors
///
/// The kernel's refusal.
pub fn discard(memory: &GuestMemory, address: GuestAddress, len: u64) -> io::Result<()> {
    let end = address.0.saturating_add(len);
    for region in memory.iter() {
        let start_of_region = region.start_addr().0;
        let from = address.0.max(start_of_region);
        let to = end.min(start_of_region + region.len());
        if from >= to {
            continue;
        }
        let page = host_page(region)?;
        let first = (from - start_of_region).next_multiple_of(page);
        let last = (to - start_of_region) / page * page;
        if first >= last {
            continue;
        }
        match overlay::discard_private(region, first, last - first) {
            Some(done) => done?,
            None => punch(region, first, last - first)?,
        }
        // They are others now, for whoever copies memory.
        let (at, len) = (first as usize, (last - first) as usize);
        (**region).bitmap().mark_dirty(at, len);
    }
    Ok(())
}

/// Notes, in the VM process's share of the dirty log, that somebody else may have written `len` bytes at
/// `address`. What is no RAM is ignored.
pub fn mark_written(memory: &GuestMemory, address: GuestAddress, len: u64) {
    let end = address.0.saturating_add(len);
    for region in memory.iter() {
        let start = region.start_addr().0;
        let from = address.0.clamp(start, start + region.len());
        let to = end.clamp(start, start + region.len());
        if from < to {
            let bitmap = (**region).bitmap();
            bitmap.mark_dirty((from - start) as usize, (to - from) as usize);
        }
    }
}

/// Makes a hole in the region's file, `len` bytes at `start`.
fn punch(region: &GuestRegionMmap<RegionPages>, start: u64, len: u64) -> io::Result<()> {
    let behind = region
        .file_offset()
        .expect("invariant: shared memory is a file's");
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(behind.file(), flags, behind.start() + start, len)?;
    Ok(())
}

/// The size of the host's pages: where they are reserved ones, their file's block size.
fn host_page(region: &GuestRegionMmap<RegionPages>) -> io::Result<u64> {
    match region.file_offset() {
        Some(behind) if region.is_hugetlbfs() == Some(true) => {
            u64::try_from(rustix::fs::fstat(behind.file())?.st_blksize).map_err(io::Error::other)
        }
        _ => Ok(PAGE_SIZE),
    }
}

#[cfg(test)]
mod tests;
