//! The near end of the guest's console.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::stdio;

use super::terminal::{EscapeCommand, EscapeFilter};

/// Input that the guest has not taken yet is read from the terminal up to this many bytes.
const MAX_PENDING_INPUT: usize = 4096;

/// Where output goes.
enum Sink {
    Stdio,
    File(File),
}

/// The guest's console as the supervisor holds it: a socket to the VM process on one side, a terminal
/// or a file on the other. Made with [`Console::off`] it is nothing at all.
pub(crate) struct Console {
    socket: Option<UnixStream>,
    sink: Option<Sink>,
    escape: EscapeFilter,
    input_open: bool,
    pending: VecDeque<u8>,
}

impl Console {
    /// No console: output is thrown away by the machine itself.
    pub(crate) fn off() -> Self {
        Self {
            socket: None,
            sink: None,
            escape: EscapeFilter::default(),
            input_open: false,
            pending: VecDeque::new(),
        }
    }

    /// Standard input and output. The second value is the far end, for the VM process.
    ///
    /// # Errors
    ///
    /// The system has no more descriptors.
    pub(crate) fn stdio() -> io::Result<(Self, UnixStream)> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        let console = Self {
            socket: Some(near),
            sink: Some(Sink::Stdio),
            input_open: true,
            ..Self::off()
        };
        Ok((console, far))
    }

    /// Output into a file, no input.
    ///
    /// # Errors
    ///
    /// The file cannot be opened.
    pub(crate) fn file(path: &Path) -> io::Result<(Self, UnixStream)> {
        let file = File::options().create(true).append(true).open(path)?;
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        Ok((
            Self {
                socket: Some(near),
                sink: Some(Sink::File(file)),
                ..Self::off()
            },
            far,
        ))
    }

    /// The near end's socket.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Whether this is the user's terminal.
    pub(crate) fn is_stdio(&self) -> bool {
        matches!(self.sink, Some(Sink::Stdio))
    }

    /// Whether output may come.
    pub(crate) fn has_output(&self) -> bool {
        self.socket.is_some()
    }

    /// Whether typed bytes wait for the guest.
    pub(crate) fn has_pending_input(&self) -> bool {
        self.socket.is_some() && !self.pending.is_empty()
    }

    /// Whether standard input should be read now.
    pub(crate) fn wants_input(&self) -> bool {
        self.input_open && self.pending.len() < MAX_PENDING_INPUT
    }

    /// Passes on what the guest has written.
    pub(crate) fn forward_output(&mut self) {
        let mut bytes = [0; 16 << 10];
        let Some(socket) = &mut self.socket else {
            return;
        };
        match socket.read(&mut bytes) {
            Ok(0) => self.socket = None,
            Ok(read) => self.write(&bytes[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.socket = None,
        }
    }

    /// Passes on all that the guest had written before its end.
    pub(crate) fn forward_rest(&mut self) {
        let mut bytes = [0; 16 << 10];
        while let Some(Ok(read)) = self.socket.as_mut().map(|socket| socket.read(&mut bytes))
            && read > 0
        {
            self.write(&bytes[..read]);
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        let result = match &mut self.sink {
            Some(Sink::Stdio) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(bytes).and_then(|()| stdout.flush())
            }
            Some(Sink::File(file)) => file.write_all(bytes),
            None => Ok(()),
        };
        if result.is_err() {
            // The reader is gone; the guest goes on without one.
            self.sink = None;
        }
    }

    /// Reads what was typed: the guest's share is kept for it, Mica's share is returned.
    pub(crate) fn take_input(&mut self) -> Vec<EscapeCommand> {
        let mut bytes = [0; 1024];
        match rustix::io::read(stdio::stdin(), &mut bytes) {
            Ok(0) => self.input_open = false,
            Ok(read) => {
                let (guest, commands) = self.escape.filter(&bytes[..read]);
                self.pending.extend(guest);
                self.flush_input();
                return commands;
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.input_open = false,
        }
        Vec::new()
    }

    /// Gives the guest what waits for it, as far as it takes it.
    pub(crate) fn flush_input(&mut self) {
        let Some(socket) = &mut self.socket else {
            self.pending.clear();
            return;
        };
        while !self.pending.is_empty() {
            match socket.write(self.pending.as_slices().0) {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(_) => return,
            }
        }
    }
}
