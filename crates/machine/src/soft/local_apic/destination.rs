//! Which messages are for a local APIC (SDM volume 3, 11.6.2 and 11.12.10).

use super::{LocalApic, index};
use crate::soft::message::{Destination, Message};

impl LocalApic {
    /// Whether a message to that destination is for this one, which has that index.
    #[must_use]
    pub fn is_destination(&self, message: &Message, own_index: usize) -> bool {
        let x2apic = self.is_x2apic();
        // A broadcast from the I/O APIC or an MSI has eight bits.
        let widen = |id: u32| match id {
            0xff if x2apic && message.sender.is_none() => u32::MAX,
            id => id,
        };
        let broadcast = if x2apic { u32::MAX } else { 0xff };
        let ldr = self.registers[index::LDR];
        match message.destination {
            Destination::Myself => message.sender == Some(own_index),
            Destination::Others => message.sender != Some(own_index),
            Destination::All => true,
            Destination::Physical(id) => {
                let id = widen(id);
                let own = if x2apic || id > 0xff {
                    self.id
                } else {
                    self.registers[index::ID] >> 24
                };
                id == broadcast || id == own
            }
            Destination::Logical(id) => {
                let id = widen(id);
                let flat = self.registers[index::DFR] >> 28 == 0xf;
                let cluster = self.registers[index::DFR] >> 28 == 0;
                id == broadcast
                    || if x2apic {
                        ldr >> 16 == id >> 16 && ldr & id & 0xffff != 0
                    } else if flat {
                        (ldr >> 24) & id != 0
                    } else {
                        cluster && ldr >> 28 == id >> 4 && (ldr >> 24) & id & 0xf != 0
                    }
            }
        }
    }
}
