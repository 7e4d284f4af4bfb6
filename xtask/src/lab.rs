//! The KVM lab: a Debian kernel with a real `kvm-amd` on a machine that need not have KVM.
//!
//! QEMU's software CPU offers SVM with nested paging (`-cpu max`). The lab boots Debian's cloud
//! kernel on it with an initramfs of busybox, the modules and our binary, runs one shell command,
//! and returns its output and exit status. Nothing outlives it: disks are snapshots, the file
//! system is memory.
//!
//! ```no_run
//! # fn main() -> xtask::error::Result<()> {
//! let outcome = xtask::lab::Lab::new()
//!     .file("target/x86_64-unknown-linux-gnu/debug/mica", "/usr/bin/mica")
//!     .file("vmlinuz", "/guest/vmlinuz")
//!     .run("mica run --kernel /guest/vmlinuz")?;
//! assert_eq!(outcome.status, 0, "{}", outcome.output);
//! # Ok(()) }
//! ```
//!
//! Inside, KVM is correct but slow: an exit to user space costs tens of microseconds. Deadlines
//! of tests should be generous and their guests small.

pub mod initramfs;
mod kernel;

pub use kernel::Kernel;

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Error, Result, output_of};
use crate::session::{self, Channel, Echo, Launch, Outcome, Session, Turn};
use initramfs::Archive;

/// Files up to this size go into the initramfs, larger ones onto the shared disk. The initramfs
/// costs guest memory twice while it is unpacked.
const INITRAMFS_FILE_BYTES: u64 = 48 << 20;

/// What every lab loads: KVM and the way to the lab's own disk and channels.
const MODULES: [&str; 4] = ["kvm-amd", "virtio_pci", "virtio_console", "virtio_blk"];

/// Mitigations protect nobody here and cost exits; the rest saves calibration time.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 \
     no_timer_check random.trust_cpu=on tsc=reliable";

/// [`COMMAND_LINE`], and how fast the emulated time-stamp counter runs: as fast as the host's. On a
/// busy host the lab's kernel would measure it wrong and have a clock several times too fast.
fn command_line() -> String {
    let tsc_khz = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("bogomips"))?;
            // Linux derives this figure from the counter's frequency: two for each cycle.
            let bogomips: f64 = line.split_once(':')?.1.trim().parse().ok()?;
            Some((bogomips * 500.0) as u64)
        });
    match tsc_khz {
        Some(khz) => format!("{COMMAND_LINE} tsc_early_khz={khz}"),
        None => COMMAND_LINE.to_owned(),
    }
}

/// A lab to be started.
#[derive(Clone, Debug)]
pub struct Lab {
    memory_mib: u32,
    cpus: u32,
    timeout: Duration,
    files: Vec<(PathBuf, String)>,
    disks: Vec<PathBuf>,
    modules: Vec<String>,
    echo: Echo,
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// Two CPUs, 3 GiB and 300 seconds.
    #[must_use]
    pub fn new() -> Lab {
        Lab {
            memory_mib: 3072,
            cpus: 2,
            timeout: Duration::from_secs(300),
            files: Vec::new(),
            disks: Vec::new(),
            modules: Vec::new(),
            echo: Echo::Nothing,
        }
    }

    /// Puts a copy of `source`, a file or a folder, at the absolute path `destination`, with its
    /// permission to be executed.
    #[must_use]
    pub fn file(mut self, source: impl Into<PathBuf>, destination: impl Into<String>) -> Lab {
        self.files.push((source.into(), destination.into()));
        self
    }

    /// Attaches a raw disk image; the first is `/dev/vdb`. What is written is thrown away.
    #[must_use]
    pub fn disk(mut self, image: impl Into<PathBuf>) -> Lab {
        self.disks.push(image.into());
        self
    }

    /// Loads one more of the kernel's modules, with what it needs.
    #[must_use]
    pub fn module(mut self, name: impl Into<String>) -> Lab {
        self.modules.push(name.into());
        self
    }

    /// The lab's memory, in MiB; its guests' memory comes out of it.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Lab {
        self.memory_mib = mib;
        self
    }

    /// The number of the lab's CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Lab {
        self.cpus = cpus;
        self
    }

    /// When the whole session, boot included, is given up.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Lab {
        self.timeout = timeout;
        self
    }

    /// What of the command's output is copied to our own as it comes.
    #[must_use]
    pub fn echo(mut self, echo: Echo) -> Lab {
        self.echo = echo;
        self
    }

    /// Runs a shell command to its end, its standard input at end of file.
    ///
    /// # Errors
    ///
    /// The lab cannot be built, its kernel dies, or the deadline passes. A command that fails is no
    /// error: see [`Outcome::status`].
    pub fn run(&self, command: &str) -> Result<Outcome> {
        self.launch(command, false)?.finish()
    }

    /// Starts a shell command whose standard input is [`Session::send`]. Waits until no other lab
    /// or guest runs on this machine.
    ///
    /// # Errors
    ///
    /// The lab cannot be built.
    pub fn start(&self, command: &str) -> Result<Session> {
        self.launch(command, true)
    }

    fn launch(&self, command: &str, input: bool) -> Result<Session> {
        let kernel = Kernel::fetch()?;
        let turn = Turn::exclusive()?;
        let directory = tempfile::tempdir().map_err(Error::io("create a temporary directory"))?;
        let share = self.build_share(directory.path())?;
        let initramfs = directory.path().join("initramfs");
        self.build_initramfs(&kernel, command, input, &initramfs)
            .map_err(|error| Error::Other(format!("building the lab's initramfs: {error}")))?;

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args([
                "-m",
                &format!("{}M", self.memory_mib),
                "-smp",
                &self.cpus.to_string(),
            ])
            .arg("-kernel")
            .arg(kernel.image())
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", &command_line()]);
        let channels = [
            Channel::Output,
            Channel::Error,
            Channel::Control,
            Channel::Console,
        ];
        for channel in channels {
            qemu.args(session::chardev(directory.path(), channel));
        }
        qemu.args(["-serial", "chardev:console", "-device", "virtio-serial-pci"]);
        for channel in &channels[..3] {
            let name = channel.name();
            qemu.args([
                "-device",
                &format!("virtserialport,chardev={name},name={name}"),
            ]);
        }
        for (index, disk) in std::iter::once(&share).chain(&self.disks).enumerate() {
            let path = disk.display();
            qemu.args([
                "-drive",
                &format!("if=none,id=disk{index},format=raw,snapshot=on,file={path}"),
            ])
            .args(["-device", &format!("virtio-blk-pci,drive=disk{index}")]);
        }
        Session::launch(Launch {
            name: "KVM lab",
            command: qemu,
            channels: channels.into(),
            directory,
            timeout: self.timeout,
            echo: self.echo,
            turn,
        })
    }

    /// What is too large for the initramfs, and whole folders, on a file system of its own.
    fn build_share(&self, directory: &Path) -> Result<PathBuf> {
        let content = directory.join("share");
        fs::create_dir(&content).map_err(Error::file("create", &content))?;
        for (index, (source, _)) in self.shared_files() {
            let copy = content.join(index.to_string());
            // `cp` keeps holes and links; a link of ours would not survive mke2fs.
            output_of(
                Command::new("cp")
                    .args(["-a", "-L", "--sparse=always"])
                    .arg(source)
                    .arg(&copy),
                "coreutils",
            )?;
        }
        let image = directory.join("share.img");
        let size = output_of(Command::new("du").args(["-sk"]).arg(&content), "coreutils")?;
        let kib: u64 = size
            .split_whitespace()
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        // An eighth for the file system's own structures.
        let blocks = format!("{}k", kib + kib / 8 + 4096);
        output_of(
            Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
                .arg(&content)
                .arg(&image)
                .arg(blocks),
            "e2fsprogs",
        )?;
        Ok(image)
    }

    fn shared_files(&self) -> impl Iterator<Item = (usize, &(PathBuf, String))> {
        self.files.iter().enumerate().filter(|(_, (source, _))| {
            fs::metadata(source)
                .is_ok_and(|metadata| metadata.is_dir() || metadata.len() > INITRAMFS_FILE_BYTES)
        })
    }

    fn build_initramfs(
        &self,
        kernel: &Kernel,
        command: &str,
        input: bool,
        path: &Path,
    ) -> Result<()> {
        let create = File::create(path).map_err(Error::file("create", path))?;
        let write = || Error::file("write", path);
        let mut archive = Archive::new(BufWriter::new(create));
        for directory in [
            "proc", "sys", "dev", "run", "tmp", "root", "mnt", "share", "usr/bin", "var/lib",
        ] {
            archive.directory(directory).map_err(write())?;
        }
        archive.console().map_err(write())?;
        let init = include_bytes!("lab/init.sh");
        archive.file("init", true, init).map_err(write())?;
        archive
            .file("etc/lab/command", false, command.as_bytes())
            .map_err(write())?;
        archive
            .file("etc/passwd", false, b"root:x:0:0:root:/root:/bin/sh\n")
            .map_err(write())?;
        archive
            .file("etc/group", false, b"root:x:0:\n")
            .map_err(write())?;
        let settings = format!(
            "LAB_TIMEOUT_S={}\nLAB_INPUT={}\n",
            self.timeout.as_secs() + 30,
            if input { "yes" } else { "" }
        );
        archive
            .file("etc/lab/settings", false, settings.as_bytes())
            .map_err(write())?;

        let wanted: Vec<&str> = MODULES
            .into_iter()
            .chain(self.modules.iter().map(String::as_str))
            .collect();
        for (index, file) in kernel.modules(&wanted)?.iter().enumerate() {
            let data = fs::read(file).map_err(Error::file("read", file))?;
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            archive
                .file(
                    &format!("etc/lab/modules/{index:02}-{stem}.ko"),
                    false,
                    &data,
                )
                .map_err(write())?;
        }
        self.add_files(kernel, &mut archive, path)?;
        archive.finish().map_err(write())?;
        Ok(())
    }

    fn add_files(
        &self,
        kernel: &Kernel,
        archive: &mut Archive<BufWriter<File>>,
        path: &Path,
    ) -> Result<()> {
        let busybox = kernel.busybox();
        let data = fs::read(&busybox).map_err(Error::file("read", &busybox))?;
        archive
            .file("bin/busybox", true, &data)
            .map_err(Error::file("write", path))?;
        let shared: Vec<usize> = self.shared_files().map(|(index, _)| index).collect();
        let mut links = String::new();
        for (index, (source, destination)) in self.files.iter().enumerate() {
            if shared.contains(&index) {
                let parent = Path::new(destination).parent().unwrap_or(Path::new("/"));
                archive
                    .directory(&parent.to_string_lossy())
                    .map_err(Error::file("write", path))?;
                links.push_str(&format!("ln -s /share/{index} {}\n", quoted(destination)));
                continue;
            }
            let read = || Error::file("read", source);
            let data = fs::read(source).map_err(read())?;
            let mode = fs::metadata(source).map_err(read())?.permissions().mode();
            archive
                .file(destination, mode & 0o111 != 0, &data)
                .map_err(Error::file("write", path))?;
        }
        archive
            .file("etc/lab/links", false, links.as_bytes())
            .map_err(Error::file("write", path))
    }
}

/// A word for the shell.
#[must_use]
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests;
