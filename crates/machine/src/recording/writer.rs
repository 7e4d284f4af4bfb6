//! Writing a recording.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::record::{Header, Record};
use super::{MAGIC, MAX_CONTENT, MAX_HEADER, VERSION};

/// A chunk is written when it has so many bytes of content…
const CHUNK: usize = 256 << 10;
/// …or is so old.
const MAX_AGE: Duration = Duration::from_secs(1);

/// A recording in the making. What is not flushed is lost when the process dies.
pub struct Writer {
    file: Box<dyn Write + Send>,
    content: Vec<u8>,
    /// The last entry's.
    position: u64,
    flushed: Instant,
    /// The file has not taken a chunk: what followed it could not be read.
    broken: bool,
}

impl Writer {
    /// Begins a recording in `file`.
    ///
    /// # Errors
    ///
    /// The file does not take it.
    pub fn new(mut file: Box<dyn Write + Send>, header: &Header) -> io::Result<Self> {
        let header = encode(header);
        let len = u32::try_from(header.len())
            .ok()
            .filter(|len| *len <= MAX_HEADER)
            .ok_or(io::ErrorKind::InvalidInput)?;
        file.write_all(&MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&len.to_le_bytes())?;
        file.write_all(&header)?;
        Ok(Self {
            file,
            content: Vec::with_capacity(CHUNK),
            position: 0,
            flushed: Instant::now(),
            broken: false,
        })
    }

    /// Adds a record at a position that is not before the last one's.
    ///
    /// # Errors
    ///
    /// The file does not take it.
    pub fn add(&mut self, position: u64, record: &Record) -> io::Result<()> {
        let entry = (position - self.position, record);
        self.position = position;
        minicbor::encode(entry, &mut self.content)
            .expect("a Vec takes every byte, so encoding cannot fail");
        if self.content.len() >= CHUNK {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what waits, if the last time is long ago.
    ///
    /// # Errors
    ///
    /// The file does not take it.
    pub fn flush_in_time(&mut self) -> io::Result<()> {
        if self.flushed.elapsed() < MAX_AGE {
            return Ok(());
        }
        self.flush()
    }

    /// Writes what waits.
    ///
    /// # Errors
    ///
    /// The file does not take it.
    pub fn flush(&mut self) -> io::Result<()> {
        self.flushed = Instant::now();
        if self.content.is_empty() {
            return Ok(());
        }
        assert!(self.content.len() <= MAX_CONTENT, "a record is small");
        let stored = lz4_flex::block::compress(&self.content);
        let mut chunk = Vec::with_capacity(12 + stored.len());
        for word in [
            stored.len() as u32,
            self.content.len() as u32,
            crc32fast::hash(&stored),
        ] {
            chunk.extend(word.to_le_bytes());
        }
        chunk.extend(stored);
        self.content.clear();
        if self.broken {
            return Err(io::Error::other("the file has failed before"));
        }
        let written = self.file.write_all(&chunk);
        self.broken = written.is_err();
        written
    }
}

fn encode<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    minicbor::to_vec(value).expect("a Vec takes every byte, so encoding cannot fail")
}
