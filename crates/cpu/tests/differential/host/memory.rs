//! Mapped memory, and the engine's RAM made of it.

use mica_cpu::{Ram, RamRange};

/// Anonymous memory that a forked child shares.
pub(crate) fn map_shared(len: usize) -> *mut u8 {
    // SAFETY: a new mapping wherever the kernel likes.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
            0,
        )
    };
    assert!(at != libc::MAP_FAILED, "mmap of {len} bytes");
    at.cast()
}

/// Physical memory from zero that is never unmapped.
#[derive(Clone, Copy)]
pub(crate) struct Physical {
    at: *mut u8,
    len: usize,
}

impl Physical {
    pub(crate) fn new(len: usize) -> Self {
        Self {
            at: map_shared(len),
            len,
        }
    }

    /// All of it as RAM.
    pub(crate) fn ram(self) -> Ram {
        // SAFETY: mapped for ever, and nobody makes a reference to it.
        Ram::new(vec![unsafe { RamRange::new(0, self.len as u64, self.at) }])
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        assert!(address as usize + bytes.len() <= self.len);
        // SAFETY: inside the mapping; the processor does not run meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.at.add(address as usize),
                bytes.len(),
            );
        }
    }

    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) {
        assert!(address as usize + bytes.len() <= self.len);
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.at.add(address as usize),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
    }

    pub(crate) fn write_u64(&self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }
}
