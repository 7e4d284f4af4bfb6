//! What stands in a recording.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

/// What the recorded machine is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Header {
    /// The VM's name.
    #[n(0)]
    pub name: String,
    /// How many vCPUs it has.
    #[n(1)]
    pub vcpus: u32,
    /// RAM, in bytes.
    #[n(2)]
    pub memory: u64,
    /// The processor that its guest sees.
    #[n(3)]
    pub cpu_profile: String,
    /// The wall clock at the machine's time zero, in nanoseconds since 1970.
    #[n(4)]
    pub realtime_ns: u64,
    /// The version of the Mica that recorded.
    #[n(5)]
    pub program: String,
}

/// A record and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the processors had used of their budgets.
    pub position: u64,
    /// What happened.
    pub record: Record,
}

/// Where a guest reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// A port, or a physical address.
    pub port: bool,
    /// Its number.
    pub address: u64,
    /// How many bytes.
    pub size: u8,
}

/// Something that reached the guest, or a check.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Record {
    /// A guest's read that devices answered.
    #[n(0)]
    Read {
        /// Where.
        #[n(0)]
        port: bool,
        /// The port or physical address.
        #[n(1)]
        address: u64,
        /// How many bytes.
        #[n(2)]
        size: u8,
        /// The answer.
        #[n(3)]
        value: u64,
    },
    /// An interrupt line changed.
    #[n(1)]
    Line {
        /// Which.
        #[n(0)]
        gsi: u32,
        /// High now.
        #[n(1)]
        level: bool,
    },
    /// An MSI came.
    #[n(2)]
    Message {
        /// Its address.
        #[n(0)]
        address: u64,
        /// Its data.
        #[n(1)]
        data: u32,
    },
    /// Devices wrote memory.
    #[n(3)]
    Memory {
        /// Where.
        #[n(0)]
        address: u64,
        /// What is there now, at most [`super::MAX_MEMORY`].
        #[n(1)]
        bytes: ByteVec,
    },
    /// Memory is zero now.
    #[n(4)]
    Zeros {
        /// From where.
        #[n(0)]
        address: u64,
        /// How many bytes.
        #[n(1)]
        len: u64,
    },
    /// All processors slept.
    #[n(5)]
    Idle {
        /// So many nanoseconds.
        #[n(0)]
        ns: u64,
    },
    /// The current processor's registers, for comparison.
    #[n(6)]
    Check {
        /// Their CRC-32.
        #[n(0)]
        registers: u32,
    },
    /// The machine was reset.
    #[n(7)]
    Reset {
        /// Why, by number.
        #[n(0)]
        cause: u8,
    },
    /// A kernel was loaded.
    #[n(8)]
    Booted {
        /// The boot protocol.
        #[n(0)]
        protocol: String,
        /// The boot entry's title.
        #[n(1)]
        entry: Option<String>,
        /// The kernel's command line.
        #[n(2)]
        cmdline: String,
    },
    /// A vCPU's state before its first instruction.
    #[n(9)]
    Vcpu {
        /// Which.
        #[n(0)]
        index: u32,
        /// The state's version.
        #[n(1)]
        version: u16,
        /// The state.
        #[n(2)]
        state: ByteVec,
    },
    /// The processors run.
    #[n(10)]
    Run,
    /// It ends here.
    #[n(11)]
    End {
        /// Why, by number.
        #[n(0)]
        reason: u8,
        /// CRC-32 of all vCPUs' states.
        #[n(1)]
        vcpus: u32,
        /// CRC-32 of RAM.
        #[n(2)]
        memory: u32,
    },
}

impl Record {
    /// A read and its answer.
    #[must_use]
    pub fn read(place: Place, value: u64) -> Self {
        let Place {
            port,
            address,
            size,
        } = place;
        Self::Read {
            port,
            address,
            size,
            value,
        }
    }

    /// What it is, in an error's words.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { port: true, .. } => "a read of a port",
            Self::Read { .. } => "a read of a device's memory",
            Self::Line { .. } => "an interrupt line's change",
            Self::Message { .. } => "an MSI",
            Self::Memory { .. } | Self::Zeros { .. } => "a device's write to memory",
            Self::Idle { .. } => "sleep",
            Self::Check { .. } => "a check",
            Self::Reset { .. } => "a reset",
            Self::Booted { .. } | Self::Vcpu { .. } | Self::Run => "a boot",
            Self::End { .. } => "the end",
        }
    }
}
