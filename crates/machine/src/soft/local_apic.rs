//! A processor's local APIC (SDM volume 3, chapter 11), in xAPIC and x2APIC mode.
//!
//! It is KVM's: version 0x14 with six local vectors, an error status that is always zero, and, after
//! power-on, vCPU 0's LINT0 as ExtINT so that the 8259s work without firmware. What a register write
//! has to do to others is its [`Effect`], which the caller carries out.

mod destination;
mod paravirtual;
mod registers;

use crate::engine::state::LOCAL_APIC_PAGE;

use super::Refused;
use super::apic_timer::{ApicTimer, TimerMode};
use super::message::{DeliveryMode, Destination, Message};
use super::tsc::Tsc;

/// Sixteen-byte slots of the page, each with a register in its first four.
const SLOTS: usize = LOCAL_APIC_PAGE / 16;
/// Version 0x14, six local vectors.
const VERSION: u32 = 0x0005_0014;

/// Indices of registers: the page's offset divided by 16, or the MSR's number less 0x800.
mod index {
    pub(super) const ID: usize = 0x02;
    pub(super) const VERSION: usize = 0x03;
    pub(super) const TPR: usize = 0x08;
    pub(super) const ARBITRATION: usize = 0x09;
    pub(super) const PPR: usize = 0x0a;
    pub(super) const EOI: usize = 0x0b;
    pub(super) const LDR: usize = 0x0d;
    pub(super) const DFR: usize = 0x0e;
    pub(super) const SPURIOUS: usize = 0x0f;
    pub(super) const ISR: usize = 0x10;
    pub(super) const TMR: usize = 0x18;
    pub(super) const IRR: usize = 0x20;
    pub(super) const ESR: usize = 0x28;
    pub(super) const ICR: usize = 0x30;
    pub(super) const ICR2: usize = 0x31;
    pub(super) const LVT_TIMER: usize = 0x32;
    pub(super) const LVT_THERMAL: usize = 0x33;
    pub(super) const LVT_PERFORMANCE: usize = 0x34;
    pub(super) const LVT_LINT0: usize = 0x35;
    pub(super) const LVT_LINT1: usize = 0x36;
    pub(super) const LVT_ERROR: usize = 0x37;
    pub(super) const INITIAL_COUNT: usize = 0x38;
    pub(super) const CURRENT_COUNT: usize = 0x39;
    pub(super) const DIVIDE: usize = 0x3e;
    pub(super) const SELF_IPI: usize = 0x3f;
}

const LVT_MASKED: u32 = 1 << 16;
const LVT_EXTINT: u32 = 0x700;
const SPURIOUS_ENABLED: u32 = 1 << 8;

/// IA32_APIC_BASE.
pub mod base {
    /// The bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const X2APIC: u64 = 1 << 10;
    /// Enabled.
    pub const ENABLED: u64 = 1 << 11;
    /// The page after power-on.
    pub const ADDRESS: u64 = 0xfee0_0000;
    /// Neither these nor the bits above the physical address may be set.
    pub(super) const RESERVED: u64 = 0x2ff | !((1 << 40) - 1);
}

/// What a write has to do elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// This message is to be delivered.
    Send(Message),
    /// A level-triggered interrupt of that vector has ended: the I/O APIC must hear of it.
    EndOfInterrupt(u8),
}

/// What waits for the processor besides interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// INIT: the processor resets and waits for its start-up message.
    pub init: bool,
    /// A start-up message with its page; it comes after [`Self::init`], and counts only while the
    /// processor waits for it.
    pub start_up: Option<u8>,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// A system management interrupt.
    pub smi: bool,
    /// A kick: HLT ends, now or the next time.
    pub kick: bool,
}

/// One local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    id: u32,
    base: u64,
    registers: [u32; SLOTS],
    timer: ApicTimer,
    tsc: Tsc,
    events: Events,
    /// The guest may have ended its interrupt without a word (PV EOI).
    end_spared: bool,
}

impl LocalApic {
    /// As after power-on, for the vCPU of that index.
    #[must_use]
    pub fn new(id: u32, tsc: Tsc) -> Self {
        let mut apic = Self {
            id,
            base: 0,
            registers: [0; SLOTS],
            timer: ApicTimer::default(),
            tsc,
            events: Events::default(),
            end_spared: false,
        };
        apic.reset();
        apic
    }

    /// As after power-on; the time-stamp counter runs on.
    pub fn reset(&mut self) {
        self.base = base::ADDRESS | base::ENABLED;
        if self.id == 0 {
            self.base |= base::BSP;
        }
        self.events = Events::default();
        self.registers = [0; SLOTS];
        self.set_xapic_id();
        self.init();
    }

    /// What INIT does (SDM volume 3, 11.4.7.3): ID, base and mode stay.
    pub fn init(&mut self) {
        let [id, ldr] = [index::ID, index::LDR].map(|index| self.registers[index]);
        self.registers = [0; SLOTS];
        self.registers[index::ID] = id;
        if self.is_x2apic() {
            self.registers[index::LDR] = ldr;
        }
        self.registers[index::VERSION] = VERSION;
        self.registers[index::DFR] = u32::MAX;
        self.registers[index::SPURIOUS] = 0xff;
        self.registers[index::LVT_TIMER..=index::LVT_ERROR].fill(LVT_MASKED);
        if self.id == 0 {
            self.registers[index::LVT_LINT0] = LVT_EXTINT;
        }
        self.timer = ApicTimer::default();
        self.end_spared = false;
    }

    /// The page's registers at `now_ns`, in KVM's form.
    #[must_use]
    pub fn save(&self, now_ns: u64) -> [u8; LOCAL_APIC_PAGE] {
        let mut registers = self.registers;
        registers[index::PPR] = self.ppr().into();
        registers[index::INITIAL_COUNT] = self.timer.initial();
        registers[index::CURRENT_COUNT] = self.timer.current(now_ns);
        registers[index::DIVIDE] = self.timer.divide();
        let mut page = [0; LOCAL_APIC_PAGE];
        for (slot, register) in page.chunks_exact_mut(16).zip(registers) {
            slot[..4].copy_from_slice(&register.to_le_bytes());
        }
        page
    }

    /// Takes what [`Self::save`] has given, with IA32_APIC_BASE and IA32_TSC_DEADLINE. The
    /// time-stamp counter is set before.
    ///
    /// # Errors
    ///
    /// The base or the page is none that can be.
    pub fn restore(
        &mut self,
        page: &[u8],
        apic_base: u64,
        deadline_tsc: u64,
        now_ns: u64,
    ) -> Result<(), Refused> {
        if page.len() != LOCAL_APIC_PAGE || !is_possible_base(apic_base) {
            return Err(Refused);
        }
        self.base = apic_base;
        for (register, slot) in self.registers.iter_mut().zip(page.chunks_exact(16)) {
            *register = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
        }
        self.registers[index::VERSION] = VERSION;
        if self.is_x2apic() {
            self.set_x2apic_id();
        }
        self.timer.restore(
            TimerMode::from_lvt(self.registers[index::LVT_TIMER]),
            self.registers[index::INITIAL_COUNT],
            self.registers[index::CURRENT_COUNT],
            self.registers[index::DIVIDE],
            now_ns,
        );
        self.timer.set_deadline(deadline_tsc, &self.tsc, now_ns);
        self.events = Events::default();
        self.end_spared = false;
        Ok(())
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE.
    ///
    /// # Errors
    ///
    /// A reserved bit, or a transition that SDM volume 3, 11.12.5 forbids.
    pub fn set_base(&mut self, value: u64) -> Result<(), Refused> {
        let mode = |base: u64| (base & base::ENABLED != 0, base & base::X2APIC != 0);
        let forbidden = matches!(
            (mode(self.base), mode(value)),
            ((true, true), (true, false)) | ((false, _), (true, true))
        );
        if !is_possible_base(value) || forbidden {
            return Err(Refused);
        }
        let before = self.base;
        self.base = value;
        if before & base::ENABLED == 0 && self.is_enabled() {
            self.set_xapic_id();
        }
        if before & base::X2APIC == 0 && self.is_x2apic() {
            self.set_x2apic_id();
        }
        Ok(())
    }

    /// Enabled in its base register.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.base & base::ENABLED != 0
    }

    /// In x2APIC mode.
    #[must_use]
    pub fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    /// Enabled in its spurious vector register too, so that it takes interrupts.
    #[must_use]
    pub fn is_software_enabled(&self) -> bool {
        self.registers[index::SPURIOUS] & SPURIOUS_ENABLED != 0
    }

    fn set_xapic_id(&mut self) {
        self.registers[index::ID] = self.id << 24;
    }

    /// The page has the ID in the xAPIC's place in both modes (`KVM_CAP_X2APIC_API` is off); a
    /// logical ID follows from it (SDM volume 3, 11.12.10.2).
    fn set_x2apic_id(&mut self) {
        self.set_xapic_id();
        self.registers[index::LDR] = (self.id >> 4) << 16 | 1 << (self.id & 0xf);
    }

    /// Takes a message that is for this one; whether it counts as delivered.
    pub fn accept(&mut self, message: &Message) -> bool {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                let deasserted = message.level_triggered && !message.assert;
                if deasserted || !self.is_enabled() || !self.is_software_enabled() {
                    return false;
                }
                let (slot, bit) = locate(message.vector);
                let tmr = &mut self.registers[index::TMR + slot];
                *tmr = if message.level_triggered {
                    *tmr | bit
                } else {
                    *tmr & !bit
                };
                self.registers[index::IRR + slot] |= bit;
                true
            }
            DeliveryMode::Nmi => {
                self.events.nmi = true;
                true
            }
            DeliveryMode::Smi => {
                self.events.smi = true;
                true
            }
            DeliveryMode::Init => {
                // The de-assertion of old processors' INIT is no INIT.
                if message.level_triggered && !message.assert {
                    return false;
                }
                self.events.init = true;
                self.events.start_up = None;
                true
            }
            DeliveryMode::StartUp => {
                self.events.start_up = Some(message.vector);
                true
            }
            // As in KVM the 8259s are on LINT0 only.
            DeliveryMode::ExtInt | DeliveryMode::Reserved => false,
        }
    }

    /// What an input of the local vector table does when it is signalled: `register` is that of
    /// [`Self::lint0_nmi`] or the timer.
    fn deliver_local(&mut self, register: usize) -> bool {
        let lvt = self.registers[register];
        if !self.is_enabled() || lvt & LVT_MASKED != 0 {
            return false;
        }
        self.accept(&Message {
            vector: lvt as u8,
            mode: DeliveryMode::from_bits(lvt),
            destination: Destination::Myself,
            sender: None,
            level_triggered: lvt & 1 << 15 != 0,
            assert: true,
            redirection_hint: false,
        })
    }

    /// LINT1 is signalled, as a board's NMI button does.
    pub fn signal_lint1(&mut self) -> bool {
        self.deliver_local(index::LVT_LINT1)
    }

    /// IRQ 0 rises on LINT0: an NMI if that is what LINT0 is for (Linux's old NMI watchdog).
    pub fn lint0_nmi(&mut self) -> bool {
        let lvt = self.registers[index::LVT_LINT0];
        DeliveryMode::from_bits(lvt) == DeliveryMode::Nmi && self.deliver_local(index::LVT_LINT0)
    }

    /// Whether the 8259s' output reaches this processor.
    #[must_use]
    pub fn takes_extint(&self) -> bool {
        let lvt = self.registers[index::LVT_LINT0];
        !self.is_enabled() || lvt & (LVT_MASKED | 0x700) == LVT_EXTINT
    }

    /// The interrupt that the processor priority lets through.
    #[must_use]
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.highest(index::IRR).filter(|_| self.is_enabled())?;
        (vector & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// The processor takes the deliverable interrupt.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        let (slot, bit) = locate(vector);
        self.registers[index::IRR + slot] &= !bit;
        self.registers[index::ISR + slot] |= bit;
        Some(vector)
    }

    fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.highest(index::ISR) else {
            return Effect::None;
        };
        let (slot, bit) = locate(vector);
        self.registers[index::ISR + slot] &= !bit;
        if self.registers[index::TMR + slot] & bit != 0 {
            Effect::EndOfInterrupt(vector)
        } else {
            Effect::None
        }
    }

    /// The processor priority (SDM volume 3, 11.8.3.1).
    #[must_use]
    pub fn ppr(&self) -> u8 {
        let tpr = self.tpr();
        let serving = self.highest(index::ISR).unwrap_or(0) & 0xf0;
        if tpr & 0xf0 >= serving { tpr } else { serving }
    }

    /// The task priority; CR8 is its upper half.
    #[must_use]
    pub fn tpr(&self) -> u8 {
        self.registers[index::TPR] as u8
    }

    /// Sets the task priority.
    pub fn set_tpr(&mut self, value: u8) {
        self.registers[index::TPR] = value.into();
    }

    /// What waits besides interrupts.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events
    }

    /// Takes what waits besides interrupts.
    pub fn take_events(&mut self) -> Events {
        std::mem::take(&mut self.events)
    }

    /// Sets what waits besides interrupts.
    pub fn set_events(&mut self, events: Events) {
        self.events = events;
    }

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.timer.next()
    }

    /// Delivers the timer's interrupt if it is due.
    pub fn expire(&mut self, now_ns: u64) {
        if self.timer.expire(now_ns) {
            self.deliver_local(index::LVT_TIMER);
        }
    }

    /// The processor's time-stamp counter.
    #[must_use]
    pub fn tsc(&self) -> Tsc {
        self.tsc
    }

    /// Sets it; a deadline is seen in its light.
    pub fn set_tsc(&mut self, tsc: Tsc, now_ns: u64) {
        self.tsc = tsc;
        self.timer.tsc_changed(&tsc, now_ns);
    }

    /// IA32_TSC_DEADLINE.
    #[must_use]
    pub fn deadline_tsc(&self) -> u64 {
        self.timer.deadline_tsc()
    }

    /// Writes IA32_TSC_DEADLINE.
    pub fn set_deadline_tsc(&mut self, value: u64, now_ns: u64) {
        if self.is_enabled() {
            self.timer.set_deadline(value, &self.tsc, now_ns);
        }
    }

    /// The highest vector in one of the 256-bit registers.
    fn highest(&self, first: usize) -> Option<u8> {
        let words = &self.registers[first..first + 8];
        let (slot, word) = words.iter().enumerate().rfind(|(_, word)| **word != 0)?;
        Some((slot as u32 * 32 + word.ilog2()) as u8)
    }
}

fn is_possible_base(value: u64) -> bool {
    let x2apic_alone = value & (base::ENABLED | base::X2APIC) == base::X2APIC;
    value & base::RESERVED == 0 && !x2apic_alone
}

/// Slot and bit of a vector in a 256-bit register.
fn locate(vector: u8) -> (usize, u32) {
    (usize::from(vector / 32), 1 << (vector % 32))
}

#[cfg(test)]
mod tests;
