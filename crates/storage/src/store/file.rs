//! A store in a file or a block device.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use super::{Geometry, Health, Store, StoreQueue, lock};
use crate::uring::{Ring, Threads};

/// The unit of virtio-blk and of every image: sizes are multiples of it.
const SECTOR: u64 = 512;

/// What `O_DIRECT` needs where the system does not say (Linux before 6.1): good for every device.
const CAUTIOUS_ALIGNMENT: u32 = 4096;

/// How to open a file as a store.
#[derive(Clone, Debug)]
pub struct FileStoreOptions {
    /// Refuse writes, and share the file with other readers.
    pub read_only: bool,
    /// Go around the page cache (`O_DIRECT`).
    pub direct: bool,
    /// How long to wait for another process to let go of the file. A process that was killed may keep
    /// it until its last write has landed.
    pub lock_patience: Duration,
    /// Use threads even where io_uring is to be had.
    pub threads_only: bool,
}

impl Default for FileStoreOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            direct: false,
            lock_patience: Duration::from_secs(5),
            threads_only: false,
        }
    }
}

/// How requests reach the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// One io_uring for each queue.
    IoUring,
    /// A few threads for each queue, for the reason given.
    Threads(String),
}

/// Why a file cannot be a store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    System {
        /// What was tried, in the infinitive.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Its size is no whole number of sectors.
    #[error(
        "{} has {size} bytes, which is no multiple of {unit}; extend it with: truncate -s %{unit} {0}",
        path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What the size should be a multiple of.
        unit: u64,
    },
    /// Another process has it.
    #[error(
        "{} is in use by another process ({}); stop that, or open it with --read-only on both sides",
        .0.display(),
        if *.1 { "which writes to it" } else { "which does not share it" }
    )]
    Locked(PathBuf, bool),
}

/// A file or block device.
pub struct FileStore {
    file: File,
    path: PathBuf,
    geometry: Geometry,
    /// What memory must be aligned to, in bytes.
    memory_alignment: usize,
    options: FileStoreOptions,
    engine: Engine,
    health: Arc<Health>,
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore")
            .field("path", &self.path)
            .field("geometry", &self.geometry)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl FileStore {
    /// Opens and locks `path`.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the file and what to do.
    pub fn open(path: &Path, options: FileStoreOptions) -> Result<Self, OpenError> {
        let failed = |action| {
            move |source: io::Error| OpenError::System {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = open_file(path, &options).map_err(failed("open"))?;
        let kind = file.metadata().map_err(failed("look at"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind(path.to_owned()));
        }
        if !lock::acquire(&file, options.read_only, options.lock_patience)
            .map_err(failed("lock"))?
        {
            return Err(OpenError::Locked(path.to_owned(), options.read_only));
        }
        // For block devices, too, the end is where BLKGETSIZE64 says.
        let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        let (memory_alignment, block_size) = alignment(&file, kind.is_block_device(), &options);
        let unit = u64::from(block_size).max(SECTOR);
        if size % unit != 0 {
            let path = path.to_owned();
            return Err(OpenError::Size { path, size, unit });
        }
        let engine = match options.threads_only {
            true => Engine::Threads("threads were asked for".into()),
            false => Ring::probe().map_or_else(
                |error| Engine::Threads(format!("io_uring is refused: {error}")),
                |()| Engine::IoUring,
            ),
        };
        Ok(Self {
            geometry: Geometry {
                capacity_bytes: size,
                block_size,
                optimal_block_size: block_size.max(4096),
                read_only: options.read_only,
            },
            file,
            path: path.to_owned(),
            memory_alignment,
            options,
            engine,
            health: Arc::default(),
        })
    }

    /// As it was given to [`FileStore::open`].
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How requests reach the kernel.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// An open file description for one queue. The kernel reports a failed writeback once to each
    /// description, so that with one for each queue no queue's flush takes the report from another's.
    fn description(&self) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let opened = open_file(Path::new(&path), &self.options).and_then(|file| {
            lock::set(file.as_fd(), self.options.read_only)?;
            Ok(file)
        });
        // Without /proc, or with privileges dropped since, the queues share a description; then the
        // store's health is what passes a failure on.
        opened.or_else(|_| self.file.try_clone())
    }
}

impl Store for FileStore {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn queue(&self, depth: u16) -> io::Result<Box<dyn StoreQueue>> {
        let target = Target {
            file: self.description()?,
            geometry: self.geometry,
            memory_alignment: self.memory_alignment,
            health: self.health.clone(),
        };
        Ok(match self.engine {
            Engine::IoUring => Box::new(Ring::new(target, depth)?),
            Engine::Threads(_) => Box::new(Threads::new(target)?),
        })
    }
}

/// What a queue's engine works on.
pub(crate) struct Target {
    pub(crate) file: File,
    pub(crate) geometry: Geometry,
    pub(crate) memory_alignment: usize,
    pub(crate) health: Arc<Health>,
}

fn open_file(path: &Path, options: &FileStoreOptions) -> io::Result<File> {
    let mut flags = OFlags::CLOEXEC | OFlags::LARGEFILE;
    flags |= match options.read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// What memory and offsets must be aligned to.
fn alignment(file: &File, device: bool, options: &FileStoreOptions) -> (usize, u32) {
    let sane = |value: u32| value.is_power_of_two().then_some(value.clamp(512, 1 << 16));
    let sector = match device {
        true => rustix::fs::ioctl_blksszget(file).ok().and_then(sane),
        false => None,
    };
    if !options.direct {
        return (1, sector.unwrap_or(512));
    }
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|found| found.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .and_then(|found| {
            let memory = found.stx_dio_mem_align;
            let memory = memory.is_power_of_two().then_some(memory)?;
            Some((memory, sane(found.stx_dio_offset_align)?))
        });
    let (memory, offset) = told.unwrap_or((CAUTIOUS_ALIGNMENT, CAUTIOUS_ALIGNMENT));
    (memory as usize, offset.max(sector.unwrap_or(512)))
}
