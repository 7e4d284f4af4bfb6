//! The virtio-blk device (virtio 1.2, clause 5.2) that an export presents: features and configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::request::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR_SHIFT};
use super::stats::Counters;
use super::{Event, ExportOptions};
use crate::store::{Geometry, Store};

/// The most data descriptors of one request. With header and status the chain is as long as the
/// smallest usual ring, which a driver must not exceed (virtio 1.2, clause 2.7.5.3.1).
const SEGMENTS_MAX: u32 = 126;

/// Bytes of the configuration space (`struct virtio_blk_config` up to the write-zeroes fields).
pub(crate) const CONFIG_BYTES: usize = 60;

/// Where `writeback` is in the configuration space: the only field that a driver may write.
pub(crate) const WRITEBACK_AT: usize = 32;

/// The state that all connections and queues of an export share.
pub(crate) struct Device {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) geometry: Geometry,
    pub(crate) options: ExportOptions,
    pub(crate) counters: Counters,
    /// Whether writes may be acknowledged before they are durable. It stays over a reconnection: the
    /// frontend does not tell it again.
    pub(crate) writeback: AtomicBool,
}

impl Device {
    pub(crate) fn new(store: Arc<dyn Store>, options: ExportOptions) -> Self {
        Self {
            geometry: store.geometry(),
            store,
            options,
            counters: Counters::default(),
            writeback: AtomicBool::new(true),
        }
    }

    pub(crate) fn report(&self, event: Event) {
        if let Some(observer) = &self.options.observer {
            observer(&event);
        }
    }

    /// The feature bits on offer.
    pub(crate) fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_TOPOLOGY,
            blk::VIRTIO_BLK_F_FLUSH,
            blk::VIRTIO_BLK_F_CONFIG_WCE,
            blk::VIRTIO_BLK_F_MQ,
        ];
        match self.geometry.read_only {
            true => bits.push(blk::VIRTIO_BLK_F_RO),
            false => bits.extend([blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES]),
        }
        let transport =
            VhostUserVirtioFeatures::LOG_ALL | VhostUserVirtioFeatures::PROTOCOL_FEATURES;
        bits.iter()
            .fold(transport.bits(), |all, bit| all | 1 << bit)
    }

    /// The protocol features on offer.
    pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The configuration space as the driver reads it.
    pub(crate) fn config(&self) -> [u8; CONFIG_BYTES] {
        let geometry = &self.geometry;
        let physical_blocks = geometry.optimal_block_size / geometry.block_size;
        let discard_alignment = geometry.optimal_block_size >> SECTOR_SHIFT;
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(geometry.capacity_bytes >> SECTOR_SHIFT).to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &geometry.block_size.to_le_bytes());
        put(24, &[physical_blocks.ilog2() as u8]); // physical_block_exp
        put(26, &(physical_blocks as u16).to_le_bytes()); // min_io_size, in blocks
        put(
            WRITEBACK_AT,
            &[self.writeback.load(Ordering::SeqCst).into()],
        );
        put(34, &self.options.queues.to_le_bytes());
        if !geometry.read_only {
            put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
            put(40, &RANGES_MAX.to_le_bytes()); // max_discard_seg
            put(44, &discard_alignment.to_le_bytes());
            put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
            put(52, &RANGES_MAX.to_le_bytes()); // max_write_zeroes_seg
            put(56, &[1]); // write_zeroes_may_unmap
        }
        config
    }

    /// Whether a write must be durable before it is acknowledged, with the features `acked`
    /// (virtio 1.2, clause 5.2.5.2: a device without either feature is write-through).
    pub(crate) fn write_through(&self, acked: u64) -> bool {
        let has = |bit: u32| acked & 1 << bit != 0;
        if has(blk::VIRTIO_BLK_F_CONFIG_WCE) {
            !self.writeback.load(Ordering::SeqCst)
        } else {
            !has(blk::VIRTIO_BLK_F_FLUSH)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::simulate::disk;

    fn device() -> Device {
        Device::new(disk(), ExportOptions::default())
    }

    #[test]
    fn a_device_is_write_through_unless_the_driver_can_flush() {
        const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
        const WCE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
        let device = device();
        for (acked, writeback, write_through) in [
            (0, true, true),
            (FLUSH, true, false),
            (FLUSH | WCE, true, false),
            (FLUSH | WCE, false, true),
            (FLUSH, false, false),
        ] {
            device.writeback.store(writeback, Ordering::SeqCst);
            assert_eq!(
                device.write_through(acked),
                write_through,
                "{acked:#x} {writeback}"
            );
        }
    }

    #[test]
    fn the_configuration_space_is_the_specified_one() {
        let config = device().config();
        let at = |offset: usize| u32::from_le_bytes(config[offset..offset + 4].try_into().unwrap());
        assert_eq!(at(0), 64); // capacity in sectors
        assert_eq!(at(12), 126); // seg_max
        assert_eq!(at(20), 512); // blk_size
        assert_eq!(config[24..28], [3, 0, 8, 0]); // 4 KiB in blocks: exponent, offset, min_io_size
        assert_eq!(config[32], 1); // writeback
        assert_eq!(config[34..36], [16, 0]); // num_queues
        assert_eq!([at(36), at(40), at(44)], [1 << 22, 32, 8]); // discard
        assert_eq!([at(48), at(52)], [1 << 22, 32]); // write zeroes
        assert_eq!(config[56], 1); // write_zeroes_may_unmap
    }
}
