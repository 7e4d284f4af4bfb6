//! `mica storage export` as a process of its own.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its share; a failed unwrap is its failure

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub(crate) struct Exporter {
    child: Child,
    socket: PathBuf,
}

impl Exporter {
    /// Starts it and waits until it listens.
    pub(crate) fn start(image: &Path, socket: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mica"))
            .args(["-o", "json", "storage", "export"])
            .arg(image)
            .arg("--vhost-user")
            .arg(socket)
            .args(["--serial", "MICA-TEST"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut ready)
            .unwrap();
        let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
        assert_eq!(ready["event"], "ready");
        Self {
            child,
            socket: socket.to_owned(),
        }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// Ends it as a fault would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop, and returns its last words: the counters.
    pub(crate) fn stop(mut self) -> serde_json::Value {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let output = self.child.stdout.take().unwrap();
        let last = BufReader::new(output)
            .lines()
            .map(Result::unwrap)
            .last()
            .unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&last).unwrap()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        // It has ended already, unless the test fails.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
