//! Guest RAM as the processor sees it.
//!
//! Ranges of host memory at guest physical addresses, read and written by relaxed atomics of up to
//! eight bytes (an access that is not aligned is several), because other processors, devices and
//! backend processes use the same memory. Beside the bytes there is one byte of state per page: the
//! page has translated code, the page was written since the dirty log was drained.

#![allow(unsafe_code)] // guest memory is shared with other threads and processes

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Log2 of the page size.
pub(crate) const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub(crate) const PAGE: u64 = 1 << PAGE_SHIFT;

/// One contiguous piece of RAM.
pub struct RamRange {
    start: u64,
    len: u64,
    host: *mut u8,
    /// What [`Ram`] knows of each page.
    pages: Box<[AtomicU8]>,
    /// How often translated code of each page went out of date.
    generations: Box<[AtomicU32]>,
}

// SAFETY: `host` is only ever used for atomic accesses, which any thread may do.
unsafe impl Send for RamRange {}
// SAFETY: as above.
unsafe impl Sync for RamRange {}

/// A page holds code that somebody has translated.
const CODE: u8 = 1;
/// A page was written since the log was last drained. Set only while the log is on.
const DIRTY: u8 = 2;

impl RamRange {
    /// RAM at guest physical `start`, which is `len` bytes at `host`. Both are multiples of a page.
    ///
    /// # Safety
    ///
    /// The memory stays mapped, readable and writable as long as the range exists, and nobody
    /// holds a Rust reference to any of it.
    #[must_use]
    pub unsafe fn new(start: u64, len: u64, host: *mut u8) -> Self {
        assert!(
            start.is_multiple_of(PAGE)
                && len.is_multiple_of(PAGE)
                && (host as u64).is_multiple_of(PAGE)
        );
        Self {
            start,
            len,
            host,
            pages: (0..len >> PAGE_SHIFT).map(|_| AtomicU8::new(0)).collect(),
            generations: (0..len >> PAGE_SHIFT).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

/// All RAM of a guest; its processors share it.
pub struct Ram {
    ranges: Vec<RamRange>,
    /// Counts the writes to pages that hold translated code; processors drop their blocks of such
    /// pages when it changes. See [`Ram::code_written`].
    pub(crate) code_epoch: AtomicU64,
    /// Counts the pages that began to hold translated code; processors give up their ways to write
    /// such pages unseen when it changes.
    pub(crate) watch_epoch: AtomicU64,
}

impl Ram {
    /// RAM of these ranges, which do not overlap.
    #[must_use]
    pub fn new(mut ranges: Vec<RamRange>) -> Self {
        ranges.sort_by_key(|range| range.start);
        Self {
            ranges,
            code_epoch: AtomicU64::new(0),
            watch_epoch: AtomicU64::new(0),
        }
    }

    /// The range and the offset in it of `len` bytes at a physical address, if all of them are RAM.
    fn find(&self, address: u64, len: u64) -> Option<(&RamRange, u64)> {
        self.ranges.iter().find_map(|range| {
            let offset = address.checked_sub(range.start)?;
            (offset < range.len && len <= range.len - offset).then_some((range, offset))
        })
    }

    /// Where the page of a physical address is in this process, if it is RAM.
    pub(crate) fn host_page(&self, address: u64) -> Option<*mut u8> {
        let (range, offset) = self.find(address & !(PAGE - 1), PAGE)?;
        // SAFETY: the offset is inside the range.
        Some(unsafe { range.host.add(offset as usize) })
    }

    /// Whether an address is RAM.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        self.find(address, 1).is_some()
    }

    /// Reads an aligned 8-byte word: a page-table entry.
    pub(crate) fn read_u64(&self, address: u64) -> Option<u64> {
        let (range, offset) = self.find(address & !7, 8)?;
        // SAFETY: in range and aligned.
        Some(
            unsafe { AtomicU64::from_ptr(range.host.add(offset as usize).cast()) }
                .load(Ordering::Relaxed),
        )
    }

    /// Sets bits of an aligned 4-byte word atomically: accessed and dirty bits.
    pub(crate) fn set_bits_u32(&self, address: u64, bits: u32) {
        if let Some((range, offset)) = self.find(address & !3, 4) {
            // SAFETY: in range and aligned.
            unsafe { AtomicU32::from_ptr(range.host.add(offset as usize).cast()) }
                .fetch_or(bits, Ordering::SeqCst);
            self.written(address);
        }
    }

    /// Says that a page of RAM holds translated code from now on.
    pub(crate) fn watch_code(&self, address: u64) {
        if let Some((range, offset)) = self.find(address, 1) {
            let page = &range.pages[(offset >> PAGE_SHIFT) as usize];
            if page.fetch_or(CODE, Ordering::SeqCst) & CODE == 0 {
                self.watch_epoch.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// How often translated code of a page went out of date: code translated at another count is.
    pub(crate) fn code_generation(&self, address: u64) -> u32 {
        self.find(address, 1).map_or(0, |(range, offset)| {
            range.generations[(offset >> PAGE_SHIFT) as usize].load(Ordering::SeqCst)
        })
    }

    /// Whether a page holds translated code.
    pub(crate) fn is_code(&self, address: u64) -> bool {
        self.find(address, 1).is_some_and(|(range, offset)| {
            range.pages[(offset >> PAGE_SHIFT) as usize].load(Ordering::SeqCst) & CODE != 0
        })
    }

    /// A page was written, by a processor or anybody else: translated code of it is out of date.
    pub fn written(&self, address: u64) {
        if let Some((range, offset)) = self.find(address, 1) {
            let page = &range.pages[(offset >> PAGE_SHIFT) as usize];
            if page.load(Ordering::SeqCst) & CODE != 0 {
                page.fetch_and(!CODE, Ordering::SeqCst);
                range.generations[(offset >> PAGE_SHIFT) as usize].fetch_add(1, Ordering::SeqCst);
                self.code_epoch.fetch_add(1, Ordering::SeqCst);
            }
            page.fetch_or(DIRTY, Ordering::Relaxed);
        }
    }
}

/// Reads `size` (1, 2, 4, 8) bytes of RAM.
///
/// # Safety
///
/// `host` points to that many bytes of a [`RamRange`].
#[inline]
pub(crate) unsafe fn read(host: *const u8, size: u8) -> u64 {
    let at = host.cast_mut();
    // SAFETY: the caller's; each atomic is used only where its alignment holds.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(at).load(Ordering::Acquire).into(),
            2 if at.addr() & 1 == 0 => AtomicU16::from_ptr(at.cast())
                .load(Ordering::Acquire)
                .into(),
            4 if at.addr() & 3 == 0 => AtomicU32::from_ptr(at.cast())
                .load(Ordering::Acquire)
                .into(),
            8 if at.addr() & 7 == 0 => AtomicU64::from_ptr(at.cast()).load(Ordering::Acquire),
            _ => (0..size).fold(0, |value, byte| {
                let part = AtomicU8::from_ptr(at.add(byte.into())).load(Ordering::Acquire);
                value | u64::from(part) << (8 * byte)
            }),
        }
    }
}

/// Writes `size` (1, 2, 4, 8) bytes of RAM.
///
/// # Safety
///
/// `host` points to that many bytes of a [`RamRange`].
#[inline]
pub(crate) unsafe fn write(host: *mut u8, size: u8, value: u64) {
    // SAFETY: the caller's; each atomic is used only where its alignment holds.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(host).store(value as u8, Ordering::Release),
            2 if host.addr() & 1 == 0 => {
                AtomicU16::from_ptr(host.cast()).store(value as u16, Ordering::Release)
            }
            4 if host.addr() & 3 == 0 => {
                AtomicU32::from_ptr(host.cast()).store(value as u32, Ordering::Release)
            }
            8 if host.addr() & 7 == 0 => {
                AtomicU64::from_ptr(host.cast()).store(value, Ordering::Release)
            }
            _ => (0..size).for_each(|byte| {
                AtomicU8::from_ptr(host.add(byte.into()))
                    .store((value >> (8 * byte)) as u8, Ordering::Release);
            }),
        }
    }
}

/// Replaces `size` (1, 2, 4, 8) bytes of RAM by `new` if they are `old`, as one; says what they were.
///
/// # Safety
///
/// `host` points to that many bytes of a [`RamRange`] and is aligned to them.
pub(crate) unsafe fn compare_exchange(host: *mut u8, size: u8, old: u64, new: u64) -> u64 {
    const SEQ: Ordering = Ordering::SeqCst;
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(host)
                .compare_exchange(old as u8, new as u8, SEQ, SEQ)
                .unwrap_or_else(|was| was)
                .into(),
            2 => AtomicU16::from_ptr(host.cast())
                .compare_exchange(old as u16, new as u16, SEQ, SEQ)
                .unwrap_or_else(|was| was)
                .into(),
            4 => AtomicU32::from_ptr(host.cast())
                .compare_exchange(old as u32, new as u32, SEQ, SEQ)
                .unwrap_or_else(|was| was)
                .into(),
            _ => AtomicU64::from_ptr(host.cast())
                .compare_exchange(old, new, SEQ, SEQ)
                .unwrap_or_else(|was| was),
        }
    }
}
