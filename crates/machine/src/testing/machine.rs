//! The machine, and what a driver does to it.

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use super::TestInterrupts;
use crate::bus::{Buses, lock};
use crate::device::{Device, SavedState};
use crate::engine::BusAccess;
use crate::layout::PCI_WINDOW_32;
use crate::memory::GuestMemory;
use crate::pci::{PciRoot, Subscriber};
use crate::virtio::transport::{SharedVirtioDevice, VirtioPci};

/// Bytes of RAM.
pub(crate) const RAM: u64 = 4 << 20;
/// Where the rings of the first queue are; each queue has [`RINGS_LEN`].
pub(crate) const RINGS: u64 = 0x10000;
/// Descriptors, then the driver's ring, then the device's.
pub(crate) const RINGS_LEN: u64 = 0x3000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_LEN: u64 = 0x1_0000;
const SLOT: u8 = 5;
const BAR: u64 = PCI_WINDOW_32.start;
const MESSAGE: u64 = 0xfee0_0000;

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

/// The driver's side of a queue.
#[derive(Clone, Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

/// A machine with one virtio device in slot 5.
pub(crate) struct TestMachine {
    pub(crate) buses: Buses,
    pub(crate) memory: GuestMemory,
    pub(crate) interrupts: TestInterrupts,
    pub(crate) devices: Vec<Arc<Mutex<dyn Device>>>,
    events: EventManager<Subscriber>,
    rings: Vec<Ring>,
    /// The queues that the driver enables, if not all.
    chosen: Option<Vec<u16>>,
}

impl TestMachine {
    pub(crate) fn new(device: SharedVirtioDevice) -> Self {
        let memory = crate::memory::allocate(mica_base::units::Bytes(RAM), &Default::default())
            .expect("invariant: the host has a few MiB");
        Self::with_memory(device, memory)
    }

    fn with_memory(device: SharedVirtioDevice, memory: GuestMemory) -> Self {
        let interrupts = TestInterrupts::default();
        let mut root = PciRoot::new(RAM, &interrupts);
        let function = VirtioPci::new(device, memory.clone(), Arc::new(interrupts.clone()))
            .expect("invariant: the stand-in has vectors");
        root.add(SLOT, function)
            .expect("invariant: the slot is free");
        let devices = root.devices();
        let mut events = EventManager::new().expect("invariant: descriptors are left");
        for subscriber in root.subscribers() {
            events.add_subscriber(subscriber);
        }
        let mut buses = Buses::default();
        root.attach(&mut buses)
            .expect("invariant: the buses are empty");
        let machine = Self {
            buses,
            memory,
            interrupts,
            devices,
            events,
            rings: Vec::new(),
            chosen: None,
        };
        // Memory decoding and bus mastering; the BAR is the first in its window.
        machine.config_write(0x04, &[6, 0]);
        machine
    }

    /// Reads the configuration space of the device's function.
    pub(crate) fn config_read<const N: usize>(&self, register: u8) -> [u8; N] {
        let mut data = [0; N];
        self.select(register);
        self.buses
            .port_read(0xcfc + u16::from(register & 3), &mut data);
        data
    }

    /// Writes the configuration space of the device's function.
    pub(crate) fn config_write(&self, register: u8, data: &[u8]) {
        self.select(register);
        self.buses.port_write(0xcfc + u16::from(register & 3), data);
    }

    fn select(&self, register: u8) {
        let address = 1 << 31 | u32::from(SLOT) << 11 | u32::from(register & !3);
        self.buses.port_write(0xcf8, &address.to_le_bytes());
    }

    /// Reads the BAR.
    pub(crate) fn bar_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.buses.memory_read(BAR + offset, &mut data);
        data
    }

    /// Writes the BAR.
    pub(crate) fn bar_write(&self, offset: u64, data: &[u8]) {
        self.buses.memory_write(BAR + offset, data);
    }

    /// Enables MSI-X with vector `n` sending the data `n`.
    pub(crate) fn enable_msix(&self, vectors: u16) {
        for vector in 0..vectors {
            let entry = 0x4000 + 16 * u64::from(vector);
            self.bar_write(entry, &MESSAGE.to_le_bytes());
            self.bar_write(entry + 8, &u64::from(vector).to_le_bytes());
        }
        self.config_write(0x42, &[0, 0x80]);
    }

    /// Does what a driver does up to `DRIVER_OK`, with MSI-X: vector 0 for the configuration, then
    /// one for each queue. False if the device refuses.
    pub(crate) fn start(&mut self, features: u64) -> bool {
        let queues = u16::from_le_bytes(self.bar_read(18));
        self.enable_msix(queues + 1);
        self.start_with(features, |machine, queue| match queue {
            None => machine.bar_write(16, &[0, 0]),
            Some(queue) => machine.bar_write(26, &(queue + 1).to_le_bytes()),
        })
    }

    /// The same with INTx.
    pub(crate) fn start_intx(&mut self, features: u64) -> bool {
        self.start_with(features, |_, _| ())
    }

    fn start_with(&mut self, features: u64, set_vector: impl Fn(&Self, Option<u16>)) -> bool {
        for status in [0, 1, 3_u8] {
            self.bar_write(20, &[status]);
        }
        self.choose_features(features);
        self.bar_write(20, &[0xb]);
        if self.bar_read(20) != [0xb] {
            return false;
        }
        set_vector(self, None);
        let queues = u16::from_le_bytes(self.bar_read(18));
        self.rings = (0..queues)
            .map(|queue| {
                self.bar_write(22, &queue.to_le_bytes());
                if self.chosen.as_ref().is_some_and(|c| !c.contains(&queue)) {
                    return Ring::default();
                }
                set_vector(self, Some(queue));
                self.set_up_queue(queue)
            })
            .collect();
        self.bar_write(20, &[0xf]);
        self.bar_read(20) == [0xf]
    }

    /// Writes the driver's feature bits.
    pub(crate) fn choose_features(&self, features: u64) {
        for select in 0..2_u32 {
            self.bar_write(8, &select.to_le_bytes());
            self.bar_write(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
    }

    fn set_up_queue(&self, queue: u16) -> Ring {
        let size = u16::from_le_bytes(self.bar_read(24)).min(128);
        let rings = RINGS + u64::from(queue) * RINGS_LEN;
        self.write(rings, &[0; RINGS_LEN as usize]);
        self.bar_write(24, &size.to_le_bytes());
        for (register, part) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
            self.bar_write(register, &(rings + part).to_le_bytes());
        }
        self.bar_write(28, &[1, 0]);
        Ring {
            size,
            ..Ring::default()
        }
    }

    /// A place for a buffer of up to 64 KiB; its first `clear` bytes are zeroed.
    pub(crate) fn buffer(&self, index: u64, clear: usize) -> u64 {
        let at = BUFFERS + index * BUFFER_LEN;
        self.write(at, &vec![0; clear]);
        at
    }

    /// Reads guest memory.
    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .expect("invariant: tests stay in RAM");
        data
    }

    /// Writes guest memory.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .expect("invariant: tests stay in RAM");
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

    /// Notifies a queue, through its doorbell if it has one, and runs the event loop.
    pub(crate) fn kick(&mut self, queue: usize) {
        let address = BAR + 0x3000 + 4 * queue as u64;
        if !self.interrupts.ring(address) {
            self.buses
                .memory_write(address, &(queue as u16).to_le_bytes());
        }
        self.run();
    }

    /// Runs the event loop until nothing is left to do.
    pub(crate) fn run(&mut self) {
        // A device that never comes to rest is a fault; the bound makes a test say so.
        for _ in 0..10_000 {
            match self.events.run_with_timeout(0) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => panic!("the event loop fails: {error}"),
            }
        }
        panic!("a device does not come to rest");
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

    fn read_u16(&self, address: u64) -> u16 {
        self.memory
            .read_obj(GuestAddress(address))
            .map(u16::from_le)
            .expect("invariant: the rings are in RAM")
    }

    /// Saves, and restores into a machine with `device` and the same memory, which then runs.
    pub(crate) fn migrate(self, device: SharedVirtioDevice) -> Self {
        let saved = self.save();
        let mut copy = Self::with_memory(device, self.memory);
        copy.rings = self.rings;
        for (device, state) in copy.devices.iter().zip(&saved) {
            let mut device = lock(device);
            if let Err(error) = device.restore(state) {
                panic!("{} refuses its state: {error}", device.name());
            }
            assert_eq!(&device.save(), state, "{}", device.name());
        }
        for device in &copy.devices {
            lock(device)
                .resume()
                .expect("invariant: the queues are valid");
        }
        copy.run();
        copy
    }

    /// Pauses the machine and saves every device.
    pub(crate) fn save(&self) -> Vec<SavedState> {
        let save = |device: &Arc<Mutex<dyn Device>>| {
            let mut device = lock(device);
            device
                .pause()
                .expect("invariant: the device has no backend");
            device.save()
        };
        self.devices.iter().map(save).collect()
    }
}

#[cfg(test)]
impl TestMachine {
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
