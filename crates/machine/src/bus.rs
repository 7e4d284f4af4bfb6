//! The machine's two address buses: ports and physical memory outside RAM.
//!
//! A [`Bus`] is built once, while the machine is assembled, and never changes after that, so that a
//! vCPU finds a device without taking a lock. What moves at run time (PCI BARs) moves inside the
//! device that owns the whole window.
//!
//! An address nobody claims never ends the VM: it reads as ones and swallows writes, as on a board
//! with nothing behind the address. Each such access is counted, and the address is named in the
//! log once.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::BusAccess;

/// What answers reads and writes in a range of addresses.
///
/// `offset` counts from the start of the range that the access fell into; `data` is 1, 2, 4 or 8
/// bytes long, in the guest's (little-endian) order. A device answers every width: what the real
/// part does not support reads as ones.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device on a bus, shared with whoever else drives it (the event loop, the control socket).
pub type SharedBusDevice = Arc<Mutex<dyn BusDevice>>;

/// Two devices claim the same address.
#[derive(Debug, thiserror::Error)]
#[error("bus range {start:#x}+{len:#x} overlaps the range at {other:#x}")]
pub struct RangeTaken {
    start: u64,
    len: u64,
    other: u64,
}

/// How many different unclaimed addresses are remembered, and so logged, before the rest is only
/// counted: a guest that scans its address space must not grow our memory.
const MAX_NAMED_UNCLAIMED: usize = 64;

/// One address space: ranges and what answers in them.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, SharedBusDevice)>,
    unclaimed: Unclaimed,
}

impl Bus {
    /// Puts `device` at `start`, for `len` addresses.
    ///
    /// # Errors
    ///
    /// [`RangeTaken`] if any of the addresses has an owner already.
    pub fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: SharedBusDevice,
    ) -> Result<(), RangeTaken> {
        let below = self.ranges.range(..start.saturating_add(len)).next_back();
        if let Some((&other, &(other_len, _))) = below
            && other + other_len > start
        {
            return Err(RangeTaken { start, len, other });
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(u64, &SharedBusDevice)> {
        let (&start, (len, device)) = self.ranges.range(..=address).next_back()?;
        (address - start < *len).then_some((address - start, device))
    }

    /// Reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                data.fill(0xff);
                self.unclaimed.note(address);
            }
        }
    }

    /// Writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(device).write(offset, data),
            None => self.unclaimed.note(address),
        }
    }

    /// Accesses to addresses that nobody claims, so far.
    #[must_use]
    pub fn unclaimed_accesses(&self) -> u64 {
        self.unclaimed.count.load(Ordering::Relaxed)
    }

    /// The distinct unclaimed addresses seen since the last call, for the log.
    #[must_use]
    pub fn take_unclaimed_addresses(&self) -> Vec<u64> {
        std::mem::take(&mut self.unclaimed.seen().fresh)
    }
}

pub(crate) fn lock<T: ?Sized>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A device whose lock is poisoned has panicked in another thread, which ends the VM there; until
    // it has, its last state is as good an answer as any.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Unclaimed {
    count: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    all: HashSet<u64>,
    fresh: Vec<u64>,
}

impl Unclaimed {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    fn note(&self, address: u64) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut seen = self.seen();
        if seen.all.len() < MAX_NAMED_UNCLAIMED && seen.all.insert(address) {
            seen.fresh.push(address);
        }
    }
}

/// Both buses of a machine, as a vCPU sees them.
#[derive(Default)]
pub struct Buses {
    /// The 64 Ki I/O ports.
    pub ports: Bus,
    /// Physical addresses outside RAM.
    pub memory: Bus,
}

impl BusAccess for Buses {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }

    fn memory_read(&self, address: u64, data: &mut [u8]) {
        self.memory.read(address, data);
    }

    fn memory_write(&self, address: u64, data: &[u8]) {
        self.memory.write(address, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers reads with the offset and remembers the last write.
    #[derive(Default)]
    struct Echo {
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written = Some((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_owner_of_its_address() {
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = Bus::default();
        bus.insert(0x3f8, 8, echo.clone()).unwrap();
        let mut byte = [0];
        bus.read(0x3fd, &mut byte);
        assert_eq!(byte, [5]);
        bus.write(0x3ff, &[9]);
        assert_eq!(echo.lock().unwrap().written, Some((7, vec![9])));
        assert_eq!(bus.unclaimed_accesses(), 0);
    }

    #[test]
    fn an_unclaimed_address_reads_as_ones_and_is_named_once() {
        let bus = Bus::default();
        let mut data = [0; 4];
        bus.read(0x80, &mut data);
        bus.write(0x80, &[1]);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(bus.unclaimed_accesses(), 2);
        assert_eq!(bus.take_unclaimed_addresses(), [0x80]);
        assert!(bus.take_unclaimed_addresses().is_empty());
    }

    #[test]
    fn a_scan_of_the_address_space_does_not_grow_the_log() {
        let bus = Bus::default();
        for address in 0..100_000 {
            bus.write(address, &[0]);
        }
        assert_eq!(bus.take_unclaimed_addresses().len(), MAX_NAMED_UNCLAIMED);
    }

    #[test]
    fn ranges_may_touch_but_not_overlap() {
        let device = || Arc::new(Mutex::new(Echo::default()));
        let mut bus = Bus::default();
        bus.insert(0x60, 1, device()).unwrap();
        bus.insert(0x64, 1, device()).unwrap();
        bus.insert(0x61, 3, device()).unwrap();
        assert!(bus.insert(0x5f, 2, device()).is_err());
        assert!(bus.insert(0x62, 1, device()).is_err());
        assert!(bus.insert(0x5f, 0x100, device()).is_err());
    }
}
