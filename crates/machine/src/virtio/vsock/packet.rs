//! The packet header (virtio 1.2, clause 5.10.6).

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 44;
/// The host's context identifier.
pub(super) const HOST_CID: u64 = 2;
/// The only socket type on offer.
pub(super) const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_RCV`: the sender receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A packet without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    pub(super) op: Op,
    pub(super) len: u32,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

/// Why a packet from the guest is no packet for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Neither end is who it should be: nobody can be told.
    Dropped,
    /// The ends are right, the rest is not: the guest is told by a reset.
    Reset(Ports),
}

impl Header {
    pub(super) fn new(ports: Ports, op: Op) -> Self {
        Self {
            ports,
            op,
            len: 0,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Reads a packet that the guest with that context identifier sent.
    pub(super) fn from_guest(bytes: &[u8; HEADER_LEN], guest: u64) -> Result<Self, Refusal> {
        if u64_at(bytes, 0) != guest || u64_at(bytes, 8) != HOST_CID {
            return Err(Refusal::Dropped);
        }
        let ports = Ports {
            guest: u32_at(bytes, 16),
            host: u32_at(bytes, 20),
        };
        let op = Op::from_wire(u16_at(bytes, 30));
        match op {
            Some(op) if u16_at(bytes, 28) == TYPE_STREAM => Ok(Self {
                ports,
                op,
                len: u32_at(bytes, 24),
                flags: u32_at(bytes, 32),
                buf_alloc: u32_at(bytes, 36),
                fwd_cnt: u32_at(bytes, 40),
            }),
            _ => Err(Refusal::Reset(ports)),
        }
    }

    /// Writes a packet to the guest with that context identifier.
    pub(super) fn to_guest(self, guest: u64) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&HOST_CID.to_le_bytes());
        bytes[8..16].copy_from_slice(&guest.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.ports.host.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.ports.guest.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_wire().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
