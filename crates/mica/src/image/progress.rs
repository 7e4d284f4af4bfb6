//! What a build tells the user on standard error while it goes on: one line that changes, on a
//! terminal; nothing elsewhere.

use std::io::{self, IsTerminal, Write};

/// The line.
pub(crate) struct Progress {
    visible: bool,
    step: String,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            visible: io::stderr().is_terminal(),
            step: String::new(),
        }
    }

    /// Starts a step, such as "downloading the kernel".
    pub(crate) fn step(&mut self, step: &str) {
        step.clone_into(&mut self.step);
        self.show(step);
    }

    /// Tells where in the step we are.
    pub(crate) fn detail(&self, detail: &str) {
        self.show(&format!("{}: {detail}", self.step));
    }

    fn show(&self, text: &str) {
        if self.visible {
            let columns = rustix::termios::tcgetwinsize(io::stderr())
                .map_or(80, |size| usize::from(size.ws_col.max(20)));
            let text: String = text
                .chars()
                .filter(|c| !c.is_control())
                .take(columns - 1)
                .collect();
            // A terminal that is gone is no reason to stop.
            let _ = write!(io::stderr(), "\r\x1b[K{text}");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.visible {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
