//! Why a chore failed, in words that say what to do.

use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus};

/// A chore's failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("`{command}` failed ({status}){}", indented(.stderr))]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error, when that was not shown already.
        stderr: String,
    },
    /// A guest did not do in time what was expected of it.
    #[error("{what} after {seconds:.1} s{}", indented(.tail))]
    Guest {
        /// What failed.
        what: String,
        /// The session's age, in seconds.
        seconds: f64,
        /// The end of what the guest printed.
        tail: String,
    },
    /// Anything else: the text says what and what to do.
    #[error("{0}")]
    Other(String),
}

/// What a chore returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps a system error with what was being done; made for `map_err`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }

    /// [`Error::io`] for an operation on a file: `read /etc/passwd`.
    pub fn file(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        Error::io(format!("{verb} {}", path.display()))
    }
}

fn indented(text: &str) -> String {
    text.trim_end()
        .lines()
        .map(|line| format!("\n  | {line}"))
        .collect()
}

/// Runs a program to its end and returns its standard output; `package` is the Debian package that
/// brings the program.
///
/// # Errors
///
/// The program is missing or fails; its standard error is in the message.
pub fn output_of(command: &mut Command, package: &str) -> Result<String> {
    let shown = show(command);
    let output = command
        .output()
        .map_err(|source| missing(&shown, package, source))?;
    if !output.status.success() {
        return Err(Error::Command {
            command: shown,
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program to its end with our own standard streams.
///
/// # Errors
///
/// The program is missing or fails.
pub fn run(command: &mut Command, package: &str) -> Result<()> {
    let shown = show(command);
    let status = command
        .status()
        .map_err(|source| missing(&shown, package, source))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Command {
            command: shown,
            status,
            stderr: String::new(),
        })
    }
}

pub(crate) fn missing(shown: &str, package: &str, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound {
        Error::Other(format!(
            "cannot start `{shown}`: not found; it comes with the package {package} \
             (`make test` installs what is needed)"
        ))
    } else {
        Error::Io {
            what: format!("start `{shown}`"),
            source,
        }
    }
}

pub(crate) fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
