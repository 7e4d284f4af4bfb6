//! The paravirtual clock that KVM offers its guests (`Documentation/virt/kvm/x86/msr.rst` in the kernel's
//! source).

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress};

use crate::engine::state::ClockState;
use crate::memory::GuestMemory;

use super::Refused;
use super::tsc::Tsc;

/// The MSRs.
pub mod msr {
    /// `MSR_KVM_WALL_CLOCK`, the old number.
    pub const WALL_CLOCK_OLD: u32 = 0x11;
    /// `MSR_KVM_SYSTEM_TIME`, the old number.
    pub const SYSTEM_TIME_OLD: u32 = 0x12;
    /// `MSR_KVM_WALL_CLOCK_NEW`.
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    /// `MSR_KVM_SYSTEM_TIME_NEW`.
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
}

/// Bit 0 of system time's MSR.
const ENABLED: u64 = 1;
const NS_PER_SECOND: u64 = 1_000_000_000;
/// Flags of the time structure: the counters of all vCPUs agree.
const TSC_STABLE: u8 = 1;
/// The machine stood still; the guest clears it.
const GUEST_STOPPED: u8 = 2;

/// The machine's time as kvmclock shows it: it stands still while the machine is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestClock {
    /// What it is ahead of the monotonic clock, modulo 2^64.
    offset: u64,
}

impl GuestClock {
    /// A clock that starts at zero now.
    #[must_use]
    pub fn new(now_ns: u64) -> Self {
        Self {
            offset: 0u64.wrapping_sub(now_ns),
        }
    }

    /// Nanoseconds of the machine's life.
    #[must_use]
    pub fn at(&self, now_ns: u64) -> u64 {
        now_ns.wrapping_add(self.offset)
    }

    /// Its state; `realtime_ns` is the host's wall clock at `now_ns`.
    #[must_use]
    pub fn save(&self, now_ns: u64, realtime_ns: Option<u64>) -> ClockState {
        ClockState {
            guest_ns: self.at(now_ns),
            realtime_ns,
        }
    }

    /// Goes on from where it was saved.
    pub fn restore(&mut self, state: &ClockState, now_ns: u64) {
        self.offset = state.guest_ns.wrapping_sub(now_ns);
    }
}

/// The clocks at one instant, as an update of a guest's structures needs them.
#[derive(Clone, Copy, Debug)]
pub struct Instant {
    /// The monotonic clock.
    pub now_ns: u64,
    /// The host's wall clock, since 1970.
    pub realtime_ns: u64,
    /// The machine's clock.
    pub clock: GuestClock,
    /// The vCPU's counter.
    pub tsc: Tsc,
}

/// One vCPU's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PvClock {
    wall_clock: u64,
    system_time: u64,
    version: u32,
}

impl PvClock {
    /// Whether the MSR is one of these.
    #[must_use]
    pub fn owns_msr(msr: u32) -> bool {
        matches!(
            msr,
            msr::WALL_CLOCK_OLD | msr::SYSTEM_TIME_OLD | msr::WALL_CLOCK | msr::SYSTEM_TIME
        )
    }

    /// Reads one of the MSRs.
    ///
    /// # Errors
    ///
    /// It is none of these.
    pub fn read_msr(&self, msr: u32) -> Result<u64, Refused> {
        match msr {
            msr::WALL_CLOCK_OLD | msr::WALL_CLOCK => Ok(self.wall_clock),
            msr::SYSTEM_TIME_OLD | msr::SYSTEM_TIME => Ok(self.system_time),
            _ => Err(Refused),
        }
    }

    /// Writes one of the MSRs, and with it the structure at the address that it has.
    ///
    /// # Errors
    ///
    /// It is none of these.
    pub fn write_msr(
        &mut self,
        msr: u32,
        value: u64,
        memory: &GuestMemory,
        instant: &Instant,
    ) -> Result<(), Refused> {
        match msr {
            msr::WALL_CLOCK_OLD | msr::WALL_CLOCK => {
                self.wall_clock = value;
                write_wall_clock(value, memory, instant);
            }
            msr::SYSTEM_TIME_OLD | msr::SYSTEM_TIME => {
                self.system_time = value;
                self.update(memory, instant, false);
            }
            _ => return Err(Refused),
        }
        Ok(())
    }

    /// Everything off, as after a reset.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Writes the time structure, if the guest has asked for it: after the time-stamp counter or the
    /// clock has been set. `stopped` tells the guest that the machine stood still, so that it does
    /// not take the gap for a lock-up.
    ///
    /// An address outside RAM is the guest's own loss.
    pub fn update(&mut self, memory: &GuestMemory, instant: &Instant, stopped: bool) {
        if self.system_time & ENABLED == 0 {
            return;
        }
        const FLAGS: u64 = 29;
        let address = GuestAddress(self.system_time & !ENABLED);
        let kept = match address.0.checked_add(FLAGS) {
            Some(at) => memory.read_obj::<u8>(GuestAddress(at)).unwrap_or(0) & GUEST_STOPPED,
            None => return,
        };
        let flags = TSC_STABLE | kept | if stopped { GUEST_STOPPED } else { 0 };
        let (multiplier, shift) = time_scale(instant.tsc.khz());
        let mut body = [0; 28];
        body[4..12].copy_from_slice(&instant.tsc.at(instant.now_ns).to_le_bytes());
        body[12..20].copy_from_slice(&instant.clock.at(instant.now_ns).to_le_bytes());
        body[20..24].copy_from_slice(&multiplier.to_le_bytes());
        body[24] = shift as u8;
        body[25] = flags;
        self.version = (self.version | 1).wrapping_add(1);
        write_versioned(memory, address, self.version, &body);
    }
}

/// The wall clock at the machine's time zero: seconds and nanoseconds behind a version.
fn write_wall_clock(address: u64, memory: &GuestMemory, instant: &Instant) {
    if address == 0 {
        return;
    }
    let address = GuestAddress(address);
    let Ok(before) = memory.read_obj::<u32>(address) else {
        return;
    };
    let life = instant.clock.at(instant.now_ns);
    let zero = instant.realtime_ns.saturating_sub(life);
    let mut body = [0; 8];
    // The structure ends in 2106.
    body[..4].copy_from_slice(&((zero / NS_PER_SECOND) as u32).to_le_bytes());
    body[4..].copy_from_slice(&((zero % NS_PER_SECOND) as u32).to_le_bytes());
    write_versioned(memory, address, (before | 1).wrapping_add(1), &body);
}

/// Writes `body` behind a version of 32 bits, which is odd meanwhile and `version` afterwards.
fn write_versioned(memory: &GuestMemory, structure: GuestAddress, version: u32, body: &[u8]) {
    let Some(behind) = structure.0.checked_add(4).map(GuestAddress) else {
        return;
    };
    // A guest that puts it outside RAM, or not aligned, does not get it.
    let _ = memory.store(version.wrapping_sub(1), structure, Ordering::Relaxed);
    fence(Ordering::Release);
    let _ = memory.write_slice(body, behind);
    fence(Ordering::Release);
    let _ = memory.store(version, structure, Ordering::Release);
}

/// Multiplier and shift with which a guest makes nanoseconds of cycles:
/// `(cycles << shift) * multiplier >> 32`, a negative shift being one to the right.
#[must_use]
pub fn time_scale(khz: u32) -> (u32, i8) {
    let mut hertz = u64::from(khz.max(1)) * 1000;
    let mut shift = 0;
    // Twice the target at the most, so that the multiplier keeps its 31 bits.
    while hertz > 2 * NS_PER_SECOND {
        hertz >>= 1;
        shift -= 1;
    }
    while hertz <= NS_PER_SECOND {
        hertz <<= 1;
        shift += 1;
    }
    (((NS_PER_SECOND << 32) / hertz) as u32, shift)
}

#[cfg(test)]
mod tests;
