//! ELF64 kernels (System V ABI, AMD64 supplement): headers checked once, then segments copied.

use super::{BootError, BootFile, LOADABLE, MAX_KERNEL, Target};
use crate::boot::bytes::{u16_at, u32_at, u64_at};
use crate::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// The first four bytes of an ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

pub(super) const HEADER_LEN: usize = 64;
pub(super) const PROGRAM_HEADER_LEN: usize = 56;
/// Linux has five program headers; more than this is no kernel.
pub(super) const MAX_PROGRAM_HEADERS: usize = 64;
/// Linux's notes have a few hundred bytes.
const MAX_NOTES: u64 = 1 << 20;

pub(super) const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// A segment's flags: it is executed, it is written to.
pub(super) const PF_X: u32 = 1;
/// See [`PF_X`].
pub(super) const PF_W: u32 = 2;
const EM_X86_64: u16 = 62;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where to enter by the PVH protocol.
const XEN_PHYS32_ENTRY: u32 = 18;

/// What has to be copied where. Every number is checked against the file and the address map.
#[derive(Debug)]
pub(super) struct Kernel {
    segments: Vec<Segment>,
    /// Entry by the 64-bit boot protocol.
    pub entry: u64,
    /// Entry by the PVH protocol, if the kernel has one.
    pub pvh_entry: Option<u32>,
    /// The address behind the last byte of the kernel, its BSS included.
    pub end: u64,
}

/// A segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) file_len: u64,
    pub(super) address: u64,
    pub(super) memory_len: u64,
    /// The kernel writes to it: Linux patches its code, too.
    written: bool,
}

impl Kernel {
    /// Reads and checks the headers of `file`.
    pub(super) fn parse(file: &BootFile) -> Result<Self, BootError> {
        let what = "kernel";
        let size = file
            .size()
            .map_err(|source| BootError::Read { what, source })?;
        if size > MAX_KERNEL {
            return Err(BootError::TooLarge {
                what,
                len: size,
                max: MAX_KERNEL,
            });
        }
        let read = |offset, len| {
            file.read_vec(offset, len)
                .map_err(|source| BootError::Read { what, source })
        };
        if size < HEADER_LEN as u64 {
            return Err(BootError::Elf("it ends inside its header"));
        }
        let header = read(0, HEADER_LEN)?;
        let table = program_headers(&header, size)?;
        let mut kernel = Self {
            segments: Vec::new(),
            entry: u64_at(&header, 24),
            pvh_entry: None,
            end: 0,
        };
        for entry in read(table.0, table.1)?.chunks_exact(PROGRAM_HEADER_LEN) {
            let segment = Segment::parse(entry, size)?;
            match u32_at(entry, 0) {
                PT_LOAD if segment.memory_len > 0 => kernel.add(segment)?,
                PT_NOTE if segment.file_len > MAX_NOTES => {
                    return Err(BootError::Elf("its notes are larger than 1 MiB"));
                }
                PT_NOTE if kernel.pvh_entry.is_none() => {
                    let notes = read(segment.offset, segment.file_len as usize)?;
                    kernel.pvh_entry = pvh_entry(&notes);
                }
                _ => {}
            }
        }
        kernel.check_entries()?;
        Ok(kernel)
    }

    fn add(&mut self, segment: Segment) -> Result<(), BootError> {
        let end = segment
            .address
            .checked_add(segment.memory_len)
            .ok_or(BootError::Elf("a segment wraps around the address space"))?;
        if segment.address < LOADABLE.start || end > LOADABLE.end {
            return Err(BootError::Unloadable {
                start: segment.address,
                end,
                low: LOADABLE.start,
                high: LOADABLE.end,
            });
        }
        let overlaps = |other: &Segment| segment.address < other.end() && other.address < end;
        if self.segments.iter().any(overlaps) {
            return Err(BootError::Elf("two segments overlap in memory"));
        }
        self.end = self.end.max(end);
        self.segments.push(segment);
        Ok(())
    }

    fn check_entries(&self) -> Result<(), BootError> {
        if self.segments.is_empty() {
            return Err(BootError::Elf("it has nothing to load"));
        }
        let inside = |entry: u64| {
            self.segments
                .iter()
                .any(|segment| (segment.address..segment.end()).contains(&entry))
        };
        match self.pvh_entry {
            Some(entry) if !inside(entry.into()) => {
                Err(BootError::Elf("its PVH entry lies in no segment"))
            }
            None if !inside(self.entry) => Err(BootError::Elf("its entry lies in no segment")),
            _ => Ok(()),
        }
    }

    /// Puts the segments into the guest. `zeroed` says that guest memory is known to be zero, so that the BSS
    /// need not be touched.
    pub(super) fn load(
        &self,
        file: &BootFile,
        target: &Target<'_>,
        zeroed: bool,
    ) -> Result<(), BootError> {
        for segment in &self.segments {
            let (offset, len) = (segment.offset, segment.file_len);
            let (to, written) = (segment.address, segment.written);
            file.put_into_guest("kernel", offset, len, target, to, written)?;
            if !zeroed {
                zero(
                    target.memory,
                    segment.address + segment.file_len,
                    segment.end(),
                )?;
            }
        }
        Ok(())
    }
}

impl Segment {
    pub(super) fn parse(header: &[u8], file_size: u64) -> Result<Self, BootError> {
        let segment = Self {
            written: u32_at(header, 4) & (PF_W | PF_X) != 0,
            offset: u64_at(header, 8),
            address: u64_at(header, 24),
            file_len: u64_at(header, 32),
            memory_len: u64_at(header, 40),
        };
        let loaded = [PT_LOAD, PT_NOTE].contains(&u32_at(header, 0));
        let file_end = segment.offset.checked_add(segment.file_len);
        if loaded && file_end.is_none_or(|end| end > file_size) {
            return Err(BootError::Elf("a segment lies beyond the end of the file"));
        }
        if u32_at(header, 0) == PT_LOAD && segment.file_len > segment.memory_len {
            return Err(BootError::Elf(
                "a segment is larger in the file than in memory",
            ));
        }
        Ok(segment)
    }

    /// The address behind the segment; `Kernel::add` has checked that there is one.
    fn end(&self) -> u64 {
        self.address + self.memory_len
    }
}

/// Offset and length in bytes of the program header table.
pub(super) fn program_headers(header: &[u8], size: u64) -> Result<(u64, usize), BootError> {
    if header[..4] != MAGIC || header[4] != 2 || header[5] != 1 || u16_at(header, 18) != EM_X86_64 {
        return Err(BootError::Elf("it is not little-endian ELF64 for x86-64"));
    }
    let count = usize::from(u16_at(header, 56));
    if usize::from(u16_at(header, 54)) != PROGRAM_HEADER_LEN || count > MAX_PROGRAM_HEADERS {
        return Err(BootError::Elf("its program header table is no kernel's"));
    }
    let offset = u64_at(header, 32);
    let len = count * PROGRAM_HEADER_LEN;
    match offset.checked_add(len as u64) {
        Some(end) if end <= size => Ok((offset, len)),
        _ => Err(BootError::Elf(
            "its program header table lies beyond the end of the file",
        )),
    }
}

/// The PVH entry in a segment of notes, each padded to four bytes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let name_len = u32_at(notes, 0) as usize;
        let value_len = u32_at(notes, 4) as usize;
        let kind = u32_at(notes, 8);
        let value_start = name_len.checked_next_multiple_of(4)?.checked_add(12)?;
        let value_end = value_start.checked_add(value_len)?;
        let name = notes.get(12..12 + name_len)?;
        let value = notes.get(value_start..value_end)?;
        if kind == XEN_PHYS32_ENTRY && name == b"Xen\0" && value.len() >= 4 {
            return Some(u32_at(value, 0));
        }
        notes = notes.get(value_end.checked_next_multiple_of(4)?..)?;
    }
    None
}

fn zero(memory: &GuestMemory, start: u64, end: u64) -> Result<(), BootError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = start;
    while at < end {
        let len = (end - at).min(ZEROS.len() as u64);
        memory
            .write_slice(&ZEROS[..len as usize], GuestAddress(at))
            .map_err(|source| BootError::Memory {
                what: "kernel's BSS",
                source,
            })?;
        at += len;
    }
    Ok(())
}
