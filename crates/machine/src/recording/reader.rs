//! Reading a recording, entry by entry. The file may be anybody's.

use std::io::{self, Read};

use minicbor::Decoder;

use super::record::{Entry, Header, Record};
use super::{MAGIC, MAX_CONTENT, MAX_HEADER, MAX_STORED, VERSION};
use crate::engine::MAX_VCPUS;

/// Why a recording cannot be replayed (further).
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// It is something else.
    #[error("this is no recording by mica run --record")]
    NoRecording,
    /// A newer Mica wrote it.
    #[error(
        "the recording has format {0}, this Mica knows {VERSION}; replay it with the one that made it"
    )]
    Version(u32),
    /// The file says what cannot be.
    #[error("the recording is damaged: {0}")]
    Damaged(String),
    /// It cannot be read.
    #[error("cannot read the recording: {0}")]
    Io(#[from] io::Error),
    /// The guest did something else than what was recorded.
    #[error("the replay went another way at position {position}: {what}")]
    Diverged {
        /// Where.
        position: u64,
        /// What happened and what should have.
        what: String,
    },
}

impl ReplayError {
    pub(crate) fn damaged(what: impl ToString) -> Self {
        Self::Damaged(what.to_string())
    }
}

/// A recording that is read.
pub struct Reader {
    file: Box<dyn Read + Send>,
    header: Header,
    content: Vec<u8>,
    /// How much of the content has been read.
    at: usize,
    /// The last entry's.
    position: u64,
    next: Option<Entry>,
}

impl Reader {
    /// Begins to read.
    ///
    /// # Errors
    ///
    /// It is no recording, or one that this Mica does not know.
    pub fn new(mut file: Box<dyn Read + Send>) -> Result<Self, ReplayError> {
        let mut start = [0; 16];
        match file.read_exact(&mut start) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ReplayError::NoRecording);
            }
            other => other?,
        }
        let (magic, numbers) = start.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(ReplayError::NoRecording);
        }
        let [version, len] = [word(numbers, 0), word(numbers, 4)];
        if version != VERSION {
            return Err(ReplayError::Version(version));
        }
        if len > MAX_HEADER {
            return Err(ReplayError::damaged("its header is too long"));
        }
        let mut header = vec![0; len as usize];
        file.read_exact(&mut header)?;
        let header: Header = minicbor::decode(&header).map_err(ReplayError::damaged)?;
        if !(1..=MAX_VCPUS).contains(&header.vcpus) {
            let what = format!("{} vCPUs; possible are 1 to {MAX_VCPUS}", header.vcpus);
            return Err(ReplayError::Damaged(what));
        }
        Ok(Self {
            file,
            header,
            content: Vec::new(),
            at: 0,
            position: 0,
            next: None,
        })
    }

    /// What was recorded.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next entry, which stays the next one; nothing at the end of the file.
    ///
    /// # Errors
    ///
    /// The file is damaged or cannot be read.
    pub fn peek(&mut self) -> Result<Option<&Entry>, ReplayError> {
        if self.next.is_none() {
            self.next = self.read()?;
        }
        Ok(self.next.as_ref())
    }

    /// Takes the next entry.
    ///
    /// # Errors
    ///
    /// The file is damaged or cannot be read.
    pub fn take(&mut self) -> Result<Option<Entry>, ReplayError> {
        self.peek()?;
        Ok(self.next.take())
    }

    fn read(&mut self) -> Result<Option<Entry>, ReplayError> {
        if self.at == self.content.len() && !self.read_chunk()? {
            return Ok(None);
        }
        let mut decoder = Decoder::new(&self.content[self.at..]);
        let (after, record): (u64, Record) = decoder.decode().map_err(ReplayError::damaged)?;
        self.at += decoder.position();
        self.position = self
            .position
            .checked_add(after)
            .ok_or_else(|| ReplayError::damaged("a position is too large"))?;
        Ok(Some(Entry {
            position: self.position,
            record,
        }))
    }

    /// Reads a chunk; `false` at the end, be it in the middle of one.
    fn read_chunk(&mut self) -> Result<bool, ReplayError> {
        let mut numbers = [0; 12];
        if !read_whole(&mut self.file, &mut numbers)? {
            return Ok(false);
        }
        let [stored, len, sum] = [0, 4, 8].map(|at| word(&numbers, at));
        let (stored, len) = (stored as usize, len as usize);
        if stored > MAX_STORED || len > MAX_CONTENT || len == 0 {
            return Err(ReplayError::damaged("a chunk is too long"));
        }
        let mut bytes = vec![0; stored];
        if !read_whole(&mut self.file, &mut bytes)? {
            return Ok(false);
        }
        if crc32fast::hash(&bytes) != sum {
            return Err(ReplayError::damaged("a chunk's checksum is wrong"));
        }
        let content = lz4_flex::block::decompress(&bytes, len).map_err(ReplayError::damaged)?;
        if content.len() != len {
            return Err(ReplayError::damaged("a chunk has another length"));
        }
        self.content = content;
        self.at = 0;
        Ok(true)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Fills `bytes`; `false` if the file ends before that.
fn read_whole(file: &mut dyn Read, bytes: &mut [u8]) -> Result<bool, ReplayError> {
    match file.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error.into()),
    }
}
