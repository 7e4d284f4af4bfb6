//! Guest RAM as the processor sees it.
//!
//! Ranges of host memory at guest physical addresses, read and written by single instructions of the
//! host, because other processors, devices and backend processes use the same memory. Beside the bytes there is one byte of state per page: the
//! page has translated code, the page was written since the dirty log was taken.

#![allow(unsafe_code)] // guest memory is shared with other threads and processes

use std::any::Any;
use std::arch::asm;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Log2 of the page size.
pub(crate) const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub(crate) const PAGE: u64 = 1 << PAGE_SHIFT;

/// One contiguous piece of RAM.
pub struct RamRange {
    start: u64,
    len: u64,
    host: *mut u8,
    /// What [`Ram`] knows of each page: [`CODE`], [`DIRTY`].
    pages: Box<[AtomicU8]>,
    /// How often translated code of each page went out of date.
    generations: Box<[AtomicU32]>,
    /// What keeps the memory mapped, where that is not the caller's task.
    _owner: Option<Box<dyn Any + Send + Sync>>,
}

// SAFETY: `host` is only ever used for atomic accesses, which any thread may do.
unsafe impl Send for RamRange {}
// SAFETY: as above.
unsafe impl Sync for RamRange {}

/// A page holds code that somebody has translated.
const CODE: u8 = 1;
/// A page was written since the log was last taken. Set only while the log is on.
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
            _owner: None,
        }
    }

    /// The same, where the memory stays mapped as long as `owner` exists.
    ///
    /// # Safety
    ///
    /// `owner` keeps the memory mapped, readable and writable, and nobody holds a Rust reference to any
    /// of it.
    #[must_use]
    pub unsafe fn owned_by(
        owner: impl Any + Send + Sync,
        start: u64,
        len: u64,
        host: *mut u8,
    ) -> Self {
        Self {
            _owner: Some(Box::new(owner)),
            // SAFETY: the caller's, and the owner lives as long as the range.
            ..unsafe { Self::new(start, len, host) }
        }
    }

    /// RAM of zeros at guest physical `start` that nobody but its guest uses. Start and length are
    /// multiples of a page.
    #[must_use]
    pub fn zeroed(start: u64, len: u64) -> Self {
        let words = (len + PAGE) / 8;
        let own: Box<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
        let host = own.as_ptr().cast::<u8>().cast_mut();
        let host = host.wrapping_add(host.align_offset(PAGE as usize));
        // SAFETY: an aligned part of what it owns, reached by atomics only.
        unsafe { Self::owned_by(own, start, len, host) }
    }
}

/// All RAM of a guest; its processors share it.
pub struct Ram {
    ranges: Vec<RamRange>,
    /// Counts the writes to pages that hold translated code; processors drop their blocks of such
    /// pages when it changes.
    pub(crate) code_epoch: AtomicU64,
    /// Counts what takes away the right to write a page unseen: it began to hold translated code, or
    /// the dirty log wants to hear of its next write.
    pub(crate) watch_epoch: AtomicU64,
    logging: AtomicBool,
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
            logging: AtomicBool::new(false),
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

    /// Writes bytes as a device does, without telling anybody; those outside RAM are lost.
    #[cfg(test)]
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        for (address, &byte) in (address..).zip(bytes) {
            if let Some((range, offset)) = self.find(address, 1) {
                // SAFETY: in range.
                unsafe { AtomicU8::from_ptr(range.host.add(offset as usize)) }
                    .store(byte, Ordering::SeqCst);
            }
        }
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

    /// What is known of the page of an address, and how often its code went out of date.
    fn page(&self, address: u64) -> Option<(&AtomicU8, &AtomicU32)> {
        let (range, offset) = self.find(address, 1)?;
        let number = (offset >> PAGE_SHIFT) as usize;
        Some((range.pages.get(number)?, range.generations.get(number)?))
    }

    /// Says that a page of RAM holds translated code from now on.
    pub(crate) fn watch_code(&self, address: u64) {
        if let Some((page, _)) = self.page(address)
            && page.fetch_or(CODE, Ordering::SeqCst) & CODE == 0
        {
            self.watch_epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How often translated code of a page went out of date: code translated at another count is.
    pub(crate) fn code_generation(&self, address: u64) -> u32 {
        self.page(address)
            .map_or(0, |(_, generation)| generation.load(Ordering::SeqCst))
    }

    /// Whether somebody has to hear of the next write to a page.
    pub(crate) fn is_watched(&self, address: u64) -> bool {
        let logging = self.logging.load(Ordering::SeqCst);
        self.page(address).is_some_and(|(page, _)| {
            let page = page.load(Ordering::SeqCst);
            page & CODE != 0 || logging && page & DIRTY == 0
        })
    }

    /// A page was written, by a processor or anybody else: translated code of it is out of date, and
    /// the dirty log has it.
    pub(crate) fn written(&self, address: u64) {
        let Some((page, generation)) = self.page(address) else {
            return;
        };
        if self.logging.load(Ordering::SeqCst) {
            page.fetch_or(DIRTY, Ordering::SeqCst);
        }
        if page.load(Ordering::SeqCst) & CODE != 0 {
            page.fetch_and(!CODE, Ordering::SeqCst);
            generation.fetch_add(1, Ordering::SeqCst);
            self.code_epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Starts the log of written pages, empty, or ends it.
    pub fn set_dirty_log(&self, on: bool) {
        for page in self.ranges.iter().flat_map(|range| &range.pages) {
            page.fetch_and(!DIRTY, Ordering::SeqCst);
        }
        self.logging.store(on, Ordering::SeqCst);
        self.watch_epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Visits the physical addresses of the pages that were written since the last time.
    ///
    /// A processor that runs meanwhile reports at the end of its block, or when it stops, all pages
    /// that it could write unseen until then: none is missed, some come again.
    pub fn take_dirty(&self, mut visit: impl FnMut(u64)) {
        for range in &self.ranges {
            for (address, page) in (range.start..).step_by(PAGE as usize).zip(&range.pages) {
                let dirty = page.load(Ordering::Relaxed) & DIRTY != 0;
                if dirty && page.fetch_and(!DIRTY, Ordering::SeqCst) & DIRTY != 0 {
                    visit(address);
                }
            }
        }
        self.watch_epoch.fetch_add(1, Ordering::SeqCst);
    }
}

/// Reads `size` (1, 2, 4, 8) bytes of RAM by one instruction of the host, whose memory model is the
/// guest's: an operand inside a cache line is read as one, aligned or not.
///
/// # Safety
///
/// `host` points to that many bytes of a [`RamRange`].
#[inline(always)]
pub(crate) unsafe fn read(host: *const u8, size: u8) -> u64 {
    let value: u64;
    // SAFETY: the caller's. Written in assembly because others may access the same bytes meanwhile,
    // and because the operand need not be aligned.
    unsafe {
        match size {
            1 => asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) host,
                options(nostack, preserves_flags, readonly)),
            2 => asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) host,
                options(nostack, preserves_flags, readonly)),
            4 => asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) host,
                options(nostack, preserves_flags, readonly)),
            _ => asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) host,
                options(nostack, preserves_flags, readonly)),
        }
    }
    value
}

/// Writes `size` (1, 2, 4, 8) bytes of RAM, likewise.
///
/// # Safety
///
/// `host` points to that many bytes of a [`RamRange`].
#[inline(always)]
pub(crate) unsafe fn write(host: *mut u8, size: u8, value: u64) {
    // SAFETY: as above.
    unsafe {
        match size {
            1 => asm!("mov byte ptr [{0}], {1}", in(reg) host, in(reg_byte) value as u8,
                options(nostack, preserves_flags)),
            2 => asm!("mov word ptr [{0}], {1:x}", in(reg) host, in(reg) value,
                options(nostack, preserves_flags)),
            4 => asm!("mov dword ptr [{0}], {1:e}", in(reg) host, in(reg) value,
                options(nostack, preserves_flags)),
            _ => asm!("mov qword ptr [{0}], {1}", in(reg) host, in(reg) value,
                options(nostack, preserves_flags)),
        }
    }
}

/// Reads 16 bytes.
///
/// # Safety
///
/// `host` points to 16 bytes of a [`RamRange`].
#[inline(always)]
pub(crate) unsafe fn read_16(host: *const u8) -> [u8; 16] {
    let mut value = [0; 16];
    // SAFETY: the caller's; writes `value`.
    unsafe {
        asm!("movdqu {0}, [{1}]", "movdqu [{2}], {0}", out(xmm_reg) _, in(reg) host,
            in(reg) value.as_mut_ptr(), options(nostack, preserves_flags));
    }
    value
}

/// Writes 16 bytes.
///
/// # Safety
///
/// `host` points to 16 bytes of a [`RamRange`].
#[inline(always)]
pub(crate) unsafe fn write_16(host: *mut u8, value: &[u8; 16]) {
    // SAFETY: the caller's; reads `value`.
    unsafe {
        asm!("movdqu {0}, [{1}]", "movdqu [{2}], {0}", out(xmm_reg) _, in(reg) value.as_ptr(),
            in(reg) host, options(nostack, preserves_flags));
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

/// Does what `rep movs` of elements of `size` (1, 2, 4, 8) bytes does, upwards, also when the places overlap.
///
/// # Safety
///
/// `from` and `to` point to `count` elements of a [`RamRange`] each.
pub(crate) unsafe fn move_string(from: *const u8, to: *mut u8, size: u8, count: u64) {
    macro_rules! host {
        ($instruction:literal) => {
            // SAFETY: the caller's; the direction flag is clear in Rust code. Written in assembly
            // because others may access the same bytes meanwhile.
            unsafe {
                asm!(
                    concat!("rep ", $instruction),
                    inout("rcx") count => _,
                    inout("rsi") from => _,
                    inout("rdi") to => _,
                    options(nostack, preserves_flags),
                )
            }
        };
    }
    match size {
        1 => host!("movsb"),
        2 => host!("movsw"),
        4 => host!("movsd"),
        _ => host!("movsq"),
    }
}

/// Does what `rep stos` of elements of `size` (1, 2, 4, 8) bytes does, upwards.
///
/// # Safety
///
/// `to` points to `count` elements of a [`RamRange`].
pub(crate) unsafe fn store_string(to: *mut u8, size: u8, count: u64, value: u64) {
    macro_rules! host {
        ($instruction:literal) => {
            // SAFETY: as in `move_string`.
            unsafe {
                asm!(
                    concat!("rep ", $instruction),
                    inout("rcx") count => _,
                    inout("rdi") to => _,
                    in("rax") value,
                    options(nostack, preserves_flags),
                )
            }
        };
    }
    match size {
        1 => host!("stosb"),
        2 => host!("stosw"),
        4 => host!("stosd"),
        _ => host!("stosq"),
    }
}

/// Replaces 16 bytes of RAM by `new` if they are `old`, as one; says what they were. Nothing on a
/// host without CMPXCHG16B.
///
/// # Safety
///
/// `host` points to 16 bytes of a [`RamRange`] and is aligned to them.
pub(crate) unsafe fn compare_exchange_16(host: *mut u8, old: u128, new: u128) -> Option<u128> {
    if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: the caller's, and the host has the instruction. RBX, which the compiler keeps for itself,
    // is put back. (Without optimisation `std::arch`'s function calls one that is not linked.)
    unsafe {
        asm!(
            "xchg {new}, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, {new}",
            new = inout(reg) new as u64 => _,
            in("rdi") host,
            inout("rax") low,
            inout("rdx") high,
            in("rcx") (new >> 64) as u64,
            options(nostack),
        );
    }
    Some(u128::from(high) << 64 | u128::from(low))
}
