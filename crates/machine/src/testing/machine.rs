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

/// The driver's side of a queue.
#[derive(Clone, Default)]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "a fuzzer writes the rings itself")
)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) next_descriptor: u16,
    pub(super) available: u16,
    pub(super) seen: u16,
    pub(super) kicked: u16,
}

/// A machine with one virtio device in slot 5.
pub(crate) struct TestMachine {
    pub(crate) buses: Buses,
    pub(crate) memory: GuestMemory,
    pub(crate) interrupts: TestInterrupts,
    pub(crate) devices: Vec<Arc<Mutex<dyn Device>>>,
    events: EventManager<Subscriber>,
    pub(super) rings: Vec<Ring>,
    /// What the driver has chosen.
    pub(super) features: u64,
    /// The queues that the driver enables, if not all.
    pub(super) chosen: Option<Vec<u16>>,
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
            features: 0,
            chosen: None,
        };
        // Memory decoding and bus mastering; the BAR is the first in its window.
        machine.config_write(0x04, &[6, 0]);
        machine
    }

    /// Writes the configuration space of the device's function.
    pub(crate) fn config_write(&self, register: u8, data: &[u8]) {
        self.select(register);
        self.buses.port_write(0xcfc + u16::from(register & 3), data);
    }

    pub(super) fn select(&self, register: u8) {
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

    pub(super) fn start_with(
        &mut self,
        features: u64,
        set_vector: impl Fn(&Self, Option<u16>),
    ) -> bool {
        if !self.set_up(features, set_vector) {
            return false;
        }
        self.bar_write(20, &[0xf]);
        self.bar_read(20) == [0xf]
    }

    /// Everything before `DRIVER_OK`.
    pub(super) fn set_up(
        &mut self,
        features: u64,
        set_vector: impl Fn(&Self, Option<u16>),
    ) -> bool {
        for status in [0, 1, 3_u8] {
            self.bar_write(20, &[status]);
        }
        self.features = features;
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
        true
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

    /// Writes guest memory.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .expect("invariant: tests stay in RAM");
    }

    /// Notifies a queue, through its doorbell if it has one, and runs the event loop.
    pub(crate) fn notify(&mut self, queue: usize) {
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

    /// Saves, and restores into a machine with `device` and the same memory, which then runs.
    pub(crate) fn migrate(self, device: SharedVirtioDevice) -> Self {
        let saved = self.save();
        let mut copy = Self::with_memory(device, self.memory);
        copy.rings = self.rings;
        copy.features = self.features;
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

    /// Whether the device's queues are such that a restored machine can go on with them: an
    /// arbitrary driver may have set them up anywhere.
    pub(crate) fn is_restorable(&self) -> bool {
        self.save();
        self.devices
            .iter()
            .all(|device| lock(device).resume().is_ok())
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
