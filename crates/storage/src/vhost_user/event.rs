//! The notification descriptors of a queue. They come from the frontend, which may hand in anything that
//! can be read and written, so nothing here waits on them but `poll`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

fn nonblocking(file: File) -> io::Result<File> {
    fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
    Ok(file)
}

/// What the driver rings when there are available buffers.
pub(crate) struct Doorbell(File);

impl Doorbell {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        nonblocking(file).map(Self)
    }

    /// A second handle to the same doorbell.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Makes it unreadable until it is rung again. `false` if it never will be.
    pub(crate) fn clear(&self) -> bool {
        match rustix::io::read(&self.0, &mut [0u8; 8]) {
            Ok(len) => len > 0,
            Err(error) => matches!(error, rustix::io::Errno::AGAIN | rustix::io::Errno::INTR),
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the device raises towards the driver. The frontend may exchange it at any time, as QEMU does
/// when an interrupt vector is masked.
#[derive(Default)]
pub(crate) struct Signal(Mutex<Option<File>>);

impl Signal {
    pub(crate) fn set(&self, file: Option<File>) -> io::Result<()> {
        let file = file.map(nonblocking).transpose()?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = file;
        Ok(())
    }

    pub(crate) fn raise(&self) {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_ref() {
            // A counter at its maximum has been raised already; a closed pipe has no listener.
            let _ = rustix::io::write(file, &1u64.to_ne_bytes());
        }
    }
}

/// Tells a thread to come to its end. A flag beside the descriptor, because a thread that always has
/// work does not sleep, and a hostile driver can see to it that there is.
pub(crate) struct Stop {
    fd: OwnedFd,
    flag: AtomicBool,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            flag: AtomicBool::new(false),
        })
    }

    pub(crate) fn request(&self) {
        self.flag.store(true, Ordering::SeqCst);
        // A full counter is readable already.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    pub(crate) fn is_requested(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }
}

impl AsFd for Stop {
    /// Readable once the stop is requested.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
