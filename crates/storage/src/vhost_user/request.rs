//! virtio-blk requests (virtio 1.2, clause 5.2.6): from a descriptor chain to a command.

use vm_memory::{Bytes, GuestAddress};

use super::chain::Chain;
use super::memory::{Memory, Span};
use crate::store::Geometry;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// The unit of every sector number, whatever the block size.
pub(crate) const SECTOR_SHIFT: u32 = 9;

/// The most ranges in one discard or write-zeroes request, as the configuration space says.
pub(crate) const RANGES_MAX: u32 = 32;

/// The most sectors in one of those ranges: 2 GiB.
pub(crate) const RANGE_SECTORS_MAX: u32 = 1 << 22;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// Bytes of a serial number (`VIRTIO_BLK_ID_BYTES`).
pub(crate) const ID_BYTES: usize = 20;

/// What the status byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A range of the disk in bytes, inside its capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskRange {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) unmap: bool,
}

/// What the driver asks for, checked against the disk; the spans are not checked against memory yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read { offset: u64, data: Vec<Span> },
    Write { offset: u64, data: Vec<Span> },
    Flush,
    Discard(Vec<DiskRange>),
    WriteZeroes(Vec<DiskRange>),
    GetId { data: Vec<Span> },
}

/// A request that can be answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    /// Where the status byte goes.
    pub(crate) status: GuestAddress,
    /// What to do, or what to answer at once.
    pub(crate) command: Result<Command, Status>,
}

/// Reads the request in `chain`. `None` if it has no place for a status, so that it cannot be answered.
pub(crate) fn parse(memory: &Memory, mut chain: Chain, geometry: &Geometry) -> Option<Parsed> {
    let status = split_status(&mut chain.writable)?;
    Some(Parsed {
        status,
        command: command(memory, chain, geometry),
    })
}

/// Takes the last byte off the spans.
fn split_status(spans: &mut Vec<Span>) -> Option<GuestAddress> {
    while spans.pop_if(|span| span.len == 0).is_some() {}
    let last = spans.last_mut()?;
    last.len -= 1;
    let address = last.address.0.checked_add(u64::from(last.len))?;
    spans.pop_if(|span| span.len == 0);
    Some(GuestAddress(address))
}

/// Copies `N` bytes off the front of the spans.
fn take<const N: usize>(memory: &Memory, spans: &mut Vec<Span>) -> Result<[u8; N], Status> {
    let mut bytes = [0; N];
    let (mut filled, mut whole) = (0, 0);
    for span in spans.iter_mut() {
        let part = (span.len as usize).min(N - filled);
        memory
            .read_slice(&mut bytes[filled..filled + part], span.address)
            .map_err(|_| Status::IoError)?;
        filled += part;
        span.len -= part as u32;
        if span.len > 0 {
            let address = span.address.0.checked_add(part as u64);
            span.address = GuestAddress(address.ok_or(Status::IoError)?);
            break;
        }
        whole += 1;
    }
    spans.drain(..whole);
    match filled == N {
        true => Ok(bytes),
        false => Err(Status::IoError),
    }
}

pub(crate) fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|span| u64::from(span.len)).sum()
}

fn command(memory: &Memory, chain: Chain, geometry: &Geometry) -> Result<Command, Status> {
    let Chain {
        mut readable,
        writable,
    } = chain;
    let header: [u8; HEADER_BYTES] = take(memory, &mut readable)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let offset = |data: &[Span]| {
        let offset = sector.checked_mul(1 << SECTOR_SHIFT);
        offset
            .filter(|offset| geometry.check(*offset, total(data)))
            .ok_or(Status::IoError)
    };
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => Ok(Command::Read {
            offset: offset(&writable)?,
            data: writable,
        }),
        VIRTIO_BLK_T_OUT if !geometry.read_only => Ok(Command::Write {
            offset: offset(&readable)?,
            data: readable,
        }),
        VIRTIO_BLK_T_OUT => Err(Status::IoError),
        VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        VIRTIO_BLK_T_GET_ID if total(&writable) >= ID_BYTES as u64 => {
            Ok(Command::GetId { data: writable })
        }
        VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
        VIRTIO_BLK_T_DISCARD if !geometry.read_only => {
            Ok(Command::Discard(ranges(memory, readable, geometry, 0)?))
        }
        VIRTIO_BLK_T_WRITE_ZEROES if !geometry.read_only => {
            let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            let ranges = ranges(memory, readable, geometry, flags)?;
            Ok(Command::WriteZeroes(ranges))
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

/// The ranges of a discard or write-zeroes request, without the empty ones. Any flag but `known` makes
/// the request unsupported (virtio 1.2, clause 5.2.6.2).
fn ranges(
    memory: &Memory,
    mut spans: Vec<Span>,
    geometry: &Geometry,
    known: u32,
) -> Result<Vec<DiskRange>, Status> {
    let bytes = total(&spans);
    let count = bytes / RANGE_BYTES as u64;
    if !bytes.is_multiple_of(RANGE_BYTES as u64) || count == 0 || count > u64::from(RANGES_MAX) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::new();
    for _ in 0..count {
        let bytes: [u8; RANGE_BYTES] = take(memory, &mut spans)?;
        let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = bytes;
        let sectors = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        let offset = u64::from_le_bytes(sector)
            .checked_mul(1 << SECTOR_SHIFT)
            .ok_or(Status::IoError)?;
        let len = u64::from(sectors) << SECTOR_SHIFT;
        if sectors > RANGE_SECTORS_MAX || !geometry.check(offset, len) {
            return Err(Status::IoError);
        }
        if len > 0 {
            ranges.push(DiskRange {
                offset,
                len,
                unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            });
        }
    }
    Ok(ranges)
}
