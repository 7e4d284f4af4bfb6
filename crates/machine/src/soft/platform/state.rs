//! The platform's state, out and in again, and its resets.

use crate::bus::lock;
use crate::engine::state::{LOCAL_APIC_PAGE, PlatformState};
use crate::soft::Refused;
use crate::soft::clock::GuestClock;
use crate::soft::io_apic::IoApic;
use crate::soft::local_apic::{Events, LocalApic};
use crate::soft::pic::Pic;
use crate::soft::pit::Pit;
use crate::soft::tsc::Tsc;

use super::Platform;

/// What of a vCPU's state its local APIC holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApicState {
    /// The register page.
    pub page: [u8; LOCAL_APIC_PAGE],
    /// IA32_APIC_BASE.
    pub base: u64,
    /// IA32_TSC_DEADLINE.
    pub deadline_tsc: u64,
    /// Events that the processor has not taken.
    pub events: Events,
}

impl Platform {
    /// The chips' state; `realtime_ns` is the host's wall clock at `now_ns`.
    pub fn save(&self, now_ns: u64, realtime_ns: Option<u64>) -> PlatformState {
        let chips = lock(&self.chips);
        let (pic_master, pic_slave) = chips.pic.save();
        PlatformState {
            pic_master,
            pic_slave,
            io_apic: chips.io_apic.save(),
            pit: chips.pit.save(),
            clock: chips.clock.save(now_ns, realtime_ns),
        }
    }

    /// Takes what [`Self::save`] has given.
    pub fn restore(&self, state: &PlatformState, now_ns: u64) {
        let mut chips = lock(&self.chips);
        chips.pic.restore(&state.pic_master, &state.pic_slave);
        chips.io_apic.restore(&state.io_apic);
        chips.pit.restore(&state.pit, now_ns);
        chips.clock.restore(&state.clock, now_ns);
        self.pic_changed(&chips);
        self.pit_changed(&chips);
    }

    /// The chips as after power-on; the clock runs on.
    pub fn reset(&self, now_ns: u64) {
        let mut chips = lock(&self.chips);
        chips.pic = Pic::new();
        chips.io_apic = IoApic::new();
        chips.pit = Pit::new(now_ns);
        self.pic_changed(&chips);
        self.pit_changed(&chips);
    }

    /// The paravirtual clock, a copy.
    pub fn clock(&self) -> GuestClock {
        lock(&self.chips).clock
    }

    /// One local APIC's state.
    pub fn save_local_apic(&self, vcpu: usize, now_ns: u64) -> LocalApicState {
        let apic = self.apic(vcpu);
        LocalApicState {
            page: apic.save(now_ns),
            base: apic.base(),
            deadline_tsc: apic.deadline_tsc(),
            events: apic.events(),
        }
    }

    /// Takes what [`Self::save_local_apic`] has given, and the time-stamp counter.
    ///
    /// # Errors
    ///
    /// No local APIC can be in this state.
    pub fn restore_local_apic(
        &self,
        vcpu: usize,
        state: &LocalApicState,
        tsc: Tsc,
        now_ns: u64,
    ) -> Result<(), Refused> {
        self.change(vcpu, |apic| {
            apic.set_tsc(tsc, now_ns);
            apic.restore(&state.page, state.base, state.deadline_tsc, now_ns)?;
            apic.set_events(state.events);
            Ok(())
        })
    }

    /// One local APIC as after power-on.
    pub fn reset_local_apic(&self, vcpu: usize) {
        self.change(vcpu, LocalApic::reset);
    }

    /// What INIT does to one local APIC.
    pub fn init_local_apic(&self, vcpu: usize) {
        self.change(vcpu, LocalApic::init);
    }
}
