//! What surrounds a processor's core: ports, device memory, its local APIC, its clocks.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

use mica_cpu::{Environment, Hypercall};

use super::clock::{Instant, PvClock};
use super::engine::Shared;
use super::msr::StoredMsrs;
use super::paravirtual::{self, Paravirtual};
use super::platform::Platform;
use super::tsc::Tsc;
use crate::cpu_profile::CpuidTable;
use crate::engine::{BusAccess, DoorbellAddress};
use crate::layout;
use crate::recording::Place;

const PAGE: u64 = 4096;

/// What belongs to one vCPU beside its core, and is used by its own thread.
pub(super) struct Local {
    pub(super) cpuid: CpuidTable,
    pub(super) msrs: RefCell<StoredMsrs>,
    pub(super) pv_clock: RefCell<PvClock>,
    pub(super) paravirtual: Paravirtual,
    /// A copy of the local APIC's, for RDTSC.
    pub(super) tsc: Cell<Tsc>,
    /// Where the local APIC's page is, if it is anywhere.
    pub(super) apic_page: Cell<Option<u64>>,
    pub(super) nmi_pending: Cell<bool>,
    /// An interrupt that was acknowledged where the state comes from.
    pub(super) interrupt: Cell<Option<u8>>,
}

impl Local {
    /// Takes over what the platform says of the vCPU.
    pub(super) fn refresh(&self, shared: &Shared, vcpu: usize) {
        self.tsc.set(shared.platform.tsc(vcpu));
        self.apic_page.set(shared.platform.local_apic_address(vcpu));
    }

    /// The clocks now.
    pub(super) fn instant(&self, shared: &Shared) -> Instant {
        Instant {
            now_ns: shared.now_ns(),
            realtime_ns: shared.realtime_ns(),
            clock: shared.platform.clock(),
            tsc: self.tsc.get(),
        }
    }
}

/// The environment of one vCPU while it runs.
pub(super) struct Board<'a> {
    pub(super) shared: &'a Shared,
    pub(super) bus: &'a dyn BusAccess,
    pub(super) local: &'a Local,
    pub(super) vcpu: usize,
}

impl Board<'_> {
    fn platform(&self) -> &Platform {
        &self.shared.platform
    }

    /// The offset in the page at `start`, if the address is in it.
    fn in_page(address: u64, start: u64) -> Option<u64> {
        address.checked_sub(start).filter(|offset| *offset < PAGE)
    }

    /// A read that a device answers, or the recording.
    fn read_device(&self, port: bool, address: u64, data: &mut [u8], read: impl FnOnce(&mut [u8])) {
        let Some(turns) = &self.shared.turns else {
            return read(data);
        };
        let place = Place {
            port,
            address,
            size: data.len() as u8,
        };
        let value = turns.read(place, || {
            let mut bytes = [0; 8];
            read(&mut bytes[..data.len()]);
            u64::from_le_bytes(bytes)
        });
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    /// Where vCPUs take turns, an interrupt that the guest itself has made deliverable is looked for at the
    /// end of the block, not some blocks later: when, must not depend on who breaks the run off.
    fn look_for_interrupts(&self) {
        if self.shared.turns.is_some() && self.platform().is_pending(self.vcpu) {
            self.shared
                .waker
                .attention(self.vcpu)
                .store(true, Ordering::SeqCst);
        }
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) {
        let apic = self.local.apic_page.get();
        if let Some(offset) = apic.and_then(|page| Self::in_page(address, page)) {
            self.settle_eoi();
            let now = self.shared.now_ns();
            self.platform()
                .read_local_apic(self.vcpu, offset, data, now);
        } else if let Some(offset) = Self::in_page(address, layout::IO_APIC) {
            self.platform().read_io_apic(offset, data);
        } else {
            self.read_device(false, address, data, |data| {
                self.bus.memory_read(address, data);
            });
        }
    }
}

impl Environment for Board<'_> {
    fn port_read(&self, port: u16, size: u8) -> u32 {
        let mut bytes = [0; 4];
        let data = &mut bytes[..usize::from(size).min(4)];
        if Platform::owns_port(port) {
            let now = self.shared.now_ns();
            for (port, byte) in (port..).zip(data) {
                *byte = self.platform().read_port(port, now);
            }
        } else {
            self.read_device(true, port.into(), data, |data| {
                self.bus.port_read(port, data);
            });
        }
        u32::from_le_bytes(bytes)
    }

    fn port_write(&self, port: u16, size: u8, value: u32) {
        let bytes = value.to_le_bytes();
        let data = &bytes[..usize::from(size).min(4)];
        if Platform::owns_port(port) {
            let now = self.shared.now_ns();
            for (port, &byte) in (port..).zip(data) {
                self.platform().write_port(port, byte, now);
            }
        } else if !self.shared.ring(DoorbellAddress::Port(port)) {
            self.bus.port_write(port, data);
        }
        self.look_for_interrupts();
    }

    fn memory_read(&self, address: u64, size: u8) -> u64 {
        let mut bytes = [0; 8];
        self.read_memory(address, &mut bytes[..usize::from(size).min(8)]);
        u64::from_le_bytes(bytes)
    }

    fn memory_write(&self, address: u64, size: u8, value: u64) {
        let bytes = value.to_le_bytes();
        let data = &bytes[..usize::from(size).min(8)];
        let apic = self.local.apic_page.get();
        if let Some(offset) = apic.and_then(|page| Self::in_page(address, page)) {
            self.settle_eoi();
            let now = self.shared.now_ns();
            self.platform()
                .write_local_apic(self.vcpu, offset, data, now);
        } else if let Some(offset) = Self::in_page(address, layout::IO_APIC) {
            self.platform().write_io_apic(offset, data);
        } else if !self.shared.ring(DoorbellAddress::Memory(address)) {
            self.bus.memory_write(address, data);
        }
        self.look_for_interrupts();
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.local.cpuid.answer(leaf, subleaf)
    }

    fn tsc(&self) -> u64 {
        self.local.tsc.get().at(self.shared.now_ns())
    }

    fn set_tsc(&self, value: u64) {
        let now = self.shared.now_ns();
        let tsc = Tsc::new(self.local.tsc.get().khz(), value, now);
        self.platform().set_tsc(self.vcpu, tsc, now);
        self.local.tsc.set(tsc);
        let instant = self.local.instant(self.shared);
        let memory = &self.shared.memory;
        self.local
            .pv_clock
            .borrow_mut()
            .update(memory, &instant, false);
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        if Platform::owns_msr(index) {
            self.settle_eoi();
            self.platform()
                .read_msr(self.vcpu, index, self.shared.now_ns())
                .ok()
        } else if PvClock::owns_msr(index) {
            self.local.pv_clock.borrow().read_msr(index).ok()
        } else if let Some(value) = self.local.paravirtual.read_msr(index) {
            Some(value)
        } else {
            let known = self.local.msrs.borrow().read(index);
            if known.is_none() {
                self.shared.unknown_msrs.note(index);
            }
            known
        }
    }

    fn write_msr(&self, index: u32, value: u64) -> bool {
        if Platform::owns_msr(index) {
            self.settle_eoi();
            let now = self.shared.now_ns();
            let written = self.platform().write_msr(self.vcpu, index, value, now);
            let page = self.platform().local_apic_address(self.vcpu);
            self.local.apic_page.set(page);
            self.look_for_interrupts();
            return written.is_ok();
        }
        if PvClock::owns_msr(index) {
            let instant = self.local.instant(self.shared);
            let memory = &self.shared.memory;
            let mut clock = self.local.pv_clock.borrow_mut();
            return clock.write_msr(index, value, memory, &instant).is_ok();
        }
        if paravirtual::MSRS.contains(&index) {
            return self.write_paravirtual_msr(index, value).is_ok();
        }
        let mut msrs = self.local.msrs.borrow_mut();
        if msrs.read(index).is_none() {
            self.shared.unknown_msrs.note(index);
        }
        msrs.write(index, value)
    }

    fn task_priority(&self) -> u8 {
        self.platform().cr8(self.vcpu)
    }

    fn set_task_priority(&self, value: u8) {
        self.platform().set_cr8(self.vcpu, value);
        self.look_for_interrupts();
    }

    fn acknowledge_interrupt(&self) -> Option<u8> {
        let acknowledged = self.local.interrupt.take();
        if acknowledged.is_some() {
            acknowledged
        } else if self.platform().is_pending(self.vcpu) {
            self.acknowledge_local()
        } else {
            None
        }
    }

    fn take_nmi(&self) -> bool {
        self.local.nmi_pending.take()
    }

    fn hypercall(&self, call: &Hypercall) -> Option<u64> {
        let answer = self.answer(call).cast_unsigned();
        self.look_for_interrupts();
        Some(answer)
    }
}
