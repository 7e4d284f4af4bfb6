//! The root complex: slots, BAR assignment, interrupt wiring.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use minicbor::{Decode, Encode};

use super::config::BarSpec;
use super::host_bridge::HostBridge;
use super::intx::{Intx, SharedLine};
use super::ports::{AddressPort, ConfigAddress, DataPort, Ecam, SLOTS, Slot, Slots, Window};
use super::{PciFunction, Wiring};
use crate::bus::{Buses, RangeTaken, SharedBusDevice, lock};
use crate::device::{Device, RestoreError, SavedState};
use crate::engine::InterruptSource;
use crate::layout::{self, gsi, port};

/// Something that runs on the event loop.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A BAR of at most this size is put below 4 GiB, where every kernel reaches it.
const MAX_LOW_BAR: u64 = 64 << 20;

/// Why a function cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// There is no such slot, or it is in use.
    #[error("PCI slot {0} is not free")]
    Slot(u8),
    /// No window has room for the BAR.
    #[error("no room for a PCI BAR of {0:#x} bytes")]
    Full(u64),
}

/// The root complex while the machine is assembled. [`PciRoot::attach`] puts it on the buses.
pub struct PciRoot {
    slots: [Option<Slot>; SLOTS],
    lines: Vec<Arc<SharedLine>>,
    windows: [Range<u64>; 2],
    /// The first address in each window that is not assigned.
    free: [u64; 2],
    address: ConfigAddress,
}

impl PciRoot {
    /// A bus with nothing but its host bridge, for a machine with `ram` bytes of RAM.
    #[must_use]
    pub fn new(ram: u64, interrupts: &dyn InterruptSource) -> Self {
        let windows = [layout::PCI_WINDOW_32, layout::pci_window_64(ram)];
        let mut root = Self {
            slots: std::array::from_fn(|_| None),
            lines: gsi::PCI_INTX
                .map(|gsi| Arc::new(SharedLine::new(interrupts.line(gsi))))
                .collect(),
            free: [windows[0].start, windows[1].start],
            windows,
            address: Arc::new(AtomicU32::new(0)),
        };
        let mut bridge = HostBridge::new();
        root.slots[0] = Some(Slot {
            decode: bridge.config().decode(),
            function: Arc::new(Mutex::new(bridge)),
        });
        root
    }

    /// The global system interrupt of the INTx line of `slot`.
    #[must_use]
    pub fn gsi(slot: u8) -> u32 {
        gsi::PCI_INTX.start + u32::from(slot) % gsi::PCI_INTX.len() as u32
    }

    /// Plugs `function` into `slot` (1 to 31) and assigns its BARs and its interrupt line.
    ///
    /// # Errors
    ///
    /// See [`PciError`].
    pub fn add(
        &mut self,
        slot: u8,
        mut function: impl PciFunction + 'static,
    ) -> Result<(), PciError> {
        let place = usize::from(slot);
        if !matches!(self.slots.get(place), Some(None)) {
            return Err(PciError::Slot(slot));
        }
        let bars: Vec<BarSpec> = function.config().bars().collect();
        for bar in bars {
            let address = self.assign(bar)?;
            function.config().place_bar(bar, address);
        }
        let gsi = Self::gsi(slot);
        function.config().set_interrupt(gsi as u8);
        let line = &self.lines[(gsi - gsi::PCI_INTX.start) as usize];
        function.connect(Wiring {
            intx: Intx::new(line.clone(), slot),
            windows: self.windows.clone(),
        });
        self.slots[place] = Some(Slot {
            decode: function.config().decode(),
            function: Arc::new(Mutex::new(function)),
        });
        Ok(())
    }

    fn assign(&mut self, bar: BarSpec) -> Result<u64, PciError> {
        let window = usize::from(bar.wide && bar.size > MAX_LOW_BAR);
        let full = PciError::Full(bar.size);
        let Some(start) = self.free[window].checked_next_multiple_of(bar.size) else {
            return Err(full);
        };
        match start.checked_add(bar.size) {
            Some(end) if end <= self.windows[window].end => {
                self.free[window] = end;
                Ok(start)
            }
            _ => Err(full),
        }
    }

    /// Every function that was plugged in, by slot, the host bridge first; then the root itself.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<Mutex<dyn Device>>> {
        let functions = self.slots.iter().flatten();
        functions
            .map(|slot| slot.function.clone() as Arc<Mutex<dyn Device>>)
            .chain([Arc::new(Mutex::new(RootState(self.address.clone()))) as _])
            .collect()
    }

    /// What of the functions runs on the event loop.
    #[must_use]
    pub fn subscribers(&self) -> Vec<Subscriber> {
        let functions = self.slots.iter().flatten();
        functions
            .flat_map(|slot| lock(&slot.function).subscribers())
            .collect()
    }

    /// Puts the root on the buses; nothing can be plugged in any more.
    ///
    /// # Errors
    ///
    /// Another device has one of the addresses.
    pub fn attach(self, buses: &mut Buses) -> Result<(), RangeTaken> {
        fn shared(device: impl crate::bus::BusDevice + 'static) -> SharedBusDevice {
            Arc::new(Mutex::new(device))
        }
        let slots: Slots = Arc::new(self.slots);
        let address = port::PCI_CONFIG_ADDRESS.into();
        let ports = &mut buses.ports;
        ports.insert(address, 1, shared(AddressPort(self.address.clone())))?;
        // Linux touches CFB once, to leave configuration mechanism 2.
        ports.insert(address + 3, 1, shared(Swallow))?;
        let data = DataPort::new(self.address, slots.clone());
        ports.insert(port::PCI_CONFIG_DATA.into(), 4, shared(data))?;
        let ecam = layout::PCI_ECAM;
        buses.memory.insert(
            ecam.start,
            ecam.end - ecam.start,
            shared(Ecam::new(slots.clone())),
        )?;
        for Range { start, end } in self.windows {
            let window = Window {
                start,
                slots: slots.clone(),
            };
            buses.memory.insert(start, end - start, shared(window))?;
        }
        Ok(())
    }
}

/// Reads as ones and swallows writes, as an unclaimed address does, but is not counted as one.
struct Swallow;

impl crate::bus::BusDevice for Swallow {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// What the root itself remembers: the configuration address register.
struct RootState(ConfigAddress);

const STATE_VERSION: u16 = 1;

#[derive(Encode, Decode)]
struct State {
    #[n(0)]
    config_address: u32,
}

impl Device for RootState {
    fn name(&self) -> &str {
        "pci-root"
    }

    fn reset(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> SavedState {
        let config_address = self.0.load(Ordering::Relaxed);
        SavedState::new(STATE_VERSION, &State { config_address })
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.read(STATE_VERSION)?;
        self.0.store(state.config_address, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::BusAccess;
    use crate::pci::{ConfigSpace, Identity};
    use crate::testing::TestInterrupts;

    /// A function with one BAR that answers with its offset.
    struct Echo {
        config: ConfigSpace,
        written: Arc<Mutex<Vec<u64>>>,
    }

    impl Echo {
        fn new(size: u64, wide: bool) -> Self {
            let identity = Identity {
                vendor: 0x1234,
                device: 0x5678,
                revision: 0,
                class: 0xff0000,
                subsystem_vendor: 0,
                subsystem: 0,
            };
            let bar = BarSpec {
                index: 0,
                size,
                wide,
            };
            Self {
                config: ConfigSpace::new(identity, &[bar]),
                written: Arc::default(),
            }
        }
    }

    impl Device for Echo {
        fn name(&self) -> &str {
            "echo"
        }
        fn reset(&mut self) {
            self.config.reset();
        }
        fn save(&self) -> SavedState {
            SavedState::new(1, &())
        }
        fn restore(&mut self, _state: &SavedState) -> Result<(), RestoreError> {
            Ok(())
        }
    }

    impl PciFunction for Echo {
        fn config(&mut self) -> &mut ConfigSpace {
            &mut self.config
        }
        fn connect(&mut self, _wiring: Wiring) {}
        fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_bar(&mut self, _bar: usize, offset: u64, _data: &[u8]) {
            self.written.lock().unwrap().push(offset);
        }
    }

    fn machine(functions: Vec<(u8, Echo)>) -> (Buses, Vec<Arc<Mutex<dyn Device>>>) {
        let mut root = PciRoot::new(128 << 20, &TestInterrupts::default());
        for (slot, function) in functions {
            root.add(slot, function).unwrap();
        }
        let devices = root.devices();
        let mut buses = Buses::default();
        root.attach(&mut buses).unwrap();
        (buses, devices)
    }

    fn config_read(buses: &Buses, slot: u32, register: u32) -> u32 {
        buses.port_write(0xcf8, &(1 << 31 | slot << 11 | register).to_le_bytes());
        let mut data = [0; 4];
        buses.port_read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    fn config_write(buses: &Buses, slot: u32, register: u32, value: u32) {
        buses.port_write(0xcf8, &(1 << 31 | slot << 11 | register).to_le_bytes());
        buses.port_write(0xcfc, &value.to_le_bytes());
    }

    #[test]
    fn ports_and_ecam_show_the_same_functions() {
        let (buses, _) = machine(vec![(3, Echo::new(4096, false))]);
        for (slot, id) in [
            (0, 0x0008_1b36),
            (1, u32::MAX),
            (3, 0x5678_1234),
            (31, u32::MAX),
        ] {
            assert_eq!(config_read(&buses, slot, 0), id);
            let mut data = [0; 4];
            buses.memory_read(layout::PCI_ECAM.start + u64::from(slot << 15), &mut data);
            assert_eq!(u32::from_le_bytes(data), id);
        }
        // Function 1, bus 1, and the extended space of function 0 are not there.
        assert_eq!(config_read(&buses, 3, 1 << 8), u32::MAX);
        assert_eq!(config_read(&buses, 3, 1 << 16), u32::MAX);
        let mut data = [0; 4];
        buses.memory_read(layout::PCI_ECAM.start + (3 << 15) + 0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
        // GSI 16 + 3, INTA.
        assert_eq!(config_read(&buses, 3, 0x3c), 0x0113);
        assert_eq!(buses.ports.unclaimed_accesses(), 0);
    }

    #[test]
    fn sub_word_accesses_reach_the_bytes_they_name() {
        let (buses, _) = machine(vec![(3, Echo::new(4096, false))]);
        config_read(&buses, 3, 0);
        let mut half = [0; 2];
        buses.port_read(0xcfe, &mut half);
        assert_eq!(half, [0x78, 0x56]);
        let mut byte = [0];
        buses.port_read(0xcfd, &mut byte);
        assert_eq!(byte, [0x12]);
        // Across the end of the data port.
        buses.port_read(0xcff, &mut half);
        assert_eq!(half, [0xff; 2]);
    }

    #[test]
    fn the_reset_port_inside_the_address_port_stays_free() {
        let (mut buses, _) = machine(vec![]);
        buses
            .ports
            .insert(0xcf9, 1, Arc::new(Mutex::new(Swallow)))
            .unwrap();
        config_read(&buses, 0, 0);
        buses.port_write(0xcf9, &[6]);
        buses.port_write(0xcfb, &[1]);
        let mut data = [0; 4];
        buses.port_read(0xcf8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1 << 31);
        assert_eq!(buses.ports.unclaimed_accesses(), 0);
    }

    #[test]
    fn bars_are_assigned_apart_and_can_be_moved() {
        let echo = Echo::new(0x8000, true);
        let written = echo.written.clone();
        let (buses, _) = machine(vec![
            (1, Echo::new(0x1000, false)),
            (2, echo),
            (4, Echo::new(256 << 20, true)),
        ]);
        let window = layout::PCI_WINDOW_32.start as u32;
        assert_eq!(config_read(&buses, 1, 0x10), window);
        assert_eq!(config_read(&buses, 2, 0x10), window + 0x8004);
        let high = layout::pci_window_64(128 << 20).start;
        assert_eq!(config_read(&buses, 4, 0x14), (high >> 32) as u32);

        let mut byte = [0];
        buses.memory_read(u64::from(window) + 0x8005, &mut byte);
        assert_eq!(byte, [0xff], "decoding is off");
        config_write(&buses, 2, 0x04, 2);
        buses.memory_read(u64::from(window) + 0x8005, &mut byte);
        assert_eq!(byte, [5]);
        config_write(&buses, 2, 0x10, 0);
        config_write(&buses, 2, 0x14, (high >> 32) as u32);
        buses.memory_write(high + 0x42, &[1]);
        assert_eq!(*written.lock().unwrap(), [0x42]);
    }

    #[test]
    fn a_slot_takes_one_function_and_a_window_only_what_fits() {
        let mut root = PciRoot::new(128 << 20, &TestInterrupts::default());
        root.add(1, Echo::new(4096, false)).unwrap();
        for slot in [0, 1, 32] {
            let error = root.add(slot, Echo::new(4096, false)).unwrap_err();
            assert!(matches!(error, PciError::Slot(s) if s == slot));
        }
        let error = root.add(2, Echo::new(1 << 30, false)).unwrap_err();
        assert!(matches!(error, PciError::Full(_)));
        assert!(root.add(2, Echo::new(1 << 40, true)).is_err());
    }

    #[test]
    fn the_root_and_its_bridge_survive_save_and_restore() {
        let (buses, devices) = machine(vec![]);
        config_write(&buses, 0, 0x3c, 0x55);
        let saved: Vec<_> = devices.iter().map(|d| d.lock().unwrap().save()).collect();
        let (copy, copies) = machine(vec![]);
        for (device, state) in copies.iter().zip(&saved) {
            let mut device = device.lock().unwrap();
            device.restore(state).unwrap();
            assert_eq!(&device.save(), state);
            let mut unknown = state.clone();
            unknown.version += 1;
            assert!(device.restore(&unknown).is_err());
        }
        let mut data = [0; 4];
        copy.port_read(0xcfc, &mut data);
        assert_eq!(data[0], 0x55);
        copies
            .iter()
            .for_each(|device| device.lock().unwrap().reset());
        assert_eq!(config_read(&copy, 0, 0x3c), 0);
    }
}
