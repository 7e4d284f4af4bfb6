//! `mica run` on this machine, driven through its console.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its share; a failed unwrap is its failure

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// A VM in the foreground, with its standard output and error together.
pub(crate) struct Vm {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What came and was not asked for yet.
    pending: String,
    transcript: String,
}

impl Vm {
    /// Starts `command`, which is a `mica run`.
    pub(crate) fn start(mut command: Command) -> Self {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .spawn()
            .unwrap();
        // The command keeps the pipe's other end open.
        drop(command);
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            input: child.stdin.take().unwrap(),
            child,
            output,
            pending: String::new(),
            transcript: String::new(),
        }
    }

    /// Types.
    pub(crate) fn send(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for `text` and returns what came up to and with it.
    pub(crate) fn expect(&mut self, text: &str, timeout: Duration) -> String {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.pending.find(text) {
                let rest = self.pending.split_off(at + text.len());
                return std::mem::replace(&mut self.pending, rest);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.receive(left) {
                panic!("no {text:?} within {timeout:?}:\n{}", self.transcript);
            }
        }
    }

    /// Takes what comes next; `false` if nothing does.
    fn receive(&mut self, timeout: Duration) -> bool {
        match self.output.recv_timeout(timeout) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                self.pending.push_str(&text);
                self.transcript.push_str(&text);
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Gives the guest's shell a command and returns what it prints, up to and with the next prompt.
    pub(crate) fn shell(&mut self, prompt: &str, line: &str, timeout: Duration) -> String {
        self.send(&format!("{line}\n"));
        // Without what bash says to terminals about pasting.
        self.expect(prompt, timeout).replace("\x1b[?2004l\r", "")
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            self.receive(Duration::from_millis(100));
            if let Some(status) = self.child.try_wait().unwrap() {
                while self.receive(Duration::from_millis(100)) {}
                return status;
            }
        }
        panic!("it runs on after {timeout:?}:\n{}", self.transcript);
    }

    /// Everything that it has printed so far.
    pub(crate) fn transcript(&self) -> &str {
        &self.transcript
    }

    /// The supervisor's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Its VM process ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
