//! The options of `mica run` and what they mean together.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use mica_base::units::Bytes;
use mica_machine::cpu_profile::CpuProfile;
use mica_machine::memory::HugePages;
use mica_machine::vmm::config::{OnPanic, OnReset};

/// Run one VM in the foreground.
///
/// What to run is an image's name (see `mica image list`), a disk image or block device that holds
/// a kernel and its boot entries, or a kernel given with --kernel.
///
/// Exit status: 0 the guest powered off, 1 Mica failed, 2 wrong usage, 3 stopped from outside,
/// 4 the guest reset and --no-reboot was given, 5 triple fault and --no-reboot was given,
/// 6 the guest panicked and --on-panic stop was given, 7 the engine failed, or a replay went another
/// way than its recording.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// An image's name, or the path of a bootable disk image or block device.
    #[arg(required_unless_present_any = ["kernel", "replay"])]
    pub(crate) image: Option<String>,

    /// The kernel to boot: bzImage or ELF.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// The initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,

    /// The kernel's whole command line, in place of the image's or the boot entry's.
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,

    /// Put behind the kernel's command line.
    #[arg(long, value_name = "TEXT")]
    pub(crate) append: Option<String>,

    /// Another boot entry of the disk than its default, by title or number.
    #[arg(long, value_name = "ENTRY", conflicts_with = "kernel")]
    pub(crate) boot_entry: Option<String>,

    /// Number of vCPUs, 1 to 254.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    pub(crate) cpus: u32,

    /// RAM, for example 512M or 2G.
    #[arg(short, long, default_value = "512M")]
    pub(crate) memory: Bytes,

    /// How RAM is backed: transparent huge pages as far as the host's kernel has them, or only small
    /// ones, or reserved ones.
    #[arg(long, value_name = "PAGES", default_value = "transparent", value_parser = huge_pages())]
    pub(crate) huge_pages: HugePages,

    /// A disk: a raw image or block device, or vhost-user:SOCKET for one that another process
    /// serves. Behind a file: ,ro for read-only, ,direct to bypass the host's page cache.
    #[arg(long = "disk", value_name = "DISK")]
    pub(crate) disks: Vec<DiskSpec>,

    /// A network interface, served by another process: vhost-user:SOCKET[,mac=XX:XX:XX:XX:XX:XX].
    #[arg(long = "net", value_name = "NET")]
    pub(crate) networks: Vec<NetworkSpec>,

    /// Work on a copy of the image's disk that is thrown away at the end.
    #[arg(long)]
    pub(crate) ephemeral: bool,

    /// What executes the guest.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) engine: EngineChoice,

    /// A socket that mica makes here for GDB: target remote PATH.
    #[arg(long, value_name = "PATH")]
    pub(crate) gdb: Option<PathBuf>,

    /// With --gdb: the guest waits for a debugger to let it run.
    #[arg(long, requires = "gdb")]
    pub(crate) gdb_wait: bool,

    /// Run on the processor in software, one vCPU at a time, by the count of instructions, and write
    /// everything that reaches the guest from outside to a new file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["networks", "gdb"])]
    pub(crate) record: Option<PathBuf>,

    /// Run once more what was recorded, bit for bit, without its disks and devices.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "record", "image", "kernel", "cmdline", "append", "disks", "networks", "ephemeral", "vsock",
        "cpus", "memory", "cpu_profile", "engine", "gdb", "console_device", "keyboard", "no_balloon",
    ])]
    pub(crate) replay: Option<PathBuf>,

    /// The processor the guest sees.
    #[arg(long, value_name = "PROFILE", default_value_t, value_parser = cpu_profiles())]
    pub(crate) cpu_profile: CpuProfile,

    /// Where the console goes: stdio, off, or file:PATH for output alone. With -o json it is off
    /// unless given.
    #[arg(long, value_name = "WHERE")]
    pub(crate) console: Option<ConsoleTarget>,

    /// Which device the console is.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) console_device: ConsoleDevice,

    /// Give the guest a vsock with this context identifier (3 or more); host programs reach it at
    /// NAME.vsock beside the control socket.
    #[arg(long, value_name = "CID", value_parser = clap::value_parser!(u32).range(3..))]
    pub(crate) vsock: Option<u32>,

    /// Leave out the memory balloon.
    #[arg(long)]
    pub(crate) no_balloon: bool,

    /// Give the guest a PS/2 keyboard. Without one it boots faster.
    #[arg(long)]
    pub(crate) keyboard: bool,

    /// The VM's name; by default the image's.
    #[arg(long)]
    pub(crate) name: Option<String>,

    /// End the VM when the guest resets it.
    #[arg(long)]
    pub(crate) no_reboot: bool,

    /// What happens when the guest's kernel panics.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) on_panic: PanicAction,

    /// How long the guest may take to shut down after SIGTERM or SIGINT before it is stopped.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) stop_timeout: u64,
}

/// The profiles' names, from the machine that knows them.
fn cpu_profiles() -> impl TypedValueParser<Value = CpuProfile> {
    PossibleValuesParser::new(CpuProfile::ALL.map(CpuProfile::name))
        .try_map(|name| name.parse::<CpuProfile>())
}

fn huge_pages() -> impl TypedValueParser<Value = HugePages> {
    PossibleValuesParser::new(["none", "transparent", "2M", "1G"]).map(|name| match name.as_str() {
        "transparent" => HugePages::Transparent,
        "2M" => HugePages::Size2M,
        "1G" => HugePages::Size1G,
        _ => HugePages::None,
    })
}

impl Options {
    /// What a reset does.
    pub(crate) fn on_reset(&self) -> OnReset {
        if self.no_reboot {
            OnReset::Stop
        } else {
            OnReset::Reboot
        }
    }
}

/// What executes the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum EngineChoice {
    /// The best that works on this host.
    #[default]
    Auto,
    /// The host kernel's hypervisor.
    Kvm,
    /// The processor in software, which needs nothing of the host.
    Soft,
}

/// Which device the console is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ConsoleDevice {
    /// The first serial line, `ttyS0` in Linux.
    #[default]
    Serial,
    /// A virtio console, `hvc0` in Linux.
    Virtio,
}

/// What happens when the guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PanicAction {
    /// Report it; the guest may reboot by itself.
    #[default]
    Continue,
    /// End the VM.
    Stop,
}

impl From<PanicAction> for OnPanic {
    fn from(action: PanicAction) -> Self {
        match action {
            PanicAction::Continue => Self::Continue,
            PanicAction::Stop => Self::Stop,
        }
    }
}

/// Where the console's bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConsoleTarget {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    Off,
    /// Appended to a file.
    File(PathBuf),
}

impl FromStr for ConsoleTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "off" => Ok(Self::Off),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("write stdio, off, or file:PATH".to_owned()),
        }
    }
}

/// A disk as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DiskSpec {
    /// Served by this process.
    File {
        /// The image or block device.
        path: PathBuf,
        /// The guest cannot write it.
        read_only: bool,
        /// The host's page cache is bypassed.
        direct: bool,
    },
    /// Served by another process at this socket.
    VhostUser(PathBuf),
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(socket) = text.strip_prefix("vhost-user:") {
            return if socket.is_empty() {
                Err("vhost-user: needs a socket's path behind it".to_owned())
            } else {
                Ok(Self::VhostUser(socket.into()))
            };
        }
        let mut path = text;
        let (mut read_only, mut direct) = (false, false);
        while let Some((front, option)) = path.rsplit_once(',') {
            match option {
                "ro" => read_only = true,
                "direct" => direct = true,
                // A comma may be part of the file's name.
                _ => break,
            }
            path = front;
        }
        if path.is_empty() {
            return Err("a disk needs a file's path".to_owned());
        }
        Ok(Self::File {
            path: path.into(),
            read_only,
            direct,
        })
    }
}

/// A network interface as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkSpec {
    /// The socket of the process that serves it.
    pub(crate) socket: PathBuf,
    /// The interface's address; one is made from the VM's name otherwise.
    pub(crate) mac: Option<[u8; 6]>,
}

impl FromStr for NetworkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text
            .strip_prefix("vhost-user:")
            .ok_or("write vhost-user:SOCKET[,mac=ADDRESS]")?;
        let (socket, mac) = match rest.rsplit_once(",mac=") {
            Some((socket, mac)) => (socket, Some(parse_mac(mac)?)),
            None => (rest, None),
        };
        if socket.is_empty() {
            return Err("vhost-user: needs a socket's path behind it".to_owned());
        }
        Ok(Self {
            socket: socket.into(),
            mac,
        })
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            (part.len() == 2)
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
        })
        .collect();
    let mac = bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .ok_or_else(|| format!("'{text}' is no MAC address; write it like 52:54:00:12:34:56"))?;
    if mac[0] & 1 != 0 {
        return Err(format!(
            "'{text}' is a group address; an interface needs an individual one"
        ));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, read_only: bool, direct: bool) -> DiskSpec {
        DiskSpec::File {
            path: path.into(),
            read_only,
            direct,
        }
    }

    #[test]
    fn disks_parse_as_the_help_says() {
        for (text, disk) in [
            ("disk.img", file("disk.img", false, false)),
            ("/dev/vdb,ro", file("/dev/vdb", true, false)),
            ("a,b.img,direct,ro", file("a,b.img", true, true)),
            (
                "vhost-user:/run/d.sock",
                DiskSpec::VhostUser("/run/d.sock".into()),
            ),
        ] {
            assert_eq!(text.parse(), Ok(disk), "{text}");
        }
        for text in ["", ",ro", "vhost-user:"] {
            assert!(text.parse::<DiskSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks_parse_as_the_help_says() {
        let spec = "vhost-user:/run/n.sock,mac=52:54:00:00:00:0a"
            .parse::<NetworkSpec>()
            .unwrap();
        assert_eq!(spec.mac, Some([0x52, 0x54, 0, 0, 0, 10]));
        assert_eq!(spec.socket, PathBuf::from("/run/n.sock"));
        for text in [
            "tap0",
            "vhost-user:",
            "vhost-user:s,mac=1:2",
            "vhost-user:s,mac=01:00:5e:0:0:1",
        ] {
            assert!(text.parse::<NetworkSpec>().is_err(), "{text}");
        }
    }
}
