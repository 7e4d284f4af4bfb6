//! A backend in a thread, over the `vhost` crate's half of the protocol, for what no daemon at hand
//! does: in-flight tracking, the dirty log, network devices.

use std::fs::File;
use std::io::Result as IoResult;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{BackendReqHandler, VhostUserProtocolFeatures as Protocol};

mod handler;
mod ring;

use handler::Handler;
pub(super) use handler::Seen;

/// What a backend does with its rings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Requests of a block device succeed; their sectors are written down.
    Block,
    /// Of the first [`HALVED`] requests every other succeeds, the last first; then the backend dies.
    BlockHalfThenDie,
    /// Frames sent on a pair come back on it.
    Loopback,
}

/// See [`Work::BlockHalfThenDie`].
pub(super) const HALVED: usize = 16;

/// What a backend is.
#[derive(Clone)]
pub(super) struct Traits {
    pub(super) features: u64,
    pub(super) protocol: Protocol,
    pub(super) config: Vec<u8>,
    pub(super) queues: u64,
    pub(super) work: Work,
}

impl Traits {
    /// A block device that can do everything.
    pub(super) fn block() -> Self {
        let mut config = vec![0; 60];
        config[0] = 16;
        config[34] = 1;
        Self {
            features: 1 << 32 | 1 << 30 | 1 << 26 | 1 << 12 | 1 << 11 | 1 << 9,
            protocol: Protocol::MQ
                | Protocol::REPLY_ACK
                | Protocol::CONFIG
                | Protocol::INFLIGHT_SHMFD
                | Protocol::LOG_SHMFD
                | Protocol::BACKEND_REQ,
            config,
            queues: 1,
            work: Work::Block,
        }
    }

    /// A network device of two queue pairs.
    pub(super) fn net() -> Self {
        Self {
            features: 1 << 32 | 1 << 30 | 1 << 26 | 0b11 | 1 << 15,
            protocol: Protocol::MQ | Protocol::REPLY_ACK | Protocol::LOG_SHMFD,
            config: Vec::new(),
            queues: 2,
            work: Work::Loopback,
        }
    }
}

/// A running backend; it ends when its front-end hangs up.
pub(super) struct Peer {
    handler: Arc<Mutex<Handler>>,
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// A backend, and the connection to it.
    pub(super) fn start(traits: Traits) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let handler = Arc::new(Mutex::new(Handler::new(traits)));
        let (serving, stream) = (handler.clone(), ours.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            let _ = serve(&stream, &serving);
            let _ = stream.shutdown(std::net::Shutdown::Both);
        });
        let peer = Self {
            handler,
            stream: ours,
            thread: Some(thread),
        };
        (peer, theirs)
    }

    /// What it has been told so far.
    pub(super) fn seen(&self) -> Seen {
        self.handler.lock().unwrap().seen.clone()
    }

    /// Ends it, as a kill does.
    pub(super) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(stream: &UnixStream, handler: &Arc<Mutex<Handler>>) -> IoResult<()> {
    let other = |error: vhost::vhost_user::Error| std::io::Error::other(error.to_string());
    let mut requests = BackendReqHandler::from_stream(stream.try_clone()?, handler.clone());
    loop {
        let kicks: Vec<(u32, Arc<File>)> = handler.lock().unwrap().kicks();
        let mut fds = vec![PollFd::new(stream, PollFlags::IN)];
        fds.extend(
            kicks
                .iter()
                .map(|(_, kick)| PollFd::new(&**kick, PollFlags::IN)),
        );
        poll(&mut fds, None)?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            requests.handle_request().map_err(other)?;
        }
        for ((index, kick), ready) in kicks.iter().zip(&ready[1..]) {
            if *ready {
                let _ = std::io::Read::read(&mut &**kick, &mut [0; 8]);
                handler.lock().unwrap().kicked(*index)?;
            }
        }
    }
}
