//! The channel between a VM process and its supervisor.
//!
//! The VM process opens nothing by itself once it is jailed: every descriptor it works with comes
//! over this channel, attached to the message that speaks of it. The channel is a Unix
//! `SOCK_SEQPACKET` socket, so one message is one packet: JSON of at most [`MAX_MESSAGE`] bytes with
//! at most [`MAX_FDS`] descriptors. Both ends are the same build of Mica, started by one another, so
//! the format carries no version and is no public interface; the control socket is.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest message, in bytes. A kernel command line is at most a few KiB.
pub const MAX_MESSAGE: usize = 64 << 10;

/// The most descriptors in one message (the kernel allows 253).
pub const MAX_FDS: usize = 200;

/// A descriptor attached to a message, by its position among the attached ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(usize);

/// Descriptors on their way out: attach one, put its index into the message.
#[derive(Debug, Default)]
pub struct Attachments(Vec<OwnedFd>);

impl Attachments {
    /// Adds a descriptor to the message.
    pub fn attach(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex(self.0.len() - 1)
    }
}

/// Descriptors that came with a message; each is taken once.
#[derive(Debug, Default)]
pub struct Received(Vec<Option<OwnedFd>>);

impl Received {
    /// Takes the descriptor that the message calls `index`.
    ///
    /// # Errors
    ///
    /// The message names a descriptor that did not come with it.
    pub fn take(&mut self, index: FdIndex) -> io::Result<OwnedFd> {
        self.0
            .get_mut(index.0)
            .and_then(Option::take)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the message has no descriptor {}", index.0),
                )
            })
    }
}

/// One end of the channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// A connected pair of ends.
    ///
    /// # Errors
    ///
    /// The system has no more descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { socket: one }, Self { socket: other }))
    }

    /// The end that this process was started with.
    #[must_use]
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The descriptor, to hand the end to a child process.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Sends one message; the attached descriptors are closed here afterwards.
    ///
    /// # Errors
    ///
    /// The other end is gone, or the message is too large.
    pub fn send<T: Serialize>(&self, message: &T, attachments: Attachments) -> io::Result<()> {
        let body = serde_json::to_vec(message)?;
        if body.len() > MAX_MESSAGE || attachments.0.len() > MAX_FDS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "message of {} bytes with {} descriptors",
                    body.len(),
                    attachments.0.len()
                ),
            ));
        }
        let fds: Vec<BorrowedFd<'_>> = attachments.0.iter().map(AsFd::as_fd).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(&body)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Waits for one message. `None` when the other end has closed.
    ///
    /// # Errors
    ///
    /// The message is too large or not what `T` says; the channel is of no use then.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Received)>> {
        let mut body = vec![0; MAX_MESSAGE + 1];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut body)];
        let result = recvmsg(
            &self.socket,
            &mut iov,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        let length = match result {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(error) => return Err(error.into()),
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received.map(Some));
            }
        }
        if length == 0 {
            return Ok(None);
        }
        if length > MAX_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the message is too large",
            ));
        }
        Ok(Some((
            serde_json::from_slice(&body[..length])?,
            Received(fds),
        )))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"through the wall").unwrap();
        file.rewind().unwrap();
        let mut attachments = Attachments::default();
        let index = attachments.attach(file);
        ours.send(&("disk0", index), attachments).unwrap();

        let (message, mut fds) = theirs.receive::<(String, FdIndex)>().unwrap().unwrap();
        assert_eq!(message.0, "disk0");
        let mut text = String::new();
        std::fs::File::from(fds.take(message.1).unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "through the wall");
        assert!(fds.take(message.1).is_err(), "a descriptor is taken once");
        assert!(fds.take(FdIndex(7)).is_err());
    }

    #[test]
    fn messages_keep_their_borders_and_the_end_is_seen() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.send(&1u32, Attachments::default()).unwrap();
        ours.send(&2u32, Attachments::default()).unwrap();
        drop(ours);
        assert_eq!(theirs.receive::<u32>().unwrap().unwrap().0, 1);
        assert_eq!(theirs.receive::<u32>().unwrap().unwrap().0, 2);
        assert!(theirs.receive::<u32>().unwrap().is_none());
    }

    #[test]
    fn an_oversized_message_is_refused_where_it_is_made() {
        let (ours, _theirs) = Channel::pair().unwrap();
        let error = ours
            .send(&"x".repeat(MAX_MESSAGE), Attachments::default())
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
