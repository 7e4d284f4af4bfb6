//! Console device (virtio 1.2, clause 5.3): one port, `VIRTIO_CONSOLE_F_SIZE` and
//! `VIRTIO_CONSOLE_F_EMERG_WRITE`.
//!
//! Input is read only when the driver has a buffer for it, so nothing is dropped: what the guest
//! does not take stays in the descriptor, and its writer waits. Input at end of file is as good as
//! a keyboard nobody touches.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use minicbor::{Decode, Encode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, DeviceQueues, F_RING, F_VERSION_1, Served, read_config};
use super::{Activation, VirtioDevice};
use crate::console::ConsoleSink;
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::memory::GuestMemory;

const DEVICE_ID: u16 = 3;
const STATE_VERSION: u16 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;
const CONFIG_EMERG_WRITE: u64 = 8;

/// The most that one output request passes on, in bytes; the rest of it is not a console's.
const MAX_OUTPUT: usize = 1 << 20;

/// The device.
pub struct Console {
    name: String,
    queues: DeviceQueues,
    sink: Box<dyn ConsoleSink>,
    input: Option<Input>,
    size: Size,
}

/// The terminal's size, in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Size {
    #[n(0)]
    columns: u16,
    #[n(1)]
    rows: u16,
}

/// The input's descriptor. It is watched for edges: between them `ready` remembers that there is
/// more, so an input that the guest does not take costs nothing.
struct Input {
    fd: OwnedFd,
    ready: bool,
    ended: bool,
    watched: bool,
}

impl Input {
    /// Reads what is there without waiting; `None` if there is nothing now, or never again. The
    /// descriptor may be shared with other processes, so it is not made non-blocking.
    fn read(&mut self, bytes: &mut [u8]) -> Option<usize> {
        if self.ended || !self.ready {
            return None;
        }
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        self.ready = matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1));
        if !self.ready {
            return None;
        }
        match rustix::io::read(&self.fd, bytes) {
            Ok(len @ 1..) => Some(len),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            // A terminal whose other end is closed answers EIO.
            Ok(0) | Err(_) => {
                self.ended = true;
                None
            }
        }
    }
}

impl Console {
    /// A console that reads `input`, if there is one, and writes to `sink`.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left for the queues' events.
    pub fn new(name: &str, input: Option<OwnedFd>, sink: Box<dyn ConsoleSink>) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            queues: DeviceQueues::new(2)?,
            sink,
            input: input.map(|fd| Input {
                fd,
                ready: true,
                ended: false,
                watched: false,
            }),
            size: Size::default(),
        })
    }

    /// The terminal has a new size, in characters. The driver is told.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = Size { columns, rows };
        if self.size != size {
            self.size = size;
            self.queues.config_changed();
        }
    }

    fn receive(&mut self) {
        let Some(input) = &mut self.input else {
            return;
        };
        self.queues
            .serve(RECEIVE, |memory, chain| receive_into(input, memory, chain));
    }

    fn transmit(&mut self) {
        let sink = &mut self.sink;
        self.queues.serve(TRANSMIT, |memory, chain| {
            transmit(&mut **sink, memory, chain)
        });
    }

    /// Stops watching an input that has ended.
    fn drop_ended(&mut self, ops: &mut EventOps) {
        if let Some(input) = self.input.take_if(|input| input.ended)
            && input.watched
        {
            let _ = ops.remove(Events::empty(&input.fd));
        }
    }
}

fn receive_into(input: &mut Input, memory: &GuestMemory, chain: Chain<'_>) -> Served {
    let Ok(mut writer) = chain.writer(memory) else {
        return Served::Done(0);
    };
    let room = writer.available_bytes();
    if room == 0 {
        return Served::Done(0);
    }
    let mut bytes = [0; 4096];
    let room = room.min(bytes.len());
    match input.read(&mut bytes[..room]) {
        Some(len) if writer.write_all(&bytes[..len]).is_ok() => Served::Done(len as u32),
        Some(_) => Served::Done(0),
        None => Served::Later,
    }
}

fn transmit(sink: &mut dyn ConsoleSink, memory: &GuestMemory, chain: Chain<'_>) -> Served {
    if let Ok(mut reader) = chain.reader(memory) {
        let mut bytes = [0; 4096];
        while reader.bytes_read() < MAX_OUTPUT {
            match reader.read(&mut bytes) {
                Ok(len @ 1..) => sink.write(&bytes[..len]),
                _ => break,
            }
        }
    }
    Served::Done(0)
}

impl Device for Console {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &self.size)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.size = state.read(STATE_VERSION)?;
        Ok(())
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
        if let Some(input) = &mut self.input {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            // A regular file cannot be watched, and need not be: it is always ready.
            input.watched = ops.add(Events::new(&input.fd, edges)).is_ok();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self.queues.acknowledge(events) {
            Some(TRANSMIT) => self.transmit(),
            Some(_) => self.receive(),
            None => {
                if let Some(input) = &mut self.input {
                    input.ready |= input.fd.as_raw_fd() == events.fd();
                }
                self.receive();
            }
        }
        self.drop_ended(ops);
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.queues.events()
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_RING | F_SIZE | F_EMERG_WRITE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[0..2].copy_from_slice(&self.size.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.size.rows.to_le_bytes());
        config[4..8].copy_from_slice(&1_u32.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == CONFIG_EMERG_WRITE {
            self.sink.write(&data[..1]);
        }
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
