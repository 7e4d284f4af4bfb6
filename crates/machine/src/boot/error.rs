//! What can be wrong with a kernel, an initrd or their fit into guest memory.

use std::io;

use mica_base::units::Bytes;

use super::decompress::Compression;

/// Why a guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("cannot read the {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// Guest memory refused an access inside a range that was checked before.
    #[error("cannot write the {what} into guest memory: {source}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// vm-memory's error.
        source: vm_memory::GuestMemoryError,
    },
    /// The file has the magic of no kernel format.
    #[error("the kernel is neither a bzImage nor an x86-64 ELF file")]
    UnknownFormat,
    /// The ELF file breaks its own format.
    #[error("the kernel's ELF file is malformed: {0}")]
    Elf(&'static str),
    /// The bzImage breaks the boot protocol.
    #[error("the bzImage is malformed: {0}")]
    BzImage(&'static str),
    /// The bzImage is older than the payload fields, which boot protocol 2.08 (Linux 2.6.26) added.
    #[error(
        "the bzImage speaks boot protocol {major}.{minor:02}; 2.08 (Linux 2.6.26) or newer is needed"
    )]
    OldProtocol {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// The payload's first bytes are those of no compression that Linux uses.
    #[error(
        "the bzImage's payload starts with {0:02x?}, which is no compression that Linux uses on x86"
    )]
    UnknownCompression([u8; 4]),
    /// The payload did not decompress.
    #[error("cannot decompress the kernel's {compression} payload: {source}")]
    Decompress {
        /// What it is compressed with.
        compression: Compression,
        /// The decoder's error.
        source: io::Error,
    },
    /// A file is larger than Mica accepts.
    #[error("the {what} has {len} bytes; at most {max} are accepted")]
    TooLarge {
        /// Which file.
        what: &'static str,
        /// Its size in bytes.
        len: u64,
        /// The bound in bytes.
        max: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} bytes; this kernel takes at most {max}")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The kernel's bound in bytes, its closing NUL not counted.
        max: usize,
    },
    /// The command line contains a NUL byte, where the kernel would end it.
    #[error("the command line contains a NUL byte")]
    CommandLineNul,
    /// Something does not fit the guest's RAM.
    #[error("the {what} needs {need} of guest memory {place}; the guest needs at least {ram} of RAM", need = Bytes(.need.next_multiple_of(1024)), ram = Bytes(*.ram))]
    DoesNotFit {
        /// What does not fit.
        what: &'static str,
        /// Its size in bytes.
        need: u64,
        /// Where it has to go.
        place: String,
        /// The least RAM that would do, in bytes, a whole number of MiB.
        ram: u64,
    },
    /// The kernel wants memory that no guest of this machine has RAM at.
    #[error(
        "the kernel's segment at {start:#x}..{end:#x} lies outside {low:#x}..{high:#x}, where this machine can load one"
    )]
    Unloadable {
        /// First address of the segment.
        start: u64,
        /// The address behind it.
        end: u64,
        /// First loadable address.
        low: u64,
        /// The address behind the last loadable one.
        high: u64,
    },
    /// The initrd would have to lie above the kernel's limit for it.
    #[error("the initrd of {need} does not fit between the kernel's end at {kernel_end:#x} and the kernel's limit for it, {limit:#x}", need = Bytes(*.need))]
    InitrdLimit {
        /// Its size in bytes.
        need: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// The address behind the last that the kernel takes.
        limit: u64,
    },
}
