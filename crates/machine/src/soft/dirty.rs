//! The log of pages that processors write.

use std::io;
use std::sync::Arc;

use mica_base::units::PAGE_SIZE;
use vm_memory::GuestAddress;

use super::engine::Shared;
use crate::memory::dirty::{DirtyPages, DirtySource};

/// All vCPUs' log.
pub(super) struct SoftDirtyLog {
    shared: Arc<Shared>,
}

impl SoftDirtyLog {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl DirtySource for SoftDirtyLog {
    fn start(&self) -> io::Result<()> {
        self.shared.ram.set_dirty_log(true);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.shared.ram.set_dirty_log(false);
        Ok(())
    }

    fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
        let visit = |address| into.mark(GuestAddress(address), PAGE_SIZE);
        self.shared.ram.take_dirty(visit);
        Ok(())
    }
}
