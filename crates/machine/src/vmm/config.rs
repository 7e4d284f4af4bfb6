//! What the supervisor says to a VM process and what it hears from it.

use mica_base::units::Bytes;
use serde::{Deserialize, Serialize};

use super::channel::FdIndex;
use crate::cpu_profile::CpuProfile;
use crate::memory::HugePages;

/// From the supervisor to the VM process.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToVm {
    /// The first message: build this machine and run it.
    Start(Box<VmConfig>),
    /// A new connection to the backend of a device that asked for one.
    Backend {
        /// The device's name.
        device: String,
        /// The connected vhost-user socket.
        socket: FdIndex,
    },
    /// The terminal behind the console has this size now.
    TerminalSize {
        /// Characters in a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Press the power button: the guest may shut down cleanly.
    PowerButton,
    /// Boot again, whatever the guest is doing.
    Reset,
    /// End the VM now, as when the plug is pulled.
    Stop,
}

/// From the VM process to its supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromVm {
    /// Something happened that users may care about.
    Event(VmEvent),
    /// A device lost its backend and waits for a [`ToVm::Backend`].
    NeedBackend {
        /// The device's name.
        device: String,
    },
    /// The VM cannot start or go on; the process ends.
    Failed {
        /// What failed, on what, and what to do.
        error: String,
    },
}

/// An event in the life of a VM, as `mica run -o json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum VmEvent {
    /// The process has given up its rights.
    Jailed {
        /// What Landlock enforces: `full`, `partial` or `none`.
        landlock: String,
        /// The system calls left.
        system_calls: usize,
    },
    /// A kernel is in memory.
    Booting {
        /// `pvh` or `linux64`.
        protocol: String,
        /// The boot entry's title, where a disk offered one.
        #[serde(skip_serializing_if = "Option::is_none")]
        entry: Option<String>,
        /// The command line as the kernel gets it.
        cmdline: String,
    },
    /// The vCPUs run, after start, resume or reset.
    Running,
    /// The vCPUs stand still on request.
    Paused,
    /// The guest asked for a reset or faulted thrice; it boots again.
    Reset {
        /// Why.
        cause: ResetCause,
    },
    /// The guest's kernel reports a panic through pvpanic.
    GuestPanicked,
    /// The backend of a device is gone; its requests wait.
    BackendLost {
        /// The device's name.
        device: String,
        /// What happened to it.
        reason: String,
    },
    /// The backend of a device is there again and its requests go on.
    BackendRestored {
        /// The device's name.
        device: String,
    },
    /// The guest used, for the first time, an address or register that the machine does not have.
    Unclaimed {
        /// `port`, `memory` or `MSR`.
        what: String,
        /// Its number.
        address: u64,
    },
    /// Something worth a line in the log.
    Warning {
        /// What.
        message: String,
    },
    /// A replay has come to its recording's end.
    Replayed {
        /// The position there: instructions and what counts as one.
        position: u64,
        /// Whether the recording was closed, so that its end could be compared: vCPUs and RAM were the same.
        compared: bool,
    },
    /// The VM has ended; no event follows.
    Stopped {
        /// How.
        reason: StopReason,
    },
}

/// Why a machine resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCause {
    /// The guest used a reset register or the keyboard controller.
    Guest,
    /// A triple fault.
    TripleFault,
    /// A command on the control socket.
    Control,
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine and the configuration says to stop then.
    Reset,
    /// A triple fault, and the configuration says to stop then.
    TripleFault,
    /// The guest's kernel panicked, and the configuration says to stop then.
    GuestPanicked,
    /// The engine could not execute the guest any further.
    EngineFailed,
    /// The supervisor or the control socket ended it.
    Stopped,
}

/// One machine, complete.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmConfig {
    /// The VM's name, for events and the control socket.
    pub name: String,
    /// Number of vCPUs, 1 to 254.
    pub vcpus: u32,
    /// RAM.
    pub memory: Bytes,
    /// How RAM is backed.
    pub huge_pages: HugePages,
    /// The frozen processor model the guest sees.
    pub cpu_profile: CpuProfile,
    /// What executes the guest.
    pub engine: EngineConfig,
    /// What the guest boots from.
    pub boot: BootConfig,
    /// The far end of the first serial line: a connected stream socket.
    pub serial: Option<FdIndex>,
    /// The far end of a virtio console, the same way.
    pub virtio_console: Option<FdIndex>,
    /// A listening socket for the control protocol.
    pub control: Option<FdIndex>,
    /// Where a debugger reaches the guest.
    pub gdb: Option<GdbConfig>,
    /// Disks, in the order of their PCI slots.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in the order of their PCI slots.
    pub networks: Vec<NetworkConfig>,
    /// The guest's vsock.
    pub vsock: Option<VsockConfig>,
    /// Whether there is a balloon with free-page reporting.
    pub balloon: bool,
    /// Whether there is a PS/2 keyboard.
    pub keyboard: bool,
    /// Whether the VM's life goes into a recording, or comes from one. The engine is the one in software.
    pub recording: Option<RecordingConfig>,
    /// What a reset does.
    pub on_reset: OnReset,
    /// What a guest panic does.
    pub on_panic: OnPanic,
}

/// What executes the guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineConfig {
    /// The host kernel's hypervisor.
    Kvm {
        /// `/dev/kvm`, open for reading and writing.
        device: FdIndex,
    },
    /// The processor in software.
    Soft,
}

/// What a guest boots from. Whatever it is, the jailed process reads it, not the supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootConfig {
    /// A kernel given by hand or by an image.
    Kernel {
        /// bzImage or ELF.
        kernel: FdIndex,
        /// The initial RAM disk.
        initrd: Option<FdIndex>,
        /// The command line.
        cmdline: String,
        /// Nobody writes to the files as long as the VM lives.
        unchanging: bool,
    },
    /// The default boot entry of a disk.
    Disk {
        /// The disk, open for reading.
        disk: FdIndex,
        /// Another entry than the default one, by title or number.
        entry: Option<String>,
        /// A command line in place of the entry's own.
        cmdline: Option<String>,
        /// Put behind the command line.
        append: String,
    },
    /// What the recording has.
    Recording,
}

/// A recording, open.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordingConfig {
    /// An empty file, for writing.
    Record(FdIndex),
    /// A recording from its first byte; the machine has no devices but a serial console.
    Replay(FdIndex),
}

/// GDB's way to the guest.
#[derive(Debug, Serialize, Deserialize)]
pub struct GdbConfig {
    /// A listening socket for GDB's remote protocol.
    pub listener: FdIndex,
    /// Whether the guest waits for a debugger to let it run.
    pub wait: bool,
}

/// A block device with its backend.
#[derive(Debug, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The device's name: `disk0`.
    pub name: String,
    /// A connected vhost-user socket.
    pub backend: FdIndex,
}

/// A network interface with its backend.
#[derive(Debug, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The device's name: `net0`.
    pub name: String,
    /// A connected vhost-user socket.
    pub backend: FdIndex,
    /// The interface's MAC address.
    pub mac: [u8; 6],
}

/// A guest's vsock.
#[derive(Debug, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context identifier, 3 or more.
    pub cid: u32,
    /// A listening socket on which host programs reach the guest.
    pub listener: FdIndex,
    /// A channel of its own on which the VM process sends the number of a host port that the guest
    /// connects to, and hears that number again with a connected socket or none.
    pub dialer: FdIndex,
}

/// What a machine does when its guest resets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// Boot again.
    #[default]
    Reboot,
    /// End the VM.
    Stop,
}

/// What a machine does when its guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnPanic {
    /// Report it and go on: the guest may reboot by itself or write a dump.
    #[default]
    Continue,
    /// End the VM.
    Stop,
}
