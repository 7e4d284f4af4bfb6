//! A vCPU: its run loop, its sleep, and how others start and stop it.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mica_cpu::{Processor, Segment, SegmentName, State, Stop};

use super::board::{Board, Local};
use super::clock::PvClock;
use super::engine::Shared;
use super::local_apic::Events;
use super::msr::StoredMsrs;
use super::paravirtual::Paravirtual;
use super::state;
use super::steal::Source;
use super::turns::{Chips, Turn, Turns};
use crate::cpu_profile::CpuidTable;
use crate::engine::state::{GeneralRegisters, RunState, VcpuState};
use crate::engine::{BusAccess, DebugRequest, EngineError, Exit, Kick, Vcpu};

/// Instructions between two looks at what nobody announces; every announcement ends a run early.
const BUDGET: u64 = 1 << 32;

/// One vCPU.
pub(super) struct SoftVcpu {
    pub(super) index: usize,
    pub(super) processor: Processor,
    pub(super) local: Local,
    pub(super) shared: Arc<Shared>,
    pub(super) run_state: RunState,
    kick: Arc<SoftKick>,
    /// It has run since it was made, so that the next entry comes after a stop.
    entered: bool,
}

/// Makes a vCPU leave its run.
struct SoftKick {
    kicked: AtomicBool,
    shared: Arc<Shared>,
    vcpu: usize,
}

impl Kick for SoftKick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        match &self.shared.turns {
            // A kick is nothing that a guest would notice, so it does not wake.
            Some(turns) => turns.stir(),
            None => self.shared.waker.rouse(self.vcpu),
        }
    }
}

impl SoftVcpu {
    /// vCPU `index` as it is after power-on.
    pub(super) fn new(shared: Arc<Shared>, index: usize, cpuid: CpuidTable) -> Self {
        let mut processor = Processor::new(Arc::clone(&shared.ram));
        processor.set_address_bits(cpuid.answer(0x8000_0008, 0)[0] & 0xff);
        processor.set_gib_pages(cpuid.answer(0x8000_0001, 0)[3] >> 26 & 1 != 0);
        shared.waker.set_attention(index, processor.attention());
        if let Some(turns) = &shared.turns {
            processor.count_on(turns.meter());
        }
        let local = Local {
            cpuid,
            msrs: RefCell::new(StoredMsrs::default()),
            pv_clock: RefCell::new(PvClock::default()),
            paravirtual: Paravirtual::new(if shared.turns.is_some() {
                Source::Nothing
            } else {
                Source::Thread
            }),
            tsc: Cell::new(shared.platform.tsc(index)),
            apic_page: Cell::new(None),
            nmi_pending: Cell::new(false),
            interrupt: Cell::new(None),
        };
        local.refresh(&shared, index);
        let mut vcpu = Self {
            kick: Arc::new(SoftKick {
                kicked: AtomicBool::new(false),
                shared: Arc::clone(&shared),
                vcpu: index,
            }),
            index,
            processor,
            local,
            shared,
            run_state: first_state(index),
            entered: false,
        };
        vcpu.set_signature();
        vcpu
    }

    /// What a processor has in EDX after power-on and INIT: family, model and stepping.
    fn set_signature(&mut self) {
        const RDX: usize = 2;
        let [signature, ..] = self.local.cpuid.answer(1, 0);
        self.processor.state.set_register(RDX, signature.into());
    }

    /// Takes what waits beside interrupts.
    pub(super) fn take_events(&mut self) {
        if !self.shared.platform.is_pending(self.index) {
            return;
        }
        let events = self.shared.platform.take_events(self.index);
        if let Some(turns) = &self.shared.turns
            && events != Events::default()
        {
            turns.meter().add(1);
        }
        if events.nmi {
            self.local.nmi_pending.set(true);
            self.processor.state.halted = false;
        }
        if events.kick {
            self.unhalt();
        }
        if events.init {
            self.init();
        }
        if let Some(page) = events.start_up
            && self.run_state == RunState::WaitForSipi
        {
            self.start_up(page);
        }
    }

    /// INIT (SDM volume 3, table 10-1): the core as after power-on, but for what it keeps.
    fn init(&mut self) {
        const CACHE_BITS: u64 = 3 << 29;
        let old = std::mem::take(&mut self.processor.state);
        let state = &mut self.processor.state;
        state.cr0 = state.cr0 & !CACHE_BITS | old.cr0 & CACHE_BITS;
        state.fx = old.fx;
        self.set_signature();
        self.processor.state_changed();
        self.shared.platform.init_local_apic(self.index);
        self.local.pv_clock.borrow_mut().reset();
        self.local.paravirtual.reset();
        self.local.nmi_pending.set(false);
        self.local.interrupt.set(None);
        self.run_state = if self.index == 0 {
            RunState::Running
        } else {
            RunState::WaitForSipi
        };
    }

    /// The start-up message: real mode at the beginning of a page (SDM volume 3, 9.4.4.1).
    fn start_up(&mut self, page: u8) {
        let state = &mut self.processor.state;
        let code = Segment {
            selector: u16::from(page) << 8,
            base: u64::from(page) << 12,
            ..*state.segment(SegmentName::Cs)
        };
        state.set_segment(SegmentName::Cs, code);
        state.rip = 0;
        self.processor.state_changed();
        self.run_state = RunState::Running;
    }

    /// The machine stood still, for who knows how long: the guest's watchdogs must not mistake that for
    /// a lock-up.
    fn enter(&mut self) {
        self.local.refresh(&self.shared, self.index);
        if self.shared.turns.is_some() {
            // Its time stands still with it.
            return;
        }
        self.arrive_now();
        if self.entered {
            let instant = self.local.instant(&self.shared);
            let memory = &self.shared.memory;
            let mut clock = self.local.pv_clock.borrow_mut();
            clock.update(memory, &instant, true);
        }
        self.entered = true;
    }

    /// [`Vcpu::run`] where the vCPUs take turns.
    fn run_in_turn(&mut self, turns: &Turns, bus: &dyn BusAccess) -> Exit {
        turns.enter();
        loop {
            let chips = Chips {
                platform: &self.shared.platform,
                waker: &self.shared.waker,
            };
            let state = &self.processor.state;
            let check = || state::checksum(state);
            let budget = match turns.take(chips, self.index, &self.kick.kicked, &check) {
                Ok(Turn::Run(budget)) => budget,
                Ok(Turn::Kicked) => return Exit::Kicked,
                Ok(Turn::Recorded) => return Exit::Recorded,
                Err(error) => return Exit::Fatal(error.to_string()),
            };
            self.take_events();
            let waits = matches!(
                self.run_state,
                RunState::WaitForInit | RunState::WaitForSipi
            );
            let board = Board {
                shared: &self.shared,
                bus,
                local: &self.local,
                vcpu: self.index,
            };
            let stop = if waits {
                Stop::Halted
            } else {
                self.processor.run(&board, budget)
            };
            // An outstanding end of PV EOI stays so: that the run was broken off is nothing to notice.
            let asleep = match stop {
                Stop::Attention => false,
                Stop::Halted if !waits && self.take_kick() => {
                    turns.meter().add(1);
                    false
                }
                _ => true,
            };
            turns.give_back(self.index, asleep);
            match stop {
                Stop::Attention | Stop::Halted => {}
                // The recording has what happened then.
                Stop::TripleFault if turns.replays() => {}
                Stop::TripleFault => return Exit::TripleFault,
                Stop::Debug => return Exit::Debug,
            }
        }
    }

    /// Everything as after power-on, but for the time-stamp counter.
    fn power_on(&mut self) {
        self.processor.state = State::default();
        self.set_signature();
        self.processor.state_changed();
        self.shared.platform.reset_local_apic(self.index);
        *self.local.msrs.borrow_mut() = StoredMsrs::default();
        self.local.pv_clock.borrow_mut().reset();
        self.local.paravirtual.reset();
        self.local.nmi_pending.set(false);
        self.local.interrupt.set(None);
        self.local.refresh(&self.shared, self.index);
        self.run_state = first_state(self.index);
    }
}

fn first_state(index: usize) -> RunState {
    if index == 0 {
        RunState::Running
    } else {
        RunState::WaitForInit
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &dyn BusAccess) -> Result<Exit, EngineError> {
        self.enter();
        if let Some(turns) = self.shared.turns.clone() {
            return Ok(self.run_in_turn(&turns, bus));
        }
        loop {
            if self.kick.kicked.swap(false, Ordering::SeqCst) {
                return Ok(Exit::Kicked);
            }
            self.take_events();
            if matches!(
                self.run_state,
                RunState::WaitForInit | RunState::WaitForSipi
            ) {
                self.shared.waker.sleep(self.index);
                continue;
            }
            let board = Board {
                shared: &self.shared,
                bus,
                local: &self.local,
                vcpu: self.index,
            };
            let stop = self.processor.run(&board, BUDGET);
            board.stopped();
            match stop {
                Stop::Attention => {}
                Stop::Halted => self.halt(),
                Stop::TripleFault => return Ok(Exit::TripleFault),
                Stop::Debug => return Ok(Exit::Debug),
            }
        }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        Ok(state::save(self, self.shared.now_ns()))
    }

    fn restore(&mut self, saved: &VcpuState) -> Result<(), EngineError> {
        let now = self.shared.now_ns();
        state::restore(self, saved, now)
    }

    fn set_registers(
        &mut self,
        general: &GeneralRegisters,
        xsave: &[u8],
    ) -> Result<(), EngineError> {
        state::set_registers(self, general, xsave)
    }

    fn set_debug(&mut self, request: &DebugRequest) -> Result<(), EngineError> {
        self.processor
            .set_debugger(request.single_step, &request.breakpoints);
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Result<Option<u64>, EngineError> {
        Ok(self.processor.translate_for_debugger(linear))
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.power_on();
        Ok(())
    }
}
