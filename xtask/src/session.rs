//! A running QEMU whose output a test reads and whose input it writes.
//!
//! ```text
//!   QEMU ── serial or virtio port ── socket ── reader thread ─► transcript ─► expect()
//!        ◄─ the same socket ◄──────────────────────────────────────────────── send()
//! ```
//!
//! Every stream has its own socket, so a guest kernel's messages never mix with a command's
//! output. Everything has a deadline; a dropped session kills its QEMU.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fd::AsFd;
use rustix::fs::FlockOperation;

use crate::error::{self, Error, Result};
use crate::workspace;

/// How long QEMU may take from its start to its connecting of all channels.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// How much of a transcript an error shows.
const TAIL_LINES: usize = 40;

/// One line between QEMU and us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    /// What the session is about: a command's standard output, or a guest's serial line; also input.
    Output,
    /// A command's standard error.
    Error,
    /// The lab's own protocol: how the command ended.
    Control,
    /// The kernel's messages, shown only when something fails.
    Console,
}

impl Channel {
    /// The name of its socket and of its `-chardev`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Channel::Output => "output",
            Channel::Error => "error",
            Channel::Control => "control",
            Channel::Console => "console",
        }
    }
}

/// What a session copies to our own standard streams as it comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Echo {
    /// Nothing.
    #[default]
    Nothing,
    /// A command's standard error: how far it is.
    Errors,
    /// All of its output.
    All,
}

/// What a session left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command's exit status in the lab (128 + n when signal n killed it), QEMU's own in
    /// [`crate::guest`].
    pub status: i32,
    /// Standard output and standard error, in the order of arrival.
    pub output: String,
    /// Standard output alone; for a guest, its serial line.
    pub stdout: String,
    /// Standard error alone.
    pub stderr: String,
}

#[derive(Default)]
struct Streams {
    merged: Vec<u8>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    control: Vec<u8>,
    console: Vec<u8>,
    /// Where the next [`Session::expect`] starts to look.
    cursor: usize,
    /// How many channels QEMU still holds open; none means that it has ended.
    open: usize,
}

impl Streams {
    fn append(&mut self, channel: Channel, bytes: &[u8]) {
        match channel {
            Channel::Output => {
                self.stdout.extend_from_slice(bytes);
                self.merged.extend_from_slice(bytes);
            }
            Channel::Error => {
                self.stderr.extend_from_slice(bytes);
                self.merged.extend_from_slice(bytes);
            }
            Channel::Control => self.control.extend_from_slice(bytes),
            Channel::Console => self.console.extend_from_slice(bytes),
        }
    }
}

#[derive(Default)]
struct Transcript {
    streams: Mutex<Streams>,
    changed: Condvar,
}

impl Transcript {
    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives a value, all channels are closed, or `deadline` has passed.
    fn wait_for<T>(
        &self,
        deadline: Instant,
        mut ready: impl FnMut(&mut Streams) -> Option<T>,
    ) -> Wait<T> {
        let mut streams = self.lock();
        loop {
            if let Some(value) = ready(&mut streams) {
                return Wait::Ready(value);
            }
            if streams.open == 0 {
                return Wait::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Wait::TimedOut;
            }
            let (guard, _) = self
                .changed
                .wait_timeout(streams, left)
                .unwrap_or_else(PoisonError::into_inner);
            streams = guard;
        }
    }
}

enum Wait<T> {
    Ready(T),
    Closed,
    TimedOut,
}

/// How a session is started; filled in by [`crate::lab`] and [`crate::guest`].
pub(crate) struct Launch {
    /// Named in errors.
    pub(crate) name: &'static str,
    pub(crate) command: Command,
    pub(crate) channels: Vec<Channel>,
    /// Holds the sockets and whatever else QEMU reads; removed with the session.
    pub(crate) directory: tempfile::TempDir,
    /// The whole session's.
    pub(crate) timeout: Duration,
    pub(crate) echo: Echo,
    /// Held while the session lives.
    pub(crate) turn: Turn,
}

/// The arguments that make `channel` a `-chardev` which connects to us.
pub(crate) fn chardev(directory: &Path, channel: Channel) -> [String; 2] {
    let path = socket_path(directory, channel);
    [
        "-chardev".into(),
        format!("socket,id={},path={}", channel.name(), path.display()),
    ]
}

fn socket_path(directory: &Path, channel: Channel) -> PathBuf {
    directory.join(format!("{}.sock", channel.name()))
}

/// A running QEMU.
pub struct Session {
    name: &'static str,
    child: Child,
    transcript: Arc<Transcript>,
    input: UnixStream,
    has_control: bool,
    started: Instant,
    deadline: Instant,
    _directory: tempfile::TempDir,
    _turn: Turn,
}

impl Session {
    pub(crate) fn launch(mut launch: Launch) -> Result<Session> {
        let started = Instant::now();
        let mut listeners = Vec::new();
        for &channel in &launch.channels {
            let path = socket_path(launch.directory.path(), channel);
            let listener = UnixListener::bind(&path).map_err(Error::file("listen on", &path))?;
            listener
                .set_nonblocking(true)
                .map_err(Error::file("set up", &path))?;
            listeners.push((channel, listener));
        }
        let log_path = launch.directory.path().join("qemu.log");
        let log = std::fs::File::create(&log_path).map_err(Error::file("create", &log_path))?;
        launch
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut child = launch.command.spawn().map_err(|source| {
            error::missing(&error::show(&launch.command), "qemu-system-x86", source)
        })?;
        let streams = match accept_all(&listeners, &mut child) {
            Ok(streams) => streams,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let log = std::fs::read_to_string(&log_path).unwrap_or_default();
                return Err(Error::Guest {
                    what: format!("{}: {error}", launch.name),
                    seconds: started.elapsed().as_secs_f64(),
                    tail: format!("{}\n{log}", error::show(&launch.command)),
                });
            }
        };
        let (transcript, input) = follow(streams, launch.echo)?;
        Ok(Session {
            name: launch.name,
            child,
            transcript,
            input,
            has_control: launch.channels.contains(&Channel::Control),
            started,
            deadline: started + launch.timeout,
            _directory: launch.directory,
            _turn: launch.turn,
        })
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `text` appears after what earlier calls found, and returns all output up to and
    /// including it.
    ///
    /// # Errors
    ///
    /// It does not come within `timeout` (or the session's own deadline), or the session ends.
    pub fn expect(&mut self, text: &str, timeout: Duration) -> Result<String> {
        let deadline = self.deadline.min(Instant::now() + timeout);
        let found = self.transcript.wait_for(deadline, |streams| {
            let new = &streams.merged[streams.cursor..];
            let end = find(new, text.as_bytes())? + text.len();
            let seen = String::from_utf8_lossy(&new[..end]).into_owned();
            streams.cursor += end;
            Some(seen)
        });
        match found {
            Wait::Ready(seen) => Ok(seen),
            Wait::Closed => Err(self.failure(&format!("ended without printing {text:?}"))),
            Wait::TimedOut => Err(self.failure(&format!("did not print {text:?}"))),
        }
    }

    /// Writes to the command's standard input or the guest's serial line.
    ///
    /// # Errors
    ///
    /// QEMU has ended.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.input
            .write_all(text.as_bytes())
            .map_err(|error| self.failure(&format!("takes no input ({error})")))
    }

    /// A second handle for input, for a thread that forwards a terminal.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left.
    pub fn input(&self) -> io::Result<impl Write + Send + 'static> {
        self.input.try_clone()
    }

    /// What has been printed so far, output and error together.
    #[must_use]
    pub fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.transcript.lock().merged).into_owned()
    }

    /// Waits for the end: the command's in the lab, QEMU's otherwise.
    ///
    /// # Errors
    ///
    /// The deadline passes, or the lab ends without the command's status: its kernel has died.
    pub fn finish(mut self) -> Result<Outcome> {
        let waited = self.transcript.wait_for(self.deadline, |_| None::<()>);
        if matches!(waited, Wait::TimedOut) {
            return Err(self.failure("did not finish"));
        }
        let process = self.child.wait().map_err(Error::io("wait for QEMU"))?;
        let status = if self.has_control {
            let control = String::from_utf8_lossy(&self.transcript.lock().control).into_owned();
            control
                .lines()
                .find_map(|line| line.strip_prefix("exit ")?.trim().parse().ok())
        } else {
            process.code()
        };
        let status = status.ok_or_else(|| self.failure(&format!("died ({process})")))?;
        let streams = self.transcript.lock();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Outcome {
            status,
            output: text(&streams.merged),
            stdout: text(&streams.stdout),
            stderr: text(&streams.stderr),
        })
    }

    /// Ends QEMU as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn failure(&self, what: &str) -> Error {
        let streams = self.transcript.lock();
        let mut text = String::new();
        for bytes in [&streams.console, &streams.merged] {
            let all = String::from_utf8_lossy(bytes);
            let lines: Vec<&str> = all.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text.push_str(line.trim_end_matches('\r'));
                text.push('\n');
            }
        }
        if let Ok(log) = std::fs::read_to_string(self._directory.path().join("qemu.log")) {
            text.push_str(&log);
        }
        Error::Guest {
            what: format!("{} {what}", self.name),
            seconds: self.started.elapsed().as_secs_f64(),
            tail: text,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a reader for each channel; the output channel's socket is also the way in.
fn follow(
    streams: Vec<(Channel, UnixStream)>,
    echo: Echo,
) -> Result<(Arc<Transcript>, UnixStream)> {
    let transcript = Arc::new(Transcript::default());
    transcript.lock().open = streams.len();
    let mut input = None;
    for (channel, stream) in streams {
        if channel == Channel::Output {
            input = Some(
                stream
                    .try_clone()
                    .map_err(Error::io("duplicate a socket"))?,
            );
        }
        let transcript = Arc::clone(&transcript);
        thread::spawn(move || read_channel(channel, stream, &transcript, echo));
    }
    let input = input.ok_or_else(|| Error::Other("a session needs an output channel".into()))?;
    Ok((transcript, input))
}

fn accept_all(
    listeners: &[(Channel, UnixListener)],
    child: &mut Child,
) -> Result<Vec<(Channel, UnixStream)>> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let mut streams = Vec::new();
    for (channel, listener) in listeners {
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(source) => {
                    return Err(Error::Io {
                        what: "accept".into(),
                        source,
                    });
                }
            }
            if let Some(status) = child.try_wait().map_err(Error::io("wait for QEMU"))? {
                return Err(Error::Other(format!("QEMU ended at once ({status})")));
            }
            if Instant::now() > deadline {
                return Err(Error::Other("QEMU does not connect".into()));
            }
            wait_readable(listener)?;
        };
        stream
            .set_nonblocking(false)
            .map_err(Error::io("set up a socket"))?;
        streams.push((*channel, stream));
    }
    Ok(streams)
}

/// Waits for a connection, but looks up now and then: QEMU may have ended without one.
fn wait_readable(listener: &UnixListener) -> Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let look_up = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let mut descriptors = [PollFd::new(listener, PollFlags::IN)];
    poll(&mut descriptors, Some(&look_up)).map_err(|error| Error::Io {
        what: "wait for QEMU's connection".into(),
        source: error.into(),
    })?;
    Ok(())
}

fn read_channel(channel: Channel, mut stream: UnixStream, transcript: &Transcript, echo: Echo) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let bytes = &buffer[..count];
        // A reader of ours that has gone away must not stop the session.
        let _ = match (channel, echo) {
            (Channel::Output, Echo::All) => io::stdout()
                .write_all(bytes)
                .and_then(|()| io::stdout().flush()),
            (Channel::Error, Echo::All | Echo::Errors) => io::stderr().write_all(bytes),
            _ => Ok(()),
        };
        transcript.lock().append(channel, bytes);
        transcript.changed.notify_all();
    }
    transcript.lock().open -= 1;
    transcript.changed.notify_all();
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

/// A place in the queue for this machine's cores: software CPUs beside each other miss their
/// deadlines. A lab wants the machine for itself, guests share it.
#[derive(Debug)]
pub struct Turn {
    _lock: std::fs::File,
}

impl Turn {
    /// Waits until nobody else has a turn. Fails if the lock's file cannot be used.
    pub fn exclusive() -> Result<Turn> {
        Turn::take(FlockOperation::LockExclusive)
    }

    pub(crate) fn shared() -> Result<Turn> {
        Turn::take(FlockOperation::LockShared)
    }

    fn take(operation: FlockOperation) -> Result<Turn> {
        let directory = workspace::target_directory().join("lab");
        std::fs::create_dir_all(&directory).map_err(Error::file("create", &directory))?;
        let path = directory.join("lock");
        let file = std::fs::File::create(&path).map_err(Error::file("create", &path))?;
        rustix::fs::flock(file.as_fd(), operation).map_err(|error| Error::Io {
            what: "lock the lab".into(),
            source: error.into(),
        })?;
        Ok(Turn { _lock: file })
    }
}
