//! lzop's container and its LZO1X blocks (the kernel's `Documentation/staging/lzo.rst`), decoded
//! in safe Rust, because no maintained crate does.

use std::io;

use super::decompress::{invalid, likely_len};

/// The first bytes of an lzop file.
pub(super) const MAGIC: [u8; 9] = *b"\x89LZO\0\r\n\x1a\n";

/// lzop's own bound on a block, unpacked.
const MAX_BLOCK: usize = 64 << 20;

// Flags of the header.
const ADLER32_UNPACKED: u32 = 1 << 0;
const ADLER32_PACKED: u32 = 1 << 1;
const CRC32_UNPACKED: u32 = 1 << 8;
const CRC32_PACKED: u32 = 1 << 9;
const FILTER: u32 = 1 << 11;

/// Unpacks an lzop file of at most `size` bytes.
pub(super) fn decompress(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut input = Input(packed);
    let flags = header(&mut input)?;
    let checksums = |mask: u32| 4 * (flags & mask).count_ones() as usize;
    let mut kernel = Vec::with_capacity(likely_len(size, packed.len()));
    loop {
        let unpacked = input.be32()? as usize;
        if unpacked == 0 {
            return Ok(kernel);
        }
        if unpacked > MAX_BLOCK.min(size - kernel.len()) {
            return Err(invalid("a block is larger than the kernel it is part of"));
        }
        let packed = input.be32()? as usize;
        input.take(checksums(ADLER32_UNPACKED | CRC32_UNPACKED))?;
        if packed < unpacked {
            input.take(checksums(ADLER32_PACKED | CRC32_PACKED))?;
            let end = kernel.len() + unpacked;
            lzo1x(Input(input.take(packed)?), &mut kernel, end)?;
        } else if packed == unpacked {
            kernel.extend_from_slice(input.take(packed)?);
        } else {
            return Err(invalid("a block is larger packed than unpacked"));
        }
    }
}

/// Reads the header and returns its flags.
fn header(input: &mut Input<'_>) -> io::Result<u32> {
    input.take(MAGIC.len())?;
    let version = input.be16()?;
    let newer = version >= 0x940;
    // Library version; version needed to extract.
    input.take(if newer { 4 } else { 2 })?;
    // Method; level.
    input.take(if newer { 2 } else { 1 })?;
    let flags = input.be32()?;
    if flags & FILTER != 0 {
        return Err(invalid("it uses a filter"));
    }
    // Mode and modification time.
    input.take(if newer { 12 } else { 8 })?;
    let name = usize::from(input.byte()?);
    // Name and header checksum.
    input.take(name + 4)?;
    Ok(flags)
}

/// One instruction of LZO1X.
enum Instruction {
    /// A run of literals.
    Literals(usize),
    /// A copy of what lies `distance` back, then up to three literals.
    Match {
        len: usize,
        distance: usize,
        literals: usize,
    },
    End,
}

impl Instruction {
    /// Reads the instruction behind one that copied `literals`; 4 stands for a run.
    fn read(input: &mut Input<'_>, literals: usize) -> io::Result<Self> {
        let code = usize::from(input.byte()?);
        let (len, distance, next) = match code {
            0..16 if literals == 0 => return Ok(Self::Literals(3 + input.length(code, 15)?)),
            0..16 => {
                let distance = (usize::from(input.byte()?) << 2) + (code >> 2);
                match literals {
                    4 => (3, distance + 0x801, code),
                    _ => (2, distance + 1, code),
                }
            }
            16..32 => {
                let len = 2 + input.length(code & 7, 7)?;
                let word = input.le16()?;
                let distance = ((code & 8) << 11) + (word >> 2);
                if distance == 0 {
                    return Ok(Self::End);
                }
                (len, distance + 0x4000, word)
            }
            32..64 => {
                let len = 2 + input.length(code & 31, 31)?;
                let word = input.le16()?;
                (len, (word >> 2) + 1, word)
            }
            _ => {
                let len = match code {
                    64..128 => 3 + (code >> 5 & 1),
                    _ => 5 + (code >> 5 & 3),
                };
                let distance = (usize::from(input.byte()?) << 3) + (code >> 2 & 7) + 1;
                (len, distance, code)
            }
        };
        Ok(Self::Match {
            len,
            distance,
            literals: next & 3,
        })
    }
}

/// Decodes one block behind what `output` already holds, until it has `end` bytes. Matches reach
/// back no further than the block's own start.
fn lzo1x(mut input: Input<'_>, output: &mut Vec<u8>, end: usize) -> io::Result<()> {
    let start = output.len();
    let mut state = 0;
    // The first byte may be a length of literals instead.
    if let Some(first @ 18..) = input.0.first() {
        let len = usize::from(first - 17);
        input.byte()?;
        check_room(output, len, end)?;
        output.extend_from_slice(input.take(len)?);
        state = len.min(4);
    }
    loop {
        match Instruction::read(&mut input, state)? {
            Instruction::Literals(len) => {
                check_room(output, len, end)?;
                output.extend_from_slice(input.take(len)?);
                state = 4;
            }
            Instruction::Match {
                len,
                distance,
                literals,
            } => {
                check_room(output, len + literals, end)?;
                if distance > output.len() - start {
                    return Err(invalid("a match reaches before the block's start"));
                }
                let from = output.len() - distance;
                for index in from..from + len {
                    output.push(output[index]);
                }
                output.extend_from_slice(input.take(literals)?);
                state = literals;
            }
            Instruction::End => break,
        }
    }
    if output.len() != end || !input.0.is_empty() {
        return Err(invalid("a block has not the size it claims"));
    }
    Ok(())
}

fn check_room(output: &[u8], len: usize, end: usize) -> io::Result<()> {
    if len > end.saturating_sub(output.len()) {
        return Err(invalid("a block is longer than it claims"));
    }
    Ok(())
}

fn ended() -> io::Error {
    invalid("the stream ends early")
}

/// What is left of the stream.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(ended)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn le16(&mut self) -> io::Result<usize> {
        Ok(usize::from(self.byte()?) | usize::from(self.byte()?) << 8)
    }

    fn be16(&mut self) -> io::Result<u16> {
        Ok(u16::from_be_bytes([self.byte()?, self.byte()?]))
    }

    fn be32(&mut self) -> io::Result<u32> {
        Ok(u32::from(self.be16()?) << 16 | u32::from(self.be16()?))
    }

    /// A length of which the instruction holds `bits`; zero means that `base` and bytes of the
    /// stream follow, each zero byte worth 255, up to one that is not zero.
    fn length(&mut self, bits: usize, base: usize) -> io::Result<usize> {
        if bits != 0 {
            return Ok(bits);
        }
        let mut len = base;
        loop {
            match self.byte()? {
                0 => len += 255,
                last => return Ok(len + usize::from(last)),
            }
        }
    }
}
