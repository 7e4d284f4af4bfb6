//! A VMM under measurement, with its guest's console read line by line.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process_group};
use xtask::error::{Error, Result};

use super::peers::Vmm;

/// The line that the guest's first process prints.
const USER_SPACE: &str = "mica: user space";

/// A VMM that was just executed; its whole process group dies with this.
pub(super) struct Running {
    child: Child,
    console: BufReader<ChildStdout>,
    executed: Instant,
}

impl Running {
    pub(super) fn start(vmm: &Vmm) -> Result<Running> {
        let (program, arguments) = vmm
            .argv
            .split_first()
            .ok_or_else(|| Error::Other(format!("{} has no command", vmm.name)))?;
        let mut child = Command::new(program)
            .args(arguments)
            .envs(vmm.environment.iter().cloned())
            .process_group(0)
            // Open and silent, like a terminal at which nobody types.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io(format!("start {program}")))?;
        // `spawn` returns when the child has executed its program.
        let executed = Instant::now();
        let console = child
            .stdout
            .take()
            .ok_or_else(|| Error::Other("a child without standard output".into()))?;
        Ok(Running {
            child,
            console: BufReader::new(console),
            executed,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the guest's user space; returns the milliseconds since exec.
    pub(super) fn wait_for_user_space(&mut self) -> Result<f64> {
        self.wait_for(USER_SPACE)
    }

    /// Waits for a line with `text` in it; returns the milliseconds since exec.
    pub(super) fn wait_for(&mut self, text: &str) -> Result<f64> {
        let mut seen = Vec::new();
        loop {
            let start = seen.len();
            let count = self
                .console
                .read_until(b'\n', &mut seen)
                .map_err(Error::io("read the guest's console"))?;
            if count == 0 {
                let mut errors = String::new();
                if let Some(mut stderr) = self.child.stderr.take() {
                    let _ = stderr.read_to_string(&mut errors);
                }
                let seen = String::from_utf8_lossy(&seen).into_owned();
                return Err(Error::Other(format!(
                    "the guest ended early:\n{seen}{errors}"
                )));
            }
            if String::from_utf8_lossy(&seen[start..]).contains(text) {
                return Ok(self.executed.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}
