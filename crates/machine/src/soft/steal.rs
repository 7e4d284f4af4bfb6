//! Steal time: how long a vCPU wanted to run and its thread had no processor, and the byte that says
//! whether it runs at all (`MSR_KVM_STEAL_TIME` in the kernel's `Documentation/virt/kvm/x86/msr.rst`).
//!
//! KVM adds what the host's scheduler calls run_delay. Its file in /proc is closed to the VM process,
//! which is in its jail before it has threads for vCPUs. So time is stolen here if it passes on the
//! wall and not on the thread's own clock, from the moment when the vCPU wants to run, or somebody has
//! roused it, until it sleeps. That needs no descriptor and works without /proc. It also counts
//! where the thread waits for the host inside an access of the guest's: for a lock, for memory that is
//! swapped out. To the guest that is no different.
//!
//! Like KVM it adds to what it finds in the guest's memory, so there is nothing to save but the MSR.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use rustix::time::{ClockId, clock_gettime};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::memory::GuestMemory;

use super::Refused;

/// `MSR_KVM_STEAL_TIME`.
pub const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
const ENABLED: u64 = 1;
/// The structure is aligned to 64 bytes.
const RESERVED: u64 = 0x3e;
/// Where the structure has its version and its `preempted` byte; the time is at its beginning.
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;
/// The vCPU does not run.
const IS_PREEMPTED: u8 = 1;
/// Set by another vCPU beside it, instead of an IPI: its translations must go before it runs.
const FLUSH_TLB: u8 = 2;
/// A running vCPU's time is added up at most so often.
const UPDATE_NS: u64 = 1_000_000;

/// The wall clock that the processor time of threads is measured with: NTP does not correct it.
pub(super) fn wall_ns() -> u64 {
    read(ClockId::MonotonicRaw)
}

fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = time.tv_sec.cast_unsigned();
    seconds
        .wrapping_mul(1_000_000_000)
        .wrapping_add(time.tv_nsec.cast_unsigned())
}

/// Whether a vCPU's lost time is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// By the clocks of the thread that executes it.
    #[default]
    Thread,
    /// It never loses any, and never says that it does not run: what the guest sees is not to depend
    /// on the host's time.
    Nothing,
}

/// Two clocks at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Reading {
    wall_ns: u64,
    thread_ns: u64,
}

impl Reading {
    fn now() -> Self {
        Self {
            wall_ns: wall_ns(),
            thread_ns: read(ClockId::ThreadCPUTime),
        }
    }

    /// What the thread has lost until `now`, and where the next reckoning begins. Where it seems to
    /// have got more than there was, the surplus stays for later.
    fn lost(self, now: Self) -> (u64, Self) {
        let passed = now.wall_ns.saturating_sub(self.wall_ns);
        let had = now.thread_ns.saturating_sub(self.thread_ns).min(passed);
        let next = Self {
            wall_ns: now.wall_ns,
            thread_ns: self.thread_ns.wrapping_add(had),
        };
        (passed - had, next)
    }
}

/// One vCPU's steal time. Its methods are called by the vCPU's thread.
#[derive(Clone, Debug, Default)]
pub struct StealTime {
    source: Source,
    msr: u64,
    /// Until when the time is added up.
    counted: Reading,
}

impl StealTime {
    /// It is off, as after a reset.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            ..Self::default()
        }
    }

    /// Off again.
    pub fn reset(&mut self) {
        *self = Self::new(self.source);
    }

    /// The MSR.
    #[must_use]
    pub fn msr(&self) -> u64 {
        self.msr
    }

    /// Writes the MSR, and with it the structure at the address that it has.
    ///
    /// # Errors
    ///
    /// A reserved bit is set.
    pub fn write_msr(&mut self, value: u64, memory: &GuestMemory) -> Result<(), Refused> {
        self.restore(value)?;
        // Nobody can have asked for a flush here before.
        let _ = self.arrive(wall_ns(), memory);
        self.add(0, memory);
        Ok(())
    }

    /// Sets the MSR without touching the guest's memory, which may not be there yet.
    ///
    /// # Errors
    ///
    /// A reserved bit is set.
    pub fn restore(&mut self, value: u64) -> Result<(), Refused> {
        if value & RESERVED != 0 {
            return Err(Refused);
        }
        self.msr = value;
        Ok(())
    }

    /// The vCPU goes on running.
    pub fn running(&mut self, memory: &GuestMemory) {
        if self.is_measured() && wall_ns().saturating_sub(self.counted.wall_ns) >= UPDATE_NS {
            self.count(memory);
        }
    }

    /// The vCPU is going to sleep.
    pub fn leave(&mut self, memory: &GuestMemory) {
        if !self.is_measured() {
            return;
        }
        self.count(memory);
        self.swap_preempted(IS_PREEMPTED, memory);
    }

    /// The vCPU runs from now on, and has wanted to since `since_ns`; whether its translations must go
    /// before it does.
    #[must_use]
    pub fn arrive(&mut self, since_ns: u64, memory: &GuestMemory) -> bool {
        if self.source == Source::Thread {
            let now = Reading::now();
            // Who was roused before it slept has counted until then.
            let wall_ns = since_ns.max(self.counted.wall_ns).min(now.wall_ns);
            self.counted = Reading { wall_ns, ..now };
        }
        self.swap_preempted(0, memory) & FLUSH_TLB != 0
    }

    fn is_measured(&self) -> bool {
        self.source == Source::Thread && self.msr & ENABLED != 0
    }

    fn count(&mut self, memory: &GuestMemory) {
        let (lost, counted) = self.counted.lost(Reading::now());
        self.counted = counted;
        if lost != 0 {
            self.add(lost, memory);
        }
    }

    /// The address of a field, while the guest wants to see it.
    fn field(&self, offset: u64) -> Option<GuestAddress> {
        let address = (self.msr & !(RESERVED | ENABLED)).checked_add(offset)?;
        (self.msr & ENABLED != 0).then_some(GuestAddress(address))
    }

    /// Adds to the time in the guest's memory. An address outside RAM is the guest's own loss.
    fn add(&self, lost_ns: u64, memory: &GuestMemory) {
        let (Some(time), Some(version_at)) = (self.field(0), self.field(VERSION)) else {
            return;
        };
        let Ok(version) = memory.read_obj::<u32>(version_at) else {
            return;
        };
        let odd = version | 1;
        let _ = memory.store(odd, version_at, Ordering::Relaxed);
        fence(Ordering::Release);
        let before: u64 = memory.load(time, Ordering::Relaxed).unwrap_or(0);
        let _ = memory.store(before.wrapping_add(lost_ns), time, Ordering::Relaxed);
        fence(Ordering::Release);
        let _ = memory.store(odd.wrapping_add(1), version_at, Ordering::Release);
    }

    /// Replaces the `preempted` byte, as one because other vCPUs set bits of it; says what it was.
    fn swap_preempted(&self, value: u8, memory: &GuestMemory) -> u8 {
        let Some(at) = self.field(PREEMPTED) else {
            return 0;
        };
        let Ok(slice) = memory.get_slice(at, 1) else {
            return 0;
        };
        let Ok(byte) = slice.get_atomic_ref::<AtomicU8>(0) else {
            return 0;
        };
        let before = byte.swap(value, Ordering::SeqCst);
        if before != value {
            slice.bitmap().mark_dirty(0, 1);
        }
        before
    }
}

/// When somebody roused a sleeper.
#[derive(Debug, Default)]
pub(super) struct RousedAt(AtomicU64);

impl RousedAt {
    /// Now.
    pub(super) fn note(&self) {
        self.0.store(wall_ns(), Ordering::Relaxed);
    }

    /// On the clock of [`wall_ns`].
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
