//! The rings of an active device: handed to a backend, taken back, handed to the next one.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::handshake::{F_LOG_ALL, F_PROTOCOL_FEATURES, Link};
use super::inflight::Inflight;
use super::wire::{BackendError, Body, Deadline, MAX_FDS};
use crate::memory::GuestMemory;
use crate::virtio::VirtioInterrupt;

/// `VHOST_VRING_F_LOG`: writes to the used ring are logged, at the address that goes with it.
const VRING_F_LOG: u32 = 1;

/// How often a stopped ring's used index is read while the backend still completes requests.
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// How long a backend without in-flight tracking gets to work its rings off before it is stopped.
const QUIESCE: Duration = Duration::from_secs(1);

/// Where backends note the pages that they write: one bit for each 4 KiB page of guest physical
/// address space.
pub(super) struct DirtyLog {
    pub(super) fd: OwnedFd,
    pub(super) size: u64,
}

/// One ring that its driver has enabled.
pub(super) struct Ring {
    pub(super) queue: Queue,
    pub(super) kick: Arc<EventFd>,
    /// The next available index, where a stop has told it. The used index in guest memory else.
    pub(super) base: Option<u16>,
    /// Whether the backend may work on it.
    pub(super) enabled: bool,
}

/// What a device has while its driver is ready.
pub(super) struct Active {
    pub(super) memory: GuestMemory,
    pub(super) features: u64,
    /// By index; the backend's rings only.
    pub(super) rings: Vec<Option<Ring>>,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
    pub(super) inflight: Option<Inflight>,
}

impl Active {
    fn rings(&self) -> impl Iterator<Item = (u32, &Ring)> {
        (0..)
            .zip(&self.rings)
            .filter_map(|(index, ring)| Some((index, ring.as_ref()?)))
    }

    /// The used index in guest memory.
    pub(super) fn used_index(&self, ring: &Ring) -> Result<u16, BackendError> {
        ring.queue
            .used_idx(&self.memory, Ordering::Acquire)
            .map(|index| index.0)
            .map_err(|error| BackendError::Rings(error.to_string()))
    }

    /// Gives the backend everything, so that it works on the rings when this returns.
    pub(super) fn hand_over(
        &mut self,
        link: &mut Link,
        log: Option<&DirtyLog>,
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        self.set_features(link, log.is_some(), deadline)?;
        self.set_memory(link, deadline)?;
        if link.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            let inflight = match &self.inflight {
                Some(inflight) => inflight.clone(),
                None => self.new_inflight(link, deadline)?,
            };
            inflight.set(link, deadline)?;
            self.inflight = Some(inflight);
        }
        if let Some(log) = log {
            set_log_base(link, log, deadline)?;
        }
        let bases = self.take_bases()?;
        for ((index, ring), base) in self.rings().zip(bases) {
            let state = |value: u16| Body::default().u32(index).u32(value.into());
            let fd_of = Body::default().u64(index.into());
            let call = self.interrupt.used_eventfd(index as u16);
            let wire = &mut link.wire;
            wire.post(
                FrontendReq::SET_VRING_NUM,
                &state(ring.queue.size()),
                &[],
                deadline,
            )?;
            wire.post(FrontendReq::SET_VRING_BASE, &state(base), &[], deadline)?;
            set_address(link, index, ring, log.is_some(), deadline)?;
            let (call, kick) = ([call.as_raw_fd()], [ring.kick.as_raw_fd()]);
            let wire = &mut link.wire;
            wire.post(FrontendReq::SET_VRING_CALL, &fd_of, &call, deadline)?;
            wire.post(FrontendReq::SET_VRING_KICK, &fd_of, &kick, deadline)?;
        }
        self.enable(link, deadline)?;
        self.nudge();
        Ok(())
    }

    /// Each ring's base, which from now on is the used index: the backend may start any moment.
    fn take_bases(&mut self) -> Result<Vec<u16>, BackendError> {
        let bases: Result<Vec<u16>, _> = self
            .rings()
            .map(|(_, ring)| ring.base.map_or_else(|| self.used_index(ring), Ok))
            .collect();
        for ring in self.rings.iter_mut().flatten() {
            ring.base = None;
        }
        bases
    }

    fn new_inflight(&self, link: &mut Link, deadline: Deadline) -> Result<Inflight, BackendError> {
        let rings = u16::try_from(self.rings.len()).expect("a device has up to 1024 queues");
        let size = self.rings().map(|(_, ring)| ring.queue.size()).max();
        Inflight::get(link, rings, size.unwrap_or(1), deadline)
    }

    fn set_features(
        &self,
        link: &mut Link,
        logging: bool,
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        let logging = if logging { F_LOG_ALL } else { 0 };
        // Bits that only concern what we do in this process are none of the backend's.
        let features = (self.features | logging) & link.backend_features | F_PROTOCOL_FEATURES;
        let body = Body::default().u64(features);
        link.wire
            .post(FrontendReq::SET_FEATURES, &body, &[], deadline)
    }

    fn set_memory(&self, link: &mut Link, deadline: Deadline) -> Result<(), BackendError> {
        let mut fds: Vec<RawFd> = Vec::new();
        let mut regions = Body::default();
        for region in self.memory.iter() {
            let file = region
                .file_offset()
                .ok_or_else(|| BackendError::Rings("guest memory without a file".into()))?;
            let address = region.start_addr().raw_value();
            // Guest address, size, "user address" (see the module above), offset in the file.
            regions = regions
                .u64(address)
                .u64(region.len())
                .u64(address)
                .u64(file.start());
            fds.push(file.file().as_raw_fd());
        }
        if fds.len() > MAX_FDS {
            return Err(BackendError::Rings("too many memory regions".into()));
        }
        let body = Body::default()
            .u32(fds.len() as u32)
            .u32(0)
            .bytes(regions.as_bytes());
        link.wire
            .post(FrontendReq::SET_MEM_TABLE, &body, &fds, deadline)
    }

    /// Tells the backend which rings it may work on.
    pub(super) fn enable(&self, link: &mut Link, deadline: Deadline) -> Result<(), BackendError> {
        for (index, ring) in self.rings() {
            let body = Body::default().u32(index).u32(ring.enabled.into());
            link.wire
                .post(FrontendReq::SET_VRING_ENABLE, &body, &[], deadline)?;
        }
        link.wire.settle(deadline)
    }

    /// Makes backend and driver look at every ring once, for what they missed.
    fn nudge(&self) {
        for (index, ring) in self.rings() {
            // Fails only if the counter is full, and then it has been signalled.
            let _ = ring.kick.write(1);
            self.interrupt.used(index as u16);
        }
    }

    /// Takes the rings back: when this returns, the backend touches guest memory no more.
    pub(super) fn take_back(
        &mut self,
        link: &mut Link,
        drains: bool,
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        if drains && !link.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            self.quiesce();
        }
        let request = FrontendReq::GET_VRING_BASE;
        let mut bases = Vec::new();
        for (index, _) in self.rings() {
            let body = Body::default().u32(index).u32(0);
            let reply = link.wire.call(request, &body, &[], deadline)?;
            let reply: [u8; 8] = reply.body()?;
            if reply[..4] != index.to_le_bytes() || reply[6..] != [0; 2] {
                return Err(BackendError::malformed(request, "it is of another ring"));
            }
            bases.push(u16::from_le_bytes([reply[4], reply[5]]));
        }
        if drains {
            self.drain(&bases, deadline)?;
        }
        for (ring, base) in self.rings.iter_mut().flatten().zip(bases) {
            ring.base = Some(base);
        }
        Ok(())
    }

    /// Whether the backend has completed all that the driver has asked for, as far as the rings say.
    pub(super) fn is_idle(&self) -> bool {
        self.rings().all(|(_, ring)| {
            let avail = ring.queue.avail_idx(&self.memory, Ordering::Acquire);
            avail.ok().map(|index| index.0) == self.used_index(ring).ok()
        })
    }

    /// Where the backend may write for what the driver has asked for and it has not begun: address and
    /// length.
    pub(super) fn targets(&self) -> Vec<(GuestAddress, u64)> {
        let mut targets = Vec::new();
        for (queue, (_, ring)) in self.queues().into_iter().flatten().zip(self.rings()) {
            let mut queue = queue;
            // Flags, index, elements, the event that suppresses notifications.
            let used_len = 6 + 8 * u64::from(ring.queue.size());
            targets.push((GuestAddress(ring.queue.used_ring()), used_len));
            // A ring that is none has no chains; the backend will see that, too.
            let Ok(chains) = queue.iter(&self.memory) else {
                continue;
            };
            let buffers = chains.flat_map(DescriptorChain::writable);
            targets.extend(buffers.map(|buffer| (buffer.addr(), u64::from(buffer.len()))));
        }
        targets
    }

    /// Gives the backend time to complete all that the driver has asked for.
    ///
    /// The protocol has a backend finish its requests before it answers `GET_VRING_BASE`, but those
    /// on libvhost-user (QEMU 7.2) answer at once and then drop what they have in flight. It is
    /// gone for good where no in-flight region remembers it.
    fn quiesce(&self) {
        let deadline = Deadline::after(QUIESCE);
        while !self.is_idle() && deadline.remaining().is_some() {
            std::thread::sleep(DRAIN_POLL);
        }
    }

    /// Waits for what the backend has fetched to be completed.
    fn drain(&self, bases: &[u16], deadline: Deadline) -> Result<(), BackendError> {
        for ((_, ring), base) in self.rings().zip(bases) {
            while self.used_index(ring)? != *base {
                if deadline.remaining().is_none() {
                    return Err(BackendError::Timeout("for the requests in flight".into()));
                }
                std::thread::sleep(DRAIN_POLL);
            }
        }
        Ok(())
    }

    /// Starts or stops the dirty log while the backend works.
    pub(super) fn set_log(
        &self,
        link: &mut Link,
        log: Option<&DirtyLog>,
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        if let Some(log) = log {
            set_log_base(link, log, deadline)?;
        }
        self.set_features(link, log.is_some(), deadline)?;
        for (index, ring) in self.rings() {
            set_address(link, index, ring, log.is_some(), deadline)?;
        }
        link.wire.settle(deadline)
    }

    /// The queues, with the indices that the rings have come to.
    pub(super) fn queues(&self) -> Vec<Option<Queue>> {
        let position = |ring: &Ring| {
            let used = self.used_index(ring).unwrap_or(ring.queue.next_used());
            (ring.base.unwrap_or(used), used)
        };
        let queue = |ring: &Ring| {
            let (base, used) = position(ring);
            let mut queue = Queue::try_from(ring.queue.state()).expect("the state is a queue's");
            queue.set_next_avail(base);
            queue.set_next_used(used);
            queue
        };
        self.rings
            .iter()
            .map(|ring| ring.as_ref().map(queue))
            .collect()
    }
}

fn set_address(
    link: &mut Link,
    index: u32,
    ring: &Ring,
    logging: bool,
    deadline: Deadline,
) -> Result<(), BackendError> {
    let (flags, log_address) = if logging {
        (VRING_F_LOG, ring.queue.used_ring())
    } else {
        (0, 0)
    };
    let body = Body::default()
        .u32(index)
        .u32(flags)
        .u64(ring.queue.desc_table())
        .u64(ring.queue.used_ring())
        .u64(ring.queue.avail_ring())
        .u64(log_address);
    link.wire
        .post(FrontendReq::SET_VRING_ADDR, &body, &[], deadline)
}

fn set_log_base(link: &mut Link, log: &DirtyLog, deadline: Deadline) -> Result<(), BackendError> {
    if !link.protocol.contains(Protocol::LOG_SHMFD) || link.backend_features & F_LOG_ALL == 0 {
        return Err(BackendError::Unfit("it cannot log what it writes".into()));
    }
    let body = Body::default().u64(log.size).u64(0);
    let fds = [log.fd.as_raw_fd()];
    link.wire
        .call(FrontendReq::SET_LOG_BASE, &body, &fds, deadline)?;
    Ok(())
}
