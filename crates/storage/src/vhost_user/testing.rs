//! What several of the tests need.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

use super::memory::{Memory, RegionKey, Regions};

/// Guest memory of `len` bytes from address zero on.
pub(crate) fn memory(len: u64) -> Arc<Memory> {
    let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    let key = RegionKey {
        guest: 0,
        len,
        user: 0,
    };
    let mut regions = Regions::default();
    regions.add(key, file, 0, &Arc::default()).unwrap();
    Arc::new(regions.memory().unwrap())
}
