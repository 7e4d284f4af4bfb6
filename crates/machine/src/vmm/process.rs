//! The VM process's main thread: from the first message to the last event.

use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use super::assemble::{AssembleError, assemble};
use super::channel::{Attachments, Channel, Received};
use super::config::{EngineConfig, FromVm, StopReason, ToVm, VmConfig, VmEvent};
use super::gdb;
use super::jail::{self, JailError};
use super::machine::MachineError;
use super::notice::Mailbox;
use super::operate::{End, Links, Operator};
use super::server::Server;
use crate::kvm;

/// Why the process ends without having run its guest to an end.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProcessError {
    #[error("the supervisor's channel: {0}")]
    Channel(#[from] std::io::Error),
    #[error("the supervisor did not start the machine")]
    NoStart,
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the event loop: {0}")]
    EventLoop(#[from] event_manager::Error),
}

/// Runs a VM process to its end: `channel` leads to its supervisor, which speaks first.
///
/// The exit status says nothing about the guest; the last message on the channel does.
#[must_use]
pub fn run(channel: Channel) -> ExitCode {
    // A panic on any thread ends the VM: what the thread guarded can no longer be trusted. There is
    // no backtrace, since in the jail nothing can be opened that it would be made from.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("mica: VM process: {panic}");
        std::process::exit(101);
    }));
    let channel = Rc::new(channel);
    let message = match run_machine(&channel) {
        Ok(reason) => FromVm::Event(VmEvent::Stopped { reason }),
        Err(error) => FromVm::Failed {
            error: error.to_string(),
        },
    };
    // A supervisor that is gone has nobody to tell.
    let _ = channel.send(&message, Attachments::default());
    ExitCode::SUCCESS
}

fn run_machine(channel: &Rc<Channel>) -> Result<StopReason, ProcessError> {
    let Some((ToVm::Start(config), mut fds)) = channel.receive()? else {
        return Err(ProcessError::NoStart);
    };
    let landlock = jail::close_doors()?;
    let mailbox = Arc::new(Mailbox::new()?);
    let mut assembled = assemble(&config, &mut fds, &mailbox)?;
    let server = open_control(&config, &mut fds)?;
    let gdb = start_gdb(&config, &mut fds, &mailbox)?;
    drop(fds);
    let mut event_loop = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    let ioctls = match config.engine {
        EngineConfig::Kvm { .. } => kvm::RUNTIME_IOCTLS,
        EngineConfig::Soft => &[],
    };
    let system_calls = jail::drop_system_calls(ioctls)?;
    let event = |event| channel.send(&FromVm::Event(event), Attachments::default());
    event(VmEvent::Jailed {
        landlock: landlock.as_str().to_owned(),
        system_calls,
    })?;

    let machine = &mut assembled.machine;
    let booted = machine.boot()?;
    machine.start()?;
    event(booted.into())?;
    if config.gdb.as_ref().is_some_and(|gdb| gdb.wait) {
        event(VmEvent::Paused)?;
    } else {
        machine.run();
        event(VmEvent::Running)?;
    }
    // Debuggers are served from here on.
    drop(gdb);

    let serial = assembled.handles.serial.clone();
    for subscriber in std::mem::take(&mut assembled.subscribers) {
        event_loop.add_subscriber(Box::new(subscriber));
    }
    let end = End::default();
    let links = Links {
        mailbox,
        channel: Rc::clone(channel),
        server,
        end: Rc::clone(&end),
    };
    event_loop.add_subscriber(Box::new(Operator::new(*config, assembled, links)));
    let reason = loop {
        event_loop.run()?;
        if let Some(end) = end.take() {
            break end;
        }
    };
    if let Some(serial) = serial {
        crate::bus::lock(&serial).finish();
    }
    reason
}

fn open_control(config: &VmConfig, fds: &mut Received) -> Result<Option<Server>, ProcessError> {
    let Some(index) = config.control else {
        return Ok(None);
    };
    let listener = UnixListener::from(fds.take(index)?);
    Ok(Some(Server::new(listener, &config.name)?))
}

/// The thread that serves debuggers, which waits until what this returns is dropped.
fn start_gdb(
    config: &VmConfig,
    fds: &mut Received,
    mailbox: &Arc<Mailbox>,
) -> Result<Option<Sender<()>>, ProcessError> {
    let Some(gdb) = &config.gdb else {
        return Ok(None);
    };
    let listener = UnixListener::from(fds.take(gdb.listener)?);
    let started = gdb::start(listener, config.vcpus, Arc::clone(mailbox))?;
    Ok(Some(started))
}
