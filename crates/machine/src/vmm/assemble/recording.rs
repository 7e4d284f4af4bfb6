//! What a recording or a replay adds to a machine.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use super::{AssembleError, Assembler, BackendDevice, Handles};
use crate::memory::GuestMemory;
use crate::recording::{Header, Reader, Writer};
use crate::soft::turns::Turns;
use crate::vmm::channel::Received;
use crate::vmm::config::{RecordingConfig, VmConfig};
use crate::vmm::recording::{Disks, Visitor};

/// The turns of a machine that is recorded or replayed.
pub(super) fn turns(
    config: &VmConfig,
    fds: &mut Received,
    memory: &GuestMemory,
) -> Result<Option<Arc<Turns>>, AssembleError> {
    let mut file = |index| fds.take(index).map(File::from);
    Ok(match config.recording {
        None => None,
        Some(RecordingConfig::Record(index)) => {
            let header = Header {
                name: config.name.clone(),
                vcpus: config.vcpus,
                memory: config.memory.0,
                cpu_profile: config.cpu_profile.to_string(),
                realtime_ns: crate::soft::realtime_ns(),
                program: env!("CARGO_PKG_VERSION").to_owned(),
            };
            let writer = Writer::new(Box::new(file(index)?), &header)?;
            let realtime = header.realtime_ns;
            Some(Turns::record(
                writer,
                config.vcpus,
                memory.clone(),
                realtime,
            ))
        }
        Some(RecordingConfig::Replay(index)) => {
            let reader = Reader::new(Box::new(file(index)?))?;
            Some(Turns::replay(reader, config.vcpus, memory.clone()))
        }
    })
}

impl Assembler {
    /// Devices and vCPUs out of each other's way, where vCPUs take turns.
    pub(super) fn take_turns(&mut self, handles: &Handles) -> Result<(), AssembleError> {
        let Some(turns) = self.turns.clone().filter(|turns| !turns.replays()) else {
            return Ok(());
        };
        for inner in &mut self.subscribers {
            let turns = Arc::clone(&turns);
            let visited = Arc::clone(inner);
            *inner = Arc::new(Mutex::new(Visitor {
                turns,
                inner: visited,
            }));
        }
        let disks: Result<Vec<_>, _> = handles
            .backends
            .iter()
            .map(|(name, backend)| match backend {
                BackendDevice::Block(disk) => Ok(Arc::clone(disk)),
                // Frames come when they like, into memory that the guest may look at.
                BackendDevice::Net(_) => Err(AssembleError::Device {
                    device: name.clone(),
                    source: io::Error::new(
                        io::ErrorKind::Unsupported,
                        "a network interface cannot be recorded",
                    ),
                }),
            })
            .collect();
        let disks = Disks::new(self.memory.clone(), disks?)?;
        turns.attach(Arc::new(disks));
        Ok(())
    }
}
