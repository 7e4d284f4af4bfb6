//! The backend's own requests: a second socket on which it is the one who asks.
//!
//! The only request understood is that the configuration changed. Reads never block; what does not
//! fit the protocol closes the channel, and the device goes on without it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::BackendReq;

use super::wire::{FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, HEADER_LEN};

/// The longest body of a request that we look at; known ones have up to 40 bytes.
const MAX_BODY: usize = 256;

/// How many requests one call serves, so that a chatty backend does not keep the event loop.
const MAX_PER_CALL: usize = 16;

/// What came over the channel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Requests {
    /// The backend's configuration space is not what it was.
    pub(super) config_changed: bool,
    /// The backend closed the channel, or broke the protocol.
    pub(super) closed: bool,
}

/// Our end of the channel.
pub(super) struct Channel {
    socket: Arc<UnixStream>,
    pending: Vec<u8>,
}

impl Channel {
    /// The channel, and the end to hand to the backend.
    pub(super) fn pair() -> std::io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let channel = Self {
            socket: Arc::new(ours),
            pending: Vec::new(),
        };
        Ok((channel, theirs))
    }

    pub(super) fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    /// Serves what is there.
    pub(super) fn serve(&mut self) -> Requests {
        let mut requests = Requests::default();
        for _ in 0..MAX_PER_CALL {
            if !self.receive(&mut requests) || requests.closed {
                break;
            }
        }
        requests
    }

    /// Reads on, and serves the request that is complete then. `false` when there is no more.
    fn receive(&mut self, requests: &mut Requests) -> bool {
        loop {
            let wanted = match self.wanted() {
                Ok(wanted) => wanted,
                Err(Oversized) => {
                    requests.closed = true;
                    return false;
                }
            };
            if self.pending.len() == wanted {
                break;
            }
            let mut buffer = [0; HEADER_LEN + MAX_BODY];
            match (&*self.socket).read(&mut buffer[..wanted - self.pending.len()]) {
                Ok(0) => {
                    requests.closed = true;
                    return false;
                }
                Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    requests.closed = error.kind() != ErrorKind::WouldBlock;
                    return false;
                }
            }
        }
        self.dispatch(requests);
        self.pending.clear();
        true
    }

    /// How long the message is, as far as is known.
    fn wanted(&self) -> Result<usize, Oversized> {
        if self.pending.len() < HEADER_LEN {
            return Ok(HEADER_LEN);
        }
        match usize::try_from(self.word(2)) {
            Ok(len) if len <= MAX_BODY => Ok(HEADER_LEN + len),
            _ => Err(Oversized),
        }
    }

    fn word(&self, index: usize) -> u32 {
        let bytes = &self.pending[index * 4..index * 4 + 4];
        u32::from_le_bytes(bytes.try_into().expect("four bytes are four"))
    }

    fn dispatch(&self, requests: &mut Requests) {
        let (code, flags) = (self.word(0), self.word(1));
        let known = code == u32::from(BackendReq::CONFIG_CHANGE_MSG);
        requests.config_changed |= known;
        if flags & FLAG_NEED_REPLY != 0 {
            let mut reply = [0; HEADER_LEN + 8];
            reply[..4].copy_from_slice(&code.to_le_bytes());
            reply[4..8].copy_from_slice(&(FLAG_VERSION | FLAG_REPLY).to_le_bytes());
            reply[8..12].copy_from_slice(&8_u32.to_le_bytes());
            reply[12] = u8::from(!known);
            // A backend that does not read its replies loses them, and the channel with them.
            requests.closed = (&*self.socket).write_all(&reply).is_err();
        }
    }
}

/// A message longer than any that exists.
struct Oversized;

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [code, flags, body.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn requests_are_served_in_pieces_too() {
        let change = message(2, FLAG_VERSION, &[]);
        let unknown = message(99, FLAG_VERSION, &[7; 40]);
        let oversized = message(2, FLAG_VERSION, &[0; MAX_BODY + 1]);
        let cases: [(&[&[u8]], Requests); 5] = [
            (
                &[&change],
                Requests {
                    config_changed: true,
                    closed: false,
                },
            ),
            (
                &[&change[..5], &change[5..]],
                Requests {
                    config_changed: true,
                    closed: false,
                },
            ),
            (
                &[&unknown, &change],
                Requests {
                    config_changed: true,
                    closed: false,
                },
            ),
            (&[&unknown], Requests::default()),
            (
                &[&oversized],
                Requests {
                    config_changed: false,
                    closed: true,
                },
            ),
        ];
        for (pieces, expected) in cases {
            let (mut channel, mut theirs) = Channel::pair().unwrap();
            let mut seen = Requests::default();
            for piece in pieces {
                theirs.write_all(piece).unwrap();
                let now = channel.serve();
                seen.config_changed |= now.config_changed;
                seen.closed |= now.closed;
            }
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn who_asks_for_an_acknowledgement_gets_one() {
        for (code, status) in [(2, 0), (6, 1)] {
            let (mut channel, mut theirs) = Channel::pair().unwrap();
            theirs
                .write_all(&message(code, FLAG_VERSION | FLAG_NEED_REPLY, &[]))
                .unwrap();
            channel.serve();
            let mut reply = [0; 20];
            theirs.read_exact(&mut reply).unwrap();
            assert_eq!(reply[0], code as u8);
            assert_eq!(reply[12], status);
        }
    }

    #[test]
    fn a_closed_channel_is_noticed() {
        let (mut channel, theirs) = Channel::pair().unwrap();
        drop(theirs);
        assert!(channel.serve().closed);
    }
}
