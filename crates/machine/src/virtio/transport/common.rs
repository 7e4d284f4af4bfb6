//! The common configuration structure (virtio 1.2, clause 4.1.4.3) and the device status machine
//! (clause 2.1).
//!
//! ```text
//! 0 ──▶ ACKNOWLEDGE ──▶ DRIVER ──▶ FEATURES_OK ──▶ DRIVER_OK ──▶ (NEEDS_RESET)
//! ▲                                                                   │
//! └──────────────────────── status = 0 ───────────────────────────────┘
//! ```
//!
//! Bits are only ever added, until the driver writes zero. This module keeps the registers and
//! decides; the transport acts on the [`Action`] it gets back.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::memory::GuestMemory;

/// Bits of the device status.
pub(super) mod status {
    pub(in super::super) const DRIVER: u8 = 2;
    pub(in super::super) const DRIVER_OK: u8 = 4;
    pub(in super::super) const FEATURES_OK: u8 = 8;
    pub(in super::super) const NEEDS_RESET: u8 = 64;
}

pub(super) const F_EVENT_IDX: u64 = 1 << 29;
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// A queue as the driver sets it up.
#[derive(Clone, Debug, PartialEq, Eq, minicbor::Encode, minicbor::Decode)]
pub(super) struct QueueSetup {
    #[n(0)]
    pub(super) max_size: u16,
    #[n(1)]
    pub(super) size: u16,
    #[n(2)]
    pub(super) enabled: bool,
    #[n(3)]
    pub(super) descriptors: u64,
    #[n(4)]
    pub(super) driver_ring: u64,
    #[n(5)]
    pub(super) device_ring: u64,
    /// Where the device goes on after a pause.
    #[n(6)]
    pub(super) next_avail: u16,
    /// See `next_avail`.
    #[n(7)]
    pub(super) next_used: u16,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver_ring: 0,
            device_ring: 0,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// The queue to process, if its addresses are aligned and lie in RAM.
    fn build(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver_ring))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device_ring))
            .ok()?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }

    /// Whether a driver can have brought the queue into this state.
    pub(super) fn is_consistent(&self) -> bool {
        self.size == self.max_size || self.size.is_power_of_two() && self.size <= self.max_size
    }
}

/// What the transport has to do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Nothing,
    /// The driver wrote zero to the status.
    Reset,
    /// The driver set `DRIVER_OK`.
    Activate,
    /// Vector of the configuration (`None`) or of a queue.
    SetVector(Option<u16>, u16),
}

/// What a read cannot answer from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Bits(u64),
    Vector(Option<u16>),
    Generation,
}

/// The registers of the structure, with their offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    QueueCount,
    Status,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOffset,
    QueueDescriptors,
    QueueDriver,
    QueueDevice,
}

const REGISTERS: [(Register, u64, usize); 16] = [
    (Register::DeviceFeatureSelect, 0, 4),
    (Register::DeviceFeature, 4, 4),
    (Register::DriverFeatureSelect, 8, 4),
    (Register::DriverFeature, 12, 4),
    (Register::ConfigVector, 16, 2),
    (Register::QueueCount, 18, 2),
    (Register::Status, 20, 1),
    (Register::ConfigGeneration, 21, 1),
    (Register::QueueSelect, 22, 2),
    (Register::QueueSize, 24, 2),
    (Register::QueueVector, 26, 2),
    (Register::QueueEnable, 28, 2),
    (Register::QueueNotifyOffset, 30, 2),
    (Register::QueueDescriptors, 32, 8),
    (Register::QueueDriver, 40, 8),
    (Register::QueueDevice, 48, 8),
];

/// The register that an access falls into, and the byte of it. Access is by a register's own width,
/// or by half of a 64-bit one (clause 4.1.3.1).
fn register(offset: u64, len: usize) -> Option<(Register, u32)> {
    let &(register, start, width) = REGISTERS
        .iter()
        .find(|(_, start, width)| (*start..start + *width as u64).contains(&offset))?;
    let byte = offset - start;
    let whole = byte == 0 && len == width;
    let half = width == 8 && len == 4 && byte.is_multiple_of(4);
    (whole || half).then_some((register, byte as u32))
}

/// The registers.
pub(super) struct Common {
    offered: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueSetup>,
}

impl Common {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().copied().map(QueueSetup::new).collect(),
        }
    }

    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// Whether the driver expects the device to work.
    pub(super) fn live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// Whether a driver may choose `features`: ones on offer, `VIRTIO_F_VERSION_1` among them.
    pub(super) fn offers(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & F_VERSION_1 != 0
    }

    /// The enabled queues, ready to process; `None` if one of them is not valid.
    pub(super) fn build_queues(&self, memory: &GuestMemory) -> Option<Vec<Option<Queue>>> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        self.queues
            .iter()
            .map(|queue| match queue.enabled {
                true => queue.build(memory, event_idx).map(Some),
                false => Some(None),
            })
            .collect()
    }

    /// Notes where the device stopped.
    pub(super) fn note_indices(&mut self, queues: &[Option<Queue>]) {
        for (setup, queue) in self.queues.iter_mut().zip(queues) {
            if let Some(queue) = queue {
                setup.next_avail = queue.next_avail();
                setup.next_used = queue.next_used();
            }
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// What is at `offset`, as its first byte would have it; `None` where nothing is.
    pub(super) fn read(&self, offset: u64, len: usize) -> Option<Value> {
        let (register, byte) = register(offset, len)?;
        let queue = |field: fn(&QueueSetup) -> u64| self.selected().map_or(0, field);
        let bits = match register {
            Register::DeviceFeatureSelect => u64::from(self.device_feature_select),
            Register::DeviceFeature => half(self.offered, self.device_feature_select),
            Register::DriverFeatureSelect => u64::from(self.driver_feature_select),
            Register::DriverFeature => half(self.driver_features, self.driver_feature_select),
            Register::ConfigVector => return Some(Value::Vector(None)),
            Register::QueueCount => self.queues.len() as u64,
            Register::Status => u64::from(self.status),
            Register::ConfigGeneration => return Some(Value::Generation),
            Register::QueueSelect => u64::from(self.queue_select),
            Register::QueueSize => queue(|queue| queue.size.into()),
            Register::QueueVector => return Some(Value::Vector(Some(self.queue_select))),
            Register::QueueEnable => queue(|queue| queue.enabled.into()),
            Register::QueueNotifyOffset => self.selected().map_or(0, |_| self.queue_select.into()),
            Register::QueueDescriptors => queue(|queue| queue.descriptors),
            Register::QueueDriver => queue(|queue| queue.driver_ring),
            Register::QueueDevice => queue(|queue| queue.device_ring),
        };
        Some(Value::Bits(bits >> (8 * byte)))
    }

    /// Takes a write. Read-only registers, wrong widths and writes at the wrong time change nothing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let Some((register, byte)) = register(offset, data.len()) else {
            return Action::Nothing;
        };
        let value = data
            .iter()
            .rfold(0, |value, byte| value << 8 | u64::from(*byte));
        match register {
            Register::DeviceFeatureSelect => self.device_feature_select = value as u32,
            Register::DriverFeatureSelect => self.driver_feature_select = value as u32,
            Register::DriverFeature => self.set_driver_feature(value as u32),
            Register::ConfigVector => return Action::SetVector(None, value as u16),
            Register::Status => return self.set_status(value as u8),
            Register::QueueSelect => self.queue_select = value as u16,
            Register::QueueVector => {
                return Action::SetVector(Some(self.queue_select), value as u16);
            }
            Register::QueueSize
            | Register::QueueEnable
            | Register::QueueDescriptors
            | Register::QueueDriver
            | Register::QueueDevice => {
                let mask = if data.len() == 8 {
                    u64::MAX
                } else {
                    0xffff_ffff
                } << (8 * byte);
                self.set_up_queue(register, value << (8 * byte), mask);
            }
            Register::DeviceFeature
            | Register::QueueCount
            | Register::ConfigGeneration
            | Register::QueueNotifyOffset => {}
        }
        Action::Nothing
    }

    fn set_driver_feature(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            // A bit that does not exist was chosen; FEATURES_OK cannot see it, and it has no
            // meaning to us.
            _ => return,
        };
        self.driver_features =
            self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    fn set_up_queue(&mut self, register: Register, value: u64, mask: u64) {
        // DRIVER_OK fixes the queues: the device got them then.
        if self.status & status::DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled || queue.max_size == 0 {
            return;
        }
        let merge = |old: u64| old & !mask | value & mask;
        match register {
            Register::QueueSize => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            Register::QueueEnable => queue.enabled = value == 1,
            Register::QueueDescriptors => queue.descriptors = merge(queue.descriptors),
            Register::QueueDriver => queue.driver_ring = merge(queue.driver_ring),
            Register::QueueDevice => queue.device_ring = merge(queue.device_ring),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let was = self.status;
        // Only we set NEEDS_RESET, and only a reset clears a bit.
        let mut value = value & !status::NEEDS_RESET | was & status::NEEDS_RESET;
        if was & !value != 0 {
            return Action::Nothing;
        }
        let added = value & !was;
        if added & status::FEATURES_OK != 0
            && (value & status::DRIVER == 0 || !self.offers(self.driver_features))
        {
            value &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && value & status::FEATURES_OK == 0 {
            value &= !status::DRIVER_OK;
        }
        self.status = value;
        match added & value & status::DRIVER_OK {
            0 => Action::Nothing,
            _ => Action::Activate,
        }
    }
}

/// The low or high 32 feature bits.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACKNOWLEDGE: u8 = 1;

    fn common() -> Common {
        Common::new(F_VERSION_1 | F_EVENT_IDX | 1, &[256, 64])
    }

    fn read(common: &Common, offset: u64, len: usize) -> u64 {
        match common.read(offset, len) {
            Some(Value::Bits(bits)) => bits,
            other => panic!("{other:?} at {offset}"),
        }
    }

    fn choose(common: &mut Common, features: u64) {
        for select in 0..2_u32 {
            common.write(8, &select.to_le_bytes());
            common.write(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
    }

    #[test]
    fn features_are_accepted_only_if_offered_and_modern() {
        for (chosen, accepted) in [
            (F_VERSION_1, true),
            (F_VERSION_1 | F_EVENT_IDX | 1, true),
            (0, false),
            (1, false),
            (F_VERSION_1 | 2, false),
            (F_VERSION_1 | 1 << 63, false),
        ] {
            let mut common = common();
            common.write(20, &[ACKNOWLEDGE | status::DRIVER]);
            choose(&mut common, chosen);
            common.write(20, &[ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK]);
            let ok = read(&common, 20, 1) as u8 & status::FEATURES_OK != 0;
            assert_eq!(ok, accepted, "{chosen:#x}");
            let action = common.write(20, &[ACKNOWLEDGE | 2 | 4 | 8]);
            let activated = action == Action::Activate;
            // Without FEATURES_OK this write sets it if it can; the same rule decides.
            assert_eq!(activated, accepted, "{chosen:#x}");
        }
    }

    #[test]
    fn features_are_fixed_once_accepted() {
        let mut common = common();
        choose(&mut common, F_VERSION_1);
        common.write(20, &[ACKNOWLEDGE | 2 | 8]);
        choose(&mut common, F_VERSION_1 | 2);
        assert_eq!(common.driver_features, F_VERSION_1);
    }

    #[test]
    fn status_bits_are_only_added_until_reset() {
        let mut common = common();
        for (written, reads, action) in [
            (1, 1, Action::Nothing),
            (3, 3, Action::Nothing),
            (1, 3, Action::Nothing),
            (7, 3, Action::Nothing),
            (3 | 64, 3, Action::Nothing),
            (0x83, 0x83, Action::Nothing),
            (0, 0x83, Action::Reset),
        ] {
            assert_eq!(common.write(20, &[written]), action, "{written:#x}");
            assert_eq!(common.status, reads, "{written:#x}");
        }
    }

    #[test]
    fn a_queue_is_set_up_by_halves_and_fixed_when_enabled() {
        let mut common = common();
        common.write(22, &1_u16.to_le_bytes());
        assert_eq!(read(&common, 24, 2), 64);
        for (size, reads) in [(65_u16, 64), (128, 64), (0, 64), (16, 16)] {
            common.write(24, &size.to_le_bytes());
            assert_eq!(read(&common, 24, 2), reads);
        }
        common.write(32, &0x1234_5000_u32.to_le_bytes());
        common.write(36, &0x9_u32.to_le_bytes());
        assert_eq!(read(&common, 32, 8), 0x9_1234_5000);
        assert_eq!(read(&common, 36, 4), 0x9);
        common.write(28, &1_u16.to_le_bytes());
        common.write(40, &0x7000_u64.to_le_bytes());
        assert_eq!(read(&common, 40, 8), 0);
        common.write(22, &9_u16.to_le_bytes());
        assert_eq!(
            read(&common, 24, 2),
            0,
            "a queue that is not there has no size"
        );
        common.write(28, &1_u16.to_le_bytes());
    }

    #[test]
    fn only_whole_registers_answer() {
        let mut common = common();
        for (offset, len) in [(0, 1), (1, 4), (20, 2), (22, 1), (33, 4), (60, 4), (64, 1)] {
            assert_eq!(common.read(offset, len), None);
            assert_eq!(common.write(offset, &vec![0; len]), Action::Nothing);
        }
        assert_eq!(read(&common, 18, 2), 2);
    }
}
