//! The listening socket of an export.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that may wait for the one before them to leave.
const BACKLOG: i32 = 8;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("{} is in use: another process listens on it; choose another path or stop that process", .0.display())]
    InUse(PathBuf),
    /// There is something else.
    #[error("{} exists and is no socket; choose another path or remove it", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot {action} the socket {}: {source}", path.display())]
    System {
        /// What was tried, in the infinitive.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A path where a socket listens; it is removed with this value.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    /// The file that was made, so that not another's is removed.
    identity: (u64, u64),
    /// Keeps the file's inode, and so its number, from being taken by another.
    _listening: UnixListener,
}

impl SocketPath {
    /// Listens on `path`, which only this user may connect to. A socket that nobody listens on any more
    /// is replaced.
    ///
    /// # Errors
    ///
    /// [`SocketError`] names the path and what to do.
    pub fn bind(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let failed = |action| {
            move |source: io::Error| SocketError::System {
                action,
                path: path.to_owned(),
                source,
            }
        };
        remove_stale(path)?;
        let listener = listen(path).map_err(failed("listen on"))?;
        let identity = identity(path).map_err(failed("look at"))?;
        let socket = Self {
            path: path.to_owned(),
            identity,
            _listening: listener.try_clone().map_err(failed("share"))?,
        };
        Ok((socket, listener))
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // Linux gives the file the mode that the socket has when it is bound.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::lstat(path)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |action| {
        move |source: io::Error| SocketError::System {
            action,
            path: path.to_owned(),
            source,
        }
    };
    match rustix::fs::lstat(path) {
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed("look at")(error.into())),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("remove"))
        }
        Err(error) => Err(failed("probe")(error)),
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Whoever removed it in between did what this is for.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (socket, listener) = SocketPath::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = SocketPath::bind(&path).unwrap_err();
        assert!(
            matches!(&error, SocketError::InUse(at) if *at == path),
            "{error}"
        );
        drop((socket, listener));
        assert!(!path.exists());
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let error = SocketPath::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn the_socket_of_a_successor_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let (first, _listener) = SocketPath::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (_second, _listener) = SocketPath::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
