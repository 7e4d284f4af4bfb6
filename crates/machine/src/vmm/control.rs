//! The control protocol: requests, answers, and the reading of one client's bytes.
//!
//! The form is specified in `docs/formats/control.md`. This module does no I/O: a connection's bytes
//! go into [`LineReader`], whole lines come out, and [`Request::parse`] turns a line into a request.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The protocol's version, in the greeting.
pub const VERSION: u32 = 1;

/// The longest request line, with its line feed, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// The most clients at a time.
pub const MAX_CLIENTS: usize = 16;

/// The first line on a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`VERSION`].
    #[serde(rename = "mica-control")]
    pub version: u32,
    /// The VM's name.
    pub name: String,
}

/// One request line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Repeated in the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
}

/// What a client may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Command {
    /// What the VM is and does.
    State,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Boot again.
    Reset,
    /// Press the power button.
    PowerButton,
    /// Take memory from the guest.
    Balloon {
        /// Bytes to take.
        target: u64,
    },
    /// Everything that is counted.
    Counters,
    /// End the VM.
    Stop,
}

impl Request {
    /// Reads one line, without its line feed.
    ///
    /// # Errors
    ///
    /// The line is no request; the answer to send is in the error.
    pub fn parse(line: &[u8]) -> Result<Self, Box<Response>> {
        serde_json::from_slice(line).map_err(|error| {
            // An answer can still be matched when only the command is unknown.
            #[derive(Deserialize)]
            struct JustId {
                id: Option<u64>,
            }
            let id = serde_json::from_slice::<JustId>(line)
                .ok()
                .and_then(|request| request.id);
            Box::new(Response::error(id, ErrorCode::BadRequest, error))
        })
    }
}

/// One answer line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// The request's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How a request went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done, with what was asked for.
    Ok(Answer),
    /// Not done.
    Error {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
}

/// What a request was answered with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// To [`Command::State`].
    State(VmState),
    /// To [`Command::Counters`].
    Counters {
        /// By name.
        counters: BTreeMap<String, u64>,
    },
    /// To all others.
    Done {},
}

/// What a VM is and does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Running or paused.
    pub state: RunState,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM, in bytes.
    pub memory: u64,
    /// What executes the guest.
    pub engine: String,
    /// What processor the guest sees.
    pub cpu_profile: String,
    /// The VM process.
    pub pid: u32,
    /// Time since the process started the machine, pauses included.
    pub uptime_ms: u64,
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// They do.
    Running,
    /// They stand still.
    Paused,
}

/// Why a request was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// No request of this protocol.
    BadRequest,
    /// The line exceeds [`MAX_LINE`].
    TooLong,
    /// The machine has no such device.
    NoDevice,
    /// A debugger holds the machine.
    Held,
    /// Tried and failed.
    Failed,
}

impl Response {
    /// A success.
    #[must_use]
    pub fn ok(id: Option<u64>, answer: Answer) -> Self {
        Self {
            id,
            outcome: Outcome::Ok(answer),
        }
    }

    /// A failure.
    #[must_use]
    pub fn error(id: Option<u64>, code: ErrorCode, message: impl ToString) -> Self {
        Self {
            id,
            outcome: Outcome::Error {
                code,
                message: message.to_string(),
            },
        }
    }
}

/// The client's line exceeds [`MAX_LINE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineTooLong;

/// Cuts a client's bytes into lines, holding at most one line.
#[derive(Debug, Default)]
pub struct LineReader {
    pending: Vec<u8>,
}

impl LineReader {
    /// Takes what was read and gives each whole line, without its line feed, to `line`.
    ///
    /// # Errors
    ///
    /// [`LineTooLong`]: the connection is to be closed.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        mut line: impl FnMut(&[u8]),
    ) -> Result<(), LineTooLong> {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.append(&bytes[..end])?;
            line(&self.pending);
            self.pending.clear();
            bytes = &bytes[end + 1..];
        }
        self.append(bytes)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), LineTooLong> {
        if self.pending.len() + bytes.len() >= MAX_LINE {
            return Err(LineTooLong);
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }
}

/// A value as one line of the protocol.
#[must_use]
pub fn to_line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value)
        .expect("the protocol's types have string keys only, so they always become JSON");
    line.push(b'\n');
    line
}

/// Fuzzing: any bytes from a client give lines, requests or errors within bounds.
#[doc(hidden)]
pub fn fuzz_control(data: &[u8]) {
    let mut reader = LineReader::default();
    // The first byte says how the rest is cut into reads.
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    for chunk in bytes.chunks(usize::from(cut).max(1)) {
        let mut longest = 0;
        let result = reader.push(chunk, |line| {
            longest = longest.max(line.len());
            if let Ok(request) = Request::parse(line) {
                let again = Request::parse(&serde_json::to_vec(&request).expect("it came as JSON"));
                assert_eq!(again.as_ref(), Ok(&request));
            }
        });
        assert!(longest < MAX_LINE && reader.pending.len() < MAX_LINE);
        if result.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_the_format_page_shows_them() {
        for (line, command) in [
            (
                r#"{"id":7,"do":"balloon","target":67108864}"#,
                Command::Balloon { target: 64 << 20 },
            ),
            (r#"{"id":7,"do":"power-button"}"#, Command::PowerButton),
            (r#"{"do":"state","id":7,"unknown":[]}"#, Command::State),
        ] {
            let request = Request::parse(line.as_bytes()).unwrap();
            assert_eq!(
                request,
                Request {
                    id: Some(7),
                    command
                },
                "{line}"
            );
        }
    }

    #[test]
    fn answers_are_as_the_format_page_shows_them() {
        let done = Response::ok(Some(7), Answer::Done {});
        assert_eq!(to_line(&done), b"{\"id\":7,\"ok\":{}}\n");
        let error = Request::parse(br#"{"id":8,"do":"fly"}"#).unwrap_err();
        let text = String::from_utf8(to_line(&*error)).unwrap();
        assert!(
            text.starts_with(r#"{"id":8,"error":{"code":"bad-request","message":"#),
            "{text}"
        );
        for line in [done, *error] {
            let back: Response = serde_json::from_slice(&to_line(&line)).unwrap();
            assert_eq!(back, line);
        }
    }

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let text = b"one\n\ntwo\nthree";
        for size in 1..text.len() {
            let mut reader = LineReader::default();
            let mut lines = Vec::new();
            for chunk in text.chunks(size) {
                reader
                    .push(chunk, |line| lines.push(line.to_vec()))
                    .unwrap();
            }
            assert_eq!(lines, [b"one".to_vec(), vec![], b"two".to_vec()]);
        }
    }

    #[test]
    fn an_endless_line_is_cut_off() {
        let mut reader = LineReader::default();
        let mut pushed = 0;
        while reader.push(&[b' '; 1000], |_| {}).is_ok() {
            pushed += 1000;
            assert!(pushed < MAX_LINE);
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm() {
        for size in 0..300u32 {
            let bytes: Vec<u8> = (0..size)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
                .collect();
            fuzz_control(&bytes);
        }
        fuzz_control(b"\x05{\"do\":\"state\"}\n{\"id\":1}\nnonsense\n");
    }
}
