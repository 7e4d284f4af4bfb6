//! The network device (virtio 1.2, clause 5.1) over a vhost-user-net backend.
//!
//! The backend has the data path and says which offloads it takes. The configuration space and the
//! control queue are ours: address, MTU, link state, how many queue pairs are in use, and the request
//! to announce oneself after a migration.
//!
//! `GET_QUEUE_NUM` counts queue pairs here, as QEMU and DPDK have it.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use minicbor::{Decode, Encode};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::bindings::virtio_net as net;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, MAX_REQUEST};
use super::frontend::Frontend;
use super::handshake::Profile;
use super::rings::{Active, Ring};
use super::state::SavedFrontend;
use super::wire::{BackendError, Body};
use super::{BackendSource, REPLY_TIMEOUT};
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, DeviceQueues, Served, read_config};
use crate::virtio::{Activation, VirtioDevice};

/// The offloads, which are between driver and backend.
const OFFLOADS: u64 = 1 << net::VIRTIO_NET_F_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_CSUM
    | 1 << net::VIRTIO_NET_F_GUEST_TSO4
    | 1 << net::VIRTIO_NET_F_GUEST_TSO6
    | 1 << net::VIRTIO_NET_F_GUEST_ECN
    | 1 << net::VIRTIO_NET_F_GUEST_UFO
    | 1 << net::VIRTIO_NET_F_HOST_TSO4
    | 1 << net::VIRTIO_NET_F_HOST_TSO6
    | 1 << net::VIRTIO_NET_F_HOST_ECN
    | 1 << net::VIRTIO_NET_F_HOST_UFO
    | 1 << net::VIRTIO_NET_F_MRG_RXBUF
    | 1 << net::VIRTIO_NET_F_GUEST_USO4
    | 1 << net::VIRTIO_NET_F_GUEST_USO6
    | 1 << net::VIRTIO_NET_F_HOST_USO;

/// What this process provides, whatever the backend.
const OWN_FEATURES: u64 = 1 << net::VIRTIO_NET_F_MAC
    | 1 << net::VIRTIO_NET_F_STATUS
    | 1 << net::VIRTIO_NET_F_CTRL_VQ
    | 1 << net::VIRTIO_NET_F_CTRL_RX
    | 1 << net::VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << net::VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << net::VIRTIO_NET_F_GUEST_ANNOUNCE;

/// The most queue pairs of a device.
const MAX_PAIRS: u16 = 32;

/// The size of each ring, and of the control queue, that is offered to the driver.
const RING_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;

/// See `docs/formats/vhost-user-state.md`.
const STATE_VERSION: u16 = 1;

/// What the owner of a network device decides.
pub struct NetOptions {
    /// The device's name in the machine: `net0`.
    pub name: String,
    /// The device's address.
    pub mac: [u8; 6],
    /// The MTU that the driver is told, in bytes; `None` leaves it to the driver.
    pub mtu: Option<u16>,
    /// At most that many queue pairs: the number of vCPUs is a good choice.
    pub max_queue_pairs: u16,
}

/// A network device whose frames another process takes and brings.
pub struct Net {
    frontend: Frontend,
    /// The events of all queues, and the control queue while there is a driver.
    queues: DeviceQueues,
    queue_sizes: Vec<u16>,
    /// The feature bits on offer that are not the backend's.
    own_features: u64,
    mac: [u8; 6],
    mtu: Option<u16>,
    link_up: bool,
    max_pairs: u16,
    control: Control,
    /// The negotiated features, while there is a driver.
    features: u64,
    /// Which queue the control queue is, while there is a driver that has one.
    control_index: Option<usize>,
    /// Which queue's event the event loop watches.
    watched: Option<usize>,
}

/// Version 1 of the state.
#[derive(Debug, PartialEq, Eq, Encode, Decode)]
struct Saved {
    #[n(0)]
    frontend: SavedFrontend,
    #[n(1)]
    own_features: u64,
    #[n(2)]
    max_pairs: u16,
    #[n(3)]
    mtu: Option<u16>,
    #[n(4)]
    link_up: bool,
    #[n(5)]
    control: Control,
}

impl Net {
    /// A device on the backend at the other end of `stream`; later ones come from `source`.
    ///
    /// # Errors
    ///
    /// The backend does not answer as the protocol wants, or cannot be a network device.
    pub fn new(
        options: NetOptions,
        stream: UnixStream,
        source: Box<dyn BackendSource>,
    ) -> Result<Self, BackendError> {
        let profile = Profile {
            features: OFFLOADS,
            protocol: Protocol::MTU | Protocol::RARP,
            config_len: 0,
            queues: |link| link.queue_limit,
            drains: false,
        };
        let mut frontend = Frontend::new(options.name, profile, stream, source, REPLY_TIMEOUT)?;
        let limit = options.max_queue_pairs.clamp(1, MAX_PAIRS);
        let pairs = frontend.backend_queues().clamp(1, limit.into());
        frontend.require_queues(pairs);
        let max_pairs = u16::try_from(pairs).expect("pairs are at most MAX_PAIRS");
        let mut own_features = OWN_FEATURES;
        if max_pairs > 1 {
            own_features |= 1 << net::VIRTIO_NET_F_MQ;
        }
        if options.mtu.is_some() {
            own_features |= 1 << net::VIRTIO_NET_F_MTU;
        }
        let rings = usize::from(max_pairs) * 2;
        let mut queue_sizes = vec![RING_SIZE; rings];
        queue_sizes.push(CONTROL_SIZE);
        let mut device = Self {
            frontend,
            queues: DeviceQueues::new(rings + 1)?,
            queue_sizes,
            own_features,
            mac: options.mac,
            mtu: options.mtu,
            link_up: true,
            max_pairs,
            control: Control::new(options.mac),
            features: 0,
            control_index: None,
            watched: None,
        };
        device.tell_mtu();
        Ok(device)
    }

    /// Gives the device a new backend, in place of the one that it has or has lost.
    ///
    /// A backend that does not fit is hung up on, and the device asks its [`BackendSource`] again.
    pub fn reconnect(&mut self, stream: UnixStream) {
        if self.frontend.connect(stream) {
            self.tell_mtu();
            self.frontend.serve();
        }
    }

    /// Whether there is a backend.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.frontend.is_connected()
    }

    /// The device's address: ours, or what the driver has set in its place.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.control.mac
    }

    /// Plugs the cable in, or pulls it.
    pub fn set_link(&mut self, up: bool) {
        if self.link_up != up {
            self.link_up = up;
            self.queues.config_changed();
        }
    }

    /// Has the network learn where the guest is now: the driver announces itself, or else the
    /// backend does so on its behalf.
    pub fn announce(&mut self) {
        if self.features & 1 << net::VIRTIO_NET_F_GUEST_ANNOUNCE != 0 {
            self.control.announce = true;
            self.queues.config_changed();
        } else if self.frontend.has(Protocol::RARP) {
            let mac = Body::default().bytes(&self.control.mac).u16(0);
            self.frontend.tell(FrontendReq::SEND_RARP, &mac);
        }
    }

    /// See [`super::Block::start_log`].
    ///
    /// # Errors
    ///
    /// The backend has no dirty log.
    pub fn start_log(&mut self, fd: OwnedFd, size: u64) -> Result<(), DeviceError> {
        self.frontend.start_log(fd, size)
    }

    /// Ends what [`Net::start_log`] began.
    pub fn stop_log(&mut self) {
        self.frontend.stop_log();
    }

    fn tell_mtu(&mut self) {
        if let (Some(mtu), true) = (self.mtu, self.frontend.has(Protocol::MTU)) {
            let body = Body::default().u64(mtu.into());
            self.frontend.tell(FrontendReq::NET_SET_MTU, &body);
        }
    }

    /// `struct virtio_net_config` up to the MTU.
    fn config(&self) -> [u8; 12] {
        let status = u32::from(self.link_up) * net::VIRTIO_NET_S_LINK_UP
            + u32::from(self.control.announce) * net::VIRTIO_NET_S_ANNOUNCE;
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.control.mac);
        config[6..8].copy_from_slice(&(status as u16).to_le_bytes());
        config[8..10].copy_from_slice(&self.max_pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn serve_control(&mut self) {
        let Some(index) = self.control_index.filter(|_| self.frontend.is_running()) else {
            return;
        };
        let (features, max_pairs) = (self.features, self.max_pairs);
        let (frontend, control) = (&mut self.frontend, &mut self.control);
        self.queues.serve(index, |memory, chain| {
            let pairs = control.pairs;
            let done = read_request(memory, chain.clone())
                .is_some_and(|request| control.request(&request, features, max_pairs));
            if control.pairs != pairs {
                let rings = usize::from(control.pairs) * 2;
                frontend.enable(|ring| ring < rings);
            }
            let status = if done {
                net::VIRTIO_NET_OK
            } else {
                net::VIRTIO_NET_ERR
            } as u8;
            let written = chain
                .writer(memory)
                .is_ok_and(|mut writer| writer.write_all(&[status]).is_ok());
            Served::Done(written.into())
        });
    }

    /// Makes the event loop watch the control queue's event and no other: the rings' events are the
    /// backend's to read, and which queue is the control queue depends on the driver.
    fn update_watch(&mut self, ops: &mut EventOps) {
        if self.watched == self.control_index {
            return;
        }
        let events = self.queues.events();
        if let Some(index) = self.watched {
            let _ = ops.remove(Events::empty_raw(events[index].as_raw_fd()));
        }
        if let Some(index) = self.control_index {
            let _ = ops.add(Events::new_raw(events[index].as_raw_fd(), EventSet::IN));
        }
        self.watched = self.control_index;
    }
}

/// The readable part of a control request, unless it is longer than any that we know.
fn read_request(memory: &GuestMemory, chain: Chain<'_>) -> Option<Vec<u8>> {
    let mut reader = chain.reader(memory).ok()?;
    let len = Some(reader.available_bytes()).filter(|len| *len <= MAX_REQUEST)?;
    let mut request = vec![0; len];
    reader.read_exact(&mut request).ok()?;
    Some(request)
}

impl Device for Net {
    fn name(&self) -> &str {
        self.frontend.name()
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.frontend.pause()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.frontend.resume();
        self.serve_control();
        Ok(())
    }

    fn reset(&mut self) {
        self.frontend.reset();
        self.queues.deactivate();
        self.control = Control::new(self.mac);
        self.control_index = None;
        self.features = 0;
    }

    fn save(&self) -> SavedState {
        let state = Saved {
            frontend: self.frontend.save(),
            own_features: self.own_features,
            max_pairs: self.max_pairs,
            mtu: self.mtu,
            link_up: self.link_up,
            control: self.control.clone(),
        };
        SavedState::new(STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: Saved = state.read(STATE_VERSION)?;
        let ours = (self.own_features, self.max_pairs, self.mtu);
        if (state.own_features, state.max_pairs, state.mtu) != ours {
            return Err(RestoreError::Impossible(
                "other features, queue pairs or MTU than this device has".into(),
            ));
        }
        if !(1..=self.max_pairs).contains(&state.control.pairs) {
            return Err(RestoreError::Impossible(
                "too many queue pairs in use".into(),
            ));
        }
        self.frontend.restore(&state.frontend)?;
        self.link_up = state.link_up;
        self.control = state.control;
        Ok(())
    }
}

impl MutEventSubscriber for Net {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.queues.acknowledge(events).is_some() {
            self.serve_control();
        } else {
            self.frontend.process(events, ops);
        }
        self.update_watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.frontend.init(ops);
        self.update_watch(ops);
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.queues.events()
    }

    fn features(&self) -> u64 {
        self.frontend.offered() | self.own_features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let has = |bit: u32| activation.features & 1 << bit != 0;
        let pairs = if has(net::VIRTIO_NET_F_MQ) {
            self.max_pairs
        } else {
            1
        };
        let rings = usize::from(pairs) * 2;
        self.features = activation.features;
        self.control_index = has(net::VIRTIO_NET_F_CTRL_VQ).then_some(rings);
        let in_use = usize::from(self.control.pairs) * 2;
        let events = self.queues.events();
        let ring = |(index, queue): (usize, &mut Option<Queue>)| {
            queue.take().map(|queue| Ring {
                base: Some(queue.next_avail()),
                kick: events[index].clone(),
                enabled: index < in_use,
                queue,
            })
        };
        let active = Active {
            rings: activation
                .queues
                .iter_mut()
                .take(rings)
                .enumerate()
                .map(ring)
                .collect(),
            memory: activation.memory.clone(),
            features: activation.features,
            interrupt: activation.interrupt.clone(),
            inflight: None,
        };
        // What is left of the activation is the control queue.
        self.queues.activate(activation);
        self.frontend.activate(active)?;
        self.frontend.wake();
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        let mut queues = self.queues.deactivate();
        for (queue, ring) in queues.iter_mut().zip(self.frontend.deactivate()) {
            *queue = ring.or(queue.take());
        }
        self.control_index = None;
        self.frontend.wake();
        queues
    }
}
