//! The kernel and the initrd as bytes that go into guest memory without a stop in between, or as
//! pages that are mapped there.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Target};
use crate::memory::{GuestMemory, overlay};

/// A kernel or an initrd: an open file, or bytes that were found inside a disk image.
#[derive(Debug)]
pub enum BootFile {
    /// A file on the host. Its offset is moved.
    File(File),
    /// Bytes in the host's memory.
    Bytes(Vec<u8>),
}

impl From<File> for BootFile {
    fn from(file: File) -> Self {
        Self::File(file)
    }
}

impl From<Vec<u8>> for BootFile {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl BootFile {
    /// The size in bytes.
    pub(super) fn size(&self) -> io::Result<u64> {
        match self {
            // Seeking also measures block devices, whose metadata says zero.
            Self::File(file) => (&mut &*file).seek(SeekFrom::End(0)),
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Fills `buffer` from `offset`; an end before that is an error.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(buffer, offset),
            Self::Bytes(bytes) => {
                let source = slice(bytes, offset, buffer.len() as u64)
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(source);
                Ok(())
            }
        }
    }

    /// `len` bytes from `offset`, of a length that the caller has bounded.
    pub(super) fn read_vec(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; len];
        self.read_at(offset, &mut buffer)?;
        Ok(buffer)
    }

    /// Puts `len` bytes from `offset` at guest address `to`: a file's whole pages by mapping them,
    /// if `target` takes that, and all else by copying. `written` says that the guest will write
    /// there.
    pub(super) fn put_into_guest(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        target: &Target<'_>,
        to: u64,
        written: bool,
    ) -> Result<(), BootError> {
        let mut mapped = 0;
        if let (true, Self::File(file)) = (target.map, self) {
            mapped = overlay(target.memory, GuestAddress(to), file, offset, len)
                .map_err(|source| BootError::Read { what, source })?;
        }
        if mapped > 0 && written {
            target.written.borrow_mut().push(to..to + mapped);
        }
        let (offset, len, to) = (offset + mapped, len - mapped, to + mapped);
        self.copy_to_guest(what, offset, len, target.memory, to)
    }

    /// Copies `len` bytes from `offset` to guest address `to`; a file's bytes are read straight
    /// into guest memory.
    fn copy_to_guest(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        to: u64,
    ) -> Result<(), BootError> {
        let read = |source| BootError::Read { what, source };
        let memory_error = |source| BootError::Memory { what, source };
        match self {
            Self::File(file) => {
                let mut file: &File = file;
                file.seek(SeekFrom::Start(offset)).map_err(read)?;
                let mut done = 0;
                while done < len {
                    let rest = usize::try_from(len - done)
                        .map_err(|_| read(io::ErrorKind::FileTooLarge.into()))?;
                    let count = memory
                        .read_volatile_from(GuestAddress(to + done), &mut file, rest)
                        .map_err(memory_error)?;
                    if count == 0 {
                        return Err(read(io::ErrorKind::UnexpectedEof.into()));
                    }
                    done += count as u64;
                }
                Ok(())
            }
            Self::Bytes(bytes) => {
                let source = slice(bytes, offset, len)
                    .ok_or_else(|| read(io::ErrorKind::UnexpectedEof.into()))?;
                memory
                    .write_slice(source, GuestAddress(to))
                    .map_err(memory_error)
            }
        }
    }
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}
