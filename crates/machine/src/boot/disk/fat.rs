//! FAT12, FAT16 and FAT32 with long names, read-only (Microsoft's FAT specification, version
//! 1.03). Every chain is bounded by the size that its reader expects.

use std::cell::RefCell;

use crate::boot::bytes::{u16_at, u32_at};

use super::DiskError;
use super::block::Extent;
use super::volume::{FileSystem, MAX_DIR_ENTRIES, Node};

const ENTRY_LEN: usize = 32;
/// A directory has at most 65536 entries.
const MAX_DIRECTORY: u64 = 65536 * ENTRY_LEN as u64;
/// How much of the table is read at once; divisible by every entry's size.
const WINDOW: u64 = 3 * 1024;

const ATTRIBUTE_VOLUME: u8 = 0x08;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
const ATTRIBUTE_LONG_NAME: u8 = 0x0f;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Fat12,
    Fat16,
    Fat32,
}

/// A FAT file system whose boot sector is consistent.
pub(super) struct Fat {
    extent: Extent,
    width: Width,
    cluster_len: u64,
    /// Clusters are numbered from 2 to this, exclusively.
    cluster_end: u32,
    table: Extent,
    root: Root,
    data_at: u64,
    serial: u32,
    label: String,
    window: RefCell<(u64, Vec<u8>)>,
}

/// Where the root directory lies.
enum Root {
    Fixed(Extent),
    Chain(u32),
}

/// A directory entry.
struct Entry {
    name: String,
    attributes: u8,
    cluster: u32,
    len: u32,
}

fn malformed(reason: &str) -> DiskError {
    DiskError::FileSystem(format!("FAT: {reason}"))
}

impl Fat {
    /// Opens the file system; nothing if the boot sector is none of FAT.
    pub(super) fn open(extent: &Extent) -> Result<Option<Self>, DiskError> {
        if extent.len() < 512 {
            return Ok(None);
        }
        let boot = extent.read_vec(0, 512)?;
        let sector = u64::from(u16_at(&boot, 11));
        let per_cluster = u64::from(boot[13]);
        let is_fat = matches!(boot[0], 0xeb | 0xe9)
            && matches!(sector, 512 | 1024 | 2048 | 4096)
            && per_cluster.is_power_of_two()
            && matches!(boot[16], 1 | 2)
            && (boot[21] == 0xf0 || boot[21] >= 0xf8)
            && boot[510..] == [0x55, 0xaa];
        if !is_fat {
            return Ok(None);
        }
        Self::from_boot_sector(extent, &boot)
            .map(Some)
            .ok_or_else(|| malformed("its boot sector is inconsistent"))
    }

    fn from_boot_sector(extent: &Extent, boot: &[u8]) -> Option<Self> {
        let sector = u64::from(u16_at(boot, 11));
        let either = |short: usize, long: usize| match u16_at(boot, short) {
            0 => u64::from(u32_at(boot, long)),
            count => u64::from(count),
        };
        let table_len = either(22, 36) * sector;
        let table_at = u64::from(u16_at(boot, 14)) * sector;
        let root_len = (u64::from(u16_at(boot, 17)) * ENTRY_LEN as u64).next_multiple_of(sector);
        let root_at = table_at + table_len * u64::from(boot[16]);
        let data_at = root_at + root_len;
        let total = either(19, 32) * sector;
        let cluster_len = u64::from(boot[13]) * sector;
        let clusters = total.checked_sub(data_at)? / cluster_len;
        let width = match clusters {
            0..4085 => Width::Fat12,
            4085..65525 => Width::Fat16,
            _ => Width::Fat32,
        };
        // `mkfs.fat -F 32` makes small ones, which every driver tells by the empty short field.
        let width = if u16_at(boot, 22) == 0 {
            Width::Fat32
        } else {
            width
        };
        let identity = if width == Width::Fat32 { 67 } else { 39 };
        let root = match width {
            Width::Fat32 => Root::Chain(u32_at(boot, 44)),
            _ => Root::Fixed(extent.part(root_at, root_len)?),
        };
        if total > extent.len() || clusters > 0x0fff_fff5 {
            return None;
        }
        let label = String::from_utf8_lossy(&boot[identity + 4..identity + 15]);
        Some(Self {
            extent: extent.clone(),
            width,
            cluster_len,
            cluster_end: clusters as u32 + 2,
            table: extent.part(table_at, table_len)?,
            root,
            data_at,
            serial: u32_at(boot, identity),
            label: label.trim_end().to_owned(),
            window: RefCell::new((0, Vec::new())),
        })
    }

    /// The cluster that follows `cluster`; nothing at the chain's end.
    fn next(&self, cluster: u32) -> Result<Option<u32>, DiskError> {
        let index = u64::from(cluster);
        let (value, end) = match self.width {
            Width::Fat12 => {
                let pair = self.table_bytes(index + index / 2)? as u16;
                let value = if index % 2 == 0 {
                    pair & 0xfff
                } else {
                    pair >> 4
                };
                (value.into(), 0xff8)
            }
            Width::Fat16 => (self.table_bytes(index * 2)? & 0xffff, 0xfff8),
            Width::Fat32 => (self.table_bytes(index * 4)? & 0x0fff_ffff, 0x0fff_fff8),
        };
        match value {
            value if value >= end => Ok(None),
            value if (2..self.cluster_end).contains(&value) => Ok(Some(value)),
            _ => Err(malformed("a cluster chain leads nowhere")),
        }
    }

    /// Up to four bytes of the table at `offset`, little-endian.
    fn table_bytes(&self, offset: u64) -> Result<u32, DiskError> {
        let mut window = self.window.borrow_mut();
        let inside = |start: u64, len: u64| start <= offset && offset + 4 <= start + len;
        if !inside(window.0, window.1.len() as u64) {
            let len = self.table.len().saturating_sub(offset).min(WINDOW) as usize;
            window.1 = self.table.read_vec(offset, len)?;
            // The table's last FAT12 and FAT16 entries have fewer than four bytes behind them.
            window.1.resize(len + 2, 0);
            window.0 = offset;
        }
        let at = (offset - window.0) as usize;
        let bytes = window.1.get(at..at + 4);
        bytes
            .map(|bytes| u32_at(bytes, 0))
            .ok_or_else(|| malformed("its table is too short"))
    }

    /// Appends the chain from `first` to `to`, up to `len` bytes; neighbouring clusters are read
    /// at once.
    fn read_chain(&self, first: u32, len: u64, to: &mut Vec<u8>) -> Result<u64, DiskError> {
        let mut done = 0;
        let mut cluster = Some(first).filter(|first| (2..self.cluster_end).contains(first));
        while let Some(start) = cluster
            && done < len
        {
            let mut count = 1;
            cluster = self.next(start)?;
            while cluster == Some(start + count)
                && u64::from(count) * self.cluster_len < (len - done).min(1 << 20)
            {
                cluster = self.next(start + count)?;
                count += 1;
            }
            let part = (u64::from(count) * self.cluster_len).min(len - done);
            let at = self.data_at + u64::from(start - 2) * self.cluster_len;
            let before = to.len();
            to.resize(before + part as usize, 0);
            self.extent.read(at, &mut to[before..])?;
            done += part;
        }
        Ok(done)
    }

    /// The entries of a directory; of the root, if `cluster` is 0.
    fn entries(&self, cluster: u32) -> Result<Vec<Entry>, DiskError> {
        let mut bytes = Vec::new();
        match (&self.root, cluster) {
            (Root::Fixed(extent), 0) => bytes = extent.read_vec(0, extent.len() as usize)?,
            (Root::Chain(root), 0) => {
                self.read_chain(*root, MAX_DIRECTORY, &mut bytes)?;
            }
            _ => {
                self.read_chain(cluster, MAX_DIRECTORY, &mut bytes)?;
            }
        }
        let mut entries = Vec::new();
        let mut long = LongName::default();
        for entry in bytes.chunks_exact(ENTRY_LEN) {
            match (entry[0], entry[11]) {
                (0, _) => break,
                (0xe5, _) => long = LongName::default(),
                (_, ATTRIBUTE_LONG_NAME) => long.add(entry),
                (_, attributes) => {
                    let name = std::mem::take(&mut long).finish(entry);
                    if attributes & ATTRIBUTE_VOLUME == 0 && entries.len() < MAX_DIR_ENTRIES {
                        entries.push(Entry::parse(entry, name, self.width));
                    }
                }
            }
        }
        Ok(entries)
    }

    fn find(&self, path: &str) -> Result<Option<Entry>, DiskError> {
        let mut here = Entry {
            name: String::new(),
            attributes: ATTRIBUTE_DIRECTORY,
            cluster: 0,
            len: 0,
        };
        for component in path.split('/').filter(|component| !component.is_empty()) {
            if here.attributes & ATTRIBUTE_DIRECTORY == 0 {
                return Ok(None);
            }
            let same = |entry: &Entry| entry.name.to_lowercase() == component.to_lowercase();
            match self.entries(here.cluster)?.into_iter().find(same) {
                Some(entry) => here = entry,
                None => return Ok(None),
            }
        }
        Ok(Some(here))
    }
}

impl Entry {
    fn parse(entry: &[u8], name: Option<String>, width: Width) -> Self {
        let high = match width {
            Width::Fat32 => u32::from(u16_at(entry, 20)) << 16,
            _ => 0,
        };
        Self {
            name: name.unwrap_or_else(|| short_name(entry)),
            attributes: entry[11],
            cluster: high | u32::from(u16_at(entry, 26)),
            len: u32_at(entry, 28),
        }
    }
}

/// The 8.3 name, in the case that Windows NT's flags give.
fn short_name(entry: &[u8]) -> String {
    let part = |bytes: &[u8], lower: bool| {
        let text = String::from_utf8_lossy(bytes).trim_end().to_owned();
        if lower { text.to_lowercase() } else { text }
    };
    let base = part(&entry[..8], entry[12] & 0x08 != 0);
    let extension = part(&entry[8..11], entry[12] & 0x10 != 0);
    match extension.as_str() {
        "" => base,
        extension => format!("{base}.{extension}"),
    }
}

/// A long name, whose parts lie before the short entry, last part first.
#[derive(Default)]
struct LongName {
    parts: Vec<[u16; 13]>,
    missing: u8,
    checksum: u8,
}

impl LongName {
    fn add(&mut self, entry: &[u8]) {
        let order = entry[0] & 0x3f;
        if entry[0] & 0x40 != 0 {
            self.parts.clear();
            self.missing = order;
            self.checksum = entry[13];
        }
        let in_order = order != 0 && order == self.missing && entry[13] == self.checksum;
        if !in_order || order > 20 {
            *self = Self::default();
            return;
        }
        self.missing -= 1;
        let places = (1..11)
            .step_by(2)
            .chain((14..26).step_by(2))
            .chain([28, 30]);
        let mut part = [0; 13];
        for (unit, at) in part.iter_mut().zip(places) {
            *unit = u16_at(entry, at);
        }
        self.parts.push(part);
    }

    /// The name, if it is complete and belongs to this short entry.
    fn finish(self, entry: &[u8]) -> Option<String> {
        let sum = entry[..11]
            .iter()
            .fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if self.parts.is_empty() || self.missing != 0 || sum != self.checksum {
            return None;
        }
        let units = self.parts.iter().rev().flatten().copied();
        let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        Some(String::from_utf16_lossy(&name))
    }
}

impl FileSystem for Fat {
    fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.serial >> 16, self.serial & 0xffff)
    }

    fn label(&self) -> String {
        self.label.clone()
    }

    fn node(&self, path: &str) -> Result<Option<Node>, DiskError> {
        Ok(self.find(path)?.map(|entry| {
            if entry.attributes & ATTRIBUTE_DIRECTORY != 0 {
                Node::Directory
            } else {
                Node::File(entry.len.into())
            }
        }))
    }

    fn link(&self, path: &str) -> Result<String, DiskError> {
        Err(malformed(&format!("{path} cannot be a symbolic link")))
    }

    fn read(&self, path: &str, len: u64, to: &mut Vec<u8>) -> Result<(), DiskError> {
        let entry = self
            .find(path)?
            .ok_or_else(|| malformed(&format!("{path} is gone")))?;
        if self.read_chain(entry.cluster, len, to)? != len {
            return Err(malformed(&format!("{path} ends early")));
        }
        Ok(())
    }

    fn list(&self, path: &str) -> Result<Vec<String>, DiskError> {
        let Some(entry) = self.find(path)? else {
            return Ok(Vec::new());
        };
        let entries = self.entries(entry.cluster)?;
        Ok(entries.into_iter().map(|entry| entry.name).collect())
    }
}
