//! What a guest of KVM's does by other ways than registers.

use super::{Effect, LocalApic, index, locate};

impl LocalApic {
    /// Its APIC ID in its present mode; nothing while it is disabled.
    #[must_use]
    pub fn physical_id(&self) -> Option<u32> {
        let id = if self.is_x2apic() {
            self.id
        } else {
            self.registers[index::ID] >> 24
        };
        self.is_enabled().then_some(id)
    }

    /// Whether something has to happen at the end of an interrupt that was acknowledged: another one
    /// may come, or the I/O APIC has to hear of it.
    #[must_use]
    pub fn is_end_awaited(&self, vector: u8) -> bool {
        let (slot, bit) = locate(vector);
        let level = self.registers[index::TMR + slot] & bit != 0;
        level || self.highest(index::IRR).is_some()
    }

    /// The guest may end its interrupt without a word from now on.
    pub fn spare_end(&mut self) {
        self.end_spared = true;
    }

    /// No longer; whether it has.
    pub fn settle_end(&mut self, ended: bool) -> Effect {
        self.end_spared = false;
        if ended {
            self.end_of_interrupt()
        } else {
            Effect::None
        }
    }

    /// Whether the processor has to look for an interrupt: one is deliverable, or would be if the guest
    /// has ended another without a word.
    #[must_use]
    pub fn may_be_deliverable(&self) -> bool {
        self.deliverable().is_some() || self.end_spared && self.highest(index::IRR).is_some()
    }

    /// The processor leaves HLT, now or the next time.
    pub fn kick(&mut self) {
        self.events.kick = true;
    }
}
