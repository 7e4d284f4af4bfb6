//! Memory for transfers.

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// The most pieces that one system call takes (Linux `UIO_MAXIOV`).
pub(crate) const PIECES_MAX: usize = 1024;

/// A contiguous piece of memory, laid out as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Piece(libc::iovec);

// SAFETY: a piece is an address and a length; whether it may be used is the affair of the `Buffers`
// that hold it together with the owner of the memory.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Piece {
    fn new(address: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: address.cast(),
            iov_len: len,
        })
    }

    pub(crate) fn address(&self) -> usize {
        self.0.iov_base as usize
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The piece without its first `skip` bytes and no longer than `limit`.
    pub(crate) fn part(&self, skip: usize, limit: usize) -> Self {
        let skip = skip.min(self.len());
        let address = self.0.iov_base.cast::<u8>().wrapping_add(skip);
        Self::new(address, (self.len() - skip).min(limit))
    }
}

/// Pieces of memory that together are the data of one transfer, and a share in the memory itself.
///
/// The memory may be shared with a guest, which may change it at any moment; it is therefore only
/// copied and handed to the kernel, never referenced as a slice.
#[derive(Clone)]
pub struct Buffers {
    pieces: Vec<Piece>,
    len: u64,
    owner: Arc<dyn Send + Sync>,
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} bytes in {})", self.len, self.pieces.len())
    }
}

impl Buffers {
    /// Buffers without any piece yet, in memory that `owner` keeps mapped.
    pub(crate) fn new(owner: Arc<dyn Send + Sync>) -> Self {
        Self {
            pieces: Vec::new(),
            len: 0,
            owner,
        }
    }

    /// Adds a piece of the owner's memory.
    ///
    /// # Safety
    ///
    /// The owner keeps the slice's memory mapped, readable and writable.
    pub(crate) unsafe fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>) {
        let piece = Piece::new(slice.ptr_guard_mut().as_ptr(), slice.len());
        self.len += piece.len() as u64;
        self.pieces.push(piece);
    }

    /// How many pieces there are.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Zeroed memory of its own, page-aligned.
    ///
    /// # Errors
    ///
    /// The system has no memory.
    pub fn zeroed(len: usize) -> std::io::Result<Self> {
        let region = MmapRegion::<()>::new(len.max(1)).map_err(std::io::Error::other)?;
        let region = Arc::new(region);
        let mut buffers = Self::new(region.clone());
        let slice = region.get_slice(0, len).map_err(std::io::Error::other)?;
        // SAFETY: the region, an anonymous mapping that can be read and written, is the owner.
        unsafe { buffers.push(&slice) };
        Ok(buffers)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing to transfer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `offset` on, of the same memory. `None` if that is out of range.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        let mut pieces = Vec::new();
        self.pieces_from(offset, len, usize::MAX, &mut pieces);
        Some(Self {
            pieces,
            len,
            owner: self.owner.clone(),
        })
    }

    /// Appends the pieces of `len` bytes from `offset` on, at most `limit` of them.
    pub(crate) fn pieces_from(&self, offset: u64, len: u64, limit: usize, out: &mut Vec<Piece>) {
        let (mut skip, mut rest) = (offset, len);
        for piece in &self.pieces {
            if rest == 0 || out.len() == limit {
                break;
            }
            let available = piece.len() as u64;
            if skip >= available {
                skip -= available;
                continue;
            }
            // Both are at most the piece's own length, a usize.
            let part = piece.part(skip as usize, rest.min(available) as usize);
            skip = 0;
            rest -= part.len() as u64;
            out.push(part);
        }
    }

    /// Whether every piece begins and ends on a multiple of `alignment`, a power of two.
    pub(crate) fn is_aligned(&self, alignment: usize) -> bool {
        let bits = self
            .pieces
            .iter()
            .fold(0, |bits, piece| bits | piece.address() | piece.len());
        bits & (alignment - 1) == 0
    }

    /// Copies from `source` into the first bytes of the buffers, as many as fit.
    pub fn copy_from(&self, mut source: &[u8]) {
        for piece in &self.pieces {
            let (now, later) = source.split_at(source.len().min(piece.len()));
            self.volatile(piece).copy_from(now);
            source = later;
        }
    }

    /// Copies the first bytes of the buffers out, as many as fit.
    pub fn copy_to(&self, mut target: &mut [u8]) {
        for piece in &self.pieces {
            let (now, later) = target.split_at_mut(target.len().min(piece.len()));
            self.volatile(piece).copy_to(now);
            target = later;
        }
    }

    /// Copies `len` bytes, or what there is of them, between two places in buffers.
    pub(crate) fn copy_within(from: (&Self, u64), to: (&Self, u64), len: u64) {
        let (mut sources, mut targets) = (Vec::new(), Vec::new());
        from.0.pieces_from(from.1, len, usize::MAX, &mut sources);
        to.0.pieces_from(to.1, len, usize::MAX, &mut targets);
        let (mut sources, mut targets) = (sources.into_iter(), targets.into_iter());
        let (mut source, mut target) = (sources.next(), targets.next());
        while let (Some(a), Some(b)) = (source, target) {
            let step = a.len().min(b.len());
            let slice = from.0.volatile(&a.part(0, step));
            slice.copy_to_volatile_slice(to.0.volatile(&b.part(0, step)));
            let rest = |piece: Piece| Some(piece.part(step, usize::MAX)).filter(|p| p.len() > 0);
            source = rest(a).or_else(|| sources.next());
            target = rest(b).or_else(|| targets.next());
        }
    }

    fn volatile(&self, piece: &Piece) -> VolatileSlice<'_> {
        // SAFETY: the piece is memory of the owner, which `self` keeps mapped for as long as the
        // slice lives; volatile accesses may race with others'.
        unsafe { VolatileSlice::new(piece.0.iov_base.cast(), piece.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    /// Buffers of one mapping, cut at the given places.
    fn cut(len: usize, cuts: &[u64]) -> Buffers {
        let whole = Buffers::zeroed(len).unwrap();
        let mut result = Buffers::new(whole.owner.clone());
        let mut start = 0;
        for &end in cuts.iter().chain([&(len as u64)]) {
            whole.pieces_from(start, end - start, usize::MAX, &mut result.pieces);
            start = end;
        }
        result.len = len as u64;
        result
    }

    #[test]
    fn data_goes_in_and_comes_out_over_all_pieces() {
        let buffers = cut(1000, &[1, 500, 999]);
        buffers.copy_from(&pattern(1000));
        let mut out = vec![0; 1000];
        buffers.copy_to(&mut out);
        assert_eq!(out, pattern(1000));
    }

    #[test]
    fn a_slice_is_the_same_memory() {
        let buffers = cut(1000, &[10, 20, 30]);
        let slice = buffers.slice(15, 100).unwrap();
        slice.copy_from(&pattern(100));
        let mut out = vec![0; 200];
        buffers.copy_to(&mut out);
        assert_eq!(out[15..115], pattern(100));
        assert_eq!(out[115..], [0; 85]);
        assert!(buffers.slice(901, 100).is_none());
        assert!(buffers.slice(u64::MAX, 2).is_none());
    }

    #[test]
    fn copies_between_differently_cut_buffers() {
        let (from, to) = (cut(100, &[3, 50]), cut(100, &[7, 8, 60]));
        from.copy_from(&pattern(100));
        Buffers::copy_within((&from, 5), (&to, 6), 90);
        let mut out = vec![0; 100];
        to.copy_to(&mut out);
        assert_eq!(out[6..96], pattern(100)[5..95]);
        assert_eq!(out[96..], [0; 4]);
    }

    #[test]
    fn alignment_looks_at_both_ends_of_every_piece() {
        assert!(cut(8192, &[4096]).is_aligned(512));
        assert!(!cut(8192, &[100]).is_aligned(512));
    }
}
