//! One vhost-user connection as the front-end sees it: requests out, replies in, all by a deadline.
//!
//! Constants are the `vhost` crate's; its connection is not used. It repeats a receive for ever when
//! the socket's time limit strikes (`EAGAIN`), so a silent backend would hold a vCPU for good, and it
//! insists on the length of replies on which real backends differ (that to `SET_LOG_BASE` has 0, 8 or
//! 16 bytes). Here, too, requests that are only acknowledged go out together and their
//! acknowledgements are collected after: a device is set up in one round trip.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Bytes of a message header: request, flags, length of the body, each 32 bits.
pub(super) const HEADER_LEN: usize = 12;

/// Protocol version 1, in the lowest two flag bits.
pub(super) const FLAG_VERSION: u32 = 1;
/// The message answers one.
pub(super) const FLAG_REPLY: u32 = 1 << 2;
/// The sender waits for an acknowledgement.
pub(super) const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The most descriptors that go with one message, and so the most memory regions.
pub(super) const MAX_FDS: usize = 8;

/// How many acknowledgements may be outstanding. Both directions of a socket buffer hold that many
/// messages, so that the two ends never wait for each other.
const MAX_UNACKNOWLEDGED: usize = 32;

/// What went wrong with a backend. After any of these the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The other end is closed.
    #[error("the backend hung up")]
    Closed,
    /// Nothing came within [`super::REPLY_TIMEOUT`].
    #[error("the backend did not answer {0} in time")]
    Timeout(String),
    /// The backend acknowledged with a failure.
    #[error("the backend refused {0}")]
    Refused(String),
    /// Not what the protocol allows here.
    #[error("the backend's answer to {request} is not valid: {reason}")]
    Malformed {
        /// The request that was answered so.
        request: String,
        /// The rule that the answer breaks.
        reason: &'static str,
    },
    /// The backend cannot do what this device needs.
    #[error("the backend does not fit: {0}")]
    Unfit(String),
    /// The guest's rings or memory cannot be handed to a backend.
    #[error("the rings cannot be handed to the backend: {0}")]
    Rings(String),
    /// The system refused.
    #[error("vhost-user socket: {0}")]
    Io(#[from] std::io::Error),
}

impl BackendError {
    pub(super) fn malformed(request: FrontendReq, reason: &'static str) -> Self {
        Self::Malformed {
            request: format!("{request:?}"),
            reason,
        }
    }
}

impl From<Errno> for BackendError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// The end of an operation's patience.
#[derive(Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub(super) fn after(patience: Duration) -> Self {
        Self(Instant::now() + patience)
    }

    /// What is left, `None` when nothing is.
    pub(super) fn remaining(self) -> Option<Duration> {
        self.0
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
    }
}

/// A message body: little-endian integers and bytes, one after the other.
#[derive(Default)]
pub(super) struct Body(Vec<u8>);

impl Body {
    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

/// A reply: not yet checked beyond its header.
pub(super) struct Reply {
    request: FrontendReq,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reply {
    /// The body, which must have that length.
    pub(super) fn body<const LEN: usize>(&self) -> Result<[u8; LEN], BackendError> {
        self.body
            .as_slice()
            .try_into()
            .map_err(|_| BackendError::malformed(self.request, "its length is wrong"))
    }

    /// The body, a 64-bit integer.
    pub(super) fn u64(&self) -> Result<u64, BackendError> {
        Ok(u64::from_le_bytes(self.body()?))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.body
    }

    /// The one descriptor that came with the reply.
    pub(super) fn into_fd(self) -> Result<OwnedFd, BackendError> {
        let mut fds = self.fds.into_iter();
        match (fds.next(), fds.next()) {
            (Some(fd), None) => Ok(fd),
            _ => Err(BackendError::malformed(
                self.request,
                "it carries not one descriptor",
            )),
        }
    }
}

/// The connection.
pub(super) struct Wire {
    socket: Arc<UnixStream>,
    acknowledged: bool,
    unacknowledged: VecDeque<FrontendReq>,
    /// Requests went out whose outcome nothing has told yet.
    unsettled: bool,
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Result<Self, BackendError> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            socket: Arc::new(stream),
            acknowledged: false,
            unacknowledged: VecDeque::new(),
            unsettled: false,
        })
    }

    pub(super) fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    /// From now on, [`Wire::post`] asks for acknowledgements (`VHOST_USER_PROTOCOL_F_REPLY_ACK`).
    pub(super) fn use_acknowledgements(&mut self) {
        self.acknowledged = true;
    }

    /// Sends a request that has no reply of its own. Its failure shows at the latest in
    /// [`Wire::settle`].
    pub(super) fn post(
        &mut self,
        request: FrontendReq,
        body: &Body,
        fds: &[RawFd],
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        while self.unacknowledged.len() >= MAX_UNACKNOWLEDGED {
            self.collect(deadline)?;
        }
        let flags = if self.acknowledged {
            FLAG_VERSION | FLAG_NEED_REPLY
        } else {
            FLAG_VERSION
        };
        self.send(request, flags, body, fds, deadline)?;
        if self.acknowledged {
            self.unacknowledged.push_back(request);
        } else {
            self.unsettled = true;
        }
        Ok(())
    }

    /// Returns when every posted request has been carried out.
    pub(super) fn settle(&mut self, deadline: Deadline) -> Result<(), BackendError> {
        while !self.unacknowledged.is_empty() {
            self.collect(deadline)?;
        }
        if self.unsettled {
            // Requests are handled in order, so the answer to any question comes after them.
            self.call(FrontendReq::GET_FEATURES, &Body::default(), &[], deadline)?;
        }
        Ok(())
    }

    /// Sends a request and returns its reply.
    pub(super) fn call(
        &mut self,
        request: FrontendReq,
        body: &Body,
        fds: &[RawFd],
        deadline: Deadline,
    ) -> Result<Reply, BackendError> {
        self.send(request, FLAG_VERSION, body, fds, deadline)?;
        while !self.unacknowledged.is_empty() {
            self.collect(deadline)?;
        }
        let reply = self.receive(request, deadline)?;
        self.unsettled = false;
        Ok(reply)
    }

    /// Takes the oldest acknowledgement.
    fn collect(&mut self, deadline: Deadline) -> Result<(), BackendError> {
        let Some(request) = self.unacknowledged.pop_front() else {
            return Ok(());
        };
        match self.receive(request, deadline)?.u64()? {
            0 => Ok(()),
            _ => Err(BackendError::Refused(format!("{request:?}"))),
        }
    }

    fn send(
        &self,
        request: FrontendReq,
        flags: u32,
        body: &Body,
        fds: &[RawFd],
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        let len = u32::try_from(body.0.len()).expect("bodies are a few hundred bytes");
        let message = Body::default()
            .u32(request.into())
            .u32(flags)
            .u32(len)
            .bytes(&body.0)
            .0;
        let mut sent = 0;
        while sent < message.len() {
            let fds = if sent == 0 { fds } else { &[] };
            match self.socket.send_with_fds(&[&message[sent..]], fds) {
                Ok(count) => sent += count,
                Err(error) => match Errno::from_raw_os_error(error.errno()) {
                    Errno::AGAIN => self.wait(PollFlags::OUT, request, deadline)?,
                    Errno::INTR => {}
                    errno => return Err(errno.into()),
                },
            }
        }
        Ok(())
    }

    fn receive(&self, request: FrontendReq, deadline: Deadline) -> Result<Reply, BackendError> {
        let mut header = [0; HEADER_LEN];
        let fds = self.fill(&mut header, request, deadline)?;
        let word = |at: usize| {
            u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes are four"))
        };
        let (code, flags, len) = (word(0), word(4), word(8));
        if code != u32::from(request) {
            return Err(BackendError::malformed(request, "it answers another"));
        }
        if flags & 0b11 != FLAG_VERSION || flags & FLAG_REPLY == 0 {
            return Err(BackendError::malformed(
                request,
                "its flags are not a reply's",
            ));
        }
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_MSG_SIZE)
            .ok_or_else(|| BackendError::malformed(request, "it is too long"))?;
        let mut body = vec![0; len];
        self.fill(&mut body, request, deadline)?;
        Ok(Reply { request, body, fds })
    }

    /// Reads exactly `buffer`, and the descriptors that come with its first byte.
    fn fill(
        &self,
        buffer: &mut [u8],
        request: FrontendReq,
        deadline: Deadline,
    ) -> Result<Vec<OwnedFd>, BackendError> {
        let mut fds = Vec::new();
        let mut filled = 0;
        while filled < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut rest = [IoSliceMut::new(&mut buffer[filled..])];
            match recvmsg(
                &*self.socket,
                &mut rest,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(message) if message.bytes == 0 => return Err(BackendError::Closed),
                Ok(message) => filled += message.bytes,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::IN, request, deadline)?;
                    continue;
                }
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if fds.len() > MAX_FDS {
                return Err(BackendError::malformed(
                    request,
                    "it carries too many descriptors",
                ));
            }
        }
        Ok(fds)
    }

    fn wait(
        &self,
        flags: PollFlags,
        request: FrontendReq,
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        let timeout = || BackendError::Timeout(format!("{request:?}"));
        let left = deadline.remaining().ok_or_else(timeout)?;
        let left = Timespec::try_from(left).map_err(|_| timeout())?;
        let mut fds = [PollFd::new(&*self.socket, flags)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) => Err(timeout()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
