//! The disk as bytes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::DiskError;

/// A disk that can be read at any byte: an image file, a block device, a volume.
pub trait BlockRead {
    /// The size in bytes.
    ///
    /// # Errors
    /// The host cannot tell.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    /// The host cannot read, or the disk ends before the buffer is full.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl BlockRead for File {
    fn size(&self) -> io::Result<u64> {
        // Seeking also measures block devices, whose metadata says zero.
        (&mut &*self).seek(SeekFrom::End(0))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

impl BlockRead for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let source = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(source);
        Ok(())
    }
}

/// A contiguous part of a disk: a partition, or all of it.
#[derive(Clone)]
pub(super) struct Extent {
    disk: Rc<dyn BlockRead>,
    start: u64,
    len: u64,
}

impl Extent {
    /// The whole disk.
    pub(super) fn whole(disk: &Rc<dyn BlockRead>) -> io::Result<Self> {
        Ok(Self {
            disk: Rc::clone(disk),
            start: 0,
            len: disk.size()?,
        })
    }

    /// The part of this one at `start`, or nothing if it is empty or reaches outside.
    pub(super) fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (len > 0 && end <= self.len).then(|| Self {
            disk: Rc::clone(&self.disk),
            start: self.start + start,
            len,
        })
    }

    /// The length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buffer` from byte `offset` of this part.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "a structure points beyond the end of its partition",
            ));
        }
        self.disk.read_at(self.start + offset, buffer)
    }

    /// `len` bytes from `offset`, of a length that the caller has bounded.
    pub(super) fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>, DiskError> {
        let mut buffer = vec![0; len];
        self.read(offset, &mut buffer)?;
        Ok(buffer)
    }
}
