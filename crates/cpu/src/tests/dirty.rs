//! The log of written pages.

use std::cell::Cell;
use std::sync::Arc;

use iced_x86::code_asm::*;

use crate::memory::Ram;
use crate::processor::{Environment, Stop};
use crate::testing::{DATA, Guest};

/// Asks the log at each OUT: the first one turns it on.
struct Log {
    ram: Arc<Ram>,
    outs: Cell<u32>,
    /// At how many of the others a page of [`DATA`] had been written.
    written: Cell<u32>,
}

impl Environment for Log {
    fn memory_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn memory_write(&self, _: u64, _: u8, _: u64) {}
    fn port_write(&self, _: u16, _: u8, _: u32) {
        self.outs.set(self.outs.get() + 1);
        if self.outs.get() == 1 {
            return self.ram.set_dirty_log(true);
        }
        let mut found = false;
        self.ram.take_dirty(|address| found |= address == DATA);
        self.written.set(self.written.get() + u32::from(found));
    }
}

/// A page that the processor may write unseen when the log is asked for is in it at the next store, also
/// while each instruction is executed on its own because of a breakpoint.
#[test]
fn the_log_has_what_is_written_under_breakpoints() {
    const LOCAL_0: u64 = 1;
    const STORES: u32 = 5;
    for control in [0, LOCAL_0] {
        let mut guest = Guest::new(|a| {
            a.mov(rbx, DATA).unwrap();
            a.mov(dword_ptr(rbx), 1).unwrap();
            a.out(0x80, al).unwrap();
            a.out(0x80, al).unwrap(); // what may have been written before
            for _ in 0..STORES {
                a.mov(dword_ptr(rbx), 2).unwrap();
                a.out(0x80, al).unwrap();
            }
            a.hlt().unwrap();
        });
        guest.cpu.state.dr[5] |= control; // DR0 is 0, where nothing is executed
        let log = Log {
            ram: Arc::clone(&guest.cpu.ram),
            outs: Cell::new(0),
            written: Cell::new(0),
        };
        assert_eq!(guest.cpu.run(&log, 100), Stop::Halted);
        assert_eq!(log.outs.get(), 2 + STORES);
        assert!(
            log.written.get() >= STORES,
            "DR7 {control:#x}: {}",
            log.written.get()
        );
    }
}
