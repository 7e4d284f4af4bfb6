//! Configuration space, BARs, transport and MSI-X under arbitrary accesses.

use std::sync::{Arc, Mutex};

use crate::bus::lock;
use crate::engine::BusAccess;
use crate::layout;
use crate::testing::{Input, RAM, TestMachine};
use crate::virtio::entropy::Entropy;

const VERSION_1: u64 = 1 << 32;

/// Reads and writes through every face of the root, with a virtio device behind it.
///
/// Doorbells stay inside the PCI windows, and whatever state the accesses lead to can be saved and
/// restored.
#[doc(hidden)]
pub fn fuzz_pci(data: &[u8]) {
    let mut input = Input(data);
    let mut machine = TestMachine::new(entropy());
    if input.u8() & 1 == 1 {
        assert!(machine.start(VERSION_1));
    }
    while !input.is_empty() {
        access(&mut machine, &mut input);
        let windows = [layout::PCI_WINDOW_32, layout::pci_window_64(RAM)];
        for doorbell in machine.interrupts.doorbells() {
            assert!(windows.iter().any(|window| window.contains(&doorbell)));
        }
    }
    machine.run();
    if machine.is_restorable() {
        machine.migrate(entropy());
    }
}

fn entropy() -> Arc<Mutex<Entropy>> {
    let device = Entropy::new("rng0").expect("invariant: a descriptor is left");
    Arc::new(Mutex::new(device))
}

/// One access, or a reset of the machine.
fn access(machine: &mut TestMachine, input: &mut Input<'_>) {
    let kind = input.u8();
    let len = 1 << (kind >> 3 & 3);
    let write = kind & 0x20 != 0;
    match kind & 7 {
        0..=2 => {
            // The device's slot most of the time, so that something is hit.
            let register = u32::from(input.u8() & 0xfc);
            let address = match kind & 0x40 {
                0 => 1 << 31 | 5 << 11 | register,
                _ => input.u32(),
            };
            machine.buses.port_write(0xcf8, &address.to_le_bytes());
            let port = 0xcfc + u16::from(input.u8() & 3);
            let mut data = input.bytes(len.min(4));
            if write {
                machine.buses.port_write(port, &data);
            } else {
                machine.buses.port_read(port, &mut data);
            }
        }
        3 => {
            let at = layout::PCI_ECAM.start + u64::from(input.u32() & 0xf_ffff);
            memory(machine, at, len, write, input);
        }
        4..=6 => {
            let at = layout::PCI_WINDOW_32.start + u64::from(input.u16());
            memory(machine, at, len, write, input);
        }
        _ if write => machine.run(),
        _ => {
            for device in &machine.devices {
                lock(device).reset();
            }
        }
    }
}

fn memory(machine: &TestMachine, at: u64, len: usize, write: bool, input: &mut Input<'_>) {
    let mut data = input.bytes(len);
    if write {
        machine.buses.memory_write(at, &data);
    } else {
        machine.buses.memory_read(at, &mut data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::check_random;

    #[test]
    fn arbitrary_accesses_keep_the_promises() {
        check_random(fuzz_pci, 400, 600);
    }

    #[test]
    fn a_drivers_accesses_do_too() {
        fuzz_pci(&[]);
        fuzz_pci(&[1]);
        // BAR sizing, decoding off and on, a status read, a reset.
        fuzz_pci(&[
            1, 0x30, 0x10, 0, 0xff, 0xff, 0xff, 0xff, 0x28, 0x04, 0, 0, 0, 0x28, 0x04, 0, 6, 0,
            0x04, 20, 0, 0, 7,
        ]);
    }
}
