//! One stream between a guest port and a Unix socket, with its flow control.
//!
//! ```text
//!  host connects ──▶ Requested ──RESPONSE──▶ Open ──both halves shut──▶ gone
//!  guest connects ─────────────────────────▶  │
//!                       RST, error, violation └──────────────────────▶ gone
//! ```
//!
//! Towards the host we hold at most [`BUFFER_LEN`] bytes, which is the credit we give the guest.
//! Towards the guest we hold nothing: bytes stay in the socket until there are both a buffer of the
//! driver and credit of the peer.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::packet::{Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The credit we give, in bytes.
pub(super) const BUFFER_LEN: u32 = 64 << 10;

/// Why a connection is over; the guest gets a reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Over;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has not answered our request; its answer goes to the host's program as `OK`.
    Requested,
    Open,
}

/// What the guest has to be told, in this order.
#[derive(Default)]
struct Pending {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// A connection and its socket, which is non-blocking and watched for edges.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    ports: Ports,
    phase: Phase,
    pending: Pending,
    /// There may be bytes to read, room to write.
    readable: bool,
    writable: bool,
    /// Bytes from the guest that the socket has not taken.
    buffer: VecDeque<u8>,
    /// Bytes the socket has taken, and what of that the guest knows.
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// Bytes sent to the guest, and the guest's credit for them.
    sent: Wrapping<u32>,
    peer_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    /// We have asked for credit since we last got some.
    asked: bool,
    /// `SHUTDOWN_*` bits: what we told the guest of the host's program, and what the guest told.
    host_shut: u32,
    guest_shut: u32,
    /// The socket's sending half is shut, as the guest's is.
    write_shut: bool,
    /// Both directions of the socket are closed at its other end.
    hung_up: bool,
}

impl Connection {
    fn new(stream: UnixStream, ports: Ports, phase: Phase) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            ports,
            phase,
            pending: Pending::default(),
            readable: true,
            writable: true,
            buffer: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            sent: Wrapping(0),
            peer_alloc: 0,
            peer_forwarded: Wrapping(0),
            asked: false,
            host_shut: 0,
            guest_shut: 0,
            write_shut: false,
            hung_up: false,
        })
    }

    /// A program on the host wants to reach a port of the guest.
    pub(super) fn to_guest(stream: UnixStream, ports: Ports) -> io::Result<Self> {
        let mut connection = Self::new(stream, ports, Phase::Requested)?;
        connection.pending.request = true;
        Ok(connection)
    }

    /// The guest's `request` was accepted by the host's program behind `stream`.
    pub(super) fn from_guest(stream: UnixStream, request: &Header) -> io::Result<Self> {
        let mut connection = Self::new(stream, request.ports, Phase::Open)?;
        connection.pending.response = true;
        connection.take_credit(request);
        Ok(connection)
    }

    /// The socket may have become ready.
    pub(super) fn ready(
        &mut self,
        readable: bool,
        writable: bool,
        hung_up: bool,
    ) -> Result<(), Over> {
        self.readable |= readable;
        self.writable |= writable;
        self.hung_up |= hung_up;
        if self.hung_up && self.host_shut & SHUTDOWN_SEND != 0 {
            self.shut_host(SHUTDOWN_BOTH);
        }
        self.flush()
    }

    /// Whether a packet to the guest may be waiting.
    pub(super) fn has_work(&self) -> bool {
        let Pending {
            request,
            response,
            shutdown,
            credit_update,
            credit_request,
        } = self.pending;
        request || response || shutdown || credit_update || credit_request || self.may_read()
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && (self.host_shut & SHUTDOWN_SEND == 0)
            && (self.guest_shut & SHUTDOWN_RECEIVE == 0)
            && (self.credit() > 0 || !self.asked)
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        let under_way = (self.sent - self.peer_forwarded).0;
        self.peer_alloc.saturating_sub(under_way)
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        self.asked &= self.credit() == 0;
    }

    /// A packet of the guest for this connection, with its payload.
    pub(super) fn take(&mut self, header: &Header, payload: &[u8]) -> Result<(), Over> {
        self.take_credit(header);
        match (header.op, self.phase) {
            (Op::Response, Phase::Requested) => {
                self.phase = Phase::Open;
                // The line is not the guest's, so it costs no credit.
                let line = format!("OK {}\n", self.ports.host);
                (&self.stream).write_all(line.as_bytes()).map_err(|_| Over)
            }
            (Op::Data, Phase::Open) => self.take_data(payload),
            (Op::Shutdown, Phase::Open) => self.take_shutdown(header.flags),
            (Op::CreditUpdate, Phase::Open) => Ok(()),
            (Op::CreditRequest, Phase::Open) => {
                self.pending.credit_update = true;
                Ok(())
            }
            _ => Err(Over),
        }
    }

    fn take_data(&mut self, payload: &[u8]) -> Result<(), Over> {
        let within_credit = self.buffer.len() + payload.len() <= BUFFER_LEN as usize;
        if !within_credit || self.guest_shut & SHUTDOWN_SEND != 0 {
            return Err(Over);
        }
        self.flush()?;
        let mut written = 0;
        while self.writable && self.buffer.is_empty() && written < payload.len() {
            match (&self.stream).write(&payload[written..]) {
                Ok(len) => written += len,
                Err(error) => self.write_failed(&error)?,
            }
        }
        self.count_forwarded(written);
        self.buffer.extend(&payload[written..]);
        Ok(())
    }

    fn write_failed(&mut self, error: &io::Error) -> Result<(), Over> {
        match error.kind() {
            ErrorKind::WouldBlock => self.writable = false,
            ErrorKind::Interrupted => {}
            _ => return Err(Over),
        }
        Ok(())
    }

    /// Writes what is buffered as far as the socket takes it, then does what waited for that.
    fn flush(&mut self) -> Result<(), Over> {
        while self.writable && !self.buffer.is_empty() {
            match (&self.stream).write(self.buffer.as_slices().0) {
                Ok(len) => {
                    self.buffer.drain(..len);
                    self.count_forwarded(len);
                }
                Err(error) => self.write_failed(&error)?,
            }
        }
        if self.buffer.is_empty() && self.guest_shut & SHUTDOWN_SEND != 0 {
            // Once only: it is an event of the socket, which brings us here again.
            if !std::mem::replace(&mut self.write_shut, true) {
                // The other end may be gone already, which is as good.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            if self.guest_shut == SHUTDOWN_BOTH {
                return Err(Over);
            }
        }
        Ok(())
    }

    /// The guest is told when it can know of less than three quarters of our buffer as free.
    fn count_forwarded(&mut self, len: usize) {
        self.forwarded += len as u32;
        if (self.forwarded - self.forwarded_told).0 >= BUFFER_LEN / 4 {
            self.pending.credit_update = true;
        }
    }

    fn take_shutdown(&mut self, flags: u32) -> Result<(), Over> {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            // Tells the host's program, unless it is gone.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    fn shut_host(&mut self, flags: u32) {
        if self.host_shut | flags != self.host_shut {
            self.host_shut |= flags;
            self.pending.shutdown = true;
        }
    }

    /// The next packet for the guest, whose payload of at most `room.len()` bytes is put into `room`.
    pub(super) fn next_packet(&mut self, room: &mut [u8]) -> Result<Option<Header>, Over> {
        if std::mem::take(&mut self.pending.request) {
            return Ok(Some(self.header(Op::Request)));
        }
        if std::mem::take(&mut self.pending.response) {
            return Ok(Some(self.header(Op::Response)));
        }
        if self.may_read()
            && let Some(header) = self.read_data(room)?
        {
            return Ok(Some(header));
        }
        let op = if std::mem::take(&mut self.pending.shutdown) {
            Op::Shutdown
        } else if std::mem::take(&mut self.pending.credit_update) {
            Op::CreditUpdate
        } else if std::mem::take(&mut self.pending.credit_request) {
            Op::CreditRequest
        } else {
            return Ok(None);
        };
        let mut header = self.header(op);
        if op == Op::Shutdown {
            header.flags = self.host_shut;
        }
        Ok(Some(header))
    }

    fn read_data(&mut self, room: &mut [u8]) -> Result<Option<Header>, Over> {
        let len = room.len().min(self.credit() as usize);
        if len == 0 {
            if !self.asked && self.credit() == 0 {
                self.asked = true;
                self.pending.credit_request = true;
            }
            return Ok(None);
        }
        match (&self.stream).read(&mut room[..len]) {
            Ok(0) => {
                let flags = if self.hung_up {
                    SHUTDOWN_BOTH
                } else {
                    SHUTDOWN_SEND
                };
                self.shut_host(flags);
                Ok(None)
            }
            Ok(len) => {
                self.sent += len as u32;
                let mut header = self.header(Op::Data);
                header.len = len as u32;
                Ok(Some(header))
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => {
                    self.readable = false;
                    Ok(None)
                }
                ErrorKind::Interrupted => Ok(None),
                _ => Err(Over),
            },
        }
    }

    /// A header that carries our credit, as every one does.
    fn header(&mut self, op: Op) -> Header {
        self.forwarded_told = self.forwarded;
        self.pending.credit_update = false;
        Header {
            buf_alloc: BUFFER_LEN,
            fwd_cnt: self.forwarded.0,
            ..Header::new(self.ports, op)
        }
    }
}
