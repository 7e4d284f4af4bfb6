//! The log of pages that processors write.
//!
//! It is a coarse one: while it is on, every page counts as written, which [`DirtySource`] allows.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::engine::Shared;
use crate::memory::dirty::{DirtyPages, DirtySource};

/// All vCPUs' log.
pub(super) struct SoftDirtyLog {
    shared: Arc<Shared>,
    on: AtomicBool,
}

impl SoftDirtyLog {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            on: AtomicBool::new(false),
        }
    }
}

impl DirtySource for SoftDirtyLog {
    fn start(&self) -> io::Result<()> {
        self.on.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.on.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
        if self.on.load(Ordering::SeqCst) {
            for region in self.shared.memory.iter() {
                into.mark(region.start_addr(), region.len());
            }
        }
        Ok(())
    }
}
