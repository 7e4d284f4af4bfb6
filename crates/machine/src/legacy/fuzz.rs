//! The entry for the fuzzer: a hostile guest on every legacy port at once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mica_base::clock::ManualClock;

use super::{
    I8042, Key, PointerEvent, Power, PowerEvent, PowerSink, PvPanic, Rtc, Serial, attach, lock,
};
use crate::bus::Bus;
use crate::console::ConsoleSink;
use crate::device::{Device, SavedState};
use crate::engine::InterruptLine;
use crate::layout::port;

struct Nowhere;

impl ConsoleSink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

impl InterruptLine for Nowhere {
    fn set(&self, _level: bool) {}
}

impl PowerSink for Nowhere {
    fn request(&self, _event: PowerEvent) {}
}

/// No device's state grows past this many bytes, whatever the guest does.
const MAX_STATE: usize = 1024;

/// The ports that the operations choose from, and one that nobody claims.
const PORTS: [u16; 24] = [
    port::SERIAL0,
    port::SERIAL0 + 1,
    port::SERIAL0 + 2,
    port::SERIAL0 + 3,
    port::SERIAL0 + 4,
    port::SERIAL0 + 5,
    port::SERIAL0 + 6,
    port::SERIAL0 + 7,
    port::I8042_DATA,
    port::I8042_COMMAND,
    port::RTC,
    port::RTC + 1,
    port::PVPANIC,
    port::PM1_EVENT,
    port::PM1_EVENT + 1,
    port::PM1_EVENT + 2,
    port::PM1_EVENT + 3,
    port::PM1_CONTROL,
    port::PM1_CONTROL + 1,
    port::PM_TIMER,
    port::GPE0,
    port::GPE0 + 3,
    port::RESET_CONTROL,
    0x80,
];

struct Machine {
    clock: Arc<ManualClock>,
    bus: Bus,
    serial: Arc<Mutex<Serial>>,
    i8042: Arc<Mutex<I8042>>,
    rtc: Arc<Mutex<Rtc>>,
    power: Arc<Mutex<Power>>,
    pvpanic: Arc<Mutex<PvPanic>>,
}

impl Machine {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::at(Duration::from_secs(1_795_528_798)));
        let nowhere = Arc::new(Nowhere);
        let serial = Serial::new("serial0", port::SERIAL0, nowhere.clone(), Box::new(Nowhere));
        let i8042 = I8042::new(nowhere.clone(), nowhere.clone(), nowhere.clone(), true);
        let rtc = Rtc::new(clock.clone(), nowhere.clone(), 1 << 30)
            .expect("invariant: the fuzzer has descriptors to spare");
        let power = Power::new(clock.clone(), nowhere.clone(), nowhere.clone());
        let machine = Self {
            clock,
            bus: Bus::default(),
            serial: Arc::new(Mutex::new(serial)),
            i8042: Arc::new(Mutex::new(i8042)),
            rtc: Arc::new(Mutex::new(rtc)),
            power: Arc::new(Mutex::new(power)),
            pvpanic: Arc::new(Mutex::new(PvPanic::new(nowhere))),
        };
        machine.attached()
    }

    fn attached(mut self) -> Self {
        let taken = "invariant: the layout gives each device its own ports";
        attach(&mut self.bus, &self.serial).expect(taken);
        attach(&mut self.bus, &self.i8042).expect(taken);
        attach(&mut self.bus, &self.rtc).expect(taken);
        attach(&mut self.bus, &self.power).expect(taken);
        attach(&mut self.bus, &self.pvpanic).expect(taken);
        self
    }

    fn each(&self, mut visit: impl FnMut(&mut dyn Device)) {
        visit(&mut *lock(&self.serial));
        visit(&mut *lock(&self.i8042));
        visit(&mut *lock(&self.rtc));
        visit(&mut *lock(&self.power));
        visit(&mut *lock(&self.pvpanic));
    }

    /// One operation: what, where, and a value.
    fn step(&self, [operation, place, low, high]: [u8; 4]) {
        let port = PORTS[usize::from(place) % PORTS.len()].into();
        let value = [low, high, low, high];
        let width = [1, 2, 4, 1][usize::from(operation >> 6)];
        match operation & 0x3f {
            0..=31 => self.bus.write(port, &value[..width]),
            32..=47 => self.bus.read(port, &mut [0; 4][..width]),
            48 => {
                let accepted = lock(&self.serial).push_input(&value);
                assert!(accepted <= value.len());
            }
            49 => {
                lock(&self.i8042).press(Key(u16::from_le_bytes([low, high])), place & 1 != 0);
            }
            50 => lock(&self.i8042).move_pointer(PointerEvent {
                right: i32::from(low as i8) << (high & 31),
                up: i32::from(high as i8),
                wheel: i32::from(place as i8),
                buttons: low,
            }),
            51 => {
                lock(&self.power).press_power_button();
            }
            52 => lock(&self.power).raise_gpe(low),
            53 => {
                self.clock
                    .advance(Duration::from_nanos(1 << (low & 63)).min(A_WHILE));
                lock(&self.rtc).tick();
            }
            54 => self.each(|device| device.reset()),
            55 => self.each(check_round_trip),
            _ => {
                self.each(|device| restore_damaged(device, u16::from_le_bytes([low, high]), place))
            }
        }
    }
}

/// The longest step of the clock: a time-out of the guest, not of the universe.
const A_WHILE: Duration = Duration::from_secs(100_000);

/// Restores the device's own state with one byte of it changed: it is refused, or is a possible one.
fn restore_damaged(device: &mut dyn Device, index: u16, value: u8) {
    let saved = device.save();
    let SavedState { version, mut body } = saved.clone();
    if let Some(byte) = body.get_mut(usize::from(index & 0xff)) {
        *byte = value;
    }
    if device.restore(&SavedState { version, body }).is_err() {
        assert_eq!(device.save(), saved, "{} half restored", device.name());
    }
    let _ = device.resume();
}

fn check_round_trip(device: &mut dyn Device) {
    let _ = device.pause();
    let saved = device.save();
    assert!(saved.body.len() <= MAX_STATE, "{} grows", device.name());
    let restored = device.restore(&saved);
    assert!(restored.is_ok(), "{}: {restored:?}", device.name());
    assert_eq!(device.save(), saved, "{}", device.name());
    let _ = device.resume();
}

/// Drives every legacy device by the operations in `data`, four bytes each. Nothing panics, no state
/// grows without bound, and each state passes through save and restore.
#[doc(hidden)]
pub fn fuzz_legacy(data: &[u8]) {
    let machine = Machine::new();
    for operation in data.as_chunks::<4>().0 {
        machine.step(*operation);
    }
    machine.each(check_round_trip);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// splitmix64.
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    #[test]
    fn random_guests_do_no_harm() {
        for seed in 0..300 {
            println!("seed {seed}");
            let mut state = seed;
            let data: Vec<u8> = (0..256)
                .flat_map(|_| random(&mut state).to_le_bytes())
                .collect();
            fuzz_legacy(&data);
        }
    }
}
