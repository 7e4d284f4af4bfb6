//! The guest's memory as this process maps it, and the log of what it wrote there.
//!
//! A frontend hands in file descriptors; what it does with the files afterwards is its own affair. If it
//! shrinks one, touching the lost part raises `SIGBUS`, which ends this process. A frontend of ours seals
//! its memory against shrinking, and [`super::ExportOptions::require_sealed_memory`] refuses what is not
//! sealed; an export for frontends that cannot be trusted and cannot seal belongs in a process of its
//! own.
#![allow(unsafe_code)] // vouches for mapped guest memory towards the store

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::SealFlags;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    VolatileMemory,
};

use crate::store::Buffers;
use crate::uring::PIECES_MAX;

/// All of a guest's RAM that the frontend has shared.
pub(crate) type Memory = GuestMemoryMmap<PageLog>;

/// The vhost-user dirty log's page size (vhost-user specification, "Migration").
const LOG_PAGE_SHIFT: u32 = 12;

/// The log that `SET_LOG_BASE` shares: one bit for each guest page, set when the page was written.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    active: AtomicBool,
    map: RwLock<Option<MmapRegion>>,
}

impl DirtyLog {
    /// Starts or stops logging (`VHOST_F_LOG_ALL`).
    pub(crate) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::SeqCst);
    }

    pub(crate) fn set_map(&self, map: Option<MmapRegion>) {
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = map;
    }

    /// Marks the pages of `len` bytes at guest address `start`.
    pub(crate) fn mark(&self, start: u64, len: u64) {
        if len == 0 || !self.active.load(Ordering::Relaxed) {
            return;
        }
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let Some(map) = map.as_ref() else { return };
        let last = start.saturating_add(len - 1) >> LOG_PAGE_SHIFT;
        for page in (start >> LOG_PAGE_SHIFT)..=last {
            let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
            let Ok(bits) = map.get_atomic_ref::<AtomicU8>(byte) else {
                return; // The log does not reach this far.
            };
            bits.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// One region's share of the [`DirtyLog`].
#[derive(Clone, Debug)]
pub(crate) struct PageLog {
    log: Arc<DirtyLog>,
    start: u64,
}

impl<'a> WithBitmapSlice<'a> for PageLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for PageLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log
            .mark(self.start.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false // The log is the frontend's to read.
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// Maps `len` bytes of `file` from `offset` on, shared.
pub(crate) fn map_shared<B: Bitmap>(
    file: File,
    offset: u64,
    len: u64,
    bitmap: B,
) -> io::Result<MmapRegion<B>> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let end = offset
        .checked_add(len as u64)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let size = file.metadata()?.len();
    // What is no regular file (a device's memory) reports no size.
    if size != 0 && end > size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    MmapRegionBuilder::new_with_bitmap(len, bitmap)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)
}

/// Whether nobody can take pages away from `file` any more.
pub(crate) fn is_sealed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// A memory region as the frontend describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionKey {
    /// Guest physical address.
    pub(crate) guest: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Where the frontend has it in its own address space: ring addresses are given so.
    pub(crate) user: u64,
}

/// The regions that the frontend has shared so far.
#[derive(Clone, Default)]
pub(crate) struct Regions {
    list: Vec<(RegionKey, Arc<GuestRegionMmap<PageLog>>)>,
}

impl Regions {
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Maps one more region.
    pub(crate) fn add(
        &mut self,
        key: RegionKey,
        file: File,
        offset: u64,
        log: &Arc<DirtyLog>,
    ) -> io::Result<()> {
        let bitmap = PageLog {
            log: log.clone(),
            start: key.guest,
        };
        let mapping = map_shared(file, offset, key.len, bitmap)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(key.guest))
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.list.push((key, Arc::new(region)));
        self.list.sort_by_key(|(key, _)| key.guest);
        Ok(())
    }

    /// Forgets a region. `false` if there is none like it.
    pub(crate) fn remove(&mut self, key: RegionKey) -> bool {
        let before = self.list.len();
        self.list.retain(|(present, _)| *present != key);
        self.list.len() < before
    }

    /// The regions together. Fails if two overlap.
    pub(crate) fn memory(&self) -> io::Result<Memory> {
        let regions = self.list.iter().map(|(_, region)| region.clone()).collect();
        Memory::from_arc_regions(regions).map_err(io::Error::other)
    }

    /// The guest address of what the frontend has at `user`.
    pub(crate) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.list.iter().find_map(|(key, _)| {
            let offset = user.checked_sub(key.user)?;
            (offset < key.len).then(|| GuestAddress(key.guest + offset))
        })
    }
}

/// A contiguous range of guest memory, as a descriptor names it: not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) address: GuestAddress,
    pub(crate) len: u32,
}

/// The spans' memory as buffers. `None` if any of it is not guest memory, or if the regions' borders cut it
/// into more pieces than a chain of the longest kind has descriptors.
pub(crate) fn buffers(memory: &Arc<Memory>, spans: &[Span]) -> Option<Buffers> {
    let mut buffers = Buffers::new(memory.clone());
    for span in spans {
        for slice in memory.get_slices(span.address, span.len as usize) {
            // SAFETY: the slice is part of a shared, readable and writable mapping of a region that
            // `memory` holds, and the buffers own a reference to `memory`.
            unsafe { buffers.push(&slice.ok()?) };
            if buffers.pieces() > PIECES_MAX {
                return None;
            }
        }
    }
    Some(buffers)
}
