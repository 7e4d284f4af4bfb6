//! Entropy device (virtio 1.2, clause 5.4): fills the driver's buffers from the host's generator.

use std::io::{self, Write};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, DeviceQueues, F_RING, F_VERSION_1, Served, read_config};
use super::{Activation, VirtioDevice};
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::memory::GuestMemory;

const DEVICE_ID: u16 = 4;
const STATE_VERSION: u16 = 1;
const REQUESTS: usize = 0;

/// The most that one request gets, in bytes; a device may return less than was asked for.
const MAX_PER_REQUEST: usize = 64 << 10;

/// The device.
pub struct Entropy {
    name: String,
    queues: DeviceQueues,
}

impl Entropy {
    /// A device of that name.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left for the queue's event.
    pub fn new(name: &str) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            queues: DeviceQueues::new(1)?,
        })
    }
}

/// Fills the request's buffers; how far, is what the driver is told.
fn fill(memory: &GuestMemory, chain: Chain<'_>) -> Served {
    let Ok(mut writer) = chain.writer(memory) else {
        return Served::Done(0);
    };
    let mut left = writer.available_bytes().min(MAX_PER_REQUEST);
    let mut bytes = [0; 4096];
    while left > 0 {
        let chunk = left.min(bytes.len());
        let Ok(got) = getrandom(&mut bytes[..chunk], GetRandomFlags::empty()) else {
            break;
        };
        if writer.write_all(&bytes[..got]).is_err() {
            break;
        }
        left -= got;
    }
    Served::Done(writer.bytes_written() as u32)
}

impl Device for Entropy {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.read(STATE_VERSION)
    }
}

impl MutEventSubscriber for Entropy {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if self.queues.acknowledge(events).is_some() {
            self.queues.serve(REQUESTS, fill);
        }
    }
}

impl VirtioDevice for Entropy {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.queues.events()
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_RING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&[], offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queues.activate(activation);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        self.queues.deactivate()
    }
}

#[cfg(test)]
mod tests;
