//! The kernel's log of the pages that vCPUs write.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::vm::Vm;
use crate::engine::EngineError;
use crate::memory::dirty::{DirtyPages, DirtySource};

/// The dirty log of all memory slots.
pub(super) struct KvmDirtyLog {
    vm: Arc<Vm>,
}

impl KvmDirtyLog {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        Self { vm }
    }
}

impl DirtySource for KvmDirtyLog {
    fn start(&self) -> io::Result<()> {
        // Turning it off first forgets a log that was running.
        self.vm.set_dirty_log(false).map_err(into_io)?;
        self.vm.set_dirty_log(true).map_err(into_io)
    }

    fn stop(&self) -> io::Result<()> {
        self.vm.set_dirty_log(false).map_err(into_io)
    }

    fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
        for (slot, region) in (0..).zip(self.vm.memory().iter()) {
            let words = self
                .vm
                .fd
                .get_dirty_log(slot, region.size())
                .map_err(io::Error::from)?;
            into.add_words(region.start_addr(), &words);
        }
        Ok(())
    }
}

fn into_io(error: EngineError) -> io::Error {
    io::Error::new(error.source.kind(), error)
}
