//! The host bridge at 00:00.0: an identity, and nothing to program.

use super::config::{ConfigSpace, Identity};
use super::{PciFunction, Wiring};
use crate::device::{Device, RestoreError, SavedState};

/// QEMU's generic PCI host bridge, which guests know and leave alone.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x060000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

const STATE_VERSION: u16 = 1;

pub(super) struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        Self {
            config: ConfigSpace::new(IDENTITY, &[]),
        }
    }
}

#[derive(minicbor::Encode, minicbor::Decode)]
struct State {
    #[cbor(n(0), with = "minicbor::bytes")]
    config: Vec<u8>,
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        "host-bridge"
    }

    fn reset(&mut self) {
        self.config.reset();
    }

    fn save(&self) -> SavedState {
        SavedState::new(
            STATE_VERSION,
            &State {
                config: self.config.save(),
            },
        )
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.read(STATE_VERSION)?;
        if !self.config.accepts(&state.config) {
            return Err(RestoreError::Impossible("not a host bridge".into()));
        }
        self.config.restore(&state.config);
        Ok(())
    }
}

impl PciFunction for HostBridge {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn connect(&mut self, _wiring: Wiring) {}

    fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
