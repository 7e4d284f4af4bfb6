//! What both devices share: one backend at a time, the rings it works on, and how it is replaced.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BackendSource;
use super::handshake::{F_LOG_ALL, Link, Profile};
use super::rings::{Active, DirtyLog};
use super::state::{SavedFrontend, SavedSuspended, Suspended};
use super::wire::{BackendError, Body, Deadline, MAX_FDS};
use crate::device::{DeviceError, RestoreError};
use crate::memory::GuestMemory;

/// One device's relation to its backends.
pub(super) struct Frontend {
    name: String,
    profile: Profile,
    source: Box<dyn BackendSource>,
    patience: Duration,
    link: Option<Link>,
    /// The backend on `link` works on the rings of `active`.
    serving: bool,
    /// The backend may work.
    running: bool,
    /// It may not even when the machine is not paused, unless [`Frontend::work`] says so.
    held: bool,
    offered: u64,
    /// The backend's configuration space, as last read.
    config: Vec<u8>,
    /// How many queues, in the profile's unit, every backend must have.
    queues: u64,
    active: Option<Active>,
    suspended: Option<Suspended>,
    log: Option<DirtyLog>,
    /// Tells the event loop that other sockets are to be watched.
    wake: EventFd,
    watched: Option<Watched>,
}

/// The sockets that the event loop knows of. Held open until it has let go of them.
struct Watched {
    main: Arc<UnixStream>,
    channel: Option<Arc<UnixStream>>,
}

impl Frontend {
    /// Greets the first backend, whose features are the device's from then on.
    pub(super) fn new(
        name: String,
        profile: Profile,
        stream: UnixStream,
        source: Box<dyn BackendSource>,
        patience: Duration,
    ) -> Result<Self, BackendError> {
        let link = Link::establish(&profile, stream, Deadline::after(patience))?;
        Ok(Self {
            name,
            profile,
            source,
            patience,
            serving: false,
            running: true,
            held: false,
            offered: link.features(&profile),
            config: link.config.clone(),
            queues: 1,
            active: None,
            suspended: None,
            log: None,
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            watched: None,
            link: Some(link),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What the guest is offered of the backend's features.
    pub(super) fn offered(&self) -> u64 {
        self.offered
    }

    pub(super) fn config(&self) -> &[u8] {
        &self.config
    }

    pub(super) fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Whether the backend at hand uses that protocol feature.
    pub(super) fn has(&self, protocol: Protocol) -> bool {
        self.link
            .as_ref()
            .is_some_and(|link| link.protocol.contains(protocol))
    }

    /// How many queues the backend has, in the profile's unit.
    pub(super) fn backend_queues(&self) -> u64 {
        self.link
            .as_ref()
            .map_or(1, |link| (self.profile.queues)(link))
    }

    /// From now on every backend must have that many.
    pub(super) fn require_queues(&mut self, queues: u64) {
        self.queues = queues;
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.patience)
    }

    /// Greets another backend. [`Frontend::serve`] is due afterwards, if this one is taken.
    pub(super) fn connect(&mut self, stream: UnixStream) -> bool {
        self.hang_up();
        let link = Link::establish(&self.profile, stream, self.deadline())
            .and_then(|link| self.check(&link).map(|()| link));
        match link {
            Ok(link) => {
                self.config.clone_from(&link.config);
                self.link = Some(link);
                self.wake();
                true
            }
            Err(error) => {
                self.source.request(&self.name, &error.to_string());
                false
            }
        }
    }

    /// Whether a backend can take the place of the one before.
    fn check(&self, link: &Link) -> Result<(), BackendError> {
        let unfit = |reason: String| Err(BackendError::Unfit(reason));
        let missing = self.offered & !link.features(&self.profile);
        if missing != 0 {
            return unfit(format!(
                "it lacks features {missing:#x} that the guest was offered"
            ));
        }
        let queues = (self.profile.queues)(link);
        if queues < self.queues {
            return unfit(format!("it has {queues} queues of {}", self.queues));
        }
        let active = self.active.as_ref().map(|active| &active.inflight);
        let suspended = self.suspended.as_ref().map(|rings| &rings.inflight);
        let region = active.or(suspended).is_some_and(Option::is_some);
        if region && !link.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            return unfit("it does not take over requests in flight".into());
        }
        if self.log.is_some() && !can_log(link) {
            return unfit("it cannot log what it writes".into());
        }
        Ok(())
    }

    /// Has the backend work on the rings, if there is one, and there are any.
    pub(super) fn serve(&mut self) {
        if !self.running || self.serving {
            return;
        }
        let deadline = self.deadline();
        let (Some(link), Some(active)) = (&mut self.link, &mut self.active) else {
            return;
        };
        match active.hand_over(link, self.log.as_ref(), deadline) {
            Ok(()) => self.serving = true,
            Err(error) => self.lose(&error),
        }
    }

    /// Stops the backend. A hang-up is a stop, too; an error says that it may not be at rest.
    fn stop(&mut self) -> Result<(), BackendError> {
        let deadline = self.deadline();
        let (true, Some(link), Some(active)) = (self.serving, &mut self.link, &mut self.active)
        else {
            return Ok(());
        };
        self.serving = false;
        match active.take_back(link, self.profile.drains, deadline) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.lose(&error);
                match error {
                    BackendError::Closed => Ok(()),
                    error => Err(error),
                }
            }
        }
    }

    /// Runs `operation` on the backend, if there is one; its failure is the backend's loss.
    pub(super) fn with_link(
        &mut self,
        operation: impl FnOnce(&mut Link, Option<&Active>, Deadline) -> Result<(), BackendError>,
    ) {
        let deadline = self.deadline();
        let active = self.active.as_ref().filter(|_| self.serving);
        if let Some(link) = &mut self.link
            && let Err(error) = operation(link, active, deadline)
        {
            self.lose(&error);
        }
    }

    /// Sends a request that the device does not depend on.
    pub(super) fn tell(&mut self, request: FrontendReq, body: &Body) {
        self.with_link(|link, _, deadline| {
            link.wire.post(request, body, &[], deadline)?;
            link.wire.settle(deadline)
        });
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.link.take() {
            // The event loop may still hold the socket, so closing it is not enough.
            let _ = link.wire.socket().shutdown(Shutdown::Both);
            self.wake();
        }
        self.serving = false;
    }

    fn lose(&mut self, error: &BackendError) {
        self.hang_up();
        self.source.request(&self.name, &error.to_string());
    }

    /// Has the event loop call [`Frontend::process`].
    pub(super) fn wake(&self) {
        // Fails only if the counter is full, and then the event loop is awake.
        let _ = self.wake.write(1);
    }

    /// The driver is ready. Without a backend, its requests wait for the next one.
    pub(super) fn activate(&mut self, mut active: Active) -> Result<(), DeviceError> {
        let private =
            |region: &<GuestMemory as GuestMemoryBackend>::R| region.file_offset().is_none();
        if active.memory.iter().any(private) {
            return Err(self.error("guest memory cannot be shared with a backend"));
        }
        if active.memory.num_regions() > MAX_FDS {
            return Err(self.error("guest memory has too many regions"));
        }
        if let Some(suspended) = self.suspended.take() {
            for (ring, base) in active.rings.iter_mut().zip(suspended.bases) {
                if let Some(ring) = ring {
                    ring.base = base;
                }
            }
            active.inflight = suspended.inflight;
        }
        self.active = Some(active);
        self.serve();
        Ok(())
    }

    /// The opposite: the backend's queues as they are. What is needed to go on with them is kept,
    /// until [`Frontend::reset`].
    pub(super) fn deactivate(&mut self) -> Vec<Option<Queue>> {
        // A backend that does not stop is hung up on, and that is all that can be done here.
        let _ = self.stop();
        self.active.take().map_or_else(Vec::new, |active| {
            self.suspended = Some(Suspended::from(&active));
            active.queues()
        })
    }

    pub(super) fn reset(&mut self) {
        self.deactivate();
        self.suspended = None;
    }

    pub(super) fn pause(&mut self) -> Result<(), DeviceError> {
        self.running = false;
        self.stop().map_err(|error| self.error(&error.to_string()))
    }

    pub(super) fn resume(&mut self) {
        if !self.held {
            self.work();
        }
    }

    /// Lets the backend work until the next [`Frontend::pause`].
    pub(super) fn work(&mut self) {
        self.running = true;
        self.serve();
    }

    /// From now on the backend works only when [`Frontend::work`] says so.
    pub(super) fn hold(&mut self) -> Result<(), DeviceError> {
        self.held = true;
        self.pause()
    }

    /// Sets which rings the backend may work on.
    pub(super) fn enable(&mut self, enabled: impl Fn(usize) -> bool) {
        if let Some(active) = &mut self.active {
            for (index, ring) in active.rings.iter_mut().enumerate() {
                if let Some(ring) = ring {
                    ring.enabled = enabled(index);
                }
            }
        }
        self.with_link(|link, active, deadline| {
            active.map_or(Ok(()), |active| active.enable(link, deadline))
        });
    }

    /// Has backends log, from now on, the pages that they write.
    pub(super) fn start_log(&mut self, fd: OwnedFd, size: u64) -> Result<(), DeviceError> {
        if self.link.as_ref().is_some_and(|link| !can_log(link)) {
            return Err(self.error("its backend cannot log what it writes"));
        }
        self.log = Some(DirtyLog { fd, size });
        self.apply_log();
        Ok(())
    }

    pub(super) fn stop_log(&mut self) {
        self.log = None;
        self.apply_log();
    }

    fn apply_log(&mut self) {
        let log = self.log.take();
        self.with_link(|link, active, deadline| {
            active.map_or(Ok(()), |active| {
                active.set_log(link, log.as_ref(), deadline)
            })
        });
        self.log = log;
    }

    pub(super) fn save(&self) -> SavedFrontend {
        let active = self.active.as_ref().map(Suspended::from);
        SavedFrontend {
            offered: self.offered,
            config: self.config.clone(),
            suspended: active
                .or_else(|| self.suspended.clone())
                .as_ref()
                .map(SavedSuspended::from),
        }
    }

    /// Takes the place of the front-end that saved this. The rings rest until [`Frontend::resume`].
    pub(super) fn restore(&mut self, saved: &SavedFrontend) -> Result<(), RestoreError> {
        let impossible = |reason: &str| Err(RestoreError::Impossible(reason.into()));
        if saved.offered & !self.offered != 0 {
            return impossible("the guest was offered features that this backend lacks");
        }
        if saved.config.len() != self.config.len() {
            return impossible("the configuration has another length");
        }
        let suspended = saved.suspended.as_ref().map(Suspended::try_from);
        let suspended = suspended.transpose()?;
        let region = suspended
            .as_ref()
            .is_some_and(|rings| rings.inflight.is_some());
        if region && self.is_connected() && !self.has(Protocol::INFLIGHT_SHMFD) {
            return impossible("this backend does not take over requests in flight");
        }
        self.suspended = suspended;
        self.active = None;
        self.offered = saved.offered;
        self.running = false;
        Ok(())
    }

    pub(super) fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.wake, EventSet::IN));
        self.update_watches(ops);
    }

    /// Handles an event on the front-end's own descriptors. True if the configuration was read anew.
    pub(super) fn process(&mut self, events: Events, ops: &mut EventOps) -> bool {
        let fd = events.fd();
        let mut config_read = false;
        if fd == self.wake.as_raw_fd() {
            let _ = self.wake.read();
        } else if let Some(link) = &mut self.link {
            if fd == link.wire.socket().as_raw_fd() {
                self.lose(&BackendError::Closed);
            } else if let Some(channel) = &mut link.channel
                && fd == channel.socket().as_raw_fd()
            {
                let requests = channel.serve();
                if requests.closed {
                    link.channel = None;
                }
                config_read = requests.config_changed && self.read_config();
            }
        }
        self.update_watches(ops);
        config_read
    }

    fn read_config(&mut self) -> bool {
        let profile = self.profile;
        let mut config = None;
        self.with_link(|link, _, deadline| {
            config = Some(link.get_config(&profile, deadline)?);
            Ok(())
        });
        let read = config.is_some();
        self.config = config.unwrap_or_else(|| std::mem::take(&mut self.config));
        read
    }

    /// Makes the event loop watch the sockets of the link at hand, and no other.
    fn update_watches(&mut self, ops: &mut EventOps) {
        let wanted = self.link.as_ref().map(|link| Watched {
            main: link.wire.socket().clone(),
            channel: link
                .channel
                .as_ref()
                .map(|channel| channel.socket().clone()),
        });
        let before = std::mem::replace(&mut self.watched, wanted);
        let sockets = |watched: &Option<Watched>| -> Vec<(Arc<UnixStream>, EventSet)> {
            let Some(watched) = watched else {
                return Vec::new();
            };
            let channel = watched.channel.clone().map(|socket| (socket, EventSet::IN));
            std::iter::once((watched.main.clone(), EventSet::READ_HANG_UP))
                .chain(channel)
                .collect()
        };
        let (old, new) = (sockets(&before), sockets(&self.watched));
        let holds = |list: &[(Arc<UnixStream>, EventSet)], socket: &Arc<UnixStream>| {
            list.iter().any(|(other, _)| Arc::ptr_eq(other, socket))
        };
        for (socket, _) in old.iter().filter(|(socket, _)| !holds(&new, socket)) {
            let _ = ops.remove(Events::empty(&**socket));
        }
        for (socket, events) in new.iter().filter(|(socket, _)| !holds(&old, socket)) {
            // Fails for want of memory only, and then a hang-up shows at the next request.
            let _ = ops.add(Events::new(&**socket, *events));
        }
    }

    pub(super) fn error(&self, reason: &str) -> DeviceError {
        DeviceError {
            device: self.name.clone(),
            reason: reason.into(),
        }
    }
}

fn can_log(link: &Link) -> bool {
    link.protocol.contains(Protocol::LOG_SHMFD) && link.backend_features & F_LOG_ALL != 0
}
