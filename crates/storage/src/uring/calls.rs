//! System calls that rustix does not have.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::Piece;

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0, // as open file description locks demand
    }
}

/// Takes a shared open-file-description lock on the byte at `position`, without waiting.
pub(crate) fn lock_byte(file: BorrowedFd<'_>, position: i64) -> io::Result<()> {
    let lock = range(libc::F_RDLCK, position, 1);
    // SAFETY: `lock` is valid for the call, which does not keep its address.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Whether any other open file description has a lock on the byte at `position`.
pub(crate) fn locked_by_other(file: BorrowedFd<'_>, position: i64) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, position, 1);
    // SAFETY: `lock` is valid and writable for the call, which does not keep its address.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
    }
}

fn transferred(result: isize) -> io::Result<u32> {
    // A transfer is at most 0x7ffff000 bytes long (Linux `MAX_RW_COUNT`).
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `preadv(2)`.
///
/// # Safety
///
/// The pieces' memory stays mapped during the call.
pub(super) unsafe fn read(file: BorrowedFd<'_>, pieces: &[Piece], offset: u64) -> io::Result<u32> {
    let (vector, count) = (pieces.as_ptr().cast(), pieces.len() as i32);
    // SAFETY: a piece is laid out as an iovec; their number is bounded by `PIECES_MAX`; the memory
    // is the caller's promise.
    transferred(unsafe { libc::preadv(file.as_raw_fd(), vector, count, offset as i64) })
}

/// `pwritev2(2)`.
///
/// # Safety
///
/// As for [`read`].
pub(super) unsafe fn write(
    file: BorrowedFd<'_>,
    pieces: &[Piece],
    offset: u64,
    flags: i32,
) -> io::Result<u32> {
    let (vector, count) = (pieces.as_ptr().cast(), pieces.len() as i32);
    // SAFETY: as in `read`.
    transferred(unsafe { libc::pwritev2(file.as_raw_fd(), vector, count, offset as i64, flags) })
}
