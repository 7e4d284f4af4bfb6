//! The block device (virtio 1.2, clause 5.2) over a vhost-user-blk backend.
//!
//! Everything but the number of queues is the backend's: features, configuration space, data path.
//! Of the configuration space the driver may write one byte, the write-cache mode, which goes to the
//! backend, and again to each later one.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::frontend::Frontend;
use super::handshake::{Link, Profile};
use super::rings::{Active, Ring};
use super::state::SavedFrontend;
use super::wire::BackendError;
use super::{BackendSource, REPLY_TIMEOUT};
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::virtio::queue::read_config;
use crate::virtio::{Activation, VirtioDevice};

const FEATURES: u64 = 1 << blk::VIRTIO_BLK_F_SIZE_MAX
    | 1 << blk::VIRTIO_BLK_F_SEG_MAX
    | 1 << blk::VIRTIO_BLK_F_GEOMETRY
    | 1 << blk::VIRTIO_BLK_F_RO
    | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
    | 1 << blk::VIRTIO_BLK_F_FLUSH
    | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
    | 1 << blk::VIRTIO_BLK_F_CONFIG_WCE
    | 1 << blk::VIRTIO_BLK_F_MQ
    | 1 << blk::VIRTIO_BLK_F_DISCARD
    | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;

/// `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding.
const CONFIG_LEN: u32 = 60;

/// Where the write-cache mode is in the configuration space, one byte.
const WCE: usize = 32;

/// Where the number of queues is in the configuration space, 16 bits.
const NUM_QUEUES: usize = 34;

/// The most queues of a device, however many vCPUs and however capable the backend.
const MAX_QUEUES: u16 = 64;

/// The size of each queue that is offered to the driver.
const QUEUE_SIZE: u16 = 256;

/// Raised when an older Mica could misread the state: see `docs/formats/vhost-user-state.md`.
const STATE_VERSION: u16 = 1;

/// What the owner of a block device decides.
pub struct BlockOptions {
    /// The device's name in the machine: `disk0`.
    pub name: String,
    /// At most that many queues: the number of vCPUs is a good choice.
    pub max_queues: u16,
}

/// A block device whose requests another process serves.
pub struct Block {
    frontend: Frontend,
    /// The configuration space as the driver sees it.
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
    events: Vec<Arc<EventFd>>,
}

impl Block {
    /// A device on the backend at the other end of `stream`; later ones come from `source`.
    ///
    /// # Errors
    ///
    /// The backend does not answer as the protocol wants, or cannot be a block device.
    pub fn new(
        options: BlockOptions,
        stream: UnixStream,
        source: Box<dyn BackendSource>,
    ) -> Result<Self, BackendError> {
        Self::with_patience(options, stream, source, REPLY_TIMEOUT)
    }

    pub(super) fn with_patience(
        options: BlockOptions,
        stream: UnixStream,
        source: Box<dyn BackendSource>,
        patience: Duration,
    ) -> Result<Self, BackendError> {
        let profile = Profile {
            features: FEATURES,
            protocol: Protocol::CONFIG | Protocol::BACKEND_REQ | Protocol::INFLIGHT_SHMFD,
            config_len: CONFIG_LEN,
            queues: queues_of,
            drains: true,
        };
        let mut frontend = Frontend::new(options.name, profile, stream, source, patience)?;
        let limit = options.max_queues.clamp(1, MAX_QUEUES);
        let count = frontend.backend_queues().clamp(1, limit.into());
        frontend.require_queues(count);
        let events: Result<Vec<_>, _> = (0..count)
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new))
            .collect();
        let events = events?;
        let mut block = Self {
            frontend,
            config: Vec::new(),
            queue_sizes: vec![QUEUE_SIZE; events.len()],
            events,
        };
        block.config = block.config_for_driver();
        Ok(block)
    }

    /// Gives the device a new backend, in place of the one that it has or has lost.
    ///
    /// A backend that does not fit is hung up on, and the device asks its [`BackendSource`] again.
    pub fn reconnect(&mut self, stream: UnixStream) {
        if !self.frontend.connect(stream) {
            return;
        }
        self.restore_write_cache();
        self.frontend.serve();
        self.update_config();
    }

    /// Whether there is a backend.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.frontend.is_connected()
    }

    /// Whether the backend has served all that the driver has asked for.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.frontend.active().is_none_or(Active::is_idle)
    }

    /// From now on the backend works only between [`Block::work`] and the next pause.
    ///
    /// # Errors
    ///
    /// It does not come to rest.
    pub fn hold(&mut self) -> Result<(), DeviceError> {
        self.frontend.hold()
    }

    /// Lets a backend work that is [held](Block::hold).
    pub fn work(&mut self) {
        self.frontend.work();
    }

    /// Where the backend may write for requests that it has not begun: guest addresses and lengths. The
    /// device is paused.
    #[must_use]
    pub fn targets(&self) -> Vec<(GuestAddress, u64)> {
        self.frontend
            .active()
            .map_or_else(Vec::new, Active::targets)
    }

    /// Has the backend note what it writes in `fd`: one bit for each 4 KiB page of guest physical
    /// address space, `size` bytes in all. Later backends do so too, until [`Block::stop_log`].
    ///
    /// # Errors
    ///
    /// The backend has no dirty log.
    pub fn start_log(&mut self, fd: OwnedFd, size: u64) -> Result<(), DeviceError> {
        self.frontend.start_log(fd, size)
    }

    /// Ends what [`Block::start_log`] began.
    pub fn stop_log(&mut self) {
        self.frontend.stop_log();
    }

    /// The backend's configuration, with our number of queues and the driver's cache mode.
    fn config_for_driver(&self) -> Vec<u8> {
        let mut config = self.frontend.config().to_vec();
        let queues = self.queue_sizes.len() as u16;
        config[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
        if let Some(wce) = self.driver_write_cache() {
            config[WCE] = wce;
        }
        config
    }

    /// The cache mode, where it is the driver's to set.
    fn driver_write_cache(&self) -> Option<u8> {
        let settable = self.frontend.offered() & 1 << blk::VIRTIO_BLK_F_CONFIG_WCE != 0;
        self.config.get(WCE).copied().filter(|_| settable)
    }

    /// A new backend gets the cache mode before the first request.
    fn restore_write_cache(&mut self) {
        if let Some(wce) = self.driver_write_cache()
            && self.frontend.config()[WCE] != wce
        {
            self.set_write_cache(wce);
        }
    }

    fn set_write_cache(&mut self, wce: u8) {
        self.config[WCE] = wce;
        self.frontend
            .with_link(|link, _, deadline| link.set_config(WCE as u32, &[wce], deadline));
    }

    fn update_config(&mut self) {
        let config = self.config_for_driver();
        if config != self.config {
            self.config = config;
            if let Some(active) = self.frontend.active() {
                active.interrupt.config_changed();
            }
        }
    }
}

/// How many queues a backend has: what its configuration says, if it has more than one at all.
fn queues_of(link: &Link) -> u64 {
    if link.backend_features & 1 << blk::VIRTIO_BLK_F_MQ == 0 {
        return 1;
    }
    let queues = [link.config[NUM_QUEUES], link.config[NUM_QUEUES + 1]];
    u64::from(u16::from_le_bytes(queues)).min(link.queue_limit)
}

impl Device for Block {
    fn name(&self) -> &str {
        self.frontend.name()
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.frontend.pause()
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.frontend.resume();
        // A restored device may be on a disk of another size than the one that was saved.
        self.update_config();
        Ok(())
    }

    fn reset(&mut self) {
        self.frontend.reset();
        let default = self.frontend.config()[WCE];
        if self.driver_write_cache().is_some_and(|wce| wce != default) {
            self.set_write_cache(default);
        }
    }

    fn save(&self) -> SavedState {
        let mut state = self.frontend.save();
        state.config.clone_from(&self.config);
        SavedState::new(STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: SavedFrontend = state.read(STATE_VERSION)?;
        let queues = state.config.get(NUM_QUEUES..NUM_QUEUES + 2);
        if queues != Some(&self.config[NUM_QUEUES..NUM_QUEUES + 2]) {
            return Err(RestoreError::Impossible("another number of queues".into()));
        }
        self.frontend.restore(&state)?;
        self.config = state.config;
        self.restore_write_cache();
        Ok(())
    }
}

impl MutEventSubscriber for Block {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.frontend.process(events, ops) {
            self.update_config();
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // The queue events are not watched: the backend reads them.
        self.frontend.init(ops);
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.events.clone()
    }

    fn features(&self) -> u64 {
        self.frontend.offered()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let [wce] = data
            && offset == WCE as u64
            && self.driver_write_cache().is_some()
        {
            self.set_write_cache(wce & 1);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let ring = |(queue, kick): (Option<Queue>, &Arc<EventFd>)| {
            queue.map(|queue| Ring {
                base: Some(queue.next_avail()),
                kick: kick.clone(),
                enabled: true,
                queue,
            })
        };
        let queues = activation.queues.into_iter();
        self.frontend.activate(Active {
            rings: queues.zip(&self.events).map(ring).collect(),
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            inflight: None,
        })
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        self.frontend.deactivate()
    }
}
