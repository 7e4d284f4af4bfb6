//! PV EOI: the guest ends an interrupt by clearing a bit in its memory (`MSR_KVM_PV_EOI_EN` in the
//! kernel's `Documentation/virt/kvm/x86/msr.rst`).
//!
//! ```text
//!  acknowledge, and nobody else waits for the end        the guest's end of interrupt
//!  ────────────▶ bit set, end outstanding ──────────────▶ bit clear, end outstanding
//!                   │ the vCPU stops, touches its            │ likewise
//!                   │ local APIC, or acknowledges            │
//!                   ▼                                        ▼
//!            bit clear; the guest will write EOI      the local APIC ends its highest interrupt
//! ```
//!
//! Only the vCPU's thread looks at the bit, and only while the guest does not run. Nobody else waits
//! for the end if no interrupt is requested and the vector is not of a level, which the I/O APIC
//! has to hear of. While an end is outstanding, a request by somebody else therefore always stops the
//! vCPU ([`super::platform`]): it may be deliverable without the local APIC's knowing. A vCPU that has
//! stopped has no end outstanding, so a state needs nothing but the MSR.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

use super::Refused;

/// `MSR_KVM_PV_EOI_EN`.
pub const MSR_PV_EOI: u32 = 0x4b56_4d04;
const ENABLED: u64 = 1;
const ALIGNMENT: u64 = 4;
/// The bit: the guest need not write EOI.
const NO_EOI: u8 = 1;

/// One vCPU's PV EOI.
#[derive(Clone, Copy, Debug, Default)]
pub struct PvEoi {
    msr: u64,
    outstanding: bool,
}

impl PvEoi {
    /// The MSR.
    #[must_use]
    pub fn msr(&self) -> u64 {
        self.msr
    }

    /// Writes the MSR. No end is outstanding then.
    ///
    /// # Errors
    ///
    /// The address is not aligned to 4 bytes, or it is not RAM and it is to be used.
    pub fn write_msr(&mut self, value: u64, memory: &GuestMemory) -> Result<(), Refused> {
        let address = value & !ENABLED;
        let enabled = value & ENABLED != 0;
        let is_ram = || memory.read_obj::<u8>(GuestAddress(address)).is_ok();
        if !address.is_multiple_of(ALIGNMENT) || enabled && !is_ram() {
            return Err(Refused);
        }
        self.msr = value;
        self.outstanding = false;
        Ok(())
    }

    /// Sets the bit; whether the guest can see it.
    pub fn set(&mut self, memory: &GuestMemory) -> bool {
        self.outstanding = self.msr & ENABLED != 0 && self.write(NO_EOI, memory);
        self.outstanding
    }

    /// Whether the guest may end its interrupt without telling.
    #[must_use]
    pub fn is_outstanding(&self) -> bool {
        self.outstanding
    }

    /// Clears the bit; whether the guest had already, which was its end of interrupt.
    pub fn clear(&mut self, memory: &GuestMemory) -> bool {
        self.outstanding = false;
        let address = GuestAddress(self.msr & !ENABLED);
        let byte = memory.read_obj::<u8>(address).unwrap_or(0);
        byte & NO_EOI == 0 || !self.write(0, memory)
    }

    fn write(&self, byte: u8, memory: &GuestMemory) -> bool {
        let address = GuestAddress(self.msr & !ENABLED);
        memory.write_obj(byte, address).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use mica_base::units::Bytes as Size;

    use super::*;
    use crate::memory::{MemoryOptions, allocate};

    const AT: u64 = 0x1000;

    fn memory() -> GuestMemory {
        allocate(Size(1 << 20), &MemoryOptions::default()).unwrap()
    }

    #[test]
    fn a_bit_that_the_guest_has_cleared_is_its_end() {
        let memory = memory();
        let byte = || memory.read_obj::<u8>(GuestAddress(AT)).unwrap();
        let mut eoi = PvEoi::default();
        assert!(!eoi.set(&memory), "it is off");
        assert_eq!(byte(), 0);
        eoi.write_msr(AT | ENABLED, &memory).unwrap();
        assert!(eoi.set(&memory) && eoi.is_outstanding());
        assert_eq!(byte(), 1);
        assert!(!eoi.clear(&memory), "the guest has not");
        assert_eq!(byte(), 0);
        assert!(eoi.set(&memory));
        memory.write_obj(0xfe_u8, GuestAddress(AT)).unwrap();
        assert!(eoi.clear(&memory) && !eoi.is_outstanding());
        assert_eq!(byte(), 0xfe);
    }

    #[test]
    fn addresses_are_checked() {
        let memory = memory();
        let mut eoi = PvEoi::default();
        for refused in [AT | 2, AT | 3, 1 << 20 | 1, u64::MAX, u64::MAX << 2 | 1] {
            assert_eq!(
                eoi.write_msr(refused, &memory),
                Err(Refused),
                "{refused:#x}"
            );
        }
        // The last word of RAM; and off, whatever the address.
        for taken in [0xf_fffd, 1 << 40] {
            eoi.write_msr(taken, &memory).unwrap();
            assert_eq!(eoi.msr(), taken);
        }
    }
}
