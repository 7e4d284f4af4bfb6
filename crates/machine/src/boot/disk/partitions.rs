//! Partition tables: GPT (UEFI 2.10, chapter 5) with its backup, MBR with logical partitions.

use crate::boot::bytes::{u32_at, u64_at};

use super::DiskError;
use super::block::Extent;

/// A partition, by the number that Linux and GRUB give it, from 1.
pub(super) struct Partition {
    /// Its number.
    pub number: u32,
    /// GRUB's word for its table.
    pub scheme: &'static str,
    /// Its bytes.
    pub extent: Extent,
}

const MAX_ENTRIES: usize = 1024;
const MAX_LOGICAL: u32 = 128;

/// The partitions of `disk`, in the order of their numbers; none if it has no table at all.
pub(super) fn partitions(disk: &Extent) -> Result<Vec<Partition>, DiskError> {
    if disk.len() < 2 * 512 {
        return Ok(Vec::new());
    }
    let sector = disk.read_vec(0, 512)?;
    let mbr = sector[510..] == [0x55, 0xaa];
    let protective = mbr && (0..4).any(|index| sector[446 + 16 * index + 4] == 0xee);
    match gpt(disk)? {
        Some(partitions) => Ok(partitions),
        None if protective => Err(DiskError::Table(
            "both GPT headers are missing or fail their checksums",
        )),
        None if mbr => legacy(disk, &sector),
        None => Ok(Vec::new()),
    }
}

/// Tries the primary and the backup header, for sectors of 512 and 4096 bytes.
fn gpt(disk: &Extent) -> Result<Option<Vec<Partition>>, DiskError> {
    for sector in [512, 4096] {
        let last = (disk.len() / sector).saturating_sub(1);
        for lba in [1, last] {
            if let Some(partitions) = gpt_at(disk, sector, lba)? {
                return Ok(Some(partitions));
            }
        }
    }
    Ok(None)
}

fn gpt_at(disk: &Extent, sector: u64, lba: u64) -> Result<Option<Vec<Partition>>, DiskError> {
    if lba == 0 || (lba + 1) * sector > disk.len() {
        return Ok(None);
    }
    let mut header = disk.read_vec(lba * sector, sector as usize)?;
    let header_len = u32_at(&header, 12) as usize;
    if !header.starts_with(b"EFI PART")
        || !(92..=header.len()).contains(&header_len)
        || u64_at(&header, 24) != lba
    {
        return Ok(None);
    }
    let sum = u32_at(&header, 16);
    header[16..20].fill(0);
    let count = u32_at(&header, 80) as usize;
    let entry_len = u32_at(&header, 84) as usize;
    if crc32(&header[..header_len]) != sum
        || count > MAX_ENTRIES
        || !(128..=4096).contains(&entry_len)
    {
        return Ok(None);
    }
    let Some(table_at) = u64_at(&header, 72).checked_mul(sector) else {
        return Ok(None);
    };
    let mut table = vec![0; count * entry_len];
    if disk.read(table_at, &mut table).is_err() || crc32(&table) != u32_at(&header, 88) {
        return Ok(None);
    }
    let partition = |(index, entry): (usize, &[u8])| {
        if entry[..16] == [0; 16] {
            return None;
        }
        let first = u64_at(entry, 32);
        let sectors = u64_at(entry, 40).checked_sub(first)?.checked_add(1)?;
        Some(Partition {
            number: index as u32 + 1,
            scheme: "gpt",
            extent: disk.part(first.checked_mul(sector)?, sectors.checked_mul(sector)?)?,
        })
    };
    let entries = table.chunks_exact(entry_len).enumerate();
    Ok(Some(entries.filter_map(partition).collect()))
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// An entry of an MBR or of an extended partition's chain, in sectors.
struct Entry {
    kind: u8,
    start: u64,
    len: u64,
}

impl Entry {
    fn table(sector: &[u8]) -> impl Iterator<Item = Self> {
        sector[446..510].chunks_exact(16).map(|entry| Self {
            kind: entry[4],
            start: u32_at(entry, 8).into(),
            len: u32_at(entry, 12).into(),
        })
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    /// The partition, whose start counts from sector `base`.
    fn partition(&self, disk: &Extent, base: u64, number: u32) -> Option<Partition> {
        if self.kind == 0 {
            return None;
        }
        Some(Partition {
            number,
            scheme: "msdos",
            extent: disk.part((base + self.start) * 512, self.len * 512)?,
        })
    }
}

fn legacy(disk: &Extent, sector: &[u8]) -> Result<Vec<Partition>, DiskError> {
    let mut partitions = Vec::new();
    let mut extended = None;
    for (entry, number) in Entry::table(sector).zip(1..) {
        if entry.is_extended() {
            extended = extended.or(Some(entry.start));
        } else {
            partitions.extend(entry.partition(disk, 0, number));
        }
    }
    if let Some(base) = extended {
        logical(disk, base, &mut partitions)?;
    }
    Ok(partitions)
}

/// Follows the chain of an extended partition that starts at sector `base`. A link that leads
/// nowhere ends the chain; one that leads back is caught by the bound on its length.
fn logical(disk: &Extent, base: u64, partitions: &mut Vec<Partition>) -> Result<(), DiskError> {
    let mut at = base;
    for number in 5..5 + MAX_LOGICAL {
        let Some(extent) = disk.part(at * 512, 512) else {
            break;
        };
        let sector = extent.read_vec(0, 512)?;
        if sector[510..] != [0x55, 0xaa] {
            break;
        }
        let mut next = None;
        for entry in Entry::table(&sector) {
            if entry.is_extended() {
                next = next.or(Some(base + entry.start));
            } else {
                partitions.extend(entry.partition(disk, at, number));
            }
        }
        match next {
            Some(next) if next != at => at = next,
            _ => break,
        }
    }
    Ok(())
}
