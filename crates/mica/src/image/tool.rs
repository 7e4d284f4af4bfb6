//! Running the host's programs so that an interrupt ends them and us in good order.

use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    #[error("interrupted")]
    Interrupted,
    #[error("this host has no '{program}'; install the package {package}")]
    Missing {
        program: String,
        package: &'static str,
    },
    #[error("cannot run '{program}': {source}")]
    Spawn { program: String, source: io::Error },
    #[error("'{program}' failed ({status}): {message}")]
    Failed {
        program: String,
        status: ExitStatus,
        message: String,
    },
}

/// Runs programs one at a time; SIGINT, SIGTERM and SIGHUP end the one that runs, and then
/// everything asked for fails with [`ToolError::Interrupted`], so that the caller unwinds and its
/// temporary files go.
pub(crate) struct Tools {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    interrupted: AtomicBool,
    /// The process group of the program that runs; a program is reaped only after it is gone from
    /// here, so the number is never another's.
    running: Mutex<Option<Pid>>,
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, Option<Pid>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tools {
    /// Takes over the signals for the rest of the process's life.
    pub(crate) fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let for_thread = Arc::clone(&shared);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for _ in signals.forever() {
                    let running = for_thread.running();
                    for_thread.interrupted.store(true, Ordering::Relaxed);
                    if let Some(group) = *running {
                        // It may have just ended, which is as good.
                        let _ = rustix::process::kill_process_group(group, Signal::TERM);
                    }
                }
            })?;
        Ok(Self { shared })
    }

    /// Fails if the user has asked us to stop.
    pub(crate) fn check(&self) -> Result<(), ToolError> {
        if self.shared.interrupted.load(Ordering::Relaxed) {
            return Err(ToolError::Interrupted);
        }
        Ok(())
    }

    /// Runs a program from `package` to its end and returns what it printed on standard output.
    pub(crate) fn run(
        &self,
        command: &mut Command,
        package: &'static str,
    ) -> Result<Vec<u8>, ToolError> {
        self.run_reporting(command, package, |_| ())
    }

    /// The same, with each line of the program's standard error handed on as it comes.
    pub(crate) fn run_reporting(
        &self,
        command: &mut Command,
        package: &'static str,
        mut on_line: impl FnMut(&str),
    ) -> Result<Vec<u8>, ToolError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let spawn_error = |source: io::Error| ToolError::Spawn {
            program: program.clone(),
            source,
        };
        let mut child = self.spawn(command, package, &program)?;
        let stdout = child.stdout.take();
        let mut tail = Tail::default();
        let printed = thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut printed = Vec::new();
                stdout.map_or(Ok(0), |mut stdout| stdout.read_to_end(&mut printed))?;
                io::Result::Ok(printed)
            });
            for line in child.stderr.take().into_iter().flat_map(lossy_lines) {
                on_line(&line);
                tail.push(line);
            }
            reader.join().unwrap_or_else(|_| Ok(Vec::new()))
        });
        let status = self.reap(&mut child).map_err(spawn_error)?;
        self.check()?;
        if !status.success() {
            return Err(ToolError::Failed {
                program,
                status,
                message: tail.message(),
            });
        }
        printed.map_err(spawn_error)
    }

    fn spawn(
        &self,
        command: &mut Command,
        package: &'static str,
        program: &str,
    ) -> Result<Child, ToolError> {
        use std::os::unix::process::CommandExt;

        let mut running = self.shared.running();
        self.check()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("LC_ALL", "C.UTF-8")
            .env("PATH", search_path())
            // Out of the terminal's foreground group: an interrupt reaches it through us, once.
            .process_group(0)
            .spawn()
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => ToolError::Missing {
                    program: program.to_owned(),
                    package,
                },
                _ => ToolError::Spawn {
                    program: program.to_owned(),
                    source,
                },
            })?;
        *running = Some(Pid::from_child(&child));
        Ok(child)
    }

    fn reap(&self, child: &mut Child) -> io::Result<ExitStatus> {
        let pid = Pid::from_child(child);
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(error) = rustix::process::waitid(WaitId::Pid(pid), options) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        *self.shared.running() = None;
        child.wait()
    }
}

/// The end of what a program complained about.
#[derive(Default)]
struct Tail(Vec<String>);

impl Tail {
    const LINES: usize = 8;

    fn push(&mut self, line: String) {
        if !line.trim().is_empty() {
            if self.0.len() == Self::LINES {
                self.0.remove(0);
            }
            self.0.push(line);
        }
    }

    /// The lines marked as errors in the way of Debian's programs, or else all that are left.
    fn message(&self) -> String {
        let errors: Vec<&str> = self
            .0
            .iter()
            .filter_map(|line| line.strip_prefix("E: "))
            .collect();
        if errors.is_empty() {
            self.0.join("; ")
        } else {
            errors.join("; ")
        }
    }
}

fn lossy_lines(stream: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(stream)
        .split(b'\n')
        .map_while(Result::ok)
        .map(|line| String::from_utf8_lossy(&line).into_owned())
}

/// The user's search path with the directories that Debian gives to root alone.
pub(crate) fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}
