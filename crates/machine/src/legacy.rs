//! The PC's own devices, as far as a stock kernel or firmware touches them.
//!
//! Each is a byte-wide part on the I/O ports ([`PortDevice`]) with a [`crate::device::Device`] life.
//! A device does nothing on its own: a vCPU's access, the event loop or the control socket calls it
//! under its lock, and it drives its interrupt line before it returns.
//!
//! | device | ports | interrupt |
//! |---|---|---|
//! | [`Serial`] | 8 at a base, COM1 at 3F8h | GSI 4 |
//! | [`I8042`] with [`Keyboard`] and [`Mouse`] | 60h, 64h | GSI 1, 12 |
//! | [`Rtc`] | 70h, 71h | GSI 8 |
//! | [`Power`] | 600h-60Bh, 620h-623h, CF9h | SCI, GSI 9 |
//! | [`PvPanic`] | 505h | none |

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::{Bus, BusDevice, RangeTaken};

pub mod fuzz;
mod i8042;
mod keyboard;
mod mouse;
mod power;
mod pvpanic;
mod rtc;
mod serial;

pub use i8042::I8042;
pub use keyboard::{Key, Keyboard};
pub use mouse::{Mouse, PointerEvent};
pub use power::{Power, PowerEvent, PowerSink};
pub(crate) use power::{RESET_VALUE, SLEEP_TYPE_S5};
pub use pvpanic::PvPanic;
pub use rtc::Rtc;
pub use serial::Serial;

/// A device on I/O ports, addressed by absolute port number.
///
/// The parts are eight bits wide; a wider access is a series of byte accesses to successive ports,
/// as the ISA bus makes of it, unless the device says otherwise.
pub trait PortDevice: Send {
    /// The ports that the device answers: the first of each run, and how many.
    fn ports(&self) -> Vec<(u16, u16)>;

    /// Reads the register at `port`.
    fn read_byte(&mut self, port: u16) -> u8;

    /// Writes the register at `port`.
    fn write_byte(&mut self, port: u16, value: u8);

    /// Reads `data.len()` bytes at `port`.
    fn read(&mut self, port: u16, data: &mut [u8]) {
        let mut port = port;
        for byte in data {
            *byte = self.read_byte(port);
            port = port.wrapping_add(1);
        }
    }

    /// Writes `data` at `port`.
    fn write(&mut self, port: u16, data: &[u8]) {
        let mut port = port;
        for &byte in data {
            self.write_byte(port, byte);
            port = port.wrapping_add(1);
        }
    }
}

/// Puts all of `device`'s ports on the bus.
///
/// # Errors
///
/// [`RangeTaken`] if another device has one of them; ports before that one stay attached.
pub fn attach<D: PortDevice + 'static>(
    bus: &mut Bus,
    device: &Arc<Mutex<D>>,
) -> Result<(), RangeTaken> {
    let ranges = lock(device).ports();
    for (base, count) in ranges {
        let window = Window {
            base,
            device: Arc::clone(device),
        };
        bus.insert(base.into(), count.into(), Arc::new(Mutex::new(window)))?;
    }
    Ok(())
}

/// One of a device's port ranges: the bus counts from its start, the device in absolute ports.
struct Window<D> {
    base: u16,
    device: Arc<Mutex<D>>,
}

impl<D> Window<D> {
    fn port(&self, offset: u64) -> u16 {
        // The bus hands out offsets inside the range only.
        self.base.wrapping_add(offset as u16)
    }
}

impl<D: PortDevice> BusDevice for Window<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.device).read(self.port(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.device).write(self.port(offset), data);
    }
}

fn lock<T: ?Sized>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // As on the bus: who panicked inside the device has ended the VM already.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of this folder share.

    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use crate::device::Device;
    use crate::engine::InterruptLine;

    use super::{PortDevice, PowerEvent, PowerSink};

    /// An interrupt line that remembers its level and counts its rises.
    #[derive(Default)]
    pub(crate) struct Line {
        level: AtomicBool,
        rises: AtomicU32,
    }

    impl Line {
        pub(crate) fn new() -> Arc<Self> {
            Arc::default()
        }

        pub(crate) fn is_high(&self) -> bool {
            self.level.load(Ordering::Relaxed)
        }

        pub(crate) fn rises(&self) -> u32 {
            self.rises.load(Ordering::Relaxed)
        }
    }

    impl InterruptLine for Line {
        fn set(&self, level: bool) {
            if !self.level.swap(level, Ordering::Relaxed) && level {
                self.rises.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Remembers what was requested.
    #[derive(Default)]
    pub(crate) struct Requests(Mutex<Vec<PowerEvent>>);

    impl Requests {
        pub(crate) fn take(&self) -> Vec<PowerEvent> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl PowerSink for Requests {
        fn request(&self, event: PowerEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    pub(crate) fn write_all(device: &mut impl PortDevice, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            device.write_byte(port, value);
        }
    }

    /// The saved state of `from` passes through `into` unchanged.
    #[track_caller]
    pub(crate) fn check_round_trip(from: &dyn Device, into: &mut dyn Device) {
        let saved = from.save();
        assert_ne!(into.save(), saved, "the fresh device should differ");
        into.restore(&saved).unwrap();
        assert_eq!(into.save(), saved);

        let mut newer = saved.clone();
        newer.version += 1;
        assert!(into.restore(&newer).is_err());
        let mut cut = saved.clone();
        cut.body.pop();
        assert!(into.restore(&cut).is_err());
        assert_eq!(into.save(), saved, "a refused state must change nothing");
    }
}
