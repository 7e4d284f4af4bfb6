//! The engine that needs nothing of the host: a processor in software with the chips of this module.
//!
//! ```text
//!  vcpu      run loop, waiting, INIT and SIPI     board    what surrounds a processor's core
//!  signals   the thread for timers and MSIs       msi      message-signalled vectors
//!  line      interrupt lines                      msr      registers that only hold values
//!  state     out to the neutral structures and in again
//! ```
//!
//! A vCPU is a host thread; a halted one sleeps on a condition variable. One more thread waits for the
//! timers' next deadline and for the eventfds of MSI vectors, which devices and other processes signal.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, RwLock, Weak};

use mica_cpu::Ram;
use vmm_sys_util::eventfd::EventFd;

use super::dirty::SoftDirtyLog;
use super::line::Lines;
use super::msi::Vector;
use super::platform::Platform;
use super::signals::Signals;
use super::time;
use super::tsc::{DEFAULT_KHZ, Tsc};
use super::turns::Turns;
use super::vcpu::SoftVcpu;
use super::waker::Waker;
use crate::bus::lock;
use crate::cpu_profile::{CpuProfile, CpuidTable};
use crate::engine::state::PlatformState;
use crate::engine::{
    DoorbellAddress, Engine, EngineError, InterruptLine, InterruptSource, MAX_VCPUS, MsiVector,
    UnknownMsrs, Vcpu, invalid,
};
use crate::memory::dirty::DirtySource;
use crate::memory::{GuestMemory, processor_ram};
use crate::recording::Record;

/// The most MSI vectors, as many as KVM has.
const MAX_MSI_VECTORS: usize = 4096;

/// What a [`SoftEngine`] executes.
pub struct SoftConfig {
    /// The guest's RAM.
    pub memory: GuestMemory,
    /// How many vCPUs it will have, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// The processor that the guest sees.
    pub profile: CpuProfile,
    /// With these the vCPUs take turns, and the run is recorded or replayed.
    pub turns: Option<Arc<Turns>>,
}

/// What the vCPUs of a machine and its other threads share.
pub(super) struct Shared {
    pub(super) memory: GuestMemory,
    pub(super) ram: Arc<Ram>,
    pub(super) platform: Arc<Platform>,
    pub(super) waker: Arc<Waker>,
    pub(super) doorbells: RwLock<HashMap<DoorbellAddress, EventFd>>,
    pub(super) unknown_msrs: UnknownMsrs,
    /// Where vCPUs take turns.
    pub(super) turns: Option<Arc<Turns>>,
}

impl Shared {
    /// The machine's monotonic clock.
    pub(super) fn now_ns(&self) -> u64 {
        self.turns
            .as_ref()
            .map_or_else(time::now_ns, |turns| turns.now_ns())
    }

    /// The wall clock.
    pub(super) fn realtime_ns(&self) -> u64 {
        self.turns
            .as_ref()
            .map_or_else(time::realtime_ns, |turns| turns.realtime_ns())
    }

    /// Delivers a message-signalled interrupt, now or when it is its turn.
    pub(super) fn send_msi(&self, address: u64, data: u32) {
        match &self.turns {
            Some(turns) => turns.push(Record::Message { address, data }),
            None => {
                self.platform.send_msi(address, data);
            }
        }
    }

    /// Signals the doorbell at an address, if there is one.
    pub(super) fn ring(&self, address: DoorbellAddress) -> bool {
        let doorbells = self
            .doorbells
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match doorbells.get(&address) {
            // Fails only when the counter is full, and then it is signalled anyway.
            Some(eventfd) => {
                let _ = eventfd.write(1);
                if let Some(turns) = &self.turns {
                    turns.stir();
                }
                true
            }
            None => false,
        }
    }
}

/// One VM on processors in software.
pub struct SoftEngine {
    shared: Arc<Shared>,
    signals: Arc<Signals>,
    lines: Arc<Lines>,
    vectors: Mutex<Vec<Weak<Vector>>>,
    cpuid: CpuidTable,
    vcpus: u32,
    created: Mutex<Vec<bool>>,
}

impl SoftEngine {
    /// Makes the chips and starts the thread behind them; there is no vCPU yet.
    ///
    /// # Errors
    ///
    /// The profile asks for more than the processor has, or the system refuses a descriptor or a
    /// thread.
    pub fn new(config: SoftConfig) -> Result<Self, EngineError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            let reason = format!("{} vCPUs; possible are 1 to {MAX_VCPUS}", config.vcpus);
            return Err(EngineError::new("create VM", invalid(reason)));
        }
        let cpuid = config
            .profile
            .resolve_emulated(config.vcpus)
            .map_err(|error| {
                let reason = format!("{error}; the software engine has x86-64-v2");
                EngineError::new("CPU profile", invalid(reason))
            })?;
        let turns = config.turns;
        let now_ns = turns
            .as_ref()
            .map_or_else(time::now_ns, |turns| turns.now_ns());
        let system = |error| EngineError::new("create VM", error);
        let waker = Arc::new(Waker::new(config.vcpus as usize, turns.clone()).map_err(system)?);
        let platform = Arc::new(Platform::new(
            config.vcpus as usize,
            Tsc::new(DEFAULT_KHZ, 0, now_ns),
            now_ns,
            Arc::clone(&waker),
        ));
        waker.attach(&platform);
        let shared = Arc::new(Shared {
            ram: Arc::new(processor_ram(&config.memory)),
            memory: config.memory,
            platform,
            waker,
            doorbells: RwLock::default(),
            unknown_msrs: UnknownMsrs::default(),
            turns: turns.clone(),
        });
        let signals = Signals::start(Arc::clone(&shared)).map_err(system)?;
        Ok(Self {
            lines: Lines::new(Arc::clone(&shared)),
            signals,
            shared,
            vectors: Mutex::default(),
            cpuid,
            vcpus: config.vcpus,
            created: Mutex::new(vec![false; config.vcpus as usize]),
        })
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let refuse =
            |reason: String| EngineError::new(format!("create vCPU {index}"), invalid(reason));
        let mut created = lock(&self.created);
        match created.get_mut(index as usize) {
            None => return Err(refuse(format!("the VM has {} vCPUs", self.vcpus))),
            Some(true) => return Err(refuse("it exists".into())),
            Some(created) => *created = true,
        }
        Ok(Box::new(SoftVcpu::new(
            Arc::clone(&self.shared),
            index as usize,
            self.cpuid.for_vcpu(index),
        )))
    }

    fn dirty_source(&self) -> Arc<dyn DirtySource> {
        Arc::new(SoftDirtyLog::new(Arc::clone(&self.shared)))
    }

    fn save_platform(&self) -> Result<PlatformState, EngineError> {
        let (now, realtime) = (self.shared.now_ns(), self.shared.realtime_ns());
        Ok(self.shared.platform.save(now, Some(realtime)))
    }

    fn restore_platform(&self, state: &PlatformState) -> Result<(), EngineError> {
        self.shared.platform.restore(state, self.shared.now_ns());
        Ok(())
    }

    fn reset_platform(&self) -> Result<(), EngineError> {
        self.shared.platform.reset(self.shared.now_ns());
        if let Some(turns) = &self.shared.turns {
            turns.restart();
        }
        Ok(())
    }

    fn unknown_msr_accesses(&self) -> u64 {
        self.shared.unknown_msrs.accesses()
    }

    fn take_unknown_msrs(&self) -> Vec<u32> {
        self.shared.unknown_msrs.take_fresh()
    }
}

impl InterruptSource for SoftEngine {
    fn line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        self.lines.line(gsi)
    }

    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, EngineError> {
        let mut vectors = lock(&self.vectors);
        vectors.retain(|vector| vector.strong_count() > 0);
        if vectors.len() >= MAX_MSI_VECTORS {
            let reason = format!("all {MAX_MSI_VECTORS} are taken");
            return Err(EngineError::new("create MSI vector", invalid(reason)));
        }
        let vector = Vector::new(Arc::clone(&self.signals))
            .map_err(|error| EngineError::new("create MSI vector", error))?;
        vectors.push(Arc::downgrade(&vector));
        Ok(vector)
    }

    fn add_doorbell(&self, address: DoorbellAddress, eventfd: &EventFd) -> Result<(), EngineError> {
        let mut doorbells = self.doorbells();
        let Entry::Vacant(entry) = doorbells.entry(address) else {
            let reason = format!("{address:?} has one already");
            return Err(EngineError::new("add doorbell", invalid(reason)));
        };
        let kept = eventfd
            .try_clone()
            .map_err(|error| EngineError::new("add doorbell", error))?;
        entry.insert(kept);
        Ok(())
    }

    fn remove_doorbell(
        &self,
        address: DoorbellAddress,
        _eventfd: &EventFd,
    ) -> Result<(), EngineError> {
        match self.doorbells().remove(&address) {
            Some(_) => Ok(()),
            None => {
                let reason = format!("{address:?} has none");
                Err(EngineError::new("remove doorbell", invalid(reason)))
            }
        }
    }
}

impl SoftEngine {
    fn doorbells(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<DoorbellAddress, EventFd>> {
        self.shared
            .doorbells
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for SoftEngine {
    fn drop(&mut self) {
        self.signals.stop();
    }
}
