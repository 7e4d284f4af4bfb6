//! Exports: who serves connections, from the first to the stop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::Shutdown;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::device::Device;
use super::event::Stop;
use super::session::Session;
use super::stats::{Stats, count};
use super::{Event, ExportOptions};
use crate::store::Store;

/// The most queues of one export: the protocol's ring index is a byte.
pub const QUEUES_MAX: u16 = 256;

/// A store offered as a virtio-blk device.
#[derive(Debug)]
pub struct Export;

enum Clients {
    One(UnixStream),
    Many(UnixListener),
}

/// A running export. Dropping it stops it.
pub struct ExportHandle {
    device: Arc<Device>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

struct Control {
    stop: Stop,
    /// The connection that is being served, to wake its thread out of a half-sent message.
    current: Mutex<Option<OwnedFd>>,
}

impl Export {
    /// Serves one client on a connected socket, until it disconnects.
    ///
    /// # Errors
    ///
    /// The system has no resources for the export's thread, or the options are out of range.
    pub fn spawn(
        store: Arc<dyn Store>,
        connection: UnixStream,
        options: ExportOptions,
    ) -> io::Result<ExportHandle> {
        Self::start(store, Clients::One(connection), options)
    }

    /// Serves the clients of a listening socket, one after the other, until it is stopped.
    ///
    /// # Errors
    ///
    /// As for [`Export::spawn`].
    pub fn listen(
        store: Arc<dyn Store>,
        listener: UnixListener,
        options: ExportOptions,
    ) -> io::Result<ExportHandle> {
        Self::start(store, Clients::Many(listener), options)
    }

    fn start(
        store: Arc<dyn Store>,
        clients: Clients,
        options: ExportOptions,
    ) -> io::Result<ExportHandle> {
        if options.queues == 0 || options.queues > QUEUES_MAX {
            let reason = format!("an export has 1 to {QUEUES_MAX} queues");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let device = Arc::new(Device::new(store, options));
        let control = Arc::new(Control {
            stop: Stop::new()?,
            current: Mutex::default(),
        });
        let thread = {
            let (device, control) = (device.clone(), control.clone());
            std::thread::Builder::new()
                .name("vhost-user".into())
                .spawn(move || control.serve(&device, clients))?
        };
        Ok(ExportHandle {
            device,
            control,
            thread: Some(thread),
        })
    }
}

impl ExportHandle {
    /// The counters so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.device.counters.snapshot()
    }

    /// Whether the export has ended by itself: the only client of [`Export::spawn`] is gone.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Answers what is in flight, disconnects the client and ends the export.
    pub fn stop(mut self) -> Stats {
        self.shut_down();
        self.stats()
    }

    fn shut_down(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.control.request_stop();
        // A panic there has been reported by the runtime; the rings ended with their session.
        let _ = thread.join();
    }
}

impl Drop for ExportHandle {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Control {
    fn request_stop(&self) {
        self.stop.request();
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = current.as_ref() {
            let _ = rustix::net::shutdown(connection, Shutdown::Both);
        }
    }

    /// Waits until `source` is readable. `false` if the export is to stop.
    fn wait(&self, source: BorrowedFd<'_>) -> bool {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(source, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => return fds[0].revents().is_empty(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    fn serve(&self, device: &Arc<Device>, clients: Clients) {
        match clients {
            Clients::One(connection) => self.serve_one(device, connection),
            Clients::Many(listener) => {
                while self.wait(listener.as_fd()) {
                    match listener.accept() {
                        Ok((connection, _)) => self.serve_one(device, connection),
                        Err(error) if transient(&error) => {}
                        Err(error) => {
                            device.report(Event::Disconnected {
                                reason: Some(format!("cannot accept a client: {error}")),
                            });
                            return;
                        }
                    }
                }
            }
        }
    }

    fn serve_one(&self, device: &Arc<Device>, connection: UnixStream) {
        count(&device.counters.connections);
        device.report(Event::Connected);
        let result = self.converse(device, connection);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
        device.report(Event::Disconnected {
            reason: result.err().map(|error| error.to_string()),
        });
    }

    /// Handles messages until the client hangs up, breaks the protocol, or the export is to stop.
    fn converse(&self, device: &Arc<Device>, connection: UnixStream) -> Result<(), Error> {
        let watched = connection.try_clone().map_err(Error::SocketError)?;
        let clone = connection.try_clone().map_err(Error::SocketError)?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(clone.into());
        let session = Arc::new(Mutex::new(Session::new(device.clone())));
        let mut handler = BackendReqHandler::from_stream(connection, session);
        while self.wait(watched.as_fd()) {
            match handler.handle_request() {
                Ok(()) | Err(Error::SocketRetry(_)) => {}
                Err(Error::Disconnected) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether accepting may work the next time: the client is gone already, or a signal came.
fn transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}
