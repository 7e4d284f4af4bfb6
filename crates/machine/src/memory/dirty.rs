//! Which pages of guest memory changed, whoever changed them.
//!
//! Three parties write to guest memory: the vCPUs, the VM process and the backends. Each is a
//! [`DirtySource`] with its own log; a [`DirtyTracker`] drains them all into one [`DirtyPages`].
//! A page may be reported though it did not change; a page that changed after `start` or after the
//! last `drain` is never missed.

mod pages;
mod vhost_log;

use std::io;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

pub use pages::{DirtyPages, Runs};
pub use vhost_log::VhostLog;

use super::GuestMemory;

/// One party's log of the pages it writes.
pub trait DirtySource: Send + Sync {
    /// From now on every write is logged. What was logged before is forgotten.
    ///
    /// # Errors
    ///
    /// The log cannot be kept.
    fn start(&self) -> io::Result<()>;

    /// No more logging.
    ///
    /// # Errors
    ///
    /// The party does not listen any more.
    fn stop(&self) -> io::Result<()>;

    /// Adds what was written since the last call to `into`, and forgets it.
    ///
    /// # Errors
    ///
    /// The log cannot be read; pages may be missing from `into`.
    fn drain(&self, into: &mut DirtyPages) -> io::Result<()>;
}

/// All sources of one guest as one.
#[derive(Clone)]
pub struct DirtyTracker {
    sources: Vec<Arc<dyn DirtySource>>,
}

impl DirtyTracker {
    /// Merges the VM process's own writes to `memory` with `others`: the engine's log and, when
    /// there are backends, the [`VhostLog`].
    #[must_use]
    pub fn new(memory: GuestMemory, others: Vec<Arc<dyn DirtySource>>) -> Self {
        let mut sources: Vec<Arc<dyn DirtySource>> = vec![Arc::new(OwnWrites { memory })];
        sources.extend(others);
        Self { sources }
    }
}

impl DirtySource for DirtyTracker {
    fn start(&self) -> io::Result<()> {
        for (started, source) in self.sources.iter().enumerate() {
            if let Err(error) = source.start() {
                for source in &self.sources[..started] {
                    // The first failure is what the caller needs to know.
                    let _ = source.stop();
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        // Every source is stopped, whatever another one says.
        self.sources
            .iter()
            .map(|source| source.stop())
            .fold(Ok(()), Result::and)
    }

    fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
        self.sources
            .iter()
            .try_for_each(|source| source.drain(into))
    }
}

/// What the VM process writes through [`GuestMemory`], logged by vm-memory at all times.
struct OwnWrites {
    memory: GuestMemory,
}

impl DirtySource for OwnWrites {
    fn start(&self) -> io::Result<()> {
        for region in self.memory.iter() {
            (**region).bitmap().written.reset();
        }
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }

    fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
        for region in self.memory.iter() {
            into.add_words(
                region.start_addr(),
                &(**region).bitmap().written.get_and_reset(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use mica_base::units::Bytes;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::memory::{MemoryOptions, allocate};

    /// A source that another test party writes to.
    #[derive(Default)]
    struct Scripted {
        pages: Mutex<Vec<GuestAddress>>,
        calls: Mutex<Vec<&'static str>>,
        fails: bool,
    }

    impl DirtySource for Scripted {
        fn start(&self) -> io::Result<()> {
            self.calls.lock().unwrap().push("start");
            if self.fails {
                return Err(io::Error::other("no log"));
            }
            Ok(())
        }

        fn stop(&self) -> io::Result<()> {
            self.calls.lock().unwrap().push("stop");
            Ok(())
        }

        fn drain(&self, into: &mut DirtyPages) -> io::Result<()> {
            for page in self.pages.lock().unwrap().drain(..) {
                into.mark(page, 1);
            }
            Ok(())
        }
    }

    #[test]
    fn sources_are_merged_and_forgotten() {
        let memory = allocate(Bytes::mib(1), &MemoryOptions::default()).unwrap();
        let other = Arc::new(Scripted::default());
        let tracker = DirtyTracker::new(memory.clone(), vec![other.clone()]);
        memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
        tracker.start().unwrap();
        memory.write_obj(1u64, GuestAddress(0x1ffc)).unwrap();
        other.pages.lock().unwrap().push(GuestAddress(0x3000));

        let mut dirty = DirtyPages::new(&memory);
        tracker.drain(&mut dirty).unwrap();
        assert_eq!(
            dirty.runs().collect::<Vec<_>>(),
            [(GuestAddress(0x1000), 0x3000)]
        );
        dirty.clear();
        tracker.drain(&mut dirty).unwrap();
        assert_eq!(dirty.count(), 0);
    }

    #[test]
    fn a_source_that_does_not_start_stops_the_others() {
        let memory = allocate(Bytes::mib(1), &MemoryOptions::default()).unwrap();
        let good = Arc::new(Scripted::default());
        let bad = Arc::new(Scripted {
            fails: true,
            ..Scripted::default()
        });
        let tracker = DirtyTracker::new(memory, vec![good.clone(), bad]);
        assert!(tracker.start().is_err());
        assert_eq!(*good.calls.lock().unwrap(), ["start", "stop"]);
    }
}
