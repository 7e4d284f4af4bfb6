//! What a driver does request by request, and what a test looks at.

use vm_memory::{Bytes, GuestAddress};

use super::machine::{RINGS, RINGS_LEN, Ring, TestMachine};
use crate::engine::BusAccess;

/// `VIRTIO_F_RING_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;

/// A descriptor.
#[derive(Clone, Copy)]
pub(crate) struct Buffer {
    address: u64,
    len: u32,
    writable: bool,
}

impl Buffer {
    /// Bytes for the device to read.
    pub(crate) fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: false,
        }
    }

    /// Room for the device to write.
    pub(crate) fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: true,
        }
    }
}

impl TestMachine {
    /// Reads the configuration space of the device's function.
    pub(crate) fn config_read<const N: usize>(&self, register: u8) -> [u8; N] {
        let mut data = [0; N];
        self.select(register);
        self.buses
            .port_read(0xcfc + u16::from(register & 3), &mut data);
        data
    }

    /// Everything before `DRIVER_OK`, with INTx.
    pub(crate) fn start_held_back(&mut self, features: u64) {
        assert!(self.set_up(features, |_, _| ()));
    }

    /// [`TestMachine::start`] with INTx.
    pub(crate) fn start_intx(&mut self, features: u64) -> bool {
        self.start_with(features, |_, _| ())
    }

    /// Reads guest memory.
    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .expect("invariant: tests stay in RAM");
        data
    }

    /// Makes a chain of `buffers` available and returns its head.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let rings = RINGS + queue as u64 * RINGS_LEN;
        let mut ring = self.rings[queue].clone();
        let head = ring.next_descriptor;
        for (at, buffer) in buffers.iter().enumerate() {
            let index = ring.next_descriptor;
            ring.next_descriptor = (index + 1) % ring.size;
            let more = u16::from(at + 1 < buffers.len());
            let mut bytes = buffer.address.to_le_bytes().to_vec();
            bytes.extend(buffer.len.to_le_bytes());
            bytes.extend((more | u16::from(buffer.writable) << 1).to_le_bytes());
            bytes.extend(ring.next_descriptor.to_le_bytes());
            self.write(rings + u64::from(index) * 16, &bytes);
        }
        let entry = rings + 0x1004 + u64::from(ring.available % ring.size) * 2;
        self.write(entry, &head.to_le_bytes());
        ring.available = ring.available.wrapping_add(1);
        self.write(rings + 0x1002, &ring.available.to_le_bytes());
        self.rings[queue] = ring;
        head
    }

    /// The used elements (head, bytes written) since the last call. The driver asks to be
    /// interrupted by the next.
    pub(crate) fn take_used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let rings = RINGS + queue as u64 * RINGS_LEN;
        let mut ring = self.rings[queue].clone();
        let index = self.read_u16(rings + 0x2002);
        let mut used = Vec::new();
        while ring.seen != index {
            let entry = rings + 0x2004 + u64::from(ring.seen % ring.size) * 8;
            let len =
                u32::from(self.read_u16(entry + 4)) | u32::from(self.read_u16(entry + 6)) << 16;
            used.push((self.read_u16(entry), len));
            ring.seen = ring.seen.wrapping_add(1);
        }
        let used_event = rings + 0x1004 + u64::from(ring.size) * 2;
        self.write(used_event, &ring.seen.to_le_bytes());
        self.rings[queue] = ring;
        used
    }

    /// Notifies a queue of what was added, unless the device does not ask for it, and runs the event
    /// loop.
    pub(crate) fn kick(&mut self, queue: usize) {
        let rings = RINGS + queue as u64 * RINGS_LEN;
        let Ring {
            size,
            available,
            kicked,
            ..
        } = self.rings[queue];
        let wanted = if self.features & EVENT_IDX != 0 {
            let asked_for = self.read_u16(rings + 0x2004 + u64::from(size) * 8);
            let added = available.wrapping_sub(kicked);
            available.wrapping_sub(asked_for).wrapping_sub(1) < added
        } else {
            self.read_u16(rings + 0x2000) & NO_NOTIFY == 0
        };
        self.rings[queue].kicked = available;
        if wanted {
            self.notify(queue);
        } else {
            self.run();
        }
    }

    fn read_u16(&self, address: u64) -> u16 {
        self.memory
            .read_obj(GuestAddress(address))
            .map(u16::from_le)
            .expect("invariant: the rings are in RAM")
    }

    /// The vectors whose messages arrived since the last call.
    pub(crate) fn messages(&self) -> Vec<u32> {
        let messages = self.interrupts.take_messages();
        messages.into_iter().map(|(_, data)| data).collect()
    }

    /// The address in a descriptor.
    pub(crate) fn descriptor_address(&self, queue: usize, index: u16) -> u64 {
        let at = RINGS + queue as u64 * RINGS_LEN + u64::from(index) * 16;
        let bytes = self.read(at, 8);
        (0..8).rfold(0, |address, byte| address << 8 | u64::from(bytes[byte]))
    }

    pub(crate) fn config_generation(&self) -> u8 {
        let [generation] = self.bar_read(21);
        generation
    }

    pub(crate) fn device_config(&self, offset: u64, len: usize) -> Vec<u8> {
        (offset..offset + len as u64)
            .flat_map(|at| self.bar_read::<1>(0x2000 + at))
            .collect()
    }

    /// The driver enables only these queues.
    pub(crate) fn choose_queues(&mut self, queues: &[u16]) {
        self.chosen = Some(queues.to_vec());
    }

    pub(crate) fn write_device_config(&self, offset: u64, data: &[u8]) {
        self.bar_write(0x2000 + offset, data);
    }
}
