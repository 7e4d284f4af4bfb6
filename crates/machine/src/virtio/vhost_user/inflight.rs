//! The in-flight region: memory in which a backend notes what it works on, and which outlives it.
//!
//! Its layout is between one backend and the next (vhost-user, "Inflight I/O tracking"); we keep the
//! descriptor, and its bytes when the machine's state is saved. It is never mapped here.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use vhost::vhost_user::message::FrontendReq;

use super::handshake::Link;
use super::wire::{BackendError, Body, Deadline};

/// The largest region accepted: 64 rings of 1024 descriptors need little more than 1 MiB.
const MAX_SIZE: u64 = 4 << 20;

/// `GET_INFLIGHT_FD`'s and `SET_INFLIGHT_FD`'s body: size, offset, rings, ring size, padding.
const BODY_LEN: usize = 24;

/// One region. Clones share it.
#[derive(Clone)]
pub(super) struct Inflight {
    file: Arc<File>,
    size: u64,
    offset: u64,
    rings: u16,
    ring_size: u16,
}

/// The region in the machine's saved state.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct SavedInflight {
    #[n(0)]
    rings: u16,
    #[n(1)]
    ring_size: u16,
    #[cbor(n(2), with = "minicbor::bytes")]
    bytes: Vec<u8>,
}

impl Inflight {
    /// Asks the backend for a fresh region.
    pub(super) fn get(
        link: &mut Link,
        rings: u16,
        ring_size: u16,
        deadline: Deadline,
    ) -> Result<Self, BackendError> {
        let request = FrontendReq::GET_INFLIGHT_FD;
        let ask = body(0, 0, rings, ring_size);
        let reply = link.wire.call(request, &ask, &[], deadline)?;
        let body: [u8; BODY_LEN] = reply.body()?;
        let word = |at: usize| {
            u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes are eight"))
        };
        let (size, offset) = (word(0), word(8));
        let file = File::from(reply.into_fd()?);
        // Only memory has seals: no descriptor of a backend's making can block us in `save`.
        fcntl_get_seals(&file).map_err(|_| BackendError::malformed(request, "it is no memfd"))?;
        let end = offset.checked_add(size);
        if size == 0 || size > MAX_SIZE || end.is_none_or(|end| Some(end) > len(&file)) {
            return Err(BackendError::malformed(
                request,
                "the region's size is wrong",
            ));
        }
        Ok(Self {
            file: Arc::new(file),
            size,
            offset,
            rings,
            ring_size,
        })
    }

    /// Hands the region to the backend.
    pub(super) fn set(&self, link: &mut Link, deadline: Deadline) -> Result<(), BackendError> {
        let body = body(self.size, self.offset, self.rings, self.ring_size);
        let fds = [self.file.as_raw_fd()];
        link.wire
            .post(FrontendReq::SET_INFLIGHT_FD, &body, &fds, deadline)
    }

    /// The region's bytes. One that its backend has truncated reads as far as it goes.
    pub(super) fn save(&self) -> SavedInflight {
        let size = usize::try_from(self.size).expect("the size is at most MAX_SIZE");
        let mut bytes = vec![0; size];
        let _ = self.file.read_exact_at(&mut bytes, self.offset);
        SavedInflight {
            rings: self.rings,
            ring_size: self.ring_size,
            bytes,
        }
    }

    /// A new region with those bytes.
    pub(super) fn restore(saved: &SavedInflight) -> Result<Self, String> {
        let size = saved.bytes.len() as u64;
        if size == 0 || size > MAX_SIZE {
            return Err(format!("an in-flight region of {size} bytes"));
        }
        let file =
            memory_file(&saved.bytes).map_err(|error| format!("in-flight memfd: {error}"))?;
        Ok(Self {
            file: Arc::new(file),
            size,
            offset: 0,
            rings: saved.rings,
            ring_size: saved.ring_size,
        })
    }
}

fn memory_file(bytes: &[u8]) -> std::io::Result<File> {
    let fd: OwnedFd = memfd_create(
        "vhost-inflight",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    let file = File::from(fd);
    file.write_all_at(bytes, 0)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

fn len(file: &File) -> Option<u64> {
    file.metadata().ok().map(|metadata| metadata.len())
}

fn body(size: u64, offset: u64, rings: u16, ring_size: u16) -> Body {
    Body::default()
        .u64(size)
        .u64(offset)
        .u16(rings)
        .u16(ring_size)
        .u32(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_comes_back_byte_for_byte() {
        let saved = SavedInflight {
            rings: 2,
            ring_size: 128,
            bytes: (0..=255).collect(),
        };
        assert_eq!(Inflight::restore(&saved).unwrap().save(), saved);
    }

    #[test]
    fn a_region_without_bounds_is_refused() {
        for size in [0, MAX_SIZE as usize + 1] {
            let saved = SavedInflight {
                rings: 1,
                ring_size: 1,
                bytes: vec![0; size],
            };
            assert!(Inflight::restore(&saved).is_err());
        }
    }
}
