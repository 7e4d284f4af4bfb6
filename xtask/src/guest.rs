//! A guest in plain QEMU without KVM: the peer of our vhost-user backends.
//!
//! ```no_run
//! use std::time::Duration;
//! # fn main() -> xtask::error::Result<()> {
//! let mut session = xtask::guest::Guest::new()
//!     .memory_mib(256)
//!     .kernel("vmlinuz", Some("initrd".as_ref()), "console=ttyS0")
//!     .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-numa", "node,memdev=ram"])
//!     .args(["-chardev", "socket,id=disk,path=disk.sock,reconnect=1"])
//!     .args(["-device", "vhost-user-blk-pci,chardev=disk"])
//!     .start()?;
//! session.expect("login:", Duration::from_secs(120))?;
//! # Ok(()) }
//! ```

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::session::{self, Channel, Echo, Launch, Session, Turn};

/// A guest to be started.
#[derive(Clone, Debug)]
pub struct Guest {
    cpus: u32,
    memory_mib: u32,
    timeout: Duration,
    arguments: Vec<OsString>,
    echo: Echo,
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// Two CPUs, 512 MiB and 300 seconds; nothing to boot from yet.
    #[must_use]
    pub fn new() -> Guest {
        Guest {
            cpus: 2,
            memory_mib: 512,
            timeout: Duration::from_secs(300),
            arguments: Vec::new(),
            echo: Echo::Nothing,
        }
    }

    /// The number of virtual CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Guest {
        self.cpus = cpus;
        self
    }

    /// Guest memory in MiB. A memory backend given by [`Guest::args`] must have the same size.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Guest {
        self.memory_mib = mib;
        self
    }

    /// When the whole session is given up.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Guest {
        self.timeout = timeout;
        self
    }

    /// Boots this kernel.
    #[must_use]
    pub fn kernel(self, kernel: impl AsRef<Path>, initrd: Option<&Path>, cmdline: &str) -> Guest {
        let mut guest = self.args(["-kernel".as_ref(), kernel.as_ref().as_os_str()]);
        if let Some(initrd) = initrd {
            guest = guest.args(["-initrd".as_ref(), initrd.as_os_str()]);
        }
        guest.args(["-append", cmdline])
    }

    /// Attaches a raw disk image over virtio; what the guest writes is thrown away.
    #[must_use]
    pub fn disk(self, image: impl Into<PathBuf>) -> Guest {
        let drive = format!(
            "if=virtio,format=raw,snapshot=on,file={}",
            image.into().display()
        );
        self.args(["-drive", &drive])
    }

    /// More arguments for QEMU.
    #[must_use]
    pub fn args<S: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = S>) -> Guest {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Whether the serial line is shown on our standard output as well.
    #[must_use]
    pub fn echo(mut self, echo: Echo) -> Guest {
        self.echo = echo;
        self
    }

    /// Starts it; the session is its first serial line. Waits while a lab runs on this machine.
    ///
    /// # Errors
    ///
    /// QEMU is missing or refuses its arguments.
    pub fn start(&self) -> Result<Session> {
        let turn = Turn::shared()?;
        let directory = tempfile::tempdir().map_err(Error::io("create a temporary directory"))?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args([
                "-m",
                &format!("{}M", self.memory_mib),
                "-smp",
                &self.cpus.to_string(),
            ])
            .args(session::chardev(directory.path(), Channel::Output))
            .args(["-serial", "chardev:output"])
            .args(&self.arguments);
        Session::launch(Launch {
            name: "guest",
            command,
            channels: vec![Channel::Output],
            directory,
            timeout: self.timeout,
            echo: self.echo,
            turn,
        })
    }
}
