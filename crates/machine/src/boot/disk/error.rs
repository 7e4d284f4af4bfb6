//! Why nothing can be booted from a disk image.

use std::io;

/// Why a disk image gives no boot entry.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image could not be read.
    #[error("cannot read the disk: {0}")]
    Read(#[from] io::Error),
    /// The partition table breaks its own format, and so does its backup.
    #[error("the disk's partition table is malformed: {0}")]
    Table(&'static str),
    /// A file system breaks its own format or uses what is not supported.
    #[error("the file system is malformed: {0}")]
    FileSystem(String),
    /// A file that a boot entry names is missing.
    #[error("{path} is not on {volume}")]
    NotFound {
        /// The file's path.
        path: String,
        /// The partition.
        volume: String,
    },
    /// A path leads through more symbolic links than Linux follows.
    #[error("{0}: too many levels of symbolic links")]
    SymlinkLoop(String),
    /// A file is larger than Mica accepts.
    #[error("{path} has {len} bytes; at most {max} are accepted")]
    TooLarge {
        /// The file's path.
        path: String,
        /// Its size in bytes.
        len: u64,
        /// The bound in bytes.
        max: u64,
    },
    /// A boot loader's configuration cannot be understood.
    #[error("{path}: {reason}")]
    Config {
        /// The configuration file.
        path: String,
        /// What is wrong in it.
        reason: String,
    },
    /// There is no boot entry that starts Linux.
    #[error(
        "the disk has no boot entry for Linux: neither GRUB's grub.cfg nor loader/entries on {seen}"
    )]
    NoEntries {
        /// The file systems that were looked at.
        seen: String,
    },
    /// No boot entry has the title, identifier or index that was asked for.
    #[error("the disk has no boot entry '{wanted}'; it has {titles}")]
    NoSuchEntry {
        /// What was asked for.
        wanted: String,
        /// All titles.
        titles: String,
    },
}
