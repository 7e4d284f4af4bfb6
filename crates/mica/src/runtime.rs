//! Where running VMs leave their sockets: a directory of this user alone.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The directory: `$MICA_RUNTIME_DIR`, else `mica` in `$XDG_RUNTIME_DIR`, else one of this user's in
/// `/run` or `/tmp`.
pub(crate) fn directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("MICA_RUNTIME_DIR") {
        return directory.into();
    }
    if let Some(directory) = std::env::var_os("XDG_RUNTIME_DIR") {
        return Path::new(&directory).join("mica");
    }
    let uid = rustix::process::getuid();
    if uid.is_root() {
        "/run/mica".into()
    } else {
        format!("/tmp/mica-{}", uid.as_raw()).into()
    }
}

/// Makes the directory if need be.
///
/// # Errors
///
/// It cannot be made, or it belongs to somebody else, who could then stand between a VM and its
/// user.
pub(crate) fn make_directory() -> io::Result<PathBuf> {
    let directory = directory();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)?;
    let owner = fs::symlink_metadata(&directory)?.uid();
    if owner != rustix::process::getuid().as_raw() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} belongs to user {owner}; set MICA_RUNTIME_DIR to a directory of your own",
                directory.display()
            ),
        ));
    }
    Ok(directory)
}

/// The control sockets in the directory, with the names of their VMs, sorted.
///
/// # Errors
///
/// The directory cannot be read; that it does not exist is no error.
pub(crate) fn control_sockets() -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(directory()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut sockets = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "sock")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            sockets.push((name.to_owned(), path.clone()));
        }
    }
    sockets.sort();
    Ok(sockets)
}

/// A listening socket in the file system that vanishes with its owner.
pub(crate) struct SocketFile {
    path: PathBuf,
    listener: Option<UnixListener>,
}

impl SocketFile {
    /// Listens at `path`, for this user alone. A socket that nobody listens on is replaced.
    ///
    /// # Errors
    ///
    /// `AddrInUse` if somebody listens there; else what the system says.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        if UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        // A socket that nobody listens on any more is replaced; what else is there belongs to somebody.
        let there = fs::symlink_metadata(path);
        if there.is_ok_and(|there| !there.file_type().is_socket()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            path: path.to_owned(),
            listener: Some(listener),
        })
    }

    /// The path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket, once: its new owner accepts, this one removes the file at the end.
    pub(crate) fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
