//! pvpanic: one port through which a guest's kernel reports its own death, as QEMU specifies it
//! (`docs/specs/pvpanic.rst`).

use std::sync::Arc;

use crate::device::{Device, RestoreError, SavedState};
use crate::layout::port;

use super::{PortDevice, PowerEvent, PowerSink};

/// Each bit is a capability when read and an event when written.
const EVENTS: [(u8, PowerEvent); 3] = [
    (1 << 0, PowerEvent::GuestPanicked),
    (1 << 1, PowerEvent::CrashLoaded),
    (1 << 2, PowerEvent::GuestShutdown),
];

const STATE_VERSION: u16 = 1;

/// The pvpanic port.
pub struct PvPanic {
    sink: Arc<dyn PowerSink>,
}

impl PvPanic {
    /// Reports to `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self { sink }
    }
}

impl PortDevice for PvPanic {
    fn ports(&self) -> Vec<(u16, u16)> {
        vec![(port::PVPANIC, 1)]
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        if port != port::PVPANIC {
            return 0xff;
        }
        EVENTS.iter().fold(0, |all, (bit, _)| all | bit)
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        for (bit, event) in EVENTS {
            if port == port::PVPANIC && value & bit != 0 {
                self.sink.request(event);
            }
        }
    }
}

impl Device for PvPanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.read::<()>(STATE_VERSION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::Requests;

    #[test]
    fn each_bit_is_its_event() {
        let requests = Arc::new(Requests::default());
        let mut pvpanic = PvPanic::new(requests.clone());
        assert_eq!(pvpanic.read_byte(port::PVPANIC), 0x07);
        for (written, expected) in [
            (0, vec![]),
            (1, vec![PowerEvent::GuestPanicked]),
            (2, vec![PowerEvent::CrashLoaded]),
            (4, vec![PowerEvent::GuestShutdown]),
            (0xf8, vec![]),
        ] {
            pvpanic.write_byte(port::PVPANIC, written);
            assert_eq!(requests.take(), expected, "{written:#x}");
        }
    }

    #[test]
    fn state_is_empty_but_versioned() {
        let mut pvpanic = PvPanic::new(Arc::new(Requests::default()));
        let saved = pvpanic.save();
        pvpanic.restore(&saved).unwrap();
        assert_eq!(pvpanic.save(), saved);
        let newer = SavedState::new(STATE_VERSION + 1, &());
        assert!(pvpanic.restore(&newer).is_err());
    }
}
