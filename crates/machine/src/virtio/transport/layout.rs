//! Where the transport's structures lie in its BAR, and the capabilities that say so (virtio 1.2,
//! clause 4.1.4).

use crate::pci::{BarSpec, ConfigSpace, Identity, msix};
use crate::virtio::VirtioDevice;

/// The one BAR, which holds everything.
pub(super) const BAR: BarSpec = BarSpec {
    index: 0,
    size: 0x8000,
    wide: true,
};

pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const MSIX_TABLE: u64 = 0x4000;
pub(super) const MSIX_PENDING: u64 = 0x6000;
const REGION_LEN: u64 = 0x1000;
const COMMON_LEN: u32 = 64;

/// Bytes between the doorbells of two queues (`notify_off_multiplier`).
pub(super) const NOTIFY_STRIDE: u64 = 4;

/// The most queues a device may have: what the MSI-X table has room for, with one vector more for
/// the configuration.
pub(super) const MAX_QUEUES: usize = 256;

/// A structure in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

/// The structure at an offset of the BAR, and the offset in it.
pub(super) fn region(offset: u64) -> Option<(Region, u64)> {
    let (region, start) = match offset {
        COMMON..ISR => (Region::Common, COMMON),
        ISR..DEVICE => (Region::Isr, ISR),
        DEVICE..NOTIFY => (Region::Device, DEVICE),
        NOTIFY..MSIX_TABLE => (Region::Notify, NOTIFY),
        MSIX_TABLE..MSIX_PENDING => (Region::MsixTable, MSIX_TABLE),
        MSIX_PENDING..=0x7fff => (Region::MsixPending, MSIX_PENDING),
        _ => return None,
    };
    Some((region, offset - start))
}

const VENDOR: u16 = 0x1af4;
/// A non-transitional device's identifier is this plus its virtio identifier (clause 4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

const CAPABILITY_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Class code of a device, by its virtio identifier.
fn class(device_id: u16) -> u32 {
    match device_id {
        1 => 0x020000,      // network: Ethernet
        2 | 26 => 0x018000, // block, file system: other mass storage
        3 | 19 => 0x078000, // console, socket: other communication
        8 => 0x010000,      // SCSI host
        16 => 0x038000,     // GPU: other display
        18 => 0x098000,     // input
        25 => 0x040100,     // sound: audio
        _ => 0x00ff00,      // unclassified
    }
}

/// Offsets in the configuration space of what the transport looks at there.
pub(super) struct Capabilities {
    /// The access capability (clause 4.1.4.9).
    pub(super) access: u8,
    /// MSI-X.
    pub(super) msix: u8,
}

impl Capabilities {
    /// Offset of the window of the access capability.
    pub(super) fn access_data(&self) -> u8 {
        self.access + 16
    }
}

/// The body of a `virtio_pci_cap`, behind its identifier and link.
fn capability(kind: u8, len: u8, offset: u64, size: u32) -> Vec<u8> {
    let mut body = vec![len, kind, BAR.index as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(size.to_le_bytes());
    body
}

/// The configuration space of a function that presents `device`.
pub(super) fn config_space(device: &dyn VirtioDevice, vectors: u16) -> (ConfigSpace, Capabilities) {
    let id = device.device_id();
    let identity = Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + id,
        revision: 1,
        class: class(id),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    };
    let mut space = ConfigSpace::new(identity, &[BAR]);
    let mut table = (vectors - 1).to_le_bytes().to_vec();
    table.extend((MSIX_TABLE as u32 | BAR.index as u32).to_le_bytes());
    table.extend((MSIX_PENDING as u32 | BAR.index as u32).to_le_bytes());
    let msix = space.add_capability(msix::CAPABILITY_ID, &table);
    space.make_writable(msix + 2, &msix::CONTROL_WRITABLE.to_le_bytes());

    let whole = REGION_LEN as u32;
    for (kind, offset, size) in [
        (CFG_COMMON, COMMON, COMMON_LEN),
        (CFG_ISR, ISR, 1),
        (CFG_DEVICE, DEVICE, whole),
    ] {
        space.add_capability(CAPABILITY_VENDOR, &capability(kind, 16, offset, size));
    }
    let mut notify = capability(CFG_NOTIFY, 20, NOTIFY, whole);
    notify.extend((NOTIFY_STRIDE as u32).to_le_bytes());
    space.add_capability(CAPABILITY_VENDOR, &notify);

    let mut access = capability(CFG_PCI, 20, 0, 0);
    access.extend([0; 4]);
    let access = space.add_capability(CAPABILITY_VENDOR, &access);
    // bar; offset, length and data.
    space.make_writable(access + 4, &[0xff]);
    space.make_writable(access + 8, &[0xff; 12]);
    let capabilities = Capabilities {
        access: access as u8,
        msix: msix as u8,
    };
    (space, capabilities)
}
