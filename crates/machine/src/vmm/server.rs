//! The control socket's clients: bytes in, requests out, answers back.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::control::{
    ErrorCode, Greeting, LineReader, LineTooLong, MAX_CLIENTS, Request, Response, VERSION, to_line,
};

/// One connected client.
struct Client {
    stream: UnixStream,
    reader: LineReader,
}

/// What a client's bytes amount to.
pub(super) enum Incoming {
    /// Requests, in order; a line that is none is there as its answer.
    Requests(Vec<Result<Request, Box<Response>>>),
    /// The client is gone or had to go. Its descriptor is closed with [`Server::close`].
    Closed,
}

/// A listening control socket with its clients, none of which can make it wait.
pub(super) struct Server {
    listener: UnixListener,
    name: String,
    clients: BTreeMap<RawFd, Client>,
}

impl Server {
    pub(super) fn new(listener: UnixListener, name: &str) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            name: name.to_owned(),
            clients: BTreeMap::new(),
        })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Accepts one client and greets it. `None` if there is none, or it is one too many.
    pub(super) fn accept(&mut self) -> Option<RawFd> {
        let (mut stream, _) = self.listener.accept().ok()?;
        if self.clients.len() >= MAX_CLIENTS {
            return None;
        }
        stream.set_nonblocking(true).ok()?;
        let greeting = Greeting {
            version: VERSION,
            name: self.name.clone(),
        };
        stream.write_all(&to_line(&greeting)).ok()?;
        let fd = stream.as_raw_fd();
        self.clients.insert(
            fd,
            Client {
                stream,
                reader: LineReader::default(),
            },
        );
        Some(fd)
    }

    /// Reads what a client has sent.
    pub(super) fn read(&mut self, fd: RawFd) -> Incoming {
        let Some(client) = self.clients.get_mut(&fd) else {
            return Incoming::Closed;
        };
        let mut bytes = [0; 4096];
        let read = match client.stream.read(&mut bytes) {
            Ok(0) => return Incoming::Closed,
            Ok(read) => read,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                0
            }
            Err(_) => return Incoming::Closed,
        };
        let mut requests = Vec::new();
        let result = client
            .reader
            .push(&bytes[..read], |line| requests.push(Request::parse(line)));
        if result == Err(LineTooLong) {
            let answer = Response::error(None, ErrorCode::TooLong, "the request line is too long");
            // The client is closed either way.
            let _ = client.stream.write_all(&to_line(&answer));
            return Incoming::Closed;
        }
        Incoming::Requests(requests)
    }

    /// Answers a client. One that does not read its answers is closed: `false`.
    pub(super) fn answer(&mut self, fd: RawFd, response: &Response) -> bool {
        self.clients
            .get_mut(&fd)
            .is_some_and(|client| client.stream.write_all(&to_line(response)).is_ok())
    }

    /// Forgets a client.
    pub(super) fn close(&mut self, fd: RawFd) {
        self.clients.remove(&fd);
    }
}
