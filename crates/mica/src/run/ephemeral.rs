//! A private copy of a disk: it has no name, and is gone when its last user is.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mica_storage::store::{FileStore, FileStoreOptions};
use rustix::fs::{CWD, Mode, OFlags, SeekFrom, ioctl_ficlone, openat, seek};
use rustix::io::Errno;

/// How much is looked at at a time; blank pieces become holes.
const PIECE: usize = 64 << 10;

/// An open disk without a name.
pub(crate) struct EphemeralDisk {
    file: File,
}

impl EphemeralDisk {
    /// Copies a disk image or block device that nobody writes meanwhile. The copy lies beside an
    /// image, where the file system may share its blocks, else in the directory for temporary files.
    ///
    /// # Errors
    ///
    /// The disk is in use or unreadable, or there is no room for the copy.
    pub(crate) fn of(path: &Path) -> Result<Self, Box<dyn Error>> {
        let lock = FileStoreOptions {
            read_only: true,
            lock_patience: Duration::ZERO,
            ..FileStoreOptions::default()
        };
        let _lock = FileStore::open(path, lock)?;
        let failed = |error| format!("cannot copy {}: {error}", path.display());
        let source = File::open(path).map_err(failed)?;
        let file = create_beside(path, &source).map_err(failed)?;
        if ioctl_ficlone(&file, &source).is_err() {
            copy(&source, &file).map_err(failed)?;
        }
        Ok(Self { file })
    }

    /// A path that this process can open it by, as often as it likes.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

fn create_beside(path: &Path, source: &File) -> io::Result<File> {
    let create = |directory: &Path| {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR)
    };
    let parent = path.parent().map(|parent| parent.join(".")).filter(|_| {
        !source
            .metadata()
            .is_ok_and(|it| it.file_type().is_block_device())
    });
    let beside = parent.map(|parent| create(&parent));
    match beside {
        Some(Ok(file)) => Ok(file.into()),
        _ => Ok(create(&std::env::temp_dir())?.into()),
    }
}

/// Copies what is not blank.
fn copy(source: &File, target: &File) -> io::Result<()> {
    let size = seek(source, SeekFrom::End(0))?;
    target.set_len(size)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        at = match seek(source, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Only a hole is left.
            Err(Errno::NXIO) => return Ok(()),
            // Devices have no holes.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let length = (size - at).min(PIECE as u64) as usize;
        let piece = &mut piece[..length];
        source.read_exact_at(piece, at)?;
        if piece.iter().any(|&byte| byte != 0) {
            target.write_all_at(piece, at)?;
        }
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"front", 0).unwrap();
        file.write_all_at(b"middle", (3 << 20) + 100).unwrap();
        let original = std::fs::read(&path).unwrap();

        let copy = EphemeralDisk::of(&path).unwrap();
        assert_eq!(std::fs::read(copy.path()).unwrap(), original);
        let again = File::options().write(true).open(copy.path()).unwrap();
        again.write_all_at(b"changed", 0).unwrap();
        assert!(std::fs::read(copy.path()).unwrap().starts_with(b"changed"));
        assert_eq!(std::fs::read(&path).unwrap(), original);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_disk_in_use_is_not_copied() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let _user = FileStore::open(&path, FileStoreOptions::default()).unwrap();
        let error = EphemeralDisk::of(&path).err().unwrap().to_string();
        assert!(error.contains("in use"), "{error}");
    }
}
