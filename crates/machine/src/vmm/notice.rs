//! What vCPU threads and devices tell the event loop.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::debug::DebugCall;
use super::vcpus::VcpuEnd;
use crate::legacy::{PowerEvent, PowerSink};

/// More than this many waiting notices are one guest repeating itself; the rest is dropped.
const MAX_WAITING: usize = 64;

/// Something for the event loop to act on.
#[derive(Debug)]
pub(super) enum Notice {
    /// The guest used a power or reset register, or reports a panic.
    Power(PowerEvent),
    /// A vCPU cannot go on.
    VcpuEnd(VcpuEnd),
    /// A device lost its backend.
    NeedBackend { device: String, reason: String },
    /// A debugger wants something.
    Debug(DebugCall),
}

/// Notices on their way to the event loop, which an eventfd wakes.
pub(super) struct Mailbox {
    waiting: Mutex<VecDeque<Notice>>,
    event: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            waiting: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Notice>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn post(&self, notice: Notice) {
        let mut waiting = self.waiting();
        if waiting.len() < MAX_WAITING {
            waiting.push_back(notice);
        }
        // A counter that is not read yet is as good as a new one.
        let _ = self.event.write(1);
    }

    pub(super) fn take(&self) -> VecDeque<Notice> {
        let _ = self.event.read();
        std::mem::take(&mut *self.waiting())
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl PowerSink for Mailbox {
    fn request(&self, event: PowerEvent) {
        self.post(Notice::Power(event));
    }
}
