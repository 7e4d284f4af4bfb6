//! Memory of this process alone, and files in place of parts of it.
//!
//! Where no other process looks at guest memory it need not be a file's: the host's kernel then
//! backs it with huge pages whatever its policy for shared memory, and a kernel can be mapped
//! instead of read. Its pages are the page cache's, shared with every other guest of the same image,
//! until the guest writes to them and gets copies of its own.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use mica_base::units::PAGE_SIZE;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{GuestMemory, HugePages};

/// The largest page that a host's processor has in one entry of its lowest directory.
const HUGE_PAGE: usize = 2 << 20;

/// What is known of a region's pages, beside what they contain.
#[derive(Debug, Default)]
pub struct RegionPages {
    /// What the VM process has written.
    pub(super) written: AtomicBitmap,
    /// Files are mapped over parts of it.
    overlaid: AtomicBool,
    /// The mapping, where it is not the region's own.
    mapping: Option<Mapping>,
}

impl RegionPages {
    pub(super) fn new(written: AtomicBitmap, mapping: Option<Mapping>) -> Self {
        Self {
            written,
            overlaid: AtomicBool::new(false),
            mapping,
        }
    }
}

impl<'a> WithBitmapSlice<'a> for RegionPages {
    type S = RefSlice<'a, AtomicBitmap>;
}

impl Bitmap for RegionPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.written.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.written.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, AtomicBitmap> {
        self.written.slice_at(offset)
    }
}

impl NewBitmap for RegionPages {
    fn with_len(len: usize) -> Self {
        Self::new(AtomicBitmap::with_len(len), None)
    }
}

/// A mapping of anonymous memory, undone at its end.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    huge_pages: HugePages,
}

// SAFETY: it is a range of addresses; what lies there is reached through the region alone.
unsafe impl Send for Mapping {}
// SAFETY: see above; nothing of it changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) const PROTECTION: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
    pub(super) const FLAGS: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

    /// Maps `len` bytes, a whole number of pages, where huge pages fit.
    pub(super) fn new(len: usize, huge_pages: HugePages) -> io::Result<Self> {
        let room = len
            .checked_add(HUGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let found = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, Self::PROTECTION, Self::FLAGS)?
        };
        let found = found.cast::<u8>();
        let before = found.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: both ends lie within the mapping just made, which nobody else knows of yet.
        let start = unsafe {
            let start = found.add(before);
            if before > 0 {
                rustix::mm::munmap(found.cast(), before)?;
            }
            if before < HUGE_PAGE {
                rustix::mm::munmap(start.add(len).cast(), HUGE_PAGE - before)?;
            }
            start
        };
        let mapping = Self {
            start: NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?,
            len,
            huge_pages,
        };
        mapping.advise(0, len)?;
        Ok(mapping)
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Repeats what was said of `len` bytes at `start` when they were mapped first.
    fn advise(&self, start: usize, len: usize) -> io::Result<()> {
        assert!(start + len <= self.len, "a range beyond the mapping");
        let advise = |start: usize, len: usize, advice| {
            // SAFETY: within the mapping, and no such advice changes what it contains.
            unsafe { rustix::mm::madvise(self.as_ptr().add(start).cast(), len, advice) }
        };
        advise(start, len, Advice::LinuxDontDump)?;
        // A kernel built without huge pages refuses both; the guest runs all the same.
        let huge = match self.huge_pages {
            HugePages::None => Advice::LinuxNoHugepage,
            _ => Advice::LinuxHugepage,
        };
        let _ = advise(start, len, huge);
        // A PC uses a few pages of its first MiB.
        if start < HUGE_PAGE {
            let _ = advise(start, len.min(HUGE_PAGE - start), Advice::LinuxNoHugepage);
        }
        Ok(())
    }

    /// Empties `len` bytes at `start`, both whole pages; `overlaid` if files may lie there.
    fn discard(&self, start: usize, len: usize, overlaid: bool) -> io::Result<()> {
        assert!(start + len <= self.len, "a range beyond the mapping");
        // SAFETY: the range lies within the mapping and stays mapped as it was. Guest memory is
        // reached by volatile accesses only, which may see other bytes at any time.
        unsafe {
            let at = self.as_ptr().add(start).cast();
            if !overlaid {
                rustix::mm::madvise(at, len, Advice::LinuxDontNeed)?;
                return Ok(());
            }
            rustix::mm::mmap_anonymous(at, len, Self::PROTECTION, Self::FLAGS | MapFlags::FIXED)?;
        }
        self.advise(start, len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the region that it belongs to goes with it; what the kernel refuses stays mapped.
        let _ = unsafe { rustix::mm::munmap(self.as_ptr().cast(), self.len) };
    }
}

type Region = GuestRegionMmap<RegionPages>;

fn pages(region: &Region) -> &RegionPages {
    (**region).bitmap()
}

/// Maps the pages of `file` from `offset` over guest memory at `address`, as many whole ones as
/// `len` bytes have, and says how many bytes that are. None where memory is shared or addresses do
/// not suit: the caller reads what is left.
///
/// The vCPUs stand still. Nobody may cut the file short as long as the guest lives.
///
/// # Errors
///
/// The kernel's refusal.
pub fn overlay(
    memory: &GuestMemory,
    address: GuestAddress,
    file: &File,
    offset: u64,
    len: u64,
) -> io::Result<u64> {
    let len = len / PAGE_SIZE * PAGE_SIZE;
    let found = region_of(memory, address, len).filter(|_| {
        len > 0 && address.0.is_multiple_of(PAGE_SIZE) && offset.is_multiple_of(PAGE_SIZE)
    });
    let Some((region, mapping, start)) = found else {
        return Ok(0);
    };
    pages(region).overlaid.store(true, Ordering::SeqCst);
    let flags = Mapping::FLAGS | MapFlags::FIXED;
    // SAFETY: the range lies within the mapping, a part of which this replaces by one of the same
    // protection. Guest memory is reached by volatile accesses only, which may see other bytes at
    // any time.
    unsafe {
        let at = mapping.as_ptr().add(start).cast();
        rustix::mm::mmap(at, len as usize, Mapping::PROTECTION, flags, file, offset)?;
    }
    mapping.advise(start, len as usize)?;
    pages(region).mark_dirty(start, len as usize);
    Ok(len)
}

/// The region of private memory that holds all of a range, and where in it the range starts.
fn region_of(
    memory: &GuestMemory,
    address: GuestAddress,
    len: u64,
) -> Option<(&Region, &Mapping, usize)> {
    let region = memory.find_region(address)?;
    let start = address.0 - region.start_addr().0;
    let fits = start
        .checked_add(len)
        .is_some_and(|end| end <= region.len());
    let mapping = pages(region).mapping.as_ref().filter(|_| fits)?;
    Some((region, mapping, start as usize))
}

/// Gives the guest pages of its own in a range that was mapped and that it is about to write to: one
/// call here costs less than a fault at each page. It may be running already.
pub fn populate(memory: &GuestMemory, address: GuestAddress, len: u64) {
    if let Some((_, mapping, start)) = region_of(memory, address, len) {
        // SAFETY: within the mapping; the pages' contents stay as they are. Where the kernel does not
        // know this advice (before 5.14) or has no memory, the guest faults on its way.
        let _ = unsafe {
            let at = mapping.as_ptr().add(start).cast();
            rustix::mm::madvise(at, len as usize, Advice::LinuxPopulateWrite)
        };
    }
}

/// Empties whole pages of a region, `len` bytes at `start`, if its memory is private; else `None`.
pub(super) fn discard_private(region: &Region, start: u64, len: u64) -> Option<io::Result<()>> {
    let pages = pages(region);
    let mapping = pages.mapping.as_ref()?;
    let overlaid = pages.overlaid.load(Ordering::SeqCst);
    let result = mapping.discard(start as usize, len as usize, overlaid);
    if result.is_ok() && len == region.len() {
        pages.overlaid.store(false, Ordering::SeqCst);
    }
    Some(result)
}
