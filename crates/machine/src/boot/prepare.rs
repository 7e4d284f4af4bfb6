//! A kernel laid out for mapping, once, when an image is built.
//!
//! Linux's build makes few segments, and writes ten MiB of zeros of its BSS out. Here each segment is
//! cut by its sections into parts that the kernel will write to, be it only to patch its own code,
//! and parts that it reads at most; only the latter lose the W and X flags. The loader copies the
//! former ahead of the guest and leaves the latter in the page cache. Bytes and addresses stay.

use std::ops::Range;

use mica_base::units::PAGE_SIZE;

use super::bytes::{put, u16_at, u32_at, u64_at};
use super::elf::{
    HEADER_LEN, MAX_PROGRAM_HEADERS, PF_W, PF_X, PROGRAM_HEADER_LEN, PT_LOAD, Segment,
    program_headers,
};
use super::{BootError, MAX_KERNEL};

const PF_R: u32 = 4;
const SECTION_HEADER_LEN: usize = 64;
const SHT_NOBITS: u32 = 8;
const SHF_WRITE: u64 = 1;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
/// A part that is only read and smaller than this is not worth a segment.
const LEAST_PART: u64 = 256 << 10;

/// Program headers of `PT_LOAD` segments in place of one.
type Headers = Vec<Vec<u8>>;

/// Lays out the ELF kernel in `file`. A file without sections, or without room for more program
/// headers, keeps its segments but for their trailing zeros.
pub(super) fn prepare(file: &mut [u8]) -> Result<(), BootError> {
    let size = file.len() as u64;
    let Some(header) = file.get(..HEADER_LEN) else {
        return Err(BootError::Elf("it ends inside its header"));
    };
    let (table, len) = program_headers(header, size)?;
    let table = table as usize;
    let sections = sections(file);
    let mut whole: Headers = Vec::new();
    let mut cut: Headers = Vec::new();
    let mut room = size;
    for header in file[table..table + len].chunks_exact(PROGRAM_HEADER_LEN) {
        let segment = Segment::parse(header, size)?;
        room = room.min(segment.offset);
        if u32_at(header, 0) == PT_LOAD {
            whole.push(without_zeros(file, header));
            let parts = parts(header, &segment, &sections);
            cut.extend(parts.iter().map(|part| without_zeros(file, part)));
        } else {
            whole.push(header.to_vec());
            cut.push(header.to_vec());
        }
    }
    let end = (table + cut.len() * PROGRAM_HEADER_LEN) as u64;
    let chosen = if cut.len() <= MAX_PROGRAM_HEADERS && end <= room {
        cut
    } else {
        whole
    };
    put(file, table, &chosen.concat());
    put(file, 56, &(chosen.len() as u16).to_le_bytes());
    Ok(())
}

/// A section in memory.
struct Section {
    address: u64,
    end: u64,
    executable: bool,
    writable: bool,
}

/// The sections in memory, or nothing where their table is not in order.
fn sections(file: &[u8]) -> Vec<Section> {
    let count = usize::from(u16_at(file, 60));
    let table = usize::try_from(u64_at(file, 40)).unwrap_or(usize::MAX);
    let end = table.saturating_add(count * SECTION_HEADER_LEN);
    let Some(table) = file.get(table..end) else {
        return Vec::new();
    };
    if usize::from(u16_at(file, 58)) != SECTION_HEADER_LEN {
        return Vec::new();
    }
    let section = |header: &[u8]| {
        let (flags, address) = (u64_at(header, 8), u64_at(header, 16));
        let empty = u32_at(header, 4) == SHT_NOBITS;
        (flags & SHF_ALLOC != 0).then_some(Section {
            address,
            end: address.checked_add(u64_at(header, 32))?,
            executable: flags & SHF_EXECINSTR != 0,
            writable: flags & SHF_WRITE != 0 || empty,
        })
    };
    table
        .chunks_exact(SECTION_HEADER_LEN)
        .filter_map(section)
        .collect()
}

/// The program headers for the parts of a segment, in order.
fn parts(header: &[u8], segment: &Segment, sections: &[Section]) -> Headers {
    let flags = u32_at(header, 4);
    let mut parts = Vec::new();
    let mut at = 0;
    let mut add = |range: Range<u64>, flags: u32| {
        if !range.is_empty() {
            parts.push(part(header, segment, range, flags));
        }
    };
    for run in read_only(header, segment, sections) {
        let start = run.start.next_multiple_of(PAGE_SIZE);
        let end = if run.end == segment.memory_len {
            run.end
        } else {
            run.end / PAGE_SIZE * PAGE_SIZE
        };
        if start >= at && start + LEAST_PART <= end {
            add(at..start, flags);
            add(start..end, PF_R);
            at = end;
        }
    }
    add(at..segment.memory_len, flags);
    parts
}

/// Where the kernel only reads, by distance from the segment's start.
///
/// Code is patched wherever it is. Data is never written to in a segment that is not writable; and
/// always in one that is executable too, which holds what serves the boot: it is freed at its end.
fn read_only(header: &[u8], segment: &Segment, sections: &[Section]) -> Vec<Range<u64>> {
    let flags = u32_at(header, 4);
    let mut runs: Vec<Range<u64>> = Vec::new();
    if flags & (PF_W | PF_X) == PF_W | PF_X || segment.memory_len > MAX_KERNEL {
        return runs;
    }
    // Sections have virtual addresses; the segment says where it begins among them.
    let start = u64_at(header, 16);
    let mut previous_read_only = false;
    for section in sections {
        let inside = section.address >= start && section.end - start <= segment.memory_len;
        if !inside {
            continue;
        }
        let read_only = !section.executable && (flags & PF_W == 0 || !section.writable);
        let place = section.address - start..section.end - start;
        match runs.last_mut().filter(|_| previous_read_only && read_only) {
            Some(run) => run.end = run.end.max(place.end),
            None if read_only => runs.push(place),
            None => {}
        }
        previous_read_only = read_only;
    }
    runs
}

/// The header of a part of a segment.
fn part(header: &[u8], segment: &Segment, range: Range<u64>, flags: u32) -> Vec<u8> {
    let mut part = header.to_vec();
    // A part of the BSS alone has no place in the file.
    let first = range.start.min(segment.file_len);
    let last = range.end.min(segment.file_len);
    put(&mut part, 4, &flags.to_le_bytes());
    for (field, value) in [
        (8, segment.offset + first),
        (16, u64_at(header, 16).wrapping_add(range.start)),
        (24, segment.address.wrapping_add(range.start)),
        (32, last - first),
        (40, range.end - range.start),
    ] {
        put(&mut part, field, &value.to_le_bytes());
    }
    part
}

/// `header` with its segment ended at its last page that is not all zeros: what follows is zero in
/// memory all the same.
fn without_zeros(file: &[u8], header: &[u8]) -> Vec<u8> {
    let (offset, len) = (u64_at(header, 8), u64_at(header, 32));
    let bytes = &file[offset as usize..(offset + len) as usize];
    let used = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last as u64 + 1);
    let mut header = header.to_vec();
    let used = used.next_multiple_of(PAGE_SIZE).min(len);
    put(&mut header, 32, &used.to_le_bytes());
    header
}

#[cfg(test)]
mod tests;
