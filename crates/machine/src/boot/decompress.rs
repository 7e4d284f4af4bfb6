//! The compressions that Linux packs x86 kernels with (the kernel's `arch/x86/boot/compressed`).
//!
//! All but gzip have the size of the unpacked kernel behind their stream, little-endian in four
//! bytes; a gzip stream ends with its own such field. That size is a promise which the decoder is
//! held to, and the most that is ever allocated.

use std::fmt;
use std::io::{self, Read};

use super::MAX_KERNEL;
use super::bytes::u32_at;
use super::lzo;

/// Dictionaries of up to 128 MiB occur (`xz -9 --lzma2=dict=128MiB` in `xz_wrap.sh`).
const LZMA_MEMORY_KIB: u32 = 160 << 10;
/// What `lz4 -l` makes of one chunk, at most.
const LZ4_CHUNK: usize = 8 << 20;
const LZ4_MAGIC: u32 = 0x184c_2102;

/// What a kernel is compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// bzip2.
    Bzip2,
    /// The `.lzma` format of LZMA Utils.
    Lzma,
    /// xz.
    Xz,
    /// lzop's container of LZO1X blocks.
    Lzo,
    /// The LZ4 legacy frame.
    Lz4,
    /// RFC 8878.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

impl Compression {
    /// The compression whose magic `payload` starts with.
    pub(super) fn of(payload: &[u8]) -> Option<Self> {
        let magics: [(&[u8], Self); 7] = [
            (b"\x1f\x8b", Self::Gzip),
            (b"BZh", Self::Bzip2),
            (b"\x5d\0\0", Self::Lzma),
            (b"\xfd7zXZ\0", Self::Xz),
            (&lzo::MAGIC, Self::Lzo),
            (&LZ4_MAGIC.to_le_bytes(), Self::Lz4),
            (b"\x28\xb5\x2f\xfd", Self::Zstd),
        ];
        magics
            .into_iter()
            .find_map(|(magic, compression)| payload.starts_with(magic).then_some(compression))
    }
}

/// Unpacks a bzImage's payload of at least eight bytes.
pub(super) fn decompress(compression: Compression, payload: &[u8]) -> io::Result<Vec<u8>> {
    let (packed, trailer) = payload.split_at(payload.len() - 4);
    let size = u64::from(u32_at(trailer, 0));
    if size > MAX_KERNEL {
        return Err(invalid(format!(
            "it claims {size} bytes; at most {MAX_KERNEL} are accepted"
        )));
    }
    let size = size as usize;
    let kernel = match compression {
        Compression::Gzip => collect(flate2::read::GzDecoder::new(payload), size, payload.len())?,
        Compression::Bzip2 => collect(bzip2::read::BzDecoder::new(packed), size, packed.len())?,
        Compression::Lzma => {
            let reader = lzma_rust2::LzmaReader::new_mem_limit(packed, LZMA_MEMORY_KIB, None)?;
            collect(reader, size, packed.len())?
        }
        Compression::Xz => {
            let reader = lzma_rust2::XzReader::new_mem_limit(packed, false, LZMA_MEMORY_KIB);
            collect(reader, size, packed.len())?
        }
        Compression::Zstd => {
            let reader = ruzstd::decoding::StreamingDecoder::new(packed)
                .map_err(|error| invalid(error.to_string()))?;
            collect(reader, size, packed.len())?
        }
        Compression::Lzo => lzo::decompress(packed, size)?,
        Compression::Lz4 => lz4_legacy(packed, size)?,
    };
    if kernel.len() != size {
        return Err(invalid(format!(
            "it has {} bytes unpacked, but claims {size}",
            kernel.len()
        )));
    }
    Ok(kernel)
}

/// Reads at most one byte more than `size`, so that the caller sees an excess.
fn collect(reader: impl Read, size: usize, packed: usize) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::with_capacity(likely_len(size, packed));
    reader.take(size as u64 + 1).read_to_end(&mut kernel)?;
    Ok(kernel)
}

/// A first allocation that suits an honest kernel and is no burden for a dishonest one.
pub(super) fn likely_len(size: usize, packed: usize) -> usize {
    size.saturating_add(1).min(packed.saturating_mul(16))
}

/// Magic, then chunks of a length in four bytes and an LZ4 block each.
fn lz4_legacy(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::with_capacity(likely_len(size, packed.len()));
    let mut chunk = vec![0; LZ4_CHUNK.min(size)];
    let mut rest = packed;
    while let Some((head, tail)) = rest.split_first_chunk::<4>() {
        rest = tail;
        let len = u32::from_le_bytes(*head);
        // Concatenated streams repeat the magic.
        if len == LZ4_MAGIC {
            continue;
        }
        let block = rest
            .get(..len as usize)
            .ok_or_else(|| invalid("a chunk lies beyond the end of the stream"))?;
        rest = &rest[block.len()..];
        let unpacked = lz4_flex::block::decompress_into(block, &mut chunk)
            .map_err(|error| invalid(error.to_string()))?;
        if unpacked > size - kernel.len() {
            return Err(invalid(format!(
                "it has more than the {size} bytes it claims"
            )));
        }
        kernel.extend_from_slice(&chunk[..unpacked]);
    }
    Ok(kernel)
}

pub(super) fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}
