//! The bzImage container (the kernel's `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel
//! Header"). Only the header and the compressed payload are read; the guest never runs its
//! decompressor.

use super::bytes::{u16_at, u32_at};
use super::decompress::{Compression, decompress};
use super::{BootError, BootFile, MAX_KERNEL, elf};

const SECTOR: u64 = 512;

/// `HdrS` at this offset makes a file a Linux kernel.
pub(super) const MAGIC_OFFSET: usize = 0x202;
/// See [`MAGIC_OFFSET`].
pub(super) const MAGIC: [u8; 4] = *b"HdrS";
/// Bytes at a file's start that hold the longest possible setup header.
pub(super) const HEAD_LEN: usize = 0x202 + 0xff;

/// The setup header as the file has it, from its first byte to the end that its jump states.
#[derive(Clone, Debug)]
pub(super) struct SetupHeader {
    bytes: Vec<u8>,
}

impl SetupHeader {
    /// Where the header starts, in the file as in the zero page.
    pub(super) const OFFSET: usize = 0x1f1;

    /// Checks the header in the first bytes of a file.
    pub(super) fn parse(head: &[u8]) -> Result<Self, BootError> {
        let malformed = BootError::BzImage;
        if head.len() < MAGIC_OFFSET + 4 || head[MAGIC_OFFSET..][..4] != MAGIC {
            return Err(malformed("it has no HdrS magic"));
        }
        // The byte at 0x201 is the target of a short jump over the header.
        let end = MAGIC_OFFSET + usize::from(head[0x201]);
        let bytes = head
            .get(Self::OFFSET..end)
            .ok_or(malformed("it ends inside its setup header"))?
            .to_vec();
        let [minor, major] = u16_at(head, 0x206).to_le_bytes();
        if (major, minor) < (2, 8) {
            return Err(BootError::OldProtocol { major, minor });
        }
        if end < 0x250 {
            return Err(malformed("its setup header is too short for its version"));
        }
        if head[0x211] & 1 == 0 {
            return Err(malformed("it is a zImage that loads below 1 MiB"));
        }
        Ok(Self { bytes })
    }

    /// The header's bytes, for offset [`Self::OFFSET`] of the zero page.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The highest address an initrd's last byte may have.
    pub(super) fn initrd_max(&self) -> u64 {
        u32_at(&self.bytes, 0x22c - Self::OFFSET).into()
    }

    /// The longest command line, its closing NUL not counted.
    pub(super) fn command_line_max(&self) -> usize {
        u32_at(&self.bytes, 0x238 - Self::OFFSET) as usize
    }

    /// Offset and length of the payload in the file.
    fn payload(&self) -> (u64, u64) {
        let sectors = match self.bytes[0] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let offset = u32_at(&self.bytes, 0x248 - Self::OFFSET);
        let len = u32_at(&self.bytes, 0x24c - Self::OFFSET);
        ((sectors + 1) * SECTOR + u64::from(offset), len.into())
    }
}

/// The ELF kernel inside the bzImage `file`.
pub(super) fn unpack(file: &BootFile, setup: &SetupHeader) -> Result<Vec<u8>, BootError> {
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
    let (offset, len) = setup.payload();
    if len < 8 || offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(BootError::BzImage(
            "its payload lies beyond the end of the file",
        ));
    }
    let payload = file
        .read_vec(offset, len as usize)
        .map_err(|source| BootError::Read { what, source })?;
    let kernel = match Compression::of(&payload) {
        Some(compression) => {
            decompress(compression, &payload).map_err(|source| BootError::Decompress {
                compression,
                source,
            })?
        }
        None if payload.starts_with(&elf::MAGIC) => payload,
        None => {
            return Err(BootError::UnknownCompression([
                payload[0], payload[1], payload[2], payload[3],
            ]));
        }
    };
    if !kernel.starts_with(&elf::MAGIC) {
        return Err(BootError::BzImage("its payload is no ELF file"));
    }
    Ok(kernel)
}
