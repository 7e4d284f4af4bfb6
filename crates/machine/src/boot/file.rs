//! The kernel and the initrd as bytes that go into guest memory without a stop in between.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom as RawSeek;
use rustix::io::{Errno, retry_on_intr};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::BootError;
use crate::memory::GuestMemory;

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

    /// Copies `len` bytes from `offset` to guest address `to`.
    ///
    /// The bytes go into the memory's own file without passing through a mapping: no page fault for
    /// each page, and no page is cleared only to be filled. That is a third of the time of reading
    /// into the mapping, which is what remains for memory and files that do not take it.
    pub(super) fn copy_to_guest(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        memory: &GuestMemory,
        to: u64,
    ) -> Result<(), BootError> {
        let read = |source| BootError::Read { what, source };
        let sent = self.send(offset, len, memory, to).map_err(read)?;
        let (offset, len, to) = (offset + sent, len - sent, to + sent);
        match self {
            Self::File(file) => read_into(file, what, offset, len, memory, to),
            Self::Bytes(bytes) => {
                let source = slice(bytes, offset, len)
                    .ok_or_else(|| read(io::ErrorKind::UnexpectedEof.into()))?;
                memory
                    .write_slice(source, GuestAddress(to))
                    .map_err(|source| BootError::Memory { what, source })
            }
        }
    }

    /// Copies into the memory's file as far as that goes, and says how many bytes it was.
    fn send(&self, offset: u64, len: u64, memory: &GuestMemory, to: u64) -> io::Result<u64> {
        let mut done = 0;
        while done < len {
            let Some(region) = memory.find_region(GuestAddress(to + done)) else {
                break;
            };
            let start = to + done - region.start_addr().0;
            let piece = (len - done).min(region.len() - start);
            let count = self.send_to_region(offset + done, piece, region, start)?;
            if count == 0 {
                break;
            }
            region.bitmap().mark_dirty(start as usize, count);
            done += count as u64;
        }
        Ok(done)
    }

    /// One write of at most `len` bytes to `start` in a region; 0 where the memory or the file does
    /// not take it, or the file ends.
    fn send_to_region<B: Bitmap>(
        &self,
        offset: u64,
        len: u64,
        region: &GuestRegionMmap<B>,
        start: u64,
    ) -> io::Result<usize> {
        let backing = match region.file_offset() {
            Some(backing) if region.is_hugetlbfs() != Some(true) => backing,
            _ => return Ok(0), // hugetlbfs has no write
        };
        let at = backing.start() + start;
        let sent = retry_on_intr(|| match self {
            Self::File(file) => {
                // Nobody else moves the memory file's offset: backends map it.
                rustix::fs::seek(backing.file(), RawSeek::Start(at))?;
                let count = usize::try_from(len).unwrap_or(usize::MAX);
                rustix::fs::sendfile(backing.file(), file, Some(&mut offset.clone()), count)
            }
            Self::Bytes(bytes) => match slice(bytes, offset, len) {
                Some(bytes) => rustix::io::pwrite(backing.file(), bytes, at),
                None => Ok(0),
            },
        });
        match sent {
            // The file's file system cannot do it.
            Err(Errno::INVAL | Errno::NOSYS) => Ok(0),
            sent => Ok(sent?),
        }
    }
}

/// Reads straight into guest memory.
fn read_into(
    file: &File,
    what: &'static str,
    offset: u64,
    len: u64,
    memory: &GuestMemory,
    to: u64,
) -> Result<(), BootError> {
    let read = |source| BootError::Read { what, source };
    let mut file: &File = file;
    file.seek(SeekFrom::Start(offset)).map_err(read)?;
    let mut done = 0;
    while done < len {
        let rest =
            usize::try_from(len - done).map_err(|_| read(io::ErrorKind::FileTooLarge.into()))?;
        let count = memory
            .read_volatile_from(GuestAddress(to + done), &mut file, rest)
            .map_err(|source| BootError::Memory { what, source })?;
        if count == 0 {
            return Err(read(io::ErrorKind::UnexpectedEof.into()));
        }
        done += count as u64;
    }
    Ok(())
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mica_base::units::Bytes as Size;

    use super::*;
    use crate::memory::dirty::{DirtyPages, DirtySource, DirtyTracker};
    use crate::memory::{MemoryOptions, allocate};

    /// Bytes of which no two pages are alike.
    fn content() -> Vec<u8> {
        (0..100_000u32).map(|at| (at % 251) as u8).collect()
    }

    fn files() -> [BootFile; 2] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content()).unwrap();
        [BootFile::File(file), BootFile::Bytes(content())]
    }

    #[test]
    fn what_is_copied_is_there_and_dirty() {
        for file in files() {
            let memory = allocate(Size::mib(1), &MemoryOptions::default()).unwrap();
            memory.write_slice(&[9; 100], GuestAddress(0x1ff0)).unwrap();
            let tracker = DirtyTracker::new(memory.clone(), vec![]);
            tracker.start().unwrap();
            file.copy_to_guest("kernel", 333, 90_000, &memory, 0x2005)
                .unwrap();
            let mut copied = vec![0; 90_000];
            memory
                .read_slice(&mut copied, GuestAddress(0x2005))
                .unwrap();
            assert_eq!(copied, content()[333..90_333]);
            // Its neighbours are as they were.
            assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2004)).unwrap(), 9);
            let after = GuestAddress(0x2005 + 90_000);
            assert_eq!(memory.read_obj::<u8>(after).unwrap(), 0);
            let mut dirty = DirtyPages::new(&memory);
            tracker.drain(&mut dirty).unwrap();
            assert_eq!(dirty.count(), (5 + 90_000u64).div_ceil(4096));
        }
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        for file in files() {
            let memory = allocate(Size::mib(1), &MemoryOptions::default()).unwrap();
            let error = file.copy_to_guest("initrd", 99_000, 4096, &memory, 0);
            assert!(matches!(error, Err(BootError::Read { what: "initrd", .. })));
        }
    }
}
