//! `mica` on the KVM of the lab, driven through the lab's shell.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its share; a failed unwrap is its failure

use std::time::Duration;

use xtask::lab::Lab;
use xtask::session::Session;

/// How long a guest may take to its prompt. It runs on a processor that is emulated by a processor
/// that is emulated, and other tests want the same cores.
pub(crate) const BOOT: Duration = Duration::from_secs(240);
/// How long anything else may take.
pub(crate) const STEP: Duration = Duration::from_secs(120);

/// The tiny guest's prompt.
pub(crate) const PROMPT: &str = "tiny# ";

/// Around the exit status in the shell's output.
const MARK: &str = "@@";

/// A shell on the lab's kernel.
pub(crate) struct Host {
    session: Session,
}

impl Host {
    /// Starts a lab with mica and the tiny image, and `more` of what a test needs.
    pub(crate) fn start(more: impl FnOnce(Lab) -> Lab) -> Self {
        let lab = Lab::new()
            .timeout(Duration::from_secs(900))
            .file(env!("CARGO_BIN_EXE_mica"), "/usr/bin/mica")
            .file(crate::images::tiny(), "/home/images/tiny");
        let session = more(lab)
            .start("export MICA_HOME=/home; cd /tmp; exec sh")
            .unwrap();
        Self { session }
    }

    /// Types to whatever reads: the shell, or the guest of a `mica run` in the foreground.
    pub(crate) fn send(&mut self, text: &str) {
        self.session.send(text).unwrap();
    }

    /// Waits for `text` and returns what came up to and with it.
    pub(crate) fn expect(&mut self, text: &str, timeout: Duration) -> String {
        self.session.expect(text, timeout).unwrap()
    }

    /// Starts a command in the foreground; [`Host::status`] awaits its end.
    pub(crate) fn begin(&mut self, command: &str) {
        self.send(&format!("{command}\necho \"{MARK}$?{MARK}\"\n"));
    }

    /// What the command in the foreground still prints, and its exit status.
    pub(crate) fn status(&mut self, timeout: Duration) -> (i32, String) {
        let mut output = self.expect(MARK, timeout);
        output.truncate(output.len() - MARK.len());
        let status = self.expect("\n", STEP);
        let status = status.trim_end().trim_end_matches(MARK);
        (status.parse().unwrap(), output)
    }

    /// Runs a command to its end, its input at end of file.
    pub(crate) fn run(&mut self, command: &str) -> (i32, String) {
        self.begin(&format!("{{ {command}; }} </dev/null 2>&1"));
        self.status(BOOT)
    }

    /// Runs a command that must succeed.
    pub(crate) fn shell(&mut self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "{command}: {output}");
        output
    }

    /// Waits until a command succeeds.
    pub(crate) fn until(&mut self, command: &str) {
        let tries = BOOT.as_secs() * 10;
        let (status, output) = self.run(&format!(
            "left={tries}; until {command}; do \
             left=$((left - 1)); [ $left -gt 0 ] || break; usleep 100000; done; [ $left -gt 0 ]"
        ));
        if status != 0 {
            let files = self.run("tail -n 40 /tmp/console /tmp/events").1;
            panic!("never true: {command}\n{output}\n{files}");
        }
    }

    /// Types a line at the tiny guest's prompt and returns what it prints.
    pub(crate) fn guest(&mut self, line: &str) -> String {
        self.send(&format!("{line}\n"));
        self.expect(PROMPT, STEP)
    }

    /// Ends the lab.
    pub(crate) fn finish(mut self) {
        self.send("exit 0\n");
        let outcome = self.session.finish().unwrap();
        assert_eq!(outcome.status, 0, "{}", outcome.output);
    }
}
