//! All connections of a device, the sockets that want to become one, and the resets that have no
//! connection.
//!
//! The muxer knows neither queues nor the event loop: it takes packets and makes packets, and says
//! which sockets are to be watched and which no longer.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};

use super::Connector;
use super::connection::{Connection, Over};
use super::packet::{Header, Op, Ports, Refusal};

/// The most connections at a time, those in their handshake among them.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// How many resets may wait for the driver's buffers before its packets wait too.
const MAX_RESETS: usize = 256;
/// Host ports of connections that the host begins.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// `CONNECT `, ten digits, newline.
const MAX_HANDSHAKE: usize = 19;

/// See the module.
pub(super) struct Muxer {
    listener: Option<UnixListener>,
    connect: Connector,
    connections: BTreeMap<Ports, Connection>,
    /// Accepted, and not yet done with `CONNECT`.
    handshakes: BTreeMap<RawFd, UnixStream>,
    by_fd: BTreeMap<RawFd, Ports>,
    resets: VecDeque<Ports>,
    next_host_port: u32,
    /// Whose turn comes after.
    last_served: Ports,
    accept_ready: bool,
    /// Sockets that the event loop does not watch yet.
    fresh: Vec<RawFd>,
    /// Sockets that it still watches.
    dead: Vec<UnixStream>,
}

impl Muxer {
    pub(super) fn new(listener: Option<UnixListener>, connect: Connector) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self {
            listener,
            connect,
            connections: BTreeMap::new(),
            handshakes: BTreeMap::new(),
            by_fd: BTreeMap::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            last_served: Ports { host: 0, guest: 0 },
            accept_ready: true,
            fresh: Vec::new(),
            dead: Vec::new(),
        })
    }

    pub(super) fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    /// Connections and handshakes, now.
    pub(super) fn len(&self) -> usize {
        self.connections.len() + self.handshakes.len()
    }

    /// Sockets to watch from now on.
    pub(super) fn take_fresh(&mut self) -> Vec<RawFd> {
        std::mem::take(&mut self.fresh)
    }

    /// Sockets to watch no longer, before they are closed by dropping them.
    pub(super) fn take_dead(&mut self) -> Vec<UnixStream> {
        std::mem::take(&mut self.dead)
    }

    /// Ends every connection without a word to the guest, which has been reset itself.
    pub(super) fn clear(&mut self) {
        let connections = std::mem::take(&mut self.connections);
        self.dead
            .extend(connections.into_values().map(|c| c.stream));
        self.dead
            .extend(std::mem::take(&mut self.handshakes).into_values());
        self.by_fd.clear();
        self.resets.clear();
        self.fresh.clear();
    }

    /// A watched descriptor has become ready.
    pub(super) fn ready(&mut self, fd: RawFd, readable: bool, writable: bool, hung_up: bool) {
        if self.listener.as_ref().is_some_and(|l| l.as_raw_fd() == fd) {
            self.accept_ready = true;
        } else if let Some(&ports) = self.by_fd.get(&fd) {
            let over = match self.connections.get_mut(&ports) {
                Some(connection) => connection.ready(readable, writable, hung_up).is_err(),
                None => false,
            };
            if over {
                self.reset(ports);
            }
        } else if let Some(stream) = self.handshakes.remove(&fd) {
            self.shake_hands(stream);
        }
    }

    /// Accepts what the listener has, as far as connections are left.
    pub(super) fn accept(&mut self) {
        while self.accept_ready && self.len() < MAX_CONNECTIONS {
            let Some(listener) = &self.listener else {
                return;
            };
            match listener.accept() {
                Ok((stream, _)) => {
                    if stream.set_nonblocking(true).is_ok() {
                        self.fresh.push(stream.as_raw_fd());
                        self.shake_hands(stream);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nothing there, or no descriptor left: the next connection's edge tries again.
                Err(_) => self.accept_ready = false,
            }
        }
    }

    /// Goes on with the handshake of a host's program: `CONNECT port\n`. Bytes behind the newline
    /// are left in the socket, for the guest.
    fn shake_hands(&mut self, stream: UnixStream) {
        let mut line = [0; MAX_HANDSHAKE];
        let seen = match recv(&stream, &mut line, RecvFlags::PEEK) {
            Ok((len, _)) => &line[..len],
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => &[],
            Err(_) => return self.bury(stream),
        };
        let Some(newline) = seen.iter().position(|&byte| byte == b'\n') else {
            if seen.len() == MAX_HANDSHAKE || has_ended(&stream) {
                self.bury(stream);
            } else {
                self.handshakes.insert(stream.as_raw_fd(), stream);
            }
            return;
        };
        let port = port_of(&seen[..newline]);
        let consumed = (&stream).read_exact(&mut line[..=newline]).is_ok();
        match port {
            Some(guest) if consumed => self.open_to_guest(stream, guest),
            _ => self.bury(stream),
        }
    }

    fn open_to_guest(&mut self, stream: UnixStream, guest: u32) {
        // Among more free ports than connections there is one within as many steps.
        let mut ports = Ports { host: 0, guest };
        for _ in 0..=MAX_CONNECTIONS {
            ports.host = self.next_host_port;
            self.next_host_port = self.next_host_port.wrapping_add(1).max(FIRST_HOST_PORT);
            if !self.connections.contains_key(&ports) {
                break;
            }
        }
        let fd = stream.as_raw_fd();
        if let Ok(connection) = Connection::to_guest(stream, ports) {
            self.by_fd.insert(fd, ports);
            self.connections.insert(ports, connection);
        }
    }

    fn open_from_guest(&mut self, request: &Header) {
        let ports = request.ports;
        let free = self.len() < MAX_CONNECTIONS;
        let opened = match free {
            true => (self.connect)(ports.host)
                .and_then(|stream| Connection::from_guest(stream, request)),
            false => Err(ErrorKind::QuotaExceeded.into()),
        };
        match opened {
            Ok(connection) => {
                let fd = connection.stream.as_raw_fd();
                self.fresh.push(fd);
                self.by_fd.insert(fd, ports);
                self.connections.insert(ports, connection);
            }
            Err(_) => self.resets.push_back(ports),
        }
    }

    /// Whether the guest's next packet may be taken: it may cost a reset.
    pub(super) fn accepts_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// A packet of the guest.
    pub(super) fn take(&mut self, header: Result<Header, Refusal>, payload: &[u8]) {
        let header = match header {
            Ok(header) => header,
            Err(Refusal::Dropped) => return,
            Err(Refusal::Reset(ports)) => return self.reset(ports),
        };
        let ports = header.ports;
        let Some(connection) = self.connections.get_mut(&ports) else {
            return match header.op {
                Op::Request => self.open_from_guest(&header),
                // A reset is not answered by another.
                Op::Reset => {}
                _ => self.resets.push_back(ports),
            };
        };
        if header.op == Op::Reset {
            self.remove(ports);
        } else if let Err(Over) = connection.take(&header, payload) {
            self.reset(ports);
        }
    }

    /// The next packet for the guest, whose payload is put into `room`.
    pub(super) fn next_packet(&mut self, room: &mut [u8]) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            return Some(Header::new(ports, Op::Reset));
        }
        let after = (
            std::ops::Bound::Excluded(self.last_served),
            std::ops::Bound::Unbounded,
        );
        let waiting: Vec<Ports> = self
            .connections
            .range(after)
            .chain(self.connections.range(..=self.last_served))
            .filter(|(_, connection)| connection.has_work())
            .map(|(ports, _)| *ports)
            .collect();
        for ports in waiting {
            let connection = self.connections.get_mut(&ports)?;
            match connection.next_packet(room) {
                Ok(None) => {}
                Ok(Some(header)) => {
                    self.last_served = ports;
                    return Some(header);
                }
                Err(Over) => {
                    self.remove(ports);
                    return Some(Header::new(ports, Op::Reset));
                }
            }
        }
        None
    }

    /// Whether a packet for the guest may be there.
    pub(super) fn has_work(&self) -> bool {
        !self.resets.is_empty() || self.connections.values().any(Connection::has_work)
    }

    fn reset(&mut self, ports: Ports) {
        self.remove(ports);
        self.resets.push_back(ports);
    }

    fn remove(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.remove(&ports) {
            self.by_fd.remove(&connection.stream.as_raw_fd());
            self.bury(connection.stream);
        }
    }

    /// Keeps a socket open until the event loop has let it go.
    fn bury(&mut self, stream: UnixStream) {
        let fd = stream.as_raw_fd();
        match self.fresh.iter().position(|&fresh| fresh == fd) {
            // It was never watched.
            Some(index) => drop(self.fresh.swap_remove(index)),
            None => self.dead.push(stream),
        }
    }
}

/// Whether the other end sends no more.
fn has_ended(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

/// The port in `CONNECT port`.
fn port_of(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let digits = text.strip_prefix("CONNECT ")?.trim_end_matches('\r');
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())?
}
