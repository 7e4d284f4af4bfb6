//! The VM process's part in recording and replaying ([`crate::soft::turns`]): who visits, who rests, and
//! what a replayed machine has in place of devices.

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use mica_base::units::PAGE_SIZE;
use rustix::fs::SeekFrom;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::config::{ResetCause, StopReason};
use super::machine::{Booted, Machine, MachineError};
use crate::bus::lock;
use crate::device::{Device, DeviceError};
use crate::engine::BusAccess;
use crate::legacy::{PortDevice, Serial};
use crate::memory::{self, GuestMemory};
use crate::pci::Subscriber;
use crate::soft::turns::{Beside, Loaded, Progress, Turns};
use crate::virtio::vhost_user::Block;

/// Disks that rest while vCPUs run.
pub(super) struct Disks {
    memory: GuestMemory,
    disks: Vec<Arc<Mutex<Block>>>,
    /// Where their backends may have written since they began.
    targets: Mutex<Vec<(GuestAddress, u64)>>,
}

impl Disks {
    pub(super) fn new(
        memory: GuestMemory,
        disks: Vec<Arc<Mutex<Block>>>,
    ) -> Result<Self, DeviceError> {
        disks.iter().try_for_each(|disk| lock(disk).hold())?;
        Ok(Self {
            memory,
            disks,
            targets: Mutex::default(),
        })
    }
}

impl Beside for Disks {
    fn begin(&self) -> Result<bool, DeviceError> {
        let mut began = false;
        for disk in &self.disks {
            let mut disk = lock(disk);
            if !disk.is_idle() {
                lock(&self.targets).extend(disk.targets());
                disk.work();
                began = true;
            }
        }
        Ok(began)
    }

    fn progress(&self) -> Progress {
        let mut progress = Progress::Done;
        for disk in &self.disks {
            let disk = lock(disk);
            match (disk.is_idle(), disk.is_connected()) {
                (true, _) => {}
                (false, true) => progress = Progress::Working,
                (false, false) => return Progress::Waiting,
            }
        }
        progress
    }

    fn rest(&self) -> Result<(), DeviceError> {
        for disk in &self.disks {
            lock(disk).pause()?;
        }
        for (address, len) in lock(&self.targets).drain(..) {
            memory::mark_written(&self.memory, address, len);
        }
        Ok(())
    }
}

/// Something that the event loop drives, while no vCPU runs.
pub(super) struct Visitor {
    pub(super) turns: Arc<Turns>,
    pub(super) inner: Subscriber,
}

impl MutEventSubscriber for Visitor {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let inner = &mut self.inner;
        self.turns.visit(|| inner.process(events, ops));
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.inner.init(ops);
    }
}

/// What a replayed machine has at its ports: a console that shows what the guest prints. The guest's reads
/// do not come here, since the recording has the answers.
pub(super) struct ReplayBus {
    pub(super) serial: Arc<Mutex<Serial>>,
}

impl BusAccess for ReplayBus {
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let mut serial = lock(&self.serial);
        let [(base, count), ..] = serial.ports()[..] else {
            return;
        };
        if port.wrapping_sub(base) < count {
            serial.write(port, data);
        }
    }

    fn memory_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn memory_write(&self, _address: u64, _data: &[u8]) {}
}

impl From<Loaded> for Booted {
    fn from(loaded: Loaded) -> Self {
        Self {
            protocol: loaded.protocol,
            entry: loaded.entry,
            cmdline: loaded.cmdline,
        }
    }
}

impl From<&Booted> for Loaded {
    fn from(booted: &Booted) -> Self {
        Self {
            protocol: booted.protocol.clone(),
            entry: booted.entry.clone(),
            cmdline: booted.cmdline.clone(),
        }
    }
}

/// Checksums of a machine that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) vcpus: u32,
    pub(super) memory: u32,
}

impl Machine {
    /// Checksums of its vCPUs' states and of its RAM.
    ///
    /// # Errors
    ///
    /// The engine refuses, or RAM cannot be read.
    pub(super) fn sums(&self) -> Result<Sums, MachineError> {
        let mut vcpus = crc32fast::Hasher::new();
        self.vcpus.for_each(|_, vcpu| {
            vcpus.update(&vcpu.save()?.to_saved().body);
            Ok(())
        })?;
        let memory = memory_sum(&self.memory).map_err(MachineError::Memory)?;
        Ok(Sums {
            vcpus: vcpus.finalize(),
            memory,
        })
    }
}

/// A checksum of all pages that are not zero, and of where they are. Pages that nobody has touched are not
/// touched by this either.
fn memory_sum(memory: &GuestMemory) -> io::Result<u32> {
    let mut sum = crc32fast::Hasher::new();
    let mut page = vec![0; PAGE_SIZE as usize];
    for region in memory.iter() {
        let offset = region
            .file_offset()
            .expect("invariant: a recorded guest's memory is shared");
        let (first, end) = (offset.start(), offset.start() + region.len());
        let mut at = first;
        while let Some(data) = seek(offset.file(), SeekFrom::Data(at))?.filter(|data| *data < end) {
            let hole = seek(offset.file(), SeekFrom::Hole(data))?.unwrap_or(end);
            at = hole.min(end);
            for in_file in (data..at).step_by(PAGE_SIZE as usize) {
                let address = region.start_addr().0 + (in_file - first);
                memory
                    .read_slice(&mut page, GuestAddress(address))
                    .map_err(io::Error::other)?;
                if page.iter().any(|byte| *byte != 0) {
                    sum.update(&address.to_le_bytes());
                    sum.update(&page);
                }
            }
        }
    }
    Ok(sum.finalize())
}

/// Where the file goes on so; nothing at its end.
fn seek(file: &std::fs::File, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A reset's cause as a recording has it.
pub(super) fn cause_number(cause: ResetCause) -> u8 {
    match cause {
        ResetCause::Guest => 0,
        ResetCause::TripleFault => 1,
        ResetCause::Control => 2,
    }
}

pub(super) fn cause(number: u8) -> ResetCause {
    match number {
        0 => ResetCause::Guest,
        1 => ResetCause::TripleFault,
        _ => ResetCause::Control,
    }
}

/// The reason of an end as a recording has it.
pub(super) fn reason_number(reason: StopReason) -> u8 {
    match reason {
        StopReason::PowerOff => 0,
        StopReason::Reset => 1,
        StopReason::TripleFault => 2,
        StopReason::GuestPanicked => 3,
        StopReason::EngineFailed => 4,
        StopReason::Stopped => 5,
    }
}

pub(super) fn reason(number: u8) -> StopReason {
    match number {
        0 => StopReason::PowerOff,
        1 => StopReason::Reset,
        2 => StopReason::TripleFault,
        3 => StopReason::GuestPanicked,
        4 => StopReason::EngineFailed,
        _ => StopReason::Stopped,
    }
}
