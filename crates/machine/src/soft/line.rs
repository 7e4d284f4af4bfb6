//! Interrupt lines: any number of drivers for a pin, which is high while one of them drives it high.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::engine::Shared;
use crate::bus::lock;
use crate::engine::InterruptLine;
use crate::engine::state::IO_APIC_PINS;
use crate::recording::Record;

/// All pins of a machine.
pub(super) struct Lines {
    shared: Arc<Shared>,
    /// How many drivers hold each pin high.
    holders: [Mutex<u32>; IO_APIC_PINS],
}

impl Lines {
    pub(super) fn new(shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self {
            shared,
            holders: std::array::from_fn(|_| Mutex::new(0)),
        })
    }

    pub(super) fn line(self: &Arc<Self>, gsi: u32) -> Arc<dyn InterruptLine> {
        assert!(
            (gsi as usize) < IO_APIC_PINS,
            "the I/O APIC has no pin {gsi}"
        );
        Arc::new(Line {
            lines: Arc::clone(self),
            gsi,
            level: AtomicBool::new(false),
        })
    }

    /// The pin changes, now or when it is its turn.
    fn drive(&self, gsi: u32, level: bool) {
        match &self.shared.turns {
            Some(turns) => turns.push(Record::Line { gsi, level }),
            None => self.shared.platform.set_line(gsi, level),
        }
    }
}

/// One device's hold on a pin.
struct Line {
    lines: Arc<Lines>,
    gsi: u32,
    level: AtomicBool,
}

impl InterruptLine for Line {
    fn set(&self, level: bool) {
        let mut holders = lock(&self.lines.holders[self.gsi as usize]);
        if self.level.swap(level, Ordering::Relaxed) == level {
            return;
        }
        let before = *holders;
        *holders = if level { before + 1 } else { before - 1 };
        if (before == 0) != (*holders == 0) {
            self.lines.drive(self.gsi, level);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set(false);
    }
}
