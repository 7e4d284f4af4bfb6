//! A GUID Partition Table, as UEFI 2.10, chapter 5, lays it out.
//!
//! ```text
//! LBA 0  protective MBR     LBA 1  header     LBA 2..34  entries     partitions     (mirrored)
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use uuid::{Uuid, uuid};

/// The size of a logical block, in bytes.
pub(crate) const BLOCK: u64 = 512;
const ENTRIES: u64 = 128;
const ENTRY_LEN: usize = 128;
const ENTRY_BLOCKS: u64 = ENTRIES * ENTRY_LEN as u64 / BLOCK;
/// Partitions start at multiples of this many bytes, which suits every disk there is.
pub(crate) const ALIGNMENT: u64 = 1 << 20;

/// What a partition is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PartitionType {
    /// The EFI system partition.
    EfiSystem,
    /// The root file system of an x86-64 Linux.
    LinuxRoot,
}

impl PartitionType {
    fn guid(self) -> Uuid {
        match self {
            Self::EfiSystem => uuid!("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"),
            Self::LinuxRoot => uuid!("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"),
        }
    }
}

/// A partition to be.
#[derive(Clone, Debug)]
pub(crate) struct Partition {
    pub(crate) kind: PartitionType,
    pub(crate) name: &'static str,
    /// Where it starts, in bytes; a multiple of [`ALIGNMENT`].
    pub(crate) start: u64,
    /// Its size in bytes; a multiple of [`BLOCK`].
    pub(crate) len: u64,
}

/// What both tables at the ends of a disk of `len` bytes leave for partitions, in bytes.
pub(crate) fn usable(len: u64) -> std::ops::Range<u64> {
    let end = len.saturating_sub((1 + ENTRY_BLOCKS) * BLOCK);
    ALIGNMENT..end / ALIGNMENT * ALIGNMENT
}

/// Writes the table and its backup to a disk of `len` bytes, with fresh identifiers.
///
/// # Errors
/// The partitions do not fit the disk, or writing fails.
pub(crate) fn write(disk: &File, len: u64, partitions: &[Partition]) -> io::Result<()> {
    let room = usable(len);
    let fits = |partition: &Partition| {
        partition.start >= room.start && partition.start + partition.len <= room.end
    };
    if !len.is_multiple_of(BLOCK)
        || partitions.len() as u64 > ENTRIES
        || !partitions.iter().all(fits)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the partitions do not fit the disk",
        ));
    }
    let mut entries = vec![0; (ENTRY_BLOCKS * BLOCK) as usize];
    for (entry, partition) in entries.chunks_exact_mut(ENTRY_LEN).zip(partitions) {
        encode_entry(entry, partition);
    }
    let last = len / BLOCK - 1;
    let disk_guid = Uuid::new_v4();
    let header = |at: u64, other: u64, table: u64| {
        encode_header(&Header {
            at,
            other,
            table,
            last_usable: last - ENTRY_BLOCKS - 1,
            disk_guid,
            entries_crc: crc32(&entries),
        })
    };
    disk.write_all_at(&protective_mbr(last), 0)?;
    disk.write_all_at(&header(1, last, 2), BLOCK)?;
    disk.write_all_at(&entries, 2 * BLOCK)?;
    let backup = last - ENTRY_BLOCKS;
    disk.write_all_at(&entries, backup * BLOCK)?;
    disk.write_all_at(&header(last, 1, backup), last * BLOCK)
}

fn encode_entry(entry: &mut [u8], partition: &Partition) {
    let first = partition.start / BLOCK;
    let last = first + partition.len / BLOCK - 1;
    entry[0..16].copy_from_slice(&partition.kind.guid().to_bytes_le());
    entry[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
    entry[32..40].copy_from_slice(&first.to_le_bytes());
    entry[40..48].copy_from_slice(&last.to_le_bytes());
    for (field, unit) in entry[56..128]
        .chunks_exact_mut(2)
        .zip(partition.name.encode_utf16())
    {
        field.copy_from_slice(&unit.to_le_bytes());
    }
}

struct Header {
    at: u64,
    other: u64,
    table: u64,
    last_usable: u64,
    disk_guid: Uuid,
    entries_crc: u32,
}

fn encode_header(header: &Header) -> [u8; BLOCK as usize] {
    const HEADER_LEN: usize = 92;
    let mut block = [0; BLOCK as usize];
    block[0..8].copy_from_slice(b"EFI PART");
    block[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    block[12..16].copy_from_slice(&(HEADER_LEN as u32).to_le_bytes());
    block[24..32].copy_from_slice(&header.at.to_le_bytes());
    block[32..40].copy_from_slice(&header.other.to_le_bytes());
    block[40..48].copy_from_slice(&(2 + ENTRY_BLOCKS).to_le_bytes());
    block[48..56].copy_from_slice(&header.last_usable.to_le_bytes());
    block[56..72].copy_from_slice(&header.disk_guid.to_bytes_le());
    block[72..80].copy_from_slice(&header.table.to_le_bytes());
    block[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
    block[84..88].copy_from_slice(&(ENTRY_LEN as u32).to_le_bytes());
    block[88..92].copy_from_slice(&header.entries_crc.to_le_bytes());
    let own = crc32(&block[..HEADER_LEN]);
    block[16..20].copy_from_slice(&own.to_le_bytes());
    block
}

/// One partition over the whole disk, of the type that tells old programs to keep off.
fn protective_mbr(last: u64) -> [u8; BLOCK as usize] {
    let mut block = [0; BLOCK as usize];
    block[447..450].copy_from_slice(&[0x00, 0x02, 0x00]);
    block[450] = 0xee;
    block[451..454].copy_from_slice(&[0xff; 3]);
    block[454..458].copy_from_slice(&1u32.to_le_bytes());
    let len = u32::try_from(last).unwrap_or(u32::MAX);
    block[458..462].copy_from_slice(&len.to_le_bytes());
    block[510..512].copy_from_slice(&[0x55, 0xaa]);
    block
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn sfdisk_finds_the_table_sound() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        let len = 64 << 20;
        disk.as_file().set_len(len).unwrap();
        let partitions = [
            Partition {
                kind: PartitionType::EfiSystem,
                name: "EFI",
                start: ALIGNMENT,
                len: 8 << 20,
            },
            Partition {
                kind: PartitionType::LinuxRoot,
                name: "root",
                start: 9 << 20,
                len: usable(len).end - (9 << 20),
            },
        ];
        write(disk.as_file(), len, &partitions).unwrap();

        let sfdisk = |argument: &str| {
            let output = Command::new("/sbin/sfdisk")
                .arg(argument)
                .arg(disk.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let verdict = sfdisk("--verify");
        assert!(verdict.contains("No errors detected"), "{verdict}");
        let dump = sfdisk("--dump");
        for expected in [
            "start=        2048, size=       16384, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
            "start=       18432, size=      110592, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
            "name=\"EFI\"",
        ] {
            assert!(dump.contains(expected), "{expected} not in:\n{dump}");
        }
    }

    #[test]
    fn partitions_that_do_not_fit_are_refused() {
        let disk = tempfile::tempfile().unwrap();
        let too_long = Partition {
            kind: PartitionType::LinuxRoot,
            name: "root",
            start: ALIGNMENT,
            len: 4 << 20,
        };
        assert!(write(&disk, 4 << 20, &[too_long]).is_err());
    }
}
