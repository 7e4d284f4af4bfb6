//! QEMU's storage daemon as the backend.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};

/// A raw file of which daemons, one after the other, make a disk on one socket.
pub(super) struct Disk {
    directory: tempfile::TempDir,
    listener: UnixListener,
    queues: u16,
}

impl Disk {
    pub(super) fn new(size: u64, queues: u16) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(directory.path().join("disk")).unwrap();
        file.set_len(size).unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        Self {
            directory,
            listener,
            queues,
        }
    }

    pub(super) fn file(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// A connection, which waits in the listener until a daemon takes it.
    pub(super) fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("socket")).unwrap()
    }

    pub(super) fn serve(&self) -> Daemon {
        let file = self.file();
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", path(&file)))
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=export,node-name=disk,addr.type=fd,addr.str=0,writable=on,num-queues={}",
                self.queues
            ))
            .stdin(OwnedFd::from(self.listener.try_clone().unwrap()))
            .spawn()
            .expect("qemu-storage-daemon must be installed: Debian package qemu-system-common");
        Daemon { child }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// One daemon; it dies with this.
pub(super) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Freezes the daemon. The kernel delivers the signal before it returns to it.
    pub(super) fn freeze(&self) {
        kill_process(self.pid(), Signal::STOP).unwrap();
        // The state after the name in parentheses: T once every thread has stopped.
        let stat = format!("/proc/{}/stat", self.child.id());
        while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {
            std::thread::yield_now();
        }
    }

    pub(super) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
