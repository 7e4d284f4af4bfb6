//! What KVM's guests do to local APICs by other ways than their registers.

use crate::soft::message::Message;

use super::Platform;

impl Platform {
    /// As [`Self::acknowledge`]; if nobody waits for the end of the interrupt, `offer` may tell the
    /// guest not to report it, and says whether it has. From then on until [`Self::settle_end`] any
    /// request is pending, whatever its priority.
    pub fn acknowledge_sparing_end(&self, vcpu: usize, offer: impl FnOnce() -> bool) -> Option<u8> {
        if let Some(vector) = self.acknowledge_extint(vcpu) {
            return Some(vector);
        }
        self.change(vcpu, |apic| {
            let vector = apic.acknowledge()?;
            if !apic.is_end_awaited(vector) && offer() {
                apic.spare_end();
            }
            Some(vector)
        })
    }

    /// The guest reports the end of its interrupts from now on; the one that it was spared has `ended`
    /// or not.
    pub fn settle_end(&self, vcpu: usize, ended: bool) {
        let effect = self.change(vcpu, |apic| apic.settle_end(ended));
        self.carry_out(effect);
    }

    /// Makes the vCPU with that APIC ID leave HLT, now or the next time.
    pub fn kick(&self, id: u32) {
        if let Some(vcpu) = self.find_by_id(id) {
            self.signal(vcpu, |apic| {
                apic.kick();
                true
            });
        }
    }

    /// Takes a message to every local APIC whose ID is `chosen`; how many have accepted it.
    pub fn deliver_to_each(&self, chosen: impl Fn(u32) -> bool, message: &Message) -> usize {
        (0..self.slots.len())
            .filter(|&vcpu| self.apic(vcpu).physical_id().is_some_and(&chosen))
            .filter(|&vcpu| self.signal(vcpu, |apic| apic.accept(message)))
            .count()
    }

    /// The vCPU that has that APIC ID.
    #[must_use]
    pub fn find_by_id(&self, id: u32) -> Option<usize> {
        (0..self.slots.len()).find(|&vcpu| self.apic(vcpu).physical_id() == Some(id))
    }
}
