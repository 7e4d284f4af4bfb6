//! `mica run`: a host of one VM, in the foreground.
//!
//! The parent serves the disks, carries the console and supervises; its child is the jailed VM
//! process. What the guest boots from is opened here and read there.

mod backend;
mod console;
mod engine;
mod ephemeral;
mod options;
mod recording;
mod report;
mod source;
mod supervisor;
mod terminal;
mod vsock;

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use mica_machine::vmm;
use mica_machine::vmm::channel::{Attachments, Channel};
use mica_machine::vmm::config::{GdbConfig, NetworkConfig, ToVm, VmConfig};

use self::backend::Backends;
use self::console::Console;
pub(crate) use self::options::Options;
use self::options::{ConsoleDevice, ConsoleTarget};
use self::recording::Recording;
use self::report::{Reporter, SupervisorEvent};
use self::source::Source;
use self::supervisor::{Signals, Supervisor};
use self::terminal::RawMode;
use crate::OutputFormat;
use crate::runtime::{self, SocketFile};

/// The first of the user identifiers that VM processes get when Mica is started as root. Nothing
/// else uses numbers of this size, and no two running VMs share one.
const FIRST_VM_USER: u32 = 2_000_000_000;

/// Runs one VM and returns how it ended, as an exit status.
pub(crate) fn run(mut options: Options, output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    // Signals first: from here on an interrupt ends things in order.
    let signals = Signals::take()?;
    // It gets ready while we find out what it has to do; should that fail, it sees our end and goes.
    let (channel, child) = spawn()?;
    let source = Source::resolve(&options)?;
    let recording = Recording::open(&mut options)?;
    let (mut control, name) = control_socket(&options, &source)?;
    let mut engine = engine::choose(options.engine, recording.is_some())?;

    let target = options.console.clone().unwrap_or(match output {
        OutputFormat::Text => ConsoleTarget::Stdio,
        OutputFormat::Json => ConsoleTarget::Off,
    });
    let (console, far_end) = open_console(&target)?;

    let mut backends = Backends::default();
    let mut attachments = Attachments::default();
    let disks = backends.open_disks(&source, &options, &mut attachments)?;
    let networks = networks(&options, &name, &mut backends, &mut attachments)?;
    let (_vsock_file, vsock) = vsock::open(&name, options.vsock, &mut attachments)?.unzip();
    let (_gdb_file, gdb) = gdb_socket(&options, &mut attachments)?.unzip();
    let (mut serial, mut virtio_console) = (None, None);
    if let Some(far_end) = far_end {
        let place = match options.console_device {
            ConsoleDevice::Serial => &mut serial,
            ConsoleDevice::Virtio => &mut virtio_console,
        };
        *place = Some(attachments.attach(far_end));
    }
    let listener = control
        .take_listener()
        .ok_or("the control socket is taken")?;
    let config = VmConfig {
        name: name.clone(),
        vcpus: options.cpus,
        memory: options.memory,
        huge_pages: options.huge_pages,
        cpu_profile: options.cpu_profile,
        engine: engine.config(&mut attachments),
        boot: source.boot_config(&options, &mut attachments)?,
        serial,
        virtio_console,
        control: Some(attachments.attach(listener)),
        gdb,
        disks,
        networks,
        vsock,
        balloon: !options.no_balloon,
        keyboard: options.keyboard,
        recording: recording.map(|recording| recording.config(&mut attachments)),
        on_reset: options.on_reset(),
        on_panic: options.on_panic.into(),
    };

    let raw_mode = (target == ConsoleTarget::Stdio).then(RawMode::enter);
    let raw_mode = raw_mode.transpose()?;
    let raw = raw_mode.as_ref().is_some_and(RawMode::is_raw);
    let reporter = Reporter::new(output, &name, raw);
    reporter.supervisor(&SupervisorEvent::Starting {
        name: name.clone(),
        engine: engine.name.to_owned(),
        reason: engine.reason,
        vcpus: options.cpus,
        memory: options.memory.0,
        control: control.path().display().to_string(),
    });

    channel.send(&ToVm::Start(Box::new(config)), attachments)?;
    let supervisor = Supervisor {
        name,
        child,
        channel,
        signals,
        console,
        backends,
        reporter,
        stop_timeout: Duration::from_secs(options.stop_timeout),
    };
    let reason = supervisor.run();
    drop(raw_mode);
    Ok(report::exit_code(reason?))
}

/// The near end of the guest's console, and the far one if there is any.
fn open_console(target: &ConsoleTarget) -> Result<(Console, Option<UnixStream>), Box<dyn Error>> {
    let (near, far) = match target {
        ConsoleTarget::Off => return Ok((Console::off(), None)),
        ConsoleTarget::Stdio => Console::stdio()?,
        ConsoleTarget::File(path) => Console::file(path)
            .map_err(|error| format!("cannot write the console to {}: {error}", path.display()))?,
    };
    Ok((near, Some(far)))
}

/// The VM process's only argument.
const VM_PROCESS: &str = "vm-process";

/// Whether this process is one that [`spawn`] has started.
pub(crate) fn is_vm_process() -> bool {
    std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == VM_PROCESS)
}

/// The VM process: what `mica run` starts as its child.
pub(crate) fn vm_process() -> ExitCode {
    use std::os::fd::AsFd;
    match rustix::stdio::stdin().as_fd().try_clone_to_owned() {
        Ok(channel) => vmm::run(Channel::from_fd(channel)),
        Err(error) => {
            eprintln!("mica: VM process: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the VM process, whose standard input is its channel.
fn spawn() -> io::Result<(Channel, Child)> {
    let (ours, theirs) = Channel::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("mica-vm").arg(VM_PROCESS).env_clear();
    // Before glibc gives a part of a thread's heap back for the first time, it reads how the kernel
    // overcommits, and in the jail nothing can be opened: it is not to give back.
    command.env("MALLOC_TRIM_THRESHOLD_", i32::MAX.to_string());
    command
        .stdin(Stdio::from(theirs.into_fd()))
        .stdout(Stdio::null());
    // A terminal's Ctrl-C is for the supervisor, who ends the VM in order.
    command.process_group(0);
    if rustix::process::geteuid().is_root() {
        let user = FIRST_VM_USER + std::process::id();
        command.uid(user).gid(user);
    }
    let child = command.spawn().map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot start the VM process: {error}"),
        )
    })?;
    Ok((ours, child))
}

/// The socket for a debugger, which is removed at the end.
fn gdb_socket(
    options: &Options,
    attachments: &mut Attachments,
) -> Result<Option<(SocketFile, GdbConfig)>, Box<dyn Error>> {
    let Some(path) = &options.gdb else {
        return Ok(None);
    };
    let failed = |error: io::Error| format!("GDB's socket {}: {error}", path.display());
    let mut file = SocketFile::bind(path).map_err(failed)?;
    let listener = file.take_listener().ok_or("GDB's socket is taken")?;
    let config = GdbConfig {
        listener: attachments.attach(listener),
        wait: options.gdb_wait,
    };
    Ok(Some((file, config)))
}

/// The control socket and the name it gives the VM: as asked for, or the first one that is free.
fn control_socket(
    options: &Options,
    source: &Source,
) -> Result<(SocketFile, String), Box<dyn Error>> {
    let directory = runtime::make_directory()?;
    let bind = |name: &str| SocketFile::bind(&directory.join(format!("{name}.sock")));
    if let Some(name) = &options.name {
        check_name(name)?;
        return match bind(name) {
            Ok(socket) => Ok((socket, name.clone())),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(format!("a VM called '{name}' is running; see 'mica vm list'").into())
            }
            Err(error) => Err(format!("control socket of '{name}': {error}").into()),
        };
    }
    let base = source.name();
    for number in 1..=1000 {
        let name = if number == 1 {
            base.clone()
        } else {
            format!("{base}-{number}")
        };
        match bind(&name) {
            Ok(socket) => return Ok((socket, name)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(format!("control socket of '{name}': {error}").into()),
        }
    }
    Err(format!("a thousand VMs called '{base}' are running; give this one a --name").into())
}

fn check_name(name: &str) -> Result<(), String> {
    let fits = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !name.starts_with('.');
    if fits {
        return Ok(());
    }
    Err(format!(
        "'{name}' is no name for a VM; use up to 64 letters, digits, '-', '_' and '.'"
    ))
}

fn networks(
    options: &Options,
    name: &str,
    backends: &mut Backends,
    attachments: &mut Attachments,
) -> Result<Vec<NetworkConfig>, Box<dyn Error>> {
    let mut networks = Vec::new();
    for (number, spec) in options.networks.iter().enumerate() {
        let device = format!("net{number}");
        let stream = backends.add_socket(&device, &spec.socket)?;
        networks.push(NetworkConfig {
            backend: attachments.attach(stream),
            mac: spec.mac.unwrap_or_else(|| made_up_mac(name, number)),
            name: device,
        });
    }
    Ok(networks)
}

/// A locally administered address that stays the same for the same VM and interface.
fn made_up_mac(name: &str, number: usize) -> [u8; 6] {
    // FNV-1a: spreads names well enough, and is the same in every build.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in name.bytes().chain([0, number as u8]) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    let bytes = hash.to_be_bytes();
    [0x52, 0x54, bytes[0], bytes[1], bytes[2], bytes[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_addresses_are_individual_local_and_distinct() {
        let mut seen = std::collections::HashSet::new();
        for name in ["tiny", "tiny-2", "debian"] {
            for number in 0..4 {
                let mac = made_up_mac(name, number);
                assert_eq!(mac[0] & 3, 2, "individual and locally administered");
                assert!(seen.insert(mac));
                assert_eq!(mac, made_up_mac(name, number));
            }
        }
    }

    #[test]
    fn names_are_safe_as_file_names() {
        for name in ["tiny", "web-1.example", "a_b"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "..", "a/b", ".hidden", "späti", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
