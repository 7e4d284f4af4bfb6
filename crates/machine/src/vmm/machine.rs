//! A whole machine and its life.
//!
//! ```text
//!            boot, run             pause
//!  ┌───────┐ ─────────▶ ┌─────────┐ ────▶ ┌────────┐
//!  │ built │            │ running │       │ paused │
//!  └───────┘            └─────────┘ ◀──── └────────┘
//!                         ▲     │   run
//!                         └─────┘ reset
//! ```
//!
//! The order of things is fixed here and nowhere else: vCPUs stand still before devices do, and
//! devices work again before vCPUs run.

use std::fs::File;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::config::{ResetCause, StopReason};
use super::recording::{cause_number, reason_number};
use super::vcpus::Vcpus;
use crate::acpi::{self, AcpiConfig, AcpiError};
use crate::boot::disk::{self, BlockRead, Choice};
use crate::boot::{self, BootError, BootFile, Entry, LoadRequest, Loaded};
use crate::device::{Device, DeviceError};
use crate::engine::{Engine, EngineError};
use crate::memory::{self, GuestMemory};
use crate::recording::ReplayError;
use crate::soft::turns::{TurnError, Turns};

/// A device as the machine holds it.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// What a machine boots from, each time anew.
pub enum BootSource {
    /// A kernel on its own.
    Kernel {
        /// bzImage or ELF.
        kernel: File,
        /// Initial RAM disk.
        initrd: Option<File>,
        /// The command line.
        cmdline: String,
        /// The files may be mapped into guest memory.
        map: bool,
    },
    /// A disk's boot entries.
    Disk {
        /// The disk.
        disk: Rc<dyn BlockRead>,
        /// Another entry than the default one, by title or number.
        entry: Option<String>,
        /// A command line in place of the entry's own.
        cmdline: Option<String>,
        /// Put behind the command line.
        append: String,
    },
}

/// What was booted.
#[derive(Clone, Debug)]
pub struct Booted {
    /// `pvh` or `linux64`.
    pub protocol: String,
    /// The boot entry's title.
    pub entry: Option<String>,
    /// The command line.
    pub cmdline: String,
}

/// Why a machine does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The guest's kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The disk has nothing that could be booted.
    #[error(transparent)]
    Disk(#[from] disk::DiskError),
    /// The ACPI tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A device does not come along.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Guest memory cannot be given back to the host.
    #[error("cannot clear guest memory: {0}")]
    Memory(#[source] std::io::Error),
    /// A recording fails.
    #[error(transparent)]
    Recording(#[from] TurnError),
    /// A file that is open cannot be opened once more.
    #[error("cannot duplicate the boot file's descriptor: {0}")]
    Duplicate(#[source] std::io::Error),
}

/// One virtual machine, complete.
pub struct Machine {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) memory: GuestMemory,
    pub(super) vcpus: Vcpus,
    /// In the order in which they start, pause last to first.
    pub(super) devices: Vec<SharedDevice>,
    /// Nothing: what its recording has.
    pub(super) boot: Option<BootSource>,
    /// What the ACPI tables say; they are written anew after each reset.
    pub(super) acpi: AcpiConfig,
    pub(super) running: bool,
    /// The devices stand still, too.
    pub(super) devices_paused: bool,
    /// Where the vCPUs take turns.
    pub(super) turns: Option<Arc<Turns>>,
    /// Mapped pages that the guest will write to once it runs.
    pub(super) written: Vec<Range<u64>>,
}

fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// Loads what the machine boots from and sets the first vCPU to its first instruction. Guest
    /// memory is zero before this.
    ///
    /// # Errors
    ///
    /// What cannot be loaded.
    pub fn boot(&mut self) -> Result<Booted, MachineError> {
        match (&self.boot, &self.turns) {
            (None, Some(turns)) => {
                let (loaded, states) = turns.replay_boot(self.vcpus.len())?;
                self.vcpus
                    .for_each(|index, vcpu| vcpu.restore(&states[index]))?;
                Ok(loaded.into())
            }
            (None, None) => Err(TurnError::from(ReplayError::NoRecording).into()),
            (Some(source), _) => self.load(source.open()?),
        }
    }

    fn load(&mut self, opened: Opened) -> Result<Booted, MachineError> {
        let rsdp = acpi::write(&self.acpi, &self.memory)?;
        let (kernel, initrd, booted_entry, command_line) = opened;
        let ram = self.memory.iter().map(GuestMemoryRegion::len).sum();
        let request = LoadRequest {
            kernel,
            initrd,
            command_line: command_line.clone(),
            rsdp: Some(rsdp.0),
            ram,
            zeroed: true,
            map: matches!(self.boot, Some(BootSource::Kernel { map: true, .. })),
        };
        let Loaded { entry, written } = boot::load(&self.memory, request)?;
        self.written = written;
        let mut states = Vec::new();
        self.vcpus.for_each(|index, vcpu| {
            let mut state = vcpu.save()?;
            state.set_up_as_firmware();
            if index == 0 {
                state.enter(&entry);
            }
            // All of them, the first one first: a restored counter of time is one that the others
            // are synchronized with, and a guest trusts its clock only if all are.
            vcpu.restore(&state)?;
            states.push(state);
            Ok(())
        })?;
        let protocol = match entry {
            Entry::Pvh { .. } => "pvh",
            Entry::Linux64 { .. } => "linux64",
        };
        let booted = Booted {
            protocol: protocol.to_owned(),
            entry: booted_entry,
            cmdline: command_line,
        };
        if let Some(turns) = &self.turns {
            turns.record_boot((&booted).into(), &states)?;
        }
        Ok(booted)
    }

    /// Starts the devices, once.
    ///
    /// # Errors
    ///
    /// The first device that cannot work.
    pub fn start(&mut self) -> Result<(), MachineError> {
        for device in &self.devices {
            lock(device).start()?;
        }
        Ok(())
    }

    /// Lets the vCPUs run.
    pub fn run(&mut self) {
        self.run_some(None);
    }

    fn run_some(&mut self, only: Option<usize>) {
        self.running = true;
        self.vcpus.run_some(only);
        // While the guest takes its first steps, for it writes to these pages later.
        for range in self.written.drain(..) {
            let address = GuestAddress(range.start);
            memory::populate(&self.memory, address, range.end - range.start);
        }
    }

    /// Stops vCPUs, then devices. A machine that stands still is left alone.
    ///
    /// # Errors
    ///
    /// A device does not come to rest; the machine runs on then.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if !self.running {
            return Ok(());
        }
        self.vcpus.pause();
        for (done, device) in self.devices.iter().rev().enumerate() {
            if let Err(error) = lock(device).pause() {
                for device in self.devices.iter().rev().take(done) {
                    lock(device).resume()?;
                }
                self.vcpus.run();
                return Err(error.into());
            }
        }
        self.running = false;
        self.devices_paused = true;
        Ok(())
    }

    /// Undoes [`Machine::pause`]; lets a machine run that was booted and not run yet.
    ///
    /// # Errors
    ///
    /// A device cannot go on; the machine stays paused.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.resume_some(None)
    }

    /// The same for `only` one vCPU, if one is given.
    ///
    /// # Errors
    ///
    /// See [`Machine::resume`].
    pub fn resume_some(&mut self, only: Option<usize>) -> Result<(), MachineError> {
        if self.running {
            return Ok(());
        }
        if self.devices_paused {
            for device in &self.devices {
                lock(device).resume()?;
            }
            self.devices_paused = false;
        }
        self.run_some(only);
        Ok(())
    }

    /// Back to power-on: devices, interrupt controllers, vCPUs, cleared memory, and a fresh boot.
    /// The machine stands still afterwards; [`Machine::run`] follows.
    ///
    /// # Errors
    ///
    /// What cannot be reset or loaded; the machine cannot go on then.
    pub fn reset(&mut self, cause: ResetCause) -> Result<Booted, MachineError> {
        self.vcpus.pause();
        self.running = false;
        self.devices_paused = false;
        for device in self.devices.iter().rev() {
            lock(device).reset();
        }
        self.engine.reset_platform()?;
        self.vcpus.for_each(|_, vcpu| vcpu.reset())?;
        for region in self.memory.iter() {
            memory::discard(&self.memory, region.start_addr(), region.len())
                .map_err(MachineError::Memory)?;
        }
        if let Some(turns) = self.turns.as_ref().filter(|turns| !turns.replays()) {
            turns.record_reset(cause_number(cause))?;
        }
        self.boot()
    }

    /// Ends a recording, if there is one: the machine stops here. Without devices' last writes, which no
    /// vCPU has seen, it would not be whole.
    ///
    /// # Errors
    ///
    /// It cannot be recorded.
    pub(super) fn close_recording(&mut self, reason: StopReason) -> Result<(), MachineError> {
        let Some(turns) = self.turns.clone().filter(|turns| !turns.replays()) else {
            return Ok(());
        };
        self.vcpus.pause();
        for device in self.devices.iter().rev() {
            lock(device).pause()?;
        }
        turns.record_rest()?;
        let sums = self.sums()?;
        Ok(turns.record_end(reason_number(reason), sums.vcpus, sums.memory)?)
    }

    /// Whether the vCPUs run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }
}

/// Kernel, initrd, the boot entry's title, command line.
type Opened = (BootFile, Option<BootFile>, Option<String>, String);

impl BootSource {
    fn open(&self) -> Result<Opened, MachineError> {
        let again = |file: &File| {
            file.try_clone()
                .map(BootFile::File)
                .map_err(MachineError::Duplicate)
        };
        match self {
            Self::Kernel {
                kernel,
                initrd,
                cmdline,
                ..
            } => {
                let initrd = initrd.as_ref().map(again).transpose()?;
                Ok((again(kernel)?, initrd, None, cmdline.clone()))
            }
            Self::Disk {
                disk,
                entry,
                cmdline,
                append,
            } => {
                let choice = match entry.as_deref() {
                    None => Choice::Default,
                    Some(text) => text.parse().map_or(Choice::Title(text), Choice::Index),
                };
                let entry = disk::read(disk, choice)?;
                let mut line = cmdline.clone().unwrap_or(entry.command_line);
                if !append.is_empty() {
                    line = format!("{line} {append}");
                }
                let initrd = entry.initrd.map(BootFile::Bytes);
                Ok((
                    BootFile::Bytes(entry.kernel),
                    initrd,
                    Some(entry.title),
                    line,
                ))
            }
        }
    }
}
