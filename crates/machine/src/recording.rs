//! Recordings: what reaches a guest from outside its processors, in order, in a file.
//!
//! Bytes: `docs/formats/recording.md`. Who records and who replays is [`crate::soft`]'s and
//! [`crate::vmm`]'s business.

pub mod fuzz;
mod reader;
mod record;
mod writer;

pub use reader::{Reader, ReplayError};
pub use record::{Entry, Header, Place, Record};
pub use writer::Writer;

/// How a recording begins.
const MAGIC: [u8; 8] = *b"MICAREC\n";
/// Raised when an older Mica could misread a recording.
const VERSION: u32 = 1;
/// The longest header.
const MAX_HEADER: u32 = 1 << 16;
/// The most bytes of a chunk's content.
const MAX_CONTENT: usize = 1 << 20;
/// The most bytes of a chunk in the file: LZ4 makes hopeless content longer, by less than this.
const MAX_STORED: usize = 2 << 20;
/// Memory goes in records of at most this many bytes.
pub const MAX_MEMORY: usize = 64 << 10;

#[cfg(test)]
mod tests;
