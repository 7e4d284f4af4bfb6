//! INTx: one line shared by several functions, high while any of them drives it.

use std::sync::{Arc, Mutex};

use crate::bus::lock;
use crate::engine::InterruptLine;

/// The wired OR of the functions on one line.
pub(super) struct SharedLine {
    line: Arc<dyn InterruptLine>,
    /// Bit `slot` is set while that slot drives the line.
    drivers: Mutex<u32>,
}

impl SharedLine {
    pub(super) fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self {
            line,
            drivers: Mutex::new(0),
        }
    }
}

/// One function's pin on a shared line. Cloning it gives another handle of the same pin.
#[derive(Clone)]
pub struct Intx {
    shared: Arc<SharedLine>,
    slot: u8,
}

impl Intx {
    pub(super) fn new(shared: Arc<SharedLine>, slot: u8) -> Self {
        Self { shared, slot }
    }

    /// Drives the pin or lets it go.
    pub fn set(&self, level: bool) {
        let mut drivers = lock(&self.shared.drivers);
        let before = *drivers;
        let bit = 1 << self.slot;
        *drivers = if level { before | bit } else { before & !bit };
        if (before == 0) != (*drivers == 0) {
            self.shared.line.set(*drivers != 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::InterruptSource;
    use crate::testing::TestInterrupts;

    #[test]
    fn a_line_stays_high_until_its_last_driver_lets_go() {
        let interrupts = TestInterrupts::default();
        let shared = Arc::new(SharedLine::new(interrupts.line(17)));
        let (a, b) = (Intx::new(shared.clone(), 1), Intx::new(shared, 9));
        for (pin, level, line) in [
            (&a, true, true),
            (&b, true, true),
            (&a, false, true),
            (&a, false, true),
            (&b, false, false),
        ] {
            pin.set(level);
            assert_eq!(interrupts.level(17), line);
        }
    }
}
