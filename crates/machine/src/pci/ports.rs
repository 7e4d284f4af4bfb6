//! The root's faces on the machine's buses: configuration by ports, by ECAM, and the BAR windows.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::PciFunction;
use super::config::BarDecode;
use crate::bus::{BusDevice, lock};

/// How many devices a bus has.
pub(super) const SLOTS: usize = 32;

/// What is plugged into a slot; always function 0.
#[derive(Clone)]
pub(super) struct Slot {
    pub(super) function: Arc<Mutex<dyn PciFunction>>,
    pub(super) decode: Arc<BarDecode>,
}

/// The bus, fixed once the machine is assembled.
pub(super) type Slots = Arc<[Option<Slot>; SLOTS]>;

/// The configuration space of every function, by the address that both mechanisms share.
struct Configuration(Slots);

impl Configuration {
    /// The function that an access belongs to, if it is there and the access stays within the 256
    /// bytes of a conventional function. Beyond them ECAM reads as ones, which tells the guest that
    /// there is no extended space.
    fn find(&self, device: usize, function: u64, register: u64, len: usize) -> Option<(&Slot, u8)> {
        let slot = self.0.get(device)?.as_ref()?;
        let register = u8::try_from(register).ok()?;
        (function == 0 && usize::from(register) + len <= 256 && len <= 4)
            .then_some((slot, register))
    }

    fn read(&self, device: usize, function: u64, register: u64, data: &mut [u8]) {
        match self.find(device, function, register, data.len()) {
            Some((slot, register)) => lock(&slot.function).read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, device: usize, function: u64, register: u64, data: &[u8]) {
        if let Some((slot, register)) = self.find(device, function, register, data.len()) {
            lock(&slot.function).write_config(register, data);
        }
    }
}

/// Configuration by memory access (PCI Express 3.0, clause 7.2.2).
pub(super) struct Ecam(Configuration);

impl Ecam {
    pub(super) fn new(slots: Slots) -> Self {
        Self(Configuration(slots))
    }
}

/// Device, function and register at an offset of a bus's ECAM range.
fn ecam_address(offset: u64) -> (usize, u64, u64) {
    (
        (offset >> 15 & 0x1f) as usize,
        offset >> 12 & 7,
        offset & 0xfff,
    )
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (device, function, register) = ecam_address(offset);
        self.0.read(device, function, register, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (device, function, register) = ecam_address(offset);
        self.0.write(device, function, register, data);
    }
}

/// The address register of configuration mechanism 1 (PCI Local Bus 3.0, clause 3.2.2.3.2).
pub(super) type ConfigAddress = Arc<AtomicU32>;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device, function and register.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

/// Port CF8. The register answers accesses of four bytes only; the bytes behind the first belong to
/// other devices, the reset control register among them.
pub(super) struct AddressPort(pub(super) ConfigAddress);

impl BusDevice for AddressPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(data) if offset == 0 => *data = self.0.load(Ordering::Relaxed).to_le_bytes(),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Ok(data)) = (offset, data.try_into()) {
            let address = u32::from_le_bytes(data) & ADDRESS_WRITABLE;
            self.0.store(address, Ordering::Relaxed);
        }
    }
}

/// Ports CFC to CFF.
pub(super) struct DataPort {
    address: ConfigAddress,
    configuration: Configuration,
}

impl DataPort {
    pub(super) fn new(address: ConfigAddress, slots: Slots) -> Self {
        Self {
            address,
            configuration: Configuration(slots),
        }
    }

    /// Device, function and register that the address register selects, if there is such a bus.
    fn selected(&self, offset: u64, len: usize) -> Option<(usize, u64, u64)> {
        let address = self.address.load(Ordering::Relaxed);
        let bus = address >> 16 & 0xff;
        (address & ADDRESS_ENABLE != 0 && bus == 0 && offset + len as u64 <= 4).then_some((
            (address >> 11 & 0x1f) as usize,
            u64::from(address >> 8 & 7),
            u64::from(address & 0xfc) + offset,
        ))
    }
}

impl BusDevice for DataPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.selected(offset, data.len()) {
            Some((device, function, register)) => {
                self.configuration.read(device, function, register, data);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((device, function, register)) = self.selected(offset, data.len()) {
            self.configuration.write(device, function, register, data);
        }
    }
}

/// A memory window in which BARs answer.
pub(super) struct Window {
    pub(super) start: u64,
    pub(super) slots: Slots,
}

impl Window {
    fn find(&self, offset: u64) -> Option<(&Slot, usize, u64)> {
        let address = self.start.checked_add(offset)?;
        self.slots.iter().flatten().find_map(|slot| {
            let (bar, offset) = slot.decode.find(address)?;
            Some((slot, bar, offset))
        })
    }
}

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.find(offset) {
            Some((slot, bar, offset)) => lock(&slot.function).read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((slot, bar, offset)) = self.find(offset) {
            lock(&slot.function).write_bar(bar, offset, data);
        }
    }
}
