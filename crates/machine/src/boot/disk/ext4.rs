//! ext2, ext3 and ext4, by the ext4-view crate.
//!
//! The crate checks what it reads, but trusts some numbers as sizes of its own memory and loops.
//! These are bounded here, before it sees them: the superblock's counts, the journal's size, and
//! the sizes of the directories and links on a path.

use std::error::Error;

use ext4_view::{Ext4Error, Ext4Read, FileType};

use crate::boot::bytes::{u16_at, u32_at};

use super::DiskError;
use super::block::Extent;
use super::volume::{FileSystem, MAX_DIR_ENTRIES, Node};

const SUPERBLOCK: u64 = 1024;
/// 128 TiB in groups of the usual size.
const MAX_GROUPS: u64 = 1 << 20;
/// `mke2fs` makes journals of at most 1 GiB.
const MAX_JOURNAL: u64 = 4 << 30;
const MAX_DIRECTORY: u64 = 64 << 20;
/// `PATH_MAX` of Linux.
const MAX_LINK: u64 = 4096;

/// A file system that its superblock claims to be of this family.
pub(super) struct Ext4(ext4_view::Ext4);

impl Ext4Read for Extent {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(Extent::read(self, start_byte, dst)?)
    }
}

fn failed(error: Ext4Error) -> DiskError {
    DiskError::FileSystem(error.to_string())
}

impl Ext4 {
    /// Opens the file system; nothing if the magic is missing.
    pub(super) fn open(extent: &Extent) -> Result<Option<Self>, DiskError> {
        if extent.len() < SUPERBLOCK + 1024 {
            return Ok(None);
        }
        let superblock = extent.read_vec(SUPERBLOCK, 1024)?;
        if u16_at(&superblock, 0x38) != 0xef53 {
            return Ok(None);
        }
        check(extent, &superblock)
            .map_err(|reason| DiskError::FileSystem(format!("ext4: {reason}")))?;
        let fs = ext4_view::Ext4::load(Box::new(extent.clone())).map_err(failed)?;
        Ok(Some(Self(fs)))
    }
}

/// Bounds what ext4-view takes as given.
fn check(extent: &Extent, superblock: &[u8]) -> Result<(), &'static str> {
    const RECOVERY: u32 = 1 << 2;
    const BITS_64: u32 = 1 << 7;
    let incompatible = u32_at(superblock, 0x60);
    let block = match u32_at(superblock, 0x18) {
        log @ 0..=6 => 1024u64 << log,
        _ => return Err("its block size is larger than 64 KiB"),
    };
    let high = match incompatible & BITS_64 {
        0 => 0,
        _ => u64::from(u32_at(superblock, 0x150)) << 32,
    };
    let blocks = u64::from(u32_at(superblock, 0x04)) | high;
    if blocks
        .checked_mul(block)
        .is_none_or(|len| len > extent.len())
    {
        return Err("it is larger than its partition");
    }
    let groups = blocks / u64::from(u32_at(superblock, 0x20).max(1)) + 1;
    if groups > MAX_GROUPS {
        return Err("it has too many block groups");
    }
    if incompatible & RECOVERY == 0 {
        return Ok(());
    }
    match journal_len(extent, superblock, block) {
        Some(len) if len <= MAX_JOURNAL => Ok(()),
        Some(_) => Err("its journal is larger than 4 GiB"),
        None => Err("its journal's inode cannot be read"),
    }
}

/// The size in bytes of the journal's inode.
fn journal_len(extent: &Extent, superblock: &[u8], block: u64) -> Option<u64> {
    let index = u32_at(superblock, 0xe0).checked_sub(1)?;
    let per_group = u32_at(superblock, 0x28);
    let group = index.checked_div(per_group)?;
    let wide = u32_at(superblock, 0x60) & 1 << 7 != 0;
    let descriptor_len = match wide {
        true => u64::from(u16_at(superblock, 0xfe)).max(64),
        false => 32,
    };
    let first_block = u64::from(u32_at(superblock, 0x14));
    let at = (first_block + 1) * block + u64::from(group) * descriptor_len;
    let descriptor = extent.read_vec(at, descriptor_len as usize).ok()?;
    let high = if wide { u32_at(&descriptor, 0x28) } else { 0 };
    let table = u64::from(u32_at(&descriptor, 0x08)) | u64::from(high) << 32;
    let inode_len = match u32_at(superblock, 0x4c) {
        0 => 128,
        _ => u64::from(u16_at(superblock, 0x58)),
    };
    let offset = u64::from(index % per_group) * inode_len;
    let at = table.checked_mul(block)?.checked_add(offset)?;
    let inode = extent.read_vec(at, 128).ok()?;
    Some(u64::from(u32_at(&inode, 0x04)) | u64::from(u32_at(&inode, 0x6c)) << 32)
}

impl FileSystem for Ext4 {
    fn uuid(&self) -> String {
        self.0.uuid().to_string()
    }

    fn label(&self) -> String {
        self.0.label().to_str().unwrap_or_default().to_owned()
    }

    fn node(&self, path: &str) -> Result<Option<Node>, DiskError> {
        let metadata = match self.0.symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let len = metadata.len();
        match metadata.file_type() {
            FileType::Regular => Ok(Some(Node::File(len))),
            FileType::Directory if len <= MAX_DIRECTORY => Ok(Some(Node::Directory)),
            FileType::Symlink if len <= MAX_LINK => Ok(Some(Node::Link)),
            FileType::Directory | FileType::Symlink => Err(DiskError::TooLarge {
                path: path.into(),
                len,
                max: MAX_DIRECTORY,
            }),
            _ => Ok(None),
        }
    }

    fn link(&self, path: &str) -> Result<String, DiskError> {
        let target = self.0.read_link(path).map_err(failed)?;
        target
            .to_str()
            .map(str::to_owned)
            .map_err(|error| DiskError::FileSystem(format!("{path}: {error}")))
    }

    fn read(&self, path: &str, len: u64, to: &mut Vec<u8>) -> Result<(), DiskError> {
        use std::io::Read;
        let file = self.0.open(path).map_err(failed)?;
        let before = to.len();
        file.take(len).read_to_end(to)?;
        if (to.len() - before) as u64 != len {
            return Err(DiskError::FileSystem(format!("{path} ends early")));
        }
        Ok(())
    }

    fn list(&self, path: &str) -> Result<Vec<String>, DiskError> {
        let mut names = Vec::new();
        for entry in self.0.read_dir(path).map_err(failed)?.take(MAX_DIR_ENTRIES) {
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().as_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }
}
