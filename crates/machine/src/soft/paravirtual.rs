//! What KVM's guests have beside kvmclock, one vCPU's part: steal time, PV EOI, kicks. Hypercalls are
//! in [`super::hypercall`].

use std::cell::{Cell, RefCell};

use super::Refused;
use super::board::Board;
use super::pv_eoi::{MSR_PV_EOI, PvEoi};
use super::steal::{self, MSR_STEAL_TIME, Source, StealTime};
use super::vcpu::SoftVcpu;
use crate::memory::GuestMemory;

/// The MSRs, in the order in which they are restored.
pub(super) const MSRS: [u32; 2] = [MSR_STEAL_TIME, MSR_PV_EOI];

/// What a vCPU's thread has of it.
pub(super) struct Paravirtual {
    steal: RefCell<StealTime>,
    eoi: Cell<PvEoi>,
    /// It was kicked (`KVM_HC_KICK_CPU`) while it ran: its next HLT returns at once.
    pub(super) kicked: Cell<bool>,
}

impl Paravirtual {
    pub(super) fn new(source: Source) -> Self {
        Self {
            steal: RefCell::new(StealTime::new(source)),
            eoi: Cell::default(),
            kicked: Cell::new(false),
        }
    }

    /// All of it off, as after a reset and, as on KVM, after INIT.
    pub(super) fn reset(&self) {
        self.steal.borrow_mut().reset();
        self.eoi.set(PvEoi::default());
        self.kicked.set(false);
    }

    /// Reads one of [`MSRS`]; nothing if it is none.
    pub(super) fn read_msr(&self, msr: u32) -> Option<u64> {
        match msr {
            MSR_STEAL_TIME => Some(self.steal.borrow().msr()),
            MSR_PV_EOI => Some(self.eoi.get().msr()),
            _ => None,
        }
    }

    /// Sets one of [`MSRS`] as its state says.
    pub(super) fn restore_msr(
        &self,
        msr: u32,
        value: u64,
        memory: &GuestMemory,
    ) -> Result<(), Refused> {
        match msr {
            MSR_STEAL_TIME => self.steal.borrow_mut().restore(value),
            MSR_PV_EOI => self.change_eoi(|eoi| eoi.write_msr(value, memory)),
            _ => Err(Refused),
        }
    }

    fn change_eoi<R>(&self, change: impl FnOnce(&mut PvEoi) -> R) -> R {
        let mut eoi = self.eoi.get();
        let result = change(&mut eoi);
        self.eoi.set(eoi);
        result
    }
}

impl Board<'_> {
    /// The guest writes one of [`MSRS`].
    pub(super) fn write_paravirtual_msr(&self, msr: u32, value: u64) -> Result<(), Refused> {
        self.settle_eoi();
        let memory = &self.shared.memory;
        let own = &self.local.paravirtual;
        match msr {
            MSR_STEAL_TIME => own.steal.borrow_mut().write_msr(value, memory),
            _ => own.restore_msr(msr, value, memory),
        }
    }

    /// The local APIC's interrupt to deliver, of which the guest may spare us the end.
    pub(super) fn acknowledge_local(&self) -> Option<u8> {
        self.settle_eoi();
        let memory = &self.shared.memory;
        let own = &self.local.paravirtual;
        self.shared
            .platform
            .acknowledge_sparing_end(self.vcpu, || own.change_eoi(|eoi| eoi.set(memory)))
    }

    /// Before anything looks at the local APIC: an interrupt that the guest has ended by PV EOI is
    /// ended there, too.
    #[inline]
    pub(super) fn settle_eoi(&self) {
        let own = &self.local.paravirtual;
        if own.eoi.get().is_outstanding() {
            let ended = own.change_eoi(|eoi| eoi.clear(&self.shared.memory));
            self.shared.platform.settle_end(self.vcpu, ended);
        }
    }

    /// The core has stopped, as a vCPU of KVM does at an exit.
    pub(super) fn stopped(&self) {
        self.settle_eoi();
        let mut steal = self.local.paravirtual.steal.borrow_mut();
        steal.running(&self.shared.memory);
    }
}

impl SoftVcpu {
    /// The vCPU runs from now on, and has wanted to since `since_ns`.
    pub(super) fn arrive(&mut self, since_ns: u64) {
        let mut steal = self.local.paravirtual.steal.borrow_mut();
        if steal.arrive(since_ns, &self.shared.memory) {
            self.processor.state_changed();
        }
    }

    /// The vCPU runs from now on, after it was stopped.
    pub(super) fn arrive_now(&mut self) {
        self.arrive(steal::wall_ns());
    }

    /// The vCPU was kicked (`KVM_HC_KICK_CPU`).
    pub(super) fn unhalt(&mut self) {
        if self.processor.state.halted {
            self.processor.state.halted = false;
        } else {
            self.local.paravirtual.kicked.set(true);
        }
    }

    /// The vCPU is halted: ends that if it was kicked before, and says whether it was.
    pub(super) fn take_kick(&mut self) -> bool {
        let kicked = self.local.paravirtual.kicked.take();
        self.processor.state.halted &= !kicked;
        kicked
    }

    /// The vCPU is halted: sleeps until it is roused, unless it was kicked before.
    pub(super) fn halt(&mut self) {
        if self.take_kick() {
            return;
        }
        let own = &self.local.paravirtual;
        own.steal.borrow_mut().leave(&self.shared.memory);
        let roused_ns = self.shared.waker.sleep(self.index);
        self.arrive(roused_ns);
    }
}
