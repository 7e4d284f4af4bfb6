//! The first words on a connection: what the backend offers, and which of it we use.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::{FrontendReq, VHOST_USER_MAX_VRINGS};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::channel::Channel;
use super::wire::{BackendError, Body, Deadline, Wire};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: a bit between front-end and backend only.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// `VHOST_F_LOG_ALL`: likewise; the backend logs what it writes.
pub(super) const F_LOG_ALL: u64 = 1 << 26;

/// The bits of every virtio device that a backend may offer the guest. Packed rings, in-order use
/// and ring reset are not among them: our transport has none.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a kind of device wants of its backend.
#[derive(Clone, Copy)]
pub(super) struct Profile {
    /// Device feature bits that pass from the backend to the guest.
    pub(super) features: u64,
    /// Protocol features used if the backend has them, beside those that every kind uses.
    pub(super) protocol: Protocol,
    /// Bytes of configuration space that the backend provides; 0 if we make it up ourselves.
    pub(super) config_len: u32,
    /// How many queues the backend has, in whatever unit the device counts.
    pub(super) queues: fn(&Link) -> u64,
    /// A stopped ring has nothing in flight: its used index equals its base.
    pub(super) drains: bool,
}

/// A connection after its handshake.
pub(super) struct Link {
    pub(super) wire: Wire,
    /// All feature bits that the backend has.
    pub(super) backend_features: u64,
    /// The protocol features in use.
    pub(super) protocol: Protocol,
    /// The backend's limit, in its own unit (rings, or pairs of them for a network device).
    pub(super) queue_limit: u64,
    /// The configuration space, [`Profile::config_len`] long.
    pub(super) config: Vec<u8>,
    pub(super) channel: Option<Channel>,
}

impl Link {
    /// Greets the backend on `stream`.
    pub(super) fn establish(
        profile: &Profile,
        stream: UnixStream,
        deadline: Deadline,
    ) -> Result<Self, BackendError> {
        let mut wire = Wire::new(stream)?;
        let none = Body::default;
        let backend_features = wire
            .call(FrontendReq::GET_FEATURES, &none(), &[], deadline)?
            .u64()?;
        for (bit, name) in [
            (F_PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES"),
            (1 << VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"),
        ] {
            if backend_features & bit == 0 {
                return Err(BackendError::Unfit(format!("it lacks {name}")));
            }
        }
        wire.post(FrontendReq::SET_OWNER, &none(), &[], deadline)?;
        let protocol = negotiate_protocol(&mut wire, profile, deadline)?;
        let mut link = Self {
            wire,
            backend_features,
            protocol,
            queue_limit: 1,
            config: Vec::new(),
            channel: None,
        };
        if protocol.contains(Protocol::MQ) {
            link.queue_limit = link
                .wire
                .call(FrontendReq::GET_QUEUE_NUM, &none(), &[], deadline)?
                .u64()?
                .min(VHOST_USER_MAX_VRINGS);
        }
        if protocol.contains(Protocol::BACKEND_REQ) {
            link.open_channel(deadline)?;
        }
        link.config = link.get_config(profile, deadline)?;
        link.wire.settle(deadline)?;
        Ok(link)
    }

    /// The feature bits that this backend lets us offer to the guest.
    pub(super) fn features(&self, profile: &Profile) -> u64 {
        self.backend_features & (profile.features | COMMON_FEATURES)
    }

    fn open_channel(&mut self, deadline: Deadline) -> Result<(), BackendError> {
        let (channel, theirs) = Channel::pair()?;
        let fds = [theirs.as_raw_fd()];
        self.wire.post(
            FrontendReq::SET_BACKEND_REQ_FD,
            &Body::default(),
            &fds,
            deadline,
        )?;
        self.channel = Some(channel);
        Ok(())
    }

    /// Reads the configuration space.
    pub(super) fn get_config(
        &mut self,
        profile: &Profile,
        deadline: Deadline,
    ) -> Result<Vec<u8>, BackendError> {
        if profile.config_len == 0 {
            return Ok(Vec::new());
        }
        let len = profile.config_len as usize;
        let head = Body::default().u32(0).u32(profile.config_len).u32(0);
        let request = FrontendReq::GET_CONFIG;
        let reply = self
            .wire
            .call(request, &head.bytes(&vec![0; len]), &[], deadline)?;
        // Offset, size and flags as asked; a size of 0 is the backend's way to refuse.
        match reply.bytes().split_at_checked(12) {
            Some((head, config)) if config.len() == len => {
                if head[..4] != [0; 4] || head[4..8] != profile.config_len.to_le_bytes() {
                    return Err(BackendError::malformed(request, "it is of another range"));
                }
                Ok(config.to_vec())
            }
            _ => Err(BackendError::malformed(request, "its length is wrong")),
        }
    }

    /// Writes `bytes` at `offset` of the configuration space.
    pub(super) fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        deadline: Deadline,
    ) -> Result<(), BackendError> {
        let len = u32::try_from(bytes.len()).expect("a guest writes up to 8 bytes");
        let body = Body::default().u32(offset).u32(len).u32(0).bytes(bytes);
        self.wire
            .post(FrontendReq::SET_CONFIG, &body, &[], deadline)?;
        self.wire.settle(deadline)
    }
}

fn negotiate_protocol(
    wire: &mut Wire,
    profile: &Profile,
    deadline: Deadline,
) -> Result<Protocol, BackendError> {
    let wanted = Protocol::MQ | Protocol::REPLY_ACK | Protocol::LOG_SHMFD;
    let offered = wire
        .call(
            FrontendReq::GET_PROTOCOL_FEATURES,
            &Body::default(),
            &[],
            deadline,
        )?
        .u64()?;
    let protocol = Protocol::from_bits_truncate(offered) & (wanted | profile.protocol);
    if profile.config_len > 0 && !protocol.contains(Protocol::CONFIG) {
        return Err(BackendError::Unfit(
            "it lacks VHOST_USER_PROTOCOL_F_CONFIG".into(),
        ));
    }
    let body = Body::default().u64(protocol.bits());
    wire.post(FrontendReq::SET_PROTOCOL_FEATURES, &body, &[], deadline)?;
    if protocol.contains(Protocol::REPLY_ACK) {
        wire.use_acknowledgements();
    }
    Ok(protocol)
}
