//! Whoever acts on a running machine: its guest, its supervisor, the control socket's clients.
//!
//! All of them end up on the event loop in one [`Operator`], so a machine is paused, reset or ended
//! by one thread and one thing at a time.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use mica_base::units::Bytes;

use super::assemble::{Assembled, BackendDevice, Handles};
use super::channel::{Attachments, Channel, Received};
use super::config::{FromVm, OnPanic, OnReset, ResetCause, StopReason, ToVm, VmConfig, VmEvent};
use super::control::{Answer, Command, ErrorCode, Request, Response, RunState, VmState};
use super::debug::Debugger;
use super::machine::{Booted, Machine, MachineError};
use super::notice::{Mailbox, Notice};
use super::process::ProcessError;
use super::recording::{self, Sums};
use super::server::{Incoming, Server};
use super::vcpus::EndCause;
use crate::bus::{Buses, lock};
use crate::legacy::PowerEvent;
use crate::soft::turns::Mark;

/// How the machine's run ended; the process's main loop watches it.
pub(super) type End = Rc<Cell<Option<Result<StopReason, ProcessError>>>>;

/// Why a replay takes no orders.
const REPLAYS: &str = "a replay does what its recording says";

/// Where the operator hears of things and where it tells of them.
pub(super) struct Links {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) channel: Rc<Channel>,
    pub(super) server: Option<Server>,
    pub(super) end: End,
}

/// A running machine with everyone who may act on it.
pub(super) struct Operator {
    config: VmConfig,
    machine: Machine,
    buses: Arc<Buses>,
    handles: Handles,
    links: Links,
    started: Instant,
    resets: u64,
    /// Devices whose loss has been reported and not been mended.
    lost: Vec<String>,
    debugger: Debugger,
}

impl From<Booted> for VmEvent {
    fn from(booted: Booted) -> Self {
        Self::Booting {
            protocol: booted.protocol.to_owned(),
            entry: booted.entry,
            cmdline: booted.cmdline,
        }
    }
}

impl Operator {
    pub(super) fn new(config: VmConfig, assembled: Assembled, links: Links) -> Self {
        Self {
            config,
            machine: assembled.machine,
            buses: assembled.buses,
            handles: assembled.handles,
            links,
            started: Instant::now(),
            resets: 0,
            lost: Vec::new(),
            debugger: Debugger::default(),
        }
    }

    fn replays(&self) -> bool {
        let turns = self.machine.turns.as_ref();
        turns.is_some_and(|turns| turns.replays())
    }

    /// Does what a replayed recording has for the machine as a whole.
    fn follow_recording(&mut self) -> Result<(), MachineError> {
        let Some(turns) = self.machine.turns.clone() else {
            return Ok(());
        };
        let compared = match turns.replay_mark()? {
            Mark::Reset { cause } => {
                self.reset(recording::cause(cause));
                return Ok(());
            }
            Mark::Cut => {
                self.warn("the recording was not closed: it ends here".to_owned());
                self.finish(Ok(StopReason::Stopped));
                false
            }
            Mark::End {
                reason,
                vcpus,
                memory,
            } => {
                self.machine.vcpus.pause();
                let sums = self.machine.sums()?;
                if sums != (Sums { vcpus, memory }) {
                    self.warn(format!(
                        "the replay ends otherwise than the recording: {sums:x?}, not vcpus \
                         {vcpus:x}, memory {memory:x}"
                    ));
                    self.finish(Ok(StopReason::EngineFailed));
                    return Ok(());
                }
                self.finish(Ok(recording::reason(reason)));
                true
            }
        };
        self.event(VmEvent::Replayed {
            position: turns.position(),
            compared,
        });
        Ok(())
    }

    fn finish(&mut self, result: Result<StopReason, ProcessError>) {
        // The first reason counts: what follows it is the machine falling down.
        let first = self.links.end.take();
        let result = match (first, result) {
            (Some(first), _) => first,
            (None, Ok(reason)) => self
                .machine
                .close_recording(reason)
                .map(|()| reason)
                .map_err(ProcessError::from),
            (None, Err(error)) => Err(error),
        };
        self.links.end.set(Some(result));
    }

    fn tell(&self, message: &FromVm) {
        // A supervisor that is gone is noticed where its messages are read.
        let _ = self.links.channel.send(message, Attachments::default());
    }

    fn event(&self, event: VmEvent) {
        self.tell(&FromVm::Event(event));
    }

    fn warn(&self, message: String) {
        self.event(VmEvent::Warning { message });
    }

    fn act_on(&mut self, notice: Notice) {
        match notice {
            Notice::Power(PowerEvent::PowerOff) => self.finish(Ok(StopReason::PowerOff)),
            Notice::Power(PowerEvent::Reset) => match self.config.on_reset {
                OnReset::Reboot => self.reset(ResetCause::Guest),
                OnReset::Stop => self.finish(Ok(StopReason::Reset)),
            },
            Notice::Power(PowerEvent::GuestPanicked | PowerEvent::CrashLoaded) => {
                self.event(VmEvent::GuestPanicked);
                if self.config.on_panic == OnPanic::Stop {
                    self.finish(Ok(StopReason::GuestPanicked));
                }
            }
            Notice::Power(PowerEvent::GuestShutdown) => {}
            Notice::VcpuEnd(end) => match (end.cause, self.config.on_reset) {
                (EndCause::TripleFault, OnReset::Reboot) => self.reset(ResetCause::TripleFault),
                (EndCause::Recorded, _) => {
                    let done = self.follow_recording();
                    done.unwrap_or_else(|error| self.finish(Err(error.into())));
                }
                (EndCause::Debug, _) => {
                    let stopped = self.debugger.stopped(&mut self.machine, end.index);
                    stopped.unwrap_or_else(|error| self.finish(Err(error.into())));
                }
                (EndCause::TripleFault, OnReset::Stop) => {
                    self.finish(Ok(StopReason::TripleFault));
                }
                (EndCause::Failed(reason), _) => {
                    self.warn(format!("vCPU {}: {reason}", end.index));
                    self.finish(Ok(StopReason::EngineFailed));
                }
            },
            Notice::Debug(call) => {
                if let Err(reason) = self.debugger.execute(&mut self.machine, call) {
                    self.warn(format!("the debugger's wish: {reason}"));
                }
            }
            Notice::NeedBackend { device, reason } => {
                if !self.lost.contains(&device) {
                    self.event(VmEvent::BackendLost {
                        device: device.clone(),
                        reason,
                    });
                    self.lost.push(device.clone());
                }
                self.tell(&FromVm::NeedBackend { device });
            }
        }
    }

    fn reset(&mut self, cause: ResetCause) {
        self.event(VmEvent::Reset { cause });
        match self.machine.reset(cause) {
            Ok(booted) => {
                self.resets += 1;
                // What was asked of the machine before its reset concerns the machine before it.
                self.links
                    .mailbox
                    .take()
                    .into_iter()
                    .for_each(|notice| match notice {
                        Notice::Power(_) | Notice::VcpuEnd(_) => {}
                        notice => self.act_on(notice),
                    });
                self.event(booted.into());
                if !self.debugger.holds() {
                    self.machine.run();
                    self.event(VmEvent::Running);
                }
            }
            Err(error) => self.finish(Err(error.into())),
        }
    }

    fn hear_supervisor(&mut self) {
        match self.links.channel.receive::<ToVm>() {
            Ok(Some((message, mut fds))) => {
                if let Err(error) = self.obey(message, &mut fds) {
                    self.warn(format!("the supervisor's message: {error}"));
                }
            }
            // Without a supervisor there is no console, no disk and nobody who would know.
            Ok(None) => self.finish(Ok(StopReason::Stopped)),
            Err(error) => self.finish(Err(error.into())),
        }
    }

    fn obey(&mut self, message: ToVm, fds: &mut Received) -> std::io::Result<()> {
        match message {
            ToVm::Start(_) => self.warn("a machine starts only once".to_owned()),
            ToVm::Backend { device, socket } => {
                let stream = UnixStream::from(fds.take(socket)?);
                self.reconnect(device, stream);
            }
            ToVm::TerminalSize { columns, rows } => {
                if let Some(console) = &self.handles.console {
                    lock(console).resize(columns, rows);
                }
            }
            ToVm::PowerButton | ToVm::Reset if self.replays() => {
                self.warn(REPLAYS.to_owned());
            }
            ToVm::PowerButton => self.press_power_button(),
            ToVm::Reset => self.reset(ResetCause::Control),
            ToVm::Stop => self.finish(Ok(StopReason::Stopped)),
        }
        Ok(())
    }

    fn press_power_button(&self) {
        if !lock(&self.handles.power).press_power_button() {
            self.warn("the guest does not listen to its power button (yet)".to_owned());
        }
    }

    fn reconnect(&mut self, name: String, stream: UnixStream) {
        let connected = match self.handles.backends.get(&name) {
            None => return self.warn(format!("there is no device '{name}' to connect")),
            Some(BackendDevice::Block(block)) => {
                let mut block = lock(block);
                block.reconnect(stream);
                block.is_connected()
            }
            Some(BackendDevice::Net(net)) => {
                let mut net = lock(net);
                net.reconnect(stream);
                net.is_connected()
            }
        };
        if connected {
            self.lost.retain(|lost| *lost != name);
            self.event(VmEvent::BackendRestored { device: name });
        }
    }

    /// Does what a client asks. The answer to a stop is sent before the machine falls.
    fn execute(&mut self, command: &Command) -> Result<Answer, (ErrorCode, String)> {
        if self.replays()
            && matches!(
                command,
                Command::Reset | Command::PowerButton | Command::Balloon { .. }
            )
        {
            return Err((ErrorCode::Failed, REPLAYS.to_owned()));
        }
        let failed = |error: super::machine::MachineError| (ErrorCode::Failed, error.to_string());
        match command {
            Command::State => return Ok(Answer::State(self.state())),
            Command::Counters => {
                return Ok(Answer::Counters {
                    counters: self.counters(),
                });
            }
            Command::Pause => {
                if self.machine.is_running() {
                    self.machine.pause().map_err(failed)?;
                    self.event(VmEvent::Paused);
                }
            }
            Command::Resume if self.debugger.holds() => {
                let message = "a debugger holds the machine: let it continue or detach there";
                return Err((ErrorCode::Held, message.to_owned()));
            }
            Command::Resume => {
                if !self.machine.is_running() {
                    self.machine.resume().map_err(failed)?;
                    self.event(VmEvent::Running);
                }
            }
            Command::Reset => self.reset(ResetCause::Control),
            Command::PowerButton => self.press_power_button(),
            Command::Balloon { target } => {
                let Some(balloon) = &self.handles.balloon else {
                    let message = "the machine has no balloon".to_owned();
                    return Err((ErrorCode::NoDevice, message));
                };
                lock(balloon).set_target(Bytes(*target));
            }
            Command::Stop => self.finish(Ok(StopReason::Stopped)),
        }
        Ok(Answer::Done {})
    }

    fn state(&self) -> VmState {
        let running = self.machine.is_running();
        VmState {
            state: if running {
                RunState::Running
            } else {
                RunState::Paused
            },
            vcpus: self.config.vcpus,
            memory: self.config.memory.0,
            engine: self.machine.engine.name().to_owned(),
            cpu_profile: self.config.cpu_profile.to_string(),
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::from([
            ("resets".to_owned(), self.resets),
            (
                "unclaimed_port_accesses".to_owned(),
                self.buses.ports.unclaimed_accesses(),
            ),
            (
                "unclaimed_memory_accesses".to_owned(),
                self.buses.memory.unclaimed_accesses(),
            ),
            (
                "unknown_msr_accesses".to_owned(),
                self.machine.engine.unknown_msr_accesses(),
            ),
        ]);
        if let Some(serial) = &self.handles.serial {
            counters.insert(
                "serial0.lost_output_bytes".to_owned(),
                lock(serial).lost_output(),
            );
        }
        if let Some(balloon) = &self.handles.balloon {
            let mut balloon = lock(balloon);
            counters.insert("balloon0.target_bytes".to_owned(), balloon.target().0);
            counters.insert("balloon0.actual_bytes".to_owned(), balloon.actual().0);
            for (name, value) in balloon.stats().iter() {
                counters.insert(format!("balloon0.{name}"), value);
            }
            // The guest answers in its own time: the next reading shows it.
            balloon.request_stats();
        }
        counters
    }

    fn serve(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(server) = &mut self.links.server else {
            return;
        };
        if fd == server.listener().as_raw_fd() {
            if let Some(client) = server.accept()
                && ops.add(Events::new_raw(client, EventSet::IN)).is_err()
            {
                server.close(client);
            }
            return;
        }
        let Incoming::Requests(requests) = server.read(fd) else {
            return self.hang_up(fd, ops);
        };
        for request in requests {
            let response = match request {
                Ok(Request { id, command }) => match self.execute(&command) {
                    Ok(answer) => Response::ok(id, answer),
                    Err((code, message)) => Response::error(id, code, message),
                },
                Err(response) => *response,
            };
            let heard = self
                .links
                .server
                .as_mut()
                .is_some_and(|server| server.answer(fd, &response));
            if !heard {
                return self.hang_up(fd, ops);
            }
        }
    }

    fn hang_up(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        // Out of the loop before it is closed, so that its number can be used again.
        let _ = ops.remove(Events::empty_raw(fd));
        if let Some(server) = &mut self.links.server {
            server.close(fd);
        }
    }

    /// Names in the log what the guest tried and the machine does not have, each once.
    fn log_unknown(&self) {
        for port in self.buses.ports.take_unclaimed_addresses() {
            self.event(VmEvent::Unclaimed {
                what: "port".to_owned(),
                address: port,
            });
        }
        for address in self.buses.memory.take_unclaimed_addresses() {
            self.event(VmEvent::Unclaimed {
                what: "memory".to_owned(),
                address,
            });
        }
        for msr in self.machine.engine.take_unknown_msrs() {
            self.event(VmEvent::Unclaimed {
                what: "MSR".to_owned(),
                address: msr.into(),
            });
        }
    }
}

impl MutEventSubscriber for Operator {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let listener = self
            .links
            .server
            .as_ref()
            .map(|server| server.listener().as_raw_fd());
        for fd in [
            self.links.mailbox.as_raw_fd(),
            self.links.channel.as_raw_fd(),
        ]
        .into_iter()
        .chain(listener)
        {
            ops.add(Events::new_raw(fd, EventSet::IN))
                .expect("the loop is new and these descriptors are open");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.links.mailbox.as_raw_fd() {
            for notice in self.links.mailbox.take() {
                self.act_on(notice);
            }
        } else if fd == self.links.channel.as_raw_fd() {
            self.hear_supervisor();
        } else {
            self.serve(fd, ops);
        }
        self.log_unknown();
    }
}
