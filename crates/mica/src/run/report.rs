//! What `mica run` tells people and programs about the VM's life.

use std::io::Write;
use std::process::ExitCode;

use mica_machine::vmm::config::{ResetCause, StopReason, VmEvent};
use serde::Serialize;

use crate::OutputFormat;

/// Events of the supervisor itself, in the same form as the machine's.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum SupervisorEvent {
    /// The VM process is about to start.
    Starting {
        /// The VM's name.
        name: String,
        /// The chosen engine.
        engine: String,
        /// Why that one.
        reason: String,
        /// Number of vCPUs.
        vcpus: u32,
        /// RAM, in bytes.
        memory: u64,
        /// The control socket's path.
        control: String,
    },
}

/// Prints events: a line of JSON each on standard output, or text for people on standard error.
pub(crate) struct Reporter {
    format: OutputFormat,
    name: String,
    /// In raw mode a line feed alone does not return the carriage.
    line_end: &'static str,
}

impl Reporter {
    pub(crate) fn new(format: OutputFormat, name: &str, raw_terminal: bool) -> Self {
        let line_end = if raw_terminal { "\r\n" } else { "\n" };
        Self {
            format,
            name: name.to_owned(),
            line_end,
        }
    }

    /// Reports what the supervisor does.
    pub(crate) fn supervisor(&self, event: &SupervisorEvent) {
        let SupervisorEvent::Starting {
            name,
            engine,
            reason,
            ..
        } = event;
        self.emit(
            event,
            Some(format!(
                "{name} runs on {engine} ({reason}); Ctrl-] h helps"
            )),
        );
    }

    /// Reports what the machine does.
    pub(crate) fn machine(&self, event: &VmEvent) {
        let name = &self.name;
        let text = match event {
            VmEvent::Jailed { landlock, .. } if landlock == "none" => Some(
                "this kernel has no Landlock: the VM process is confined by seccomp alone"
                    .to_owned(),
            ),
            VmEvent::Jailed { .. } | VmEvent::Booting { .. } | VmEvent::Running => None,
            VmEvent::Paused => Some(format!("{name} is paused")),
            VmEvent::Reset { cause } => Some(match cause {
                ResetCause::Guest => format!("{name} reboots"),
                ResetCause::TripleFault => format!("{name} reboots after a triple fault"),
                ResetCause::Control => format!("{name} reboots on request"),
            }),
            VmEvent::GuestPanicked => Some(format!("{name}: the guest's kernel panicked")),
            VmEvent::BackendLost { device, reason } => Some(format!(
                "{name}: {device} lost its backend ({reason}); its requests wait for a new one"
            )),
            VmEvent::Unclaimed { .. } => None,
            VmEvent::BackendRestored { device } => {
                Some(format!("{name}: {device} has a backend again"))
            }
            VmEvent::Replayed { position, compared } => Some(if *compared {
                format!("{name}: replayed {position} units; vCPUs and memory are as recorded")
            } else {
                format!("{name}: replayed {position} units")
            }),
            VmEvent::Warning { message } => Some(format!("{name}: {message}")),
            VmEvent::Stopped { reason } => Some(format!("{name} {}", how_it_ended(*reason))),
        };
        self.emit(event, text);
    }

    /// Says a thing to people only.
    pub(crate) fn say(&self, text: &str) {
        if self.format == OutputFormat::Text {
            eprint!("mica: {text}{}", self.line_end);
        }
    }

    fn emit(&self, event: &impl Serialize, text: Option<String>) {
        match self.format {
            OutputFormat::Text => {
                if let Some(text) = text {
                    self.say(&text);
                }
            }
            OutputFormat::Json => {
                let line = serde_json::to_string(event)
                    .expect("events have string keys only, so they always become JSON");
                // A reader that went away does not concern the guest.
                let _ = writeln!(std::io::stdout().lock(), "{line}");
            }
        }
    }
}

fn how_it_ended(reason: StopReason) -> &'static str {
    match reason {
        StopReason::PowerOff => "powered off",
        StopReason::Reset => "reset and was ended (--no-reboot)",
        StopReason::TripleFault => "ended with a triple fault (--no-reboot)",
        StopReason::GuestPanicked => "ended with a kernel panic (--on-panic stop)",
        StopReason::EngineFailed => "ended: the engine failed",
        StopReason::Stopped => "was stopped",
    }
}

/// The exit status that tells how the guest ended; the help of `mica run` lists them.
pub(crate) fn exit_code(reason: StopReason) -> ExitCode {
    ExitCode::from(match reason {
        StopReason::PowerOff => 0,
        StopReason::Stopped => 3,
        StopReason::Reset => 4,
        StopReason::TripleFault => 5,
        StopReason::GuestPanicked => 6,
        StopReason::EngineFailed => 7,
    })
}
