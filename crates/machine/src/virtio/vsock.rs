//! Socket device (virtio 1.2, clause 5.10): streams between ports of the guest and Unix sockets of
//! the host.
//!
//! - A program on the host connects to the device's Unix socket and sends `CONNECT port\n`. When the
//!   guest accepts, it reads `OK host-port\n`, and then the stream is the guest's.
//! - When the guest connects to port P of the host, the device asks its [`Connector`] for a stream;
//!   whoever runs the VM connects that to the Unix socket that stands for P. The VM process opens
//!   no path itself.
//!
//! Connections do not survive migration or a restored snapshot: the guest's driver is told by a
//! `TRANSPORT_RESET` event, and its programs see their connections reset.

mod connection;
pub mod fuzz;
mod muxer;
mod packet;

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use minicbor::{Decode, Encode};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::connection::BUFFER_LEN;
use self::muxer::Muxer;
use self::packet::{HEADER_LEN, Header, Refusal};
use super::queue::{Chain, DeviceQueues, F_RING, F_VERSION_1, Served, read_config};
use super::{Activation, VirtioDevice};
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::memory::GuestMemory;

const DEVICE_ID: u16 = 19;
const STATE_VERSION: u16 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

const F_STREAM: u64 = 1 << 0;
const EVENT_TRANSPORT_RESET: u32 = 0;

/// The most payload that one packet to the guest carries, in bytes.
const MAX_PAYLOAD: usize = 16 << 10;
/// The smallest context identifier that is a guest's.
const FIRST_GUEST_CID: u64 = 3;

/// Opens the stream for a guest's connection to that port of the host, or refuses it. Called on the
/// event loop: it does not wait for the other end to accept.
pub type Connector = Box<dyn FnMut(u32) -> io::Result<UnixStream> + Send>;

/// The device.
pub struct Vsock {
    name: String,
    cid: u64,
    queues: DeviceQueues,
    muxer: Muxer,
    /// The guest's connections are gone and its driver does not know yet.
    lost_connections: bool,
}

#[derive(Encode, Decode)]
struct State {
    #[n(0)]
    cid: u64,
}

impl Vsock {
    /// A device for the guest with that context identifier (3 or more). Connections from the host
    /// come from `listener`; those of the guest go through `connect`.
    ///
    /// # Errors
    ///
    /// The identifier is reserved, or the host has no descriptor left.
    pub fn new(
        name: &str,
        cid: u32,
        listener: Option<UnixListener>,
        connect: Connector,
    ) -> io::Result<Self> {
        if u64::from(cid) < FIRST_GUEST_CID || cid == u32::MAX {
            let message = format!("vsock context identifier {cid} is reserved");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self {
            name: name.to_owned(),
            cid: cid.into(),
            queues: DeviceQueues::new(3)?,
            muxer: Muxer::new(listener, connect)?,
            lost_connections: false,
        })
    }

    /// Moves packets both ways until nothing more can move, or a turn's budget is spent.
    fn pump(&mut self) {
        if !self.queues.is_active() {
            return;
        }
        self.tell_of_lost_connections();
        let Self {
            queues, muxer, cid, ..
        } = self;
        queues.serve(TRANSMIT, |memory, chain| {
            if !muxer.accepts_packets() {
                return Served::Later;
            }
            let (header, payload) = read_packet(memory, chain, *cid);
            muxer.take(header, &payload);
            Served::Done(0)
        });
        // Behind the guest's packets, which may have made room.
        muxer.accept();
        let stalled = !muxer.accepts_packets();
        if muxer.has_work() {
            queues.serve(RECEIVE, |memory, chain| fill(muxer, memory, chain, *cid));
        }
        if stalled && muxer.accepts_packets() {
            queues.wake(TRANSMIT);
        }
    }

    fn tell_of_lost_connections(&mut self) {
        let lost = &mut self.lost_connections;
        if !*lost {
            return;
        }
        self.queues.serve(EVENT, |memory, chain| {
            if !std::mem::take(lost) {
                return Served::Later;
            }
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            let told = match chain.writer(memory) {
                Ok(mut writer) => writer.write_all(&event).is_ok(),
                Err(_) => false,
            };
            Served::Done(if told { event.len() as u32 } else { 0 })
        });
    }

    /// Brings the event loop's list of descriptors in step with ours.
    fn update_watches(&mut self, ops: &mut EventOps) {
        for stream in self.muxer.take_dead() {
            let _ = ops.remove(Events::empty(&stream));
        }
        for fd in self.muxer.take_fresh() {
            watch(fd, ops);
        }
    }
}

/// Watches a socket for edges. One that cannot be watched stalls, and ends with its other end.
fn watch(fd: RawFd, ops: &mut EventOps) {
    let edges = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    let _ = ops.add(Events::new_raw(fd, edges));
}

/// A packet of the guest. Its payload is bounded by the credit that anybody has.
fn read_packet(
    memory: &GuestMemory,
    chain: Chain<'_>,
    cid: u64,
) -> (Result<Header, Refusal>, Vec<u8>) {
    let dropped = (Err(Refusal::Dropped), Vec::new());
    let mut bytes = [0; HEADER_LEN];
    let Ok(mut reader) = chain.reader(memory) else {
        return dropped;
    };
    if reader.read_exact(&mut bytes).is_err() {
        return dropped;
    }
    let header = match Header::from_guest(&bytes, cid) {
        Ok(header) => header,
        Err(refusal) => return (Err(refusal), Vec::new()),
    };
    if header.len > BUFFER_LEN {
        return (Err(Refusal::Reset(header.ports)), Vec::new());
    }
    let mut payload = vec![0; header.len as usize];
    match reader.read_exact(&mut payload) {
        Ok(()) => (Ok(header), payload),
        Err(_) => (Err(Refusal::Reset(header.ports)), Vec::new()),
    }
}

/// Puts the next packet into the driver's buffer.
fn fill(muxer: &mut Muxer, memory: &GuestMemory, chain: Chain<'_>, cid: u64) -> Served {
    let Ok(mut writer) = chain.writer(memory) else {
        return Served::Done(0);
    };
    let Some(room) = writer.available_bytes().checked_sub(HEADER_LEN) else {
        return Served::Done(0);
    };
    let mut payload = [0; MAX_PAYLOAD];
    let room = room.min(payload.len());
    let Some(header) = muxer.next_packet(&mut payload[..room]) else {
        return Served::Later;
    };
    let payload = &payload[..header.len as usize];
    let whole = writer
        .write_all(&header.to_guest(cid))
        .and_then(|()| writer.write_all(payload));
    Served::Done(match whole {
        Ok(()) => (HEADER_LEN + payload.len()) as u32,
        Err(_) => 0,
    })
}

impl Device for Vsock {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&mut self) {
        self.muxer.clear();
        self.lost_connections = false;
        // The event loop closes the sockets.
        self.queues.wake(EVENT);
    }

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &State { cid: self.cid })
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.read(STATE_VERSION)?;
        if state.cid < FIRST_GUEST_CID || state.cid >= u32::MAX.into() {
            let reason = format!("vsock context identifier {} is reserved", state.cid);
            return Err(RestoreError::Impossible(reason));
        }
        self.cid = state.cid;
        self.muxer.clear();
        self.lost_connections = true;
        Ok(())
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
        if let Some(listener) = self.muxer.listener() {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::new_raw(listener.as_raw_fd(), edges))
                .expect("invariant: epoll takes a socket that is registered once");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.queues.acknowledge(events).is_none() {
            let set = events.event_set();
            let ended = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
            let readable = set.intersects(EventSet::IN | EventSet::READ_HANG_UP) || ended;
            let writable = set.contains(EventSet::OUT) || ended;
            self.muxer.ready(events.fd(), readable, writable, ended);
        }
        self.pump();
        self.update_watches(ops);
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128, 128, 8]
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.queues.events()
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_RING | F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.cid.to_le_bytes(), offset, data);
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
