//! The guest's accesses: memory in xAPIC mode, MSRs in x2APIC mode.

use super::{Effect, LVT_MASKED, LocalApic, SLOTS, SPURIOUS_ENABLED, TimerMode, index};
use crate::soft::Refused;
use crate::soft::message::{DeliveryMode, Destination, Message};

/// The first MSR of x2APIC mode.
const MSR_BASE: u32 = 0x800;
/// What a local vector's entry has: vector, delivery status, mask.
const LVT_BITS: u32 = LVT_MASKED | 1 << 12 | 0xff;
const LVT_DELIVERY_MODE: u32 = 0x700;
const LVT_TIMER_MODE: u32 = 3 << 17;
/// Polarity, remote IRR, trigger mode.
const LVT_LINT_BITS: u32 = 7 << 13;
const ICR_BUSY: u32 = 1 << 12;
/// Reserved bits of the 64-bit ICR.
const ICR_RESERVED: u64 = 0xfff0_0000 | 3 << 16 | 1 << 13;

impl LocalApic {
    /// Reads `data.len()` bytes at that offset of the page.
    pub fn read_memory(&self, offset: u64, data: &mut [u8], now_ns: u64) {
        if !self.is_enabled() || self.is_x2apic() {
            // Nobody answers.
            data.fill(0xff);
            return;
        }
        data.fill(0);
        let at = (offset & 0xf) as usize;
        let Ok(value) = self.read_register((offset & 0xfff) as usize >> 4, now_ns) else {
            return;
        };
        if let Some(bytes) = value.to_le_bytes().get(at..at + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes at that offset of the page; only whole registers can be written.
    pub fn write_memory(&mut self, offset: u64, data: &[u8], now_ns: u64) -> Effect {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return Effect::None;
        };
        if !self.is_enabled() || self.is_x2apic() || offset & 0xf != 0 {
            return Effect::None;
        }
        let register = (offset & 0xfff) as usize >> 4;
        self.write_register(register, u32::from_le_bytes(bytes), now_ns)
            .unwrap_or(Effect::None)
    }

    /// Reads one of the MSRs 0x800 to 0x8ff.
    ///
    /// # Errors
    ///
    /// Not in x2APIC mode, or no register that can be read.
    pub fn read_msr(&self, msr: u32, now_ns: u64) -> Result<u64, Refused> {
        let register = self.msr_register(msr)?;
        if register == index::ICR {
            let high = u64::from(self.registers[index::ICR2]);
            return Ok(high << 32 | u64::from(self.registers[index::ICR]));
        }
        self.read_register(register, now_ns).map(u64::from)
    }

    /// Writes one of the MSRs 0x800 to 0x8ff.
    ///
    /// # Errors
    ///
    /// Not in x2APIC mode, no register that can be written, or a reserved bit.
    pub fn write_msr(&mut self, msr: u32, value: u64, now_ns: u64) -> Result<Effect, Refused> {
        let register = self.msr_register(msr)?;
        if register == index::ICR {
            if value & ICR_RESERVED != 0 {
                return Err(Refused);
            }
            let low = value as u32 & !ICR_BUSY;
            let high = (value >> 32) as u32;
            self.registers[index::ICR] = low;
            self.registers[index::ICR2] = high;
            return Ok(Effect::Send(Message::from_icr(self.id as usize, low, high)));
        }
        let value = u32::try_from(value).map_err(|_| Refused)?;
        self.write_register(register, value, now_ns)
    }

    fn msr_register(&self, msr: u32) -> Result<usize, Refused> {
        let register = msr.checked_sub(MSR_BASE).ok_or(Refused)? as usize;
        if self.is_x2apic() && register < SLOTS {
            Ok(register)
        } else {
            Err(Refused)
        }
    }

    fn read_register(&self, register: usize, now_ns: u64) -> Result<u32, Refused> {
        let x2apic = self.is_x2apic();
        Ok(match register {
            index::ID if x2apic => self.id,
            index::PPR => self.ppr().into(),
            index::DFR | index::ICR2 | index::ARBITRATION if x2apic => return Err(Refused),
            index::ARBITRATION => 0,
            index::INITIAL_COUNT => self.timer.initial(),
            index::CURRENT_COUNT => self.timer.current(now_ns),
            index::DIVIDE => self.timer.divide(),
            index::ID
            | index::VERSION
            | index::TPR
            | index::LDR..=index::ESR
            | index::ICR..=index::LVT_ERROR => self.registers[register],
            _ => return Err(Refused),
        })
    }

    fn write_register(
        &mut self,
        register: usize,
        value: u32,
        now_ns: u64,
    ) -> Result<Effect, Refused> {
        let x2apic = self.is_x2apic();
        match register {
            index::ID | index::LDR | index::DFR | index::ICR2 if x2apic => return Err(Refused),
            index::ID | index::LDR | index::ICR2 => self.registers[register] = value & 0xff << 24,
            index::DFR => self.registers[register] = value | 0x0fff_ffff,
            index::TPR => self.registers[register] = value & 0xff,
            index::EOI => return Ok(self.end_of_interrupt()),
            index::SPURIOUS => self.write_spurious(value),
            index::ESR if x2apic && value != 0 => return Err(Refused),
            // There are never any errors.
            index::ESR => {}
            index::ICR => {
                let low = value & !ICR_BUSY;
                self.registers[register] = low;
                let destination = self.registers[index::ICR2] >> 24;
                let message = Message::from_icr(self.id as usize, low, destination);
                return Ok(Effect::Send(message));
            }
            index::LVT_TIMER..=index::LVT_ERROR => self.write_lvt(register, value),
            index::INITIAL_COUNT => self.timer.set_initial(value, now_ns),
            index::DIVIDE => self.timer.set_divide(value, now_ns),
            index::SELF_IPI if x2apic && value <= 0xff => {
                return Ok(Effect::Send(Message {
                    vector: value as u8,
                    mode: DeliveryMode::Fixed,
                    destination: Destination::Myself,
                    sender: Some(self.id as usize),
                    level_triggered: false,
                    assert: true,
                    redirection_hint: false,
                }));
            }
            _ => return Err(Refused),
        }
        Ok(Effect::None)
    }

    fn write_spurious(&mut self, value: u32) {
        self.registers[index::SPURIOUS] = value & 0x3ff;
        if value & SPURIOUS_ENABLED == 0 {
            // Disabled by software: all local vectors are masked (SDM volume 3, 11.4.7.2).
            for lvt in &mut self.registers[index::LVT_TIMER..=index::LVT_ERROR] {
                *lvt |= LVT_MASKED;
            }
        }
    }

    fn write_lvt(&mut self, register: usize, value: u32) {
        let bits = match register {
            index::LVT_TIMER => LVT_BITS | LVT_TIMER_MODE,
            index::LVT_THERMAL | index::LVT_PERFORMANCE => LVT_BITS | LVT_DELIVERY_MODE,
            index::LVT_LINT0 | index::LVT_LINT1 => LVT_BITS | LVT_DELIVERY_MODE | LVT_LINT_BITS,
            _ => LVT_BITS,
        };
        let masked = if self.is_software_enabled() {
            0
        } else {
            LVT_MASKED
        };
        self.registers[register] = value & bits | masked;
        if register == index::LVT_TIMER {
            self.timer.set_mode(TimerMode::from_lvt(value));
        }
    }
}
