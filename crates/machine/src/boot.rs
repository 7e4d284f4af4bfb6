//! From a kernel, an initrd and a command line to a guest's first instruction.
//!
//! A bzImage is unpacked on the host, so that the guest need not. The ELF kernel inside, or given
//! as such, starts by its PVH note if it has one, else by the Linux 64-bit boot protocol. [`load`]
//! fills guest memory and returns an [`Entry`]: how the first vCPU has to start, as plain data
//! that an engine turns into registers.
//!
//! ```text
//! 0500          GDT                  (64-bit protocol)
//! 1000          PVH start information or zero page
//! 2000..8000    page tables          (64-bit protocol)
//! 2_0000        command line
//! 10_0000..     kernel, at the addresses it was linked for
//! ..top         initrd, as high in low RAM as the kernel takes it
//! ```
//!
//! [`disk`] finds all three inside a disk image.

mod bytes;
mod bzimage;
mod decompress;
pub mod disk;
mod elf;
mod error;
mod file;
pub mod fuzz;
mod linux64;
mod lzo;
mod memory_map;
mod prepare;
mod pvh;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use mica_base::units::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};

use self::bzimage::SetupHeader;
pub use self::decompress::Compression;
pub use self::error::BootError;
pub use self::file::BootFile;
use crate::layout;
use crate::memory::GuestMemory;

/// The largest kernel, packed or not, in bytes.
pub const MAX_KERNEL: u64 = 512 << 20;
/// The largest initrd, in bytes.
pub const MAX_INITRD: u64 = 1 << 30;

/// What a kernel without a setup header takes, its closing NUL not counted: `COMMAND_LINE_SIZE` of
/// every x86 Linux.
const DEFAULT_COMMAND_LINE_MAX: usize = 2047;
/// Where a kernel may lie.
const LOADABLE: Range<u64> = layout::LEGACY_HOLE.end..layout::LOW_RAM_END;

/// Where the small things go, below the legacy hole. The kernel copies what it keeps before it
/// hands this memory out.
mod low {
    /// The GDT, for the 64-bit protocol.
    pub(super) const GDT: u64 = 0x500;
    /// The PVH start information with its tables.
    pub(super) const START_INFO: u64 = 0x1000;
    /// The zero page; a guest has it or the start information.
    pub(super) const ZERO_PAGE: u64 = 0x1000;
    /// Identity page tables, for the 64-bit protocol.
    pub(super) const PAGE_TABLES: u64 = 0x2000;
    /// Their length in bytes.
    pub(super) const PAGE_TABLES_LEN: usize = 6 << 12;
    /// The command line.
    pub(super) const COMMAND_LINE: u64 = 0x2_0000;
    /// The longest command line with its NUL that fits there.
    pub(super) const COMMAND_LINE_ROOM: usize = 0x1_0000;
}

/// What to boot, and in which machine.
#[derive(Debug)]
pub struct LoadRequest {
    /// bzImage or x86-64 ELF.
    pub kernel: BootFile,
    /// Initial RAM disk: one or more cpio archives, one behind the other.
    pub initrd: Option<BootFile>,
    /// The kernel's command line.
    pub command_line: String,
    /// Guest physical address of the ACPI RSDP.
    pub rsdp: Option<u64>,
    /// RAM in bytes, laid out as [`layout::ram_ranges`] says.
    pub ram: u64,
    /// Guest memory is known to be zero, so that the kernel's BSS need not be written.
    pub zeroed: bool,
    /// Files may be mapped into guest memory, as [`crate::memory::overlay`] puts conditions on it.
    pub map: bool,
}

/// How the first vCPU starts. All addresses are guest physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Xen's PVH protocol: 32-bit protected mode with flat segments and paging off; EBX holds
    /// `start_info`, EFLAGS is clear save its fixed bit.
    Pvh {
        /// First instruction.
        rip: u64,
        /// `struct hvm_start_info`.
        start_info: u64,
    },
    /// Linux's 64-bit boot protocol: long mode, interrupts off; RSI holds `boot_params`.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// `struct boot_params`, the zero page.
        boot_params: u64,
        /// Page tables that map the first 4 GiB to themselves.
        cr3: u64,
        /// The GDT's address.
        gdt: u64,
        /// The GDT's limit: its length in bytes, less one.
        gdt_limit: u16,
        /// Selector of the flat 64-bit code segment.
        code_selector: u16,
        /// Selector of the flat data segment.
        data_selector: u16,
    },
}

/// Where files go.
struct Target<'a> {
    memory: &'a GuestMemory,
    /// By mapping them, if they can be mapped.
    map: bool,
    /// What was mapped and will be written to.
    written: RefCell<Vec<Range<u64>>>,
}

/// A guest that only has to be entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// How.
    pub entry: Entry,
    /// Guest addresses where files are mapped that the guest will write to, for
    /// [`crate::memory::populate`].
    pub written: Vec<Range<u64>>,
}

/// Where things lie, for the tables that tell the kernel.
#[derive(Debug)]
struct Placed {
    ram: u64,
    rsdp: Option<u64>,
    initrd: Option<Range<u64>>,
}

/// Loads kernel, initrd, command line and the protocol's tables into `memory`.
///
/// Each byte of the files is read once; those of an ELF kernel and of the initrd straight into
/// guest memory, or not at all where they may be mapped.
///
/// # Errors
/// A file is unreadable or malformed, or something does not fit the guest's RAM.
pub fn load(memory: &GuestMemory, request: LoadRequest) -> Result<Loaded, BootError> {
    let (file, setup) = open(request.kernel)?;
    let kernel = elf::Kernel::parse(&file)?;
    let pvh = kernel.pvh_entry;
    check_ram(&kernel, request.initrd.as_ref(), request.ram)?;
    check_command_line(&request.command_line, setup.as_ref())?;
    let initrd = match &request.initrd {
        Some(initrd) => {
            let limit = match (&pvh, &setup) {
                (Some(_), _) => layout::LOW_RAM_END,
                (None, Some(setup)) => setup.initrd_max() + 1,
                (None, None) => linux64::INITRD_MAX + 1,
            };
            Some(place_initrd(initrd, kernel.end, limit, request.ram)?)
        }
        None => None,
    };

    let target = Target {
        memory,
        map: request.map,
        written: RefCell::default(),
    };
    kernel.load(&file, &target, request.zeroed)?;
    if let (Some(file), Some(range)) = (&request.initrd, &initrd) {
        let len = range.end - range.start;
        // The kernel frees its pages when it has unpacked them, and hands them out again.
        file.put_into_guest("initrd", 0, len, &target, range.start, true)?;
    }
    let mut command_line = request.command_line.into_bytes();
    command_line.push(0);
    write(memory, "command line", low::COMMAND_LINE, &command_line)?;
    let placed = Placed {
        ram: request.ram,
        rsdp: request.rsdp,
        initrd,
    };
    let entry = match pvh {
        Some(rip) => enter_pvh(memory, rip, &placed),
        None => enter_linux64(memory, kernel.entry, setup.as_ref(), &placed),
    }?;
    let written = target.written.into_inner();
    Ok(Loaded { entry, written })
}

/// The ELF kernel inside a bzImage, or an ELF kernel itself, laid out for mapping.
///
/// # Errors
/// The bytes are no kernel, or its payload does not decompress to one.
pub fn unpack_kernel(bytes: &[u8]) -> Result<Vec<u8>, BootError> {
    let file = BootFile::Bytes(bytes.to_vec());
    let mut kernel = match unpack(&file)? {
        Some((kernel, _)) => kernel,
        None => bytes.to_vec(),
    };
    prepare::prepare(&mut kernel)?;
    Ok(kernel)
}

/// The ELF kernel in `file`, with the setup header if it came in a bzImage.
fn open(file: BootFile) -> Result<(BootFile, Option<SetupHeader>), BootError> {
    Ok(match unpack(&file)? {
        Some((kernel, setup)) => (BootFile::Bytes(kernel), Some(setup)),
        None => (file, None),
    })
}

/// Kernel and setup header of a bzImage, or nothing if `file` is an ELF kernel already.
fn unpack(file: &BootFile) -> Result<Option<(Vec<u8>, SetupHeader)>, BootError> {
    let read = |source| BootError::Read {
        what: "kernel",
        source,
    };
    let size = file.size().map_err(read)?;
    let head = file
        .read_vec(0, size.min(bzimage::HEAD_LEN as u64) as usize)
        .map_err(read)?;
    if head.starts_with(&elf::MAGIC) {
        return Ok(None);
    }
    if head.get(bzimage::MAGIC_OFFSET..bzimage::MAGIC_OFFSET + 4) != Some(&bzimage::MAGIC[..]) {
        return Err(BootError::UnknownFormat);
    }
    let setup = SetupHeader::parse(&head)?;
    let kernel = bzimage::unpack(file, &setup)?;
    Ok(Some((kernel, setup)))
}

fn check_ram(kernel: &elf::Kernel, initrd: Option<&BootFile>, ram: u64) -> Result<(), BootError> {
    if kernel.end <= ram {
        return Ok(());
    }
    // One answer for both, rather than another one at the next attempt.
    let initrd_len = initrd.and_then(|initrd| initrd.size().ok()).unwrap_or(0);
    Err(BootError::DoesNotFit {
        what: "kernel",
        need: kernel.end - LOADABLE.start,
        place: format!("up to {:#x}", kernel.end),
        ram: ram_for(kernel.end, initrd_len.min(MAX_INITRD)),
    })
}

fn check_command_line(text: &str, setup: Option<&SetupHeader>) -> Result<(), BootError> {
    let max = setup.map_or(DEFAULT_COMMAND_LINE_MAX, SetupHeader::command_line_max);
    let max = max.min(low::COMMAND_LINE_ROOM - 1);
    if text.len() > max {
        return Err(BootError::CommandLineTooLong {
            len: text.len(),
            max,
        });
    }
    if text.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    Ok(())
}

/// The highest page-aligned place in low RAM, above the kernel and below `limit`.
fn place_initrd(
    initrd: &BootFile,
    kernel_end: u64,
    limit: u64,
    ram: u64,
) -> Result<Range<u64>, BootError> {
    let what = "initrd";
    let len = initrd
        .size()
        .map_err(|source| BootError::Read { what, source })?;
    if len > MAX_INITRD {
        return Err(BootError::TooLarge {
            what,
            len,
            max: MAX_INITRD,
        });
    }
    let limit = limit.min(layout::LOW_RAM_END);
    let floor = kernel_end.next_multiple_of(PAGE_SIZE);
    let start = |top: u64| top.checked_sub(len).map(|start| start - start % PAGE_SIZE);
    if start(limit).is_none_or(|start| start < floor) {
        return Err(BootError::InitrdLimit {
            need: len,
            kernel_end,
            limit,
        });
    }
    match start(limit.min(ram)) {
        Some(start) if start >= floor => Ok(start..start + len),
        _ => Err(BootError::DoesNotFit {
            what,
            need: len,
            place: format!("above the kernel's end at {kernel_end:#x}"),
            ram: ram_for(kernel_end, len),
        }),
    }
}

/// The RAM for a kernel up to `kernel_end` and an initrd, a whole number of MiB.
fn ram_for(kernel_end: u64, initrd_len: u64) -> u64 {
    (kernel_end.next_multiple_of(PAGE_SIZE) + initrd_len.next_multiple_of(PAGE_SIZE))
        .next_multiple_of(1 << 20)
}

fn enter_pvh(memory: &GuestMemory, rip: u32, placed: &Placed) -> Result<Entry, BootError> {
    let start_info = pvh::start_info(placed);
    write(
        memory,
        "PVH start information",
        low::START_INFO,
        &start_info,
    )?;
    Ok(Entry::Pvh {
        rip: rip.into(),
        start_info: low::START_INFO,
    })
}

fn enter_linux64(
    memory: &GuestMemory,
    rip: u64,
    setup: Option<&SetupHeader>,
    placed: &Placed,
) -> Result<Entry, BootError> {
    let zero_page = linux64::zero_page(setup, placed);
    let gdt = linux64::gdt();
    write(memory, "zero page", low::ZERO_PAGE, &zero_page)?;
    write(memory, "GDT", low::GDT, &gdt)?;
    let tables = linux64::page_tables();
    write(memory, "page tables", low::PAGE_TABLES, &tables)?;
    Ok(Entry::Linux64 {
        rip,
        boot_params: low::ZERO_PAGE,
        cr3: low::PAGE_TABLES,
        gdt: low::GDT,
        gdt_limit: gdt.len() as u16 - 1,
        code_selector: linux64::CODE_SELECTOR,
        data_selector: linux64::DATA_SELECTOR,
    })
}

fn write(memory: &GuestMemory, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::Memory { what, source })
}
