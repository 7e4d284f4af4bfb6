//! The supervisor's part of a guest's vsock: what the VM process may not open.
//!
//! Host programs reach the guest through the listening socket NAME.vsock. When the guest connects to
//! port P of its host, it reaches what listens at NAME.vsock_P.

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mica_machine::vmm::channel::{Attachments, Channel};
use mica_machine::vmm::config::VsockConfig;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::runtime::{self, SocketFile};

/// The longest that the VM process waits for a connection, so that a listener that does not accept
/// cannot hold up its event loop.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Makes the sockets of the vsock with context identifier `cid`, if there is to be one; the listening one vanishes with the
/// returned file.
///
/// # Errors
///
/// The socket's path is taken, or the system refuses.
pub(crate) fn open(
    name: &str,
    cid: Option<u32>,
    attachments: &mut Attachments,
) -> Result<Option<(SocketFile, VsockConfig)>, Box<dyn Error>> {
    let Some(cid) = cid else {
        return Ok(None);
    };
    let path = runtime::make_directory()?.join(format!("{name}.vsock"));
    let mut file = SocketFile::bind(&path)
        .map_err(|error| format!("vsock socket {}: {error}", path.display()))?;
    let listener = file.take_listener().ok_or("the vsock socket is taken")?;
    let (ours, theirs) = Channel::pair()?;
    set_socket_timeout(&theirs, Timeout::Recv, Some(DIAL_TIMEOUT))?;
    std::thread::Builder::new()
        .name("vsock".to_owned())
        .spawn(move || answer(&ours, &path))?;
    let config = VsockConfig {
        cid,
        listener: attachments.attach(listener),
        dialer: attachments.attach(theirs.into_fd()),
    };
    Ok(Some((file, config)))
}

/// Answers the VM process until it is gone.
fn answer(channel: &Channel, path: &Path) {
    while let Ok(Some((port, _))) = channel.receive::<u32>() {
        let mut attachments = Attachments::default();
        let socket = connect(path, port)
            .ok()
            .map(|stream| attachments.attach(stream));
        if channel.send(&(port, socket), attachments).is_err() {
            return;
        }
    }
}

fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    UnixStream::connect(PathBuf::from(path))
}
