//! The devices' queues under arbitrary rings and buffers.

use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex};

use super::balloon::Balloon;
use super::console::Console;
use super::entropy::Entropy;
use super::transport::SharedVirtioDevice;
use super::vsock::Vsock;
use crate::bus::lock;
use crate::console::ConsoleSink;
use crate::testing::{Input, RINGS, TestMachine};

const VERSION_1: u64 = 1 << 32;

struct Nowhere;

impl ConsoleSink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

/// One of the devices, with a host side that has something to say.
fn device(which: u8) -> std::io::Result<SharedVirtioDevice> {
    Ok(match which % 4 {
        0 => Arc::new(Mutex::new(Entropy::new("rng0")?)),
        1 => {
            let (reader, mut writer) = std::io::pipe()?;
            writer.write_all(b"input of the console")?;
            let console = Console::new("console0", Some(reader.into()), Box::new(Nowhere))?;
            Arc::new(Mutex::new(console))
        }
        2 => Arc::new(Mutex::new(Balloon::new("balloon0")?)),
        _ => {
            let connect = Box::new(|_| Err(ErrorKind::ConnectionRefused.into()));
            Arc::new(Mutex::new(Vsock::new("vsock0", 3, None, connect)?))
        }
    })
}

/// Writes arbitrary bytes into rings and buffers, notifies, writes the device configuration and
/// pauses, in any order. The device always comes to rest.
#[doc(hidden)]
pub fn fuzz_virtqueue(data: &[u8]) {
    let mut input = Input(data);
    let device = device(input.u8()).expect("invariant: descriptors are left");
    let offered = lock(&device).features();
    let features = offered & (u64::from(input.u32()) | VERSION_1);
    let mut machine = TestMachine::new(device);
    assert!(machine.start(features));
    while !input.is_empty() {
        match input.u8() % 6 {
            0 | 1 => write_ring(&machine, &mut input),
            2 => {
                let at = machine.buffer(u64::from(input.u8() & 7), 0);
                let len = usize::from(input.u8());
                machine.write(at, &input.bytes(len));
            }
            3 => machine.notify(usize::from(input.u8() & 7)),
            4 => {
                let (offset, len) = (input.u8(), 1 << (input.u8() & 3));
                machine.bar_write(0x2000 + u64::from(offset), &input.bytes(len));
            }
            _ => {
                machine.save();
                for device in &machine.devices {
                    // Its queues were valid and RAM does not change.
                    lock(device).resume().expect("invariant: valid queues");
                }
                machine.run();
            }
        }
    }
}

/// A descriptor that names RAM most of the time, an index, or bytes anywhere in the rings.
fn write_ring(machine: &TestMachine, input: &mut Input<'_>) {
    let queue = u64::from(input.u8() % 5);
    let rings = RINGS + queue * 0x3000;
    let shape = input.u8();
    let index = u64::from(input.u8() & 0x7f);
    match shape & 3 {
        0 => {
            let page = u64::from(input.u8() & 7);
            let mut descriptor = machine.buffer(page, 0).to_le_bytes().to_vec();
            descriptor.extend((input.u32() & 0x1_ffff).to_le_bytes());
            descriptor.extend([input.u8() & 7, 0, input.u8() & 0x7f, 0]);
            machine.write(rings + index * 16, &descriptor);
        }
        1 => machine.write(rings + 0x1002, &[input.u8(), shape >> 7]),
        2 => machine.write(rings + 0x1004 + index * 2, &[input.u8() & 0x7f, 0]),
        _ => {
            let at = u64::from(input.u16()) % 0x2f00;
            let len = usize::from(input.u8());
            machine.write(rings + at, &input.bytes(len));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::check_random;

    #[test]
    fn every_device_stands_arbitrary_rings() {
        check_random(fuzz_virtqueue, 400, 600);
    }

    #[test]
    fn a_whole_request_is_served() {
        for device in 0..4 {
            // Event index and all; a writable descriptor, an index, a notification, a pause.
            let request = [0, 0, 0, 0, 0, 1, 0xff, 0, 0, 2, 0, 0, 0, 1, 0, 1, 3, 0, 5];
            let mut data = vec![device, 0xff, 0xff, 0xff, 0xff];
            data.extend(request);
            fuzz_virtqueue(&data);
        }
    }
}
