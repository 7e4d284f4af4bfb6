//! The chips of one machine, joined.
//!
//! Any thread may use a [`Platform`]. Lock order: the chips (8259s, I/O APIC, 8254, clock), then one
//! local APIC; never two local APICs at once, and never the chips while a local APIC is locked. What
//! a local APIC's register write does to others is therefore carried out after it is unlocked.
//! [`Wake`] may be called with the chips locked, so it must not call back.
//!
//! A vCPU's thread looks at [`Platform::is_pending`], one atomic load, between instructions.

mod paravirtual;
mod state;

pub use state::LocalApicState;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::bus::lock;

use super::Refused;
use super::clock::GuestClock;
use super::io_apic::IoApic;
use super::local_apic::{Effect, Events, LocalApic};
use super::message::Message;
use super::pic::Pic;
use super::pit::Pit;
use super::tsc::Tsc;

/// How the platform reaches the threads that use it.
pub trait Wake: Send + Sync {
    /// Something has become pending for that vCPU: if it is halted or waits for INIT, it has to look.
    fn wake(&self, vcpu: usize);

    /// [`Platform::next_deadline`] has come closer.
    fn rearm(&self) {}
}

impl<F: Fn(usize) + Send + Sync> Wake for F {
    fn wake(&self, vcpu: usize) {
        self(vcpu);
    }
}

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The lines that the 8259s have.
const PIC_LINES: u32 = 16;
const TIMER_LINE: u32 = 0;
/// No deadline.
const NEVER: u64 = u64::MAX;

struct Chips {
    pic: Pic,
    io_apic: IoApic,
    pit: Pit,
    clock: GuestClock,
}

struct Slot {
    apic: Mutex<LocalApic>,
    /// Written with `apic` locked.
    pending: AtomicBool,
    /// The timer's, or [`NEVER`]; written with `apic` locked.
    deadline: AtomicU64,
}

/// All interrupt controllers and timers of a machine.
pub struct Platform {
    chips: Mutex<Chips>,
    slots: Vec<Slot>,
    /// The 8259s' output; written with the chips locked.
    pic_output: AtomicBool,
    /// The 8254's deadline, or [`NEVER`]; written with the chips locked.
    pit_deadline: AtomicU64,
    wake: Box<dyn Wake>,
}

impl Platform {
    /// As after power-on, for `vcpus` processors whose counters are `tsc`.
    #[must_use]
    pub fn new(vcpus: usize, tsc: Tsc, now_ns: u64, wake: impl Wake + 'static) -> Self {
        let slot = |index: usize| Slot {
            apic: Mutex::new(LocalApic::new(index as u32, tsc)),
            pending: AtomicBool::new(false),
            deadline: AtomicU64::new(NEVER),
        };
        Self {
            chips: Mutex::new(Chips {
                pic: Pic::new(),
                io_apic: IoApic::new(),
                pit: Pit::new(now_ns),
                clock: GuestClock::new(now_ns),
            }),
            slots: (0..vcpus).map(slot).collect(),
            pic_output: AtomicBool::new(false),
            pit_deadline: AtomicU64::new(NEVER),
            wake: Box::new(wake),
        }
    }

    /// Drives line `gsi` (0 to 23): the 8259s' input, if they have it, and the I/O APIC's pin of the
    /// same number, as on KVM and as the MADT says.
    pub fn set_line(&self, gsi: u32, level: bool) {
        self.drive(&mut lock(&self.chips), gsi, level);
    }

    /// Delivers an MSI; whether somebody has taken it.
    pub fn send_msi(&self, address: u64, data: u32) -> bool {
        Message::from_msi(address, data).is_ok_and(|message| self.deliver(&message))
    }

    /// Whether the port is one of the chips'.
    #[must_use]
    pub fn owns_port(port: u16) -> bool {
        is_pic(port) || is_pit(port)
    }

    /// Reads a port that is [one of the chips'](Self::owns_port).
    pub fn read_port(&self, port: u16, now_ns: u64) -> u8 {
        let mut chips = lock(&self.chips);
        if is_pit(port) {
            return chips.pit.read(port, now_ns);
        }
        let value = chips.pic.read(port);
        self.pic_changed(&chips);
        value
    }

    /// Writes a port that is [one of the chips'](Self::owns_port).
    pub fn write_port(&self, port: u16, value: u8, now_ns: u64) {
        let mut chips = lock(&self.chips);
        if is_pit(port) {
            chips.pit.write(port, value, now_ns);
            self.pit_changed(&chips);
        } else {
            chips.pic.write(port, value);
            self.pic_changed(&chips);
        }
    }

    /// Reads at that offset of the I/O APIC's page.
    pub fn read_io_apic(&self, offset: u64, data: &mut [u8]) {
        let value = lock(&self.chips).io_apic.read(offset).to_le_bytes();
        data.fill(0);
        let len = data.len().min(value.len());
        data[..len].copy_from_slice(&value[..len]);
    }

    /// Writes at that offset of the I/O APIC's page.
    pub fn write_io_apic(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        let len = data.len().min(value.len());
        value[..len].copy_from_slice(&data[..len]);
        let mut chips = lock(&self.chips);
        let value = u32::from_le_bytes(value);
        chips
            .io_apic
            .write(offset, value, &mut |message| self.deliver(message));
    }

    /// Where vCPU `vcpu`'s local APIC answers, if it does.
    pub fn local_apic_address(&self, vcpu: usize) -> Option<u64> {
        let apic = self.apic(vcpu);
        (apic.is_enabled() && !apic.is_x2apic()).then_some(apic.base() & !0xfff)
    }

    /// Reads at that offset of the vCPU's local APIC's page.
    pub fn read_local_apic(&self, vcpu: usize, offset: u64, data: &mut [u8], now_ns: u64) {
        self.apic(vcpu).read_memory(offset, data, now_ns);
    }

    /// Writes at that offset of the vCPU's local APIC's page.
    pub fn write_local_apic(&self, vcpu: usize, offset: u64, data: &[u8], now_ns: u64) {
        let effect = self.change(vcpu, |apic| apic.write_memory(offset, data, now_ns));
        self.carry_out(effect);
    }

    /// Whether the register is a local APIC's.
    #[must_use]
    pub fn owns_msr(msr: u32) -> bool {
        matches!(msr, MSR_APIC_BASE | MSR_TSC_DEADLINE | 0x800..=0x8ff)
    }

    /// Reads an MSR that is [a local APIC's](Self::owns_msr).
    ///
    /// # Errors
    ///
    /// The guest's access faults.
    pub fn read_msr(&self, vcpu: usize, msr: u32, now_ns: u64) -> Result<u64, Refused> {
        let apic = self.apic(vcpu);
        match msr {
            MSR_APIC_BASE => Ok(apic.base()),
            MSR_TSC_DEADLINE => Ok(apic.deadline_tsc()),
            _ => apic.read_msr(msr, now_ns),
        }
    }

    /// Writes an MSR that is [a local APIC's](Self::owns_msr).
    ///
    /// # Errors
    ///
    /// The guest's access faults.
    pub fn write_msr(&self, vcpu: usize, msr: u32, value: u64, now_ns: u64) -> Result<(), Refused> {
        let effect = self.change(vcpu, |apic| match msr {
            MSR_APIC_BASE => apic.set_base(value).map(|()| Effect::None),
            MSR_TSC_DEADLINE => {
                apic.set_deadline_tsc(value, now_ns);
                Ok(Effect::None)
            }
            _ => apic.write_msr(msr, value, now_ns),
        })?;
        self.carry_out(effect);
        Ok(())
    }

    /// CR8.
    pub fn cr8(&self, vcpu: usize) -> u8 {
        self.apic(vcpu).tpr() >> 4
    }

    /// Sets CR8.
    pub fn set_cr8(&self, vcpu: usize, value: u8) {
        self.change(vcpu, |apic| apic.set_tpr(value << 4));
    }

    /// Whether the vCPU has an event or an interrupt that its priority lets through. It stays so
    /// while the vCPU cannot take it (interrupts off).
    #[must_use]
    pub fn is_pending(&self, vcpu: usize) -> bool {
        self.slots[vcpu].pending.load(Ordering::Acquire)
    }

    /// Takes the events that wait for the vCPU.
    pub fn take_events(&self, vcpu: usize) -> Events {
        self.change(vcpu, LocalApic::take_events)
    }

    /// The vCPU takes an interrupt: its vector, if there is one. As on KVM the 8259s come first.
    pub fn acknowledge(&self, vcpu: usize) -> Option<u8> {
        self.acknowledge_sparing_end(vcpu, || false)
    }

    fn acknowledge_extint(&self, vcpu: usize) -> Option<u8> {
        if self.pic_output.load(Ordering::Acquire) && self.apic(vcpu).takes_extint() {
            let mut chips = lock(&self.chips);
            // Another vCPU may have been faster.
            if chips.pic.output() {
                let vector = chips.pic.acknowledge();
                self.pic_changed(&chips);
                return Some(vector);
            }
        }
        None
    }

    /// Whether [`Self::acknowledge`] would give a vector.
    pub fn has_interrupt(&self, vcpu: usize) -> bool {
        let apic = self.apic(vcpu);
        let extint = self.pic_output.load(Ordering::Acquire) && apic.takes_extint();
        extint || apic.deliverable().is_some()
    }

    /// A non-maskable interrupt on that vCPU's LINT1.
    pub fn signal_nmi(&self, vcpu: usize) {
        self.signal(vcpu, LocalApic::signal_lint1);
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let timers = self.slots.iter().map(|slot| &slot.deadline);
        let deadlines = timers.chain([&self.pit_deadline]);
        deadlines
            .map(|deadline| deadline.load(Ordering::Acquire))
            .min()
            .filter(|deadline| *deadline != NEVER)
    }

    /// Raises the timers' interrupts that are due at `now_ns`.
    pub fn expire(&self, now_ns: u64) {
        if self.pit_deadline.load(Ordering::Acquire) <= now_ns {
            let mut chips = lock(&self.chips);
            if chips.pit.expire(now_ns) {
                self.drive(&mut chips, TIMER_LINE, true);
                self.drive(&mut chips, TIMER_LINE, false);
                for vcpu in 0..self.slots.len() {
                    self.signal(vcpu, LocalApic::lint0_nmi);
                }
            }
            self.pit_changed(&chips);
        }
        for (vcpu, slot) in self.slots.iter().enumerate() {
            if slot.deadline.load(Ordering::Acquire) <= now_ns {
                self.signal(vcpu, |apic| {
                    apic.expire(now_ns);
                    true
                });
            }
        }
    }

    /// The vCPU's time-stamp counter.
    pub fn tsc(&self, vcpu: usize) -> Tsc {
        self.apic(vcpu).tsc()
    }

    /// Sets the vCPU's time-stamp counter.
    pub fn set_tsc(&self, vcpu: usize, tsc: Tsc, now_ns: u64) {
        self.change(vcpu, |apic| apic.set_tsc(tsc, now_ns));
    }

    fn apic(&self, vcpu: usize) -> MutexGuard<'_, LocalApic> {
        lock(&self.slots[vcpu].apic)
    }

    /// Changes a local APIC for its own processor, which looks by itself.
    fn change<R>(&self, vcpu: usize, act: impl FnOnce(&mut LocalApic) -> R) -> R {
        let mut apic = self.apic(vcpu);
        let result = act(&mut apic);
        let closer = self.publish(vcpu, &apic);
        drop(apic);
        if closer {
            self.wake.rearm();
        }
        result
    }

    /// Changes a local APIC for somebody else; `act` says whether anything has come of it.
    fn signal(&self, vcpu: usize, act: impl FnOnce(&mut LocalApic) -> bool) -> bool {
        let accepted = self.change(vcpu, act);
        if accepted && self.is_pending(vcpu) {
            self.wake.wake(vcpu);
        }
        accepted
    }

    /// Brings the atomics up to date with a locked local APIC; whether its deadline is closer now.
    fn publish(&self, vcpu: usize, apic: &LocalApic) -> bool {
        let slot = &self.slots[vcpu];
        let extint = self.pic_output.load(Ordering::Acquire) && apic.takes_extint();
        let events = apic.events() != Events::default();
        let pending = extint || events || apic.may_be_deliverable();
        slot.pending.store(pending, Ordering::Release);
        let deadline = apic.next_deadline().unwrap_or(NEVER);
        deadline < slot.deadline.swap(deadline, Ordering::AcqRel)
    }

    fn carry_out(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Send(message) => {
                self.deliver(&message);
            }
            Effect::EndOfInterrupt(vector) => lock(&self.chips)
                .io_apic
                .end_of_interrupt(vector, &mut |message| self.deliver(message)),
        }
    }

    /// Takes a message to its destinations; whether one has accepted it. As on KVM the vector
    /// chooses among the destinations of a lowest-priority message.
    fn deliver(&self, message: &Message) -> bool {
        let one = message.is_for_one();
        let is_for = |vcpu: &usize| {
            let apic = self.apic(*vcpu);
            apic.is_enabled()
                && apic.is_destination(message, *vcpu)
                && (!one || apic.is_software_enabled())
        };
        let all = 0..self.slots.len();
        if one {
            let candidates: Vec<_> = all.filter(is_for).collect();
            let chosen = usize::from(message.vector).checked_rem(candidates.len());
            return chosen.is_some_and(|chosen| {
                self.signal(candidates[chosen], |apic| apic.accept(message))
            });
        }
        let mut accepted = false;
        for vcpu in all.filter(is_for) {
            accepted |= self.signal(vcpu, |apic| apic.accept(message));
        }
        accepted
    }

    fn drive(&self, chips: &mut Chips, gsi: u32, level: bool) {
        if gsi < PIC_LINES {
            chips.pic.set_line(gsi as u8, level);
            self.pic_changed(chips);
        }
        let deliver = &mut |message: &Message| self.deliver(message);
        chips.io_apic.set_line(gsi as usize, level, deliver);
    }

    /// Publishes the 8259s' output.
    fn pic_changed(&self, chips: &Chips) {
        let output = chips.pic.output();
        if self.pic_output.swap(output, Ordering::AcqRel) != output {
            // The output is stored before each look, so whoever looks meanwhile sees it too.
            for vcpu in 0..self.slots.len() {
                self.signal(vcpu, |apic| output && apic.takes_extint());
            }
        }
    }

    /// Publishes the 8254's deadline.
    fn pit_changed(&self, chips: &Chips) {
        let deadline = chips.pit.next_deadline().unwrap_or(NEVER);
        if deadline < self.pit_deadline.swap(deadline, Ordering::AcqRel) {
            self.wake.rearm();
        }
    }
}

fn is_pic(port: u16) -> bool {
    matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
}

fn is_pit(port: u16) -> bool {
    matches!(port, 0x40..=0x43 | 0x61)
}

#[cfg(test)]
mod tests;
