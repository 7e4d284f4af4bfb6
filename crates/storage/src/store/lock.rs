//! The lock on an image: one writer, or any number of readers.
//!
//! It consists of open-file-description locks on single bytes, by the protocol and on the bytes that
//! QEMU uses, so that Mica and QEMU keep out of each other's images. For each permission `p`, byte
//! `100 + p` is locked by who uses it and byte `200 + p` by who does not share it; all locks are of the
//! shared kind, and a conflict is found by looking for others' after setting one's own.
//!
//! A lock lasts until the last reference to the open file is gone, and a request that the kernel still
//! has in flight holds one. So the lock of a process that was killed is released only when its last
//! write has landed or will never land: a successor that waits for it cannot be overtaken.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::uring::{lock_byte, locked_by_other};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How long to sleep between two looks at a lock that another process has.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

fn used(read_only: bool) -> &'static [i64] {
    if read_only { &[READ] } else { &[READ, WRITE] }
}

const NOT_SHARED: [i64; 2] = [WRITE, RESIZE];

/// Sets the locks on `file` without looking for others': the file's owner holds them already, and its
/// further descriptions need the same.
pub(crate) fn set(file: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    for permission in used(read_only) {
        lock_byte(file, USED + permission)?;
    }
    for permission in NOT_SHARED {
        lock_byte(file, UNSHARED + permission)?;
    }
    Ok(())
}

fn conflict(file: BorrowedFd<'_>, read_only: bool) -> io::Result<bool> {
    for permission in used(read_only) {
        if locked_by_other(file, UNSHARED + permission)? {
            return Ok(true);
        }
    }
    for permission in NOT_SHARED {
        if locked_by_other(file, USED + permission)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Locks `file`, waiting for at most `patience`. `false` if another process has it still.
pub(crate) fn acquire(file: &impl AsFd, read_only: bool, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        // Looking first keeps a process that waits from disturbing one that starts.
        if !conflict(file.as_fd(), read_only)? {
            set(file.as_fd(), read_only)?;
            return Ok(!conflict(file.as_fd(), read_only)?);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
