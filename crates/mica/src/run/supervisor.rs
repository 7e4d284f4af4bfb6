//! The parent of a VM process: carries the console, answers the process's needs, passes on signals.
//!
//! One thread polls everything. It ends when the VM process has ended, and only then: whatever
//! happens to the terminal or to a backend, the guest goes on.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

use mica_machine::vmm::channel::{Attachments, Channel};
use mica_machine::vmm::config::{FromVm, StopReason, ToVm, VmEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::backend::Backends;
use super::console::Console;
use super::report::Reporter;
use super::terminal::{self, ESCAPE_HELP, EscapeCommand};

/// How long to wait before another attempt to reach a lost backend.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(200);

/// Signals as readable sockets.
pub(crate) struct Signals {
    terminate: UnixStream,
    window: UnixStream,
}

impl Signals {
    /// Takes SIGTERM, SIGINT, SIGHUP and SIGWINCH.
    ///
    /// # Errors
    ///
    /// The system refuses descriptors or handlers.
    pub(crate) fn take() -> io::Result<Self> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
        use signal_hook::low_level::pipe::register;
        let (terminate, terminate_sender) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            register(signal, terminate_sender.try_clone()?)?;
        }
        let (window, window_sender) = UnixStream::pair()?;
        register(SIGWINCH, window_sender)?;
        terminate.set_nonblocking(true)?;
        window.set_nonblocking(true)?;
        Ok(Self { terminate, window })
    }
}

/// Whether the VM has been asked to end.
enum Ending {
    No,
    /// The power button is pressed; at the instant the plug is pulled.
    Asked(Instant),
    /// The plug is pulled.
    Pulled,
}

/// A VM process and all that its supervisor holds for it.
pub(crate) struct Supervisor {
    pub(crate) name: String,
    pub(crate) child: Child,
    pub(crate) channel: Channel,
    pub(crate) signals: Signals,
    pub(crate) console: Console,
    pub(crate) backends: Backends,
    pub(crate) reporter: Reporter,
    pub(crate) stop_timeout: Duration,
}

/// What the poll found.
struct Ready {
    terminate: bool,
    window: bool,
    channel: bool,
    console_read: bool,
    console_write: bool,
    input: bool,
}

impl Supervisor {
    /// Supervises until the VM process has ended.
    ///
    /// # Errors
    ///
    /// The VM could not start, or its process ended without saying how.
    pub(crate) fn run(mut self) -> io::Result<StopReason> {
        let mut ending = Ending::No;
        let mut waiting: Vec<(String, Instant)> = Vec::new();
        self.send_terminal_size();
        let outcome = loop {
            let deadline = waiting.iter().map(|(_, at)| *at).chain(match ending {
                Ending::Asked(at) => Some(at),
                _ => None,
            });
            let ready = self.poll(deadline.min())?;
            if ready.terminate {
                drain(&self.signals.terminate);
                self.advance_ending(&mut ending);
            }
            if ready.window {
                drain(&self.signals.window);
                self.send_terminal_size();
            }
            if ready.console_read {
                self.console.forward_output();
            }
            if ready.input {
                for command in self.console.take_input() {
                    self.escape(command)?;
                }
            }
            if ready.console_write {
                self.console.flush_input();
            }
            if let Ending::Asked(at) = ending
                && Instant::now() >= at
            {
                self.reporter.say("the guest did not shut down in time");
                self.advance_ending(&mut ending);
            }
            self.reconnect(&mut waiting);
            if ready.channel
                && let Some(outcome) = self.hear(&mut waiting)
            {
                break outcome;
            }
        };
        self.console.forward_rest();
        let status = self.child.wait()?;
        outcome.unwrap_or_else(|| {
            let hint = match status.signal() {
                Some(signal_hook::consts::SIGSYS) => {
                    ": it used a system call that its jail forbids; please report this"
                }
                _ => "",
            };
            Err(io::Error::other(format!(
                "the VM process of '{}' ended without a word ({status}){hint}",
                self.name
            )))
        })
    }

    fn poll(&self, deadline: Option<Instant>) -> io::Result<Ready> {
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let stdin = rustix::stdio::stdin();
        let mut console_events = PollFlags::empty();
        if self.console.has_output() {
            console_events |= PollFlags::IN;
        }
        if self.console.has_pending_input() {
            console_events |= PollFlags::OUT;
        }
        let mut fds = vec![
            PollFd::new(&self.signals.terminate, PollFlags::IN),
            PollFd::new(&self.signals.window, PollFlags::IN),
            PollFd::new(&self.channel, PollFlags::IN),
        ];
        // A closed descriptor reports its end for ever, so what has nothing to give is left out.
        let socket = self.console.socket().filter(|_| !console_events.is_empty());
        let console_place = socket.map(|socket| {
            fds.push(PollFd::from_borrowed_fd(socket, console_events));
            fds.len() - 1
        });
        let input_place = self.console.wants_input().then(|| {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
            fds.len() - 1
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let seen = |place: usize| fds[place].revents();
        let hung_up = PollFlags::HUP | PollFlags::ERR;
        Ok(Ready {
            terminate: !seen(0).is_empty(),
            window: !seen(1).is_empty(),
            channel: !seen(2).is_empty(),
            console_read: console_place
                .is_some_and(|place| seen(place).intersects(PollFlags::IN | hung_up)),
            console_write: console_place.is_some_and(|place| seen(place).contains(PollFlags::OUT)),
            input: input_place.is_some_and(|place| !seen(place).is_empty()),
        })
    }

    /// One step towards the end: the power button first, then the plug.
    fn advance_ending(&self, ending: &mut Ending) {
        let message = match ending {
            Ending::No => {
                self.reporter
                    .say("asking the guest to shut down; once more stops it at once");
                *ending = Ending::Asked(Instant::now() + self.stop_timeout);
                ToVm::PowerButton
            }
            Ending::Asked(_) => {
                *ending = Ending::Pulled;
                ToVm::Stop
            }
            Ending::Pulled => return,
        };
        // If the process is gone, its end is about to be read from the channel.
        let _ = self.channel.send(&message, Attachments::default());
    }

    fn escape(&self, command: EscapeCommand) -> io::Result<()> {
        let message = match command {
            EscapeCommand::PowerButton => ToVm::PowerButton,
            EscapeCommand::Reset => ToVm::Reset,
            EscapeCommand::Stop => ToVm::Stop,
            EscapeCommand::Help => return io::stderr().write_all(ESCAPE_HELP.as_bytes()),
        };
        let _ = self.channel.send(&message, Attachments::default());
        Ok(())
    }

    fn send_terminal_size(&self) {
        if self.console.is_stdio()
            && let Some((columns, rows)) = terminal::size()
        {
            let message = ToVm::TerminalSize { columns, rows };
            let _ = self.channel.send(&message, Attachments::default());
        }
    }

    /// Takes one message. `Some` when the VM has ended; `Some(None)` if it did not say how.
    #[expect(
        clippy::option_option,
        reason = "going on, an end unexplained, an end explained"
    )]
    fn hear(
        &mut self,
        waiting: &mut Vec<(String, Instant)>,
    ) -> Option<Option<io::Result<StopReason>>> {
        let message = match self.channel.receive::<FromVm>() {
            Ok(Some((message, _))) => message,
            Ok(None) => return Some(None),
            Err(error) => return Some(Some(Err(error))),
        };
        match message {
            FromVm::Event(event) => {
                if let VmEvent::Stopped { .. } = event {
                    self.console.forward_rest();
                }
                self.reporter.machine(&event);
                if let VmEvent::Stopped { reason } = event {
                    return Some(Some(Ok(reason)));
                }
            }
            FromVm::NeedBackend { device } => waiting.push((device, Instant::now())),
            FromVm::Failed { error } => {
                let error = io::Error::other(format!("{}: {error}", self.name));
                return Some(Some(Err(error)));
            }
        }
        None
    }

    fn reconnect(&mut self, waiting: &mut Vec<(String, Instant)>) {
        waiting.retain_mut(|(device, at)| {
            if Instant::now() < *at {
                return true;
            }
            let Ok(socket) = self.backends.connect(device) else {
                *at = Instant::now() + RECONNECT_INTERVAL;
                return true;
            };
            let mut attachments = Attachments::default();
            let socket = attachments.attach(socket);
            let _ = self.channel.send(
                &ToVm::Backend {
                    device: device.clone(),
                    socket,
                },
                attachments,
            );
            false
        });
    }
}

fn drain(mut socket: &UnixStream) {
    let mut bytes = [0; 64];
    while matches!(socket.read(&mut bytes), Ok(read) if read > 0) {}
}
