//! Deterministic execution: the vCPUs take turns, time is what they have done, and all that comes from
//! outside is recorded, or comes from a recording.
//!
//! ```text
//!            take: its turn, nobody visits          guest code, at most `budget` units
//!  ┌────────┐ ─────▶ next: chips, inputs, whose turn ─────▶ ┌─────────┐
//!  │ waiting│                                               │ running │
//!  └────────┘ ◀─────────────── give_back ────────────────── └─────────┘
//!      ▲  visit: devices' threads work while nobody runs
//! ```
//!
//! The *position* is what the processors have used of their budgets ([`mica_cpu::Meter`]). A run's
//! budget ends exactly at timers' deadlines, and a recorded input is replayed at the position at which
//! it was taken. What makes that enough:
//!
//! 1. One vCPU runs at a time, in an order that follows from positions alone.
//! 2. Whatever changes a guest or the order of turns uses at least one unit; so what happens between
//!    two inputs of one position is nothing.
//! 3. Inputs (lines, MSIs, memory that devices wrote) are taken between runs, never inside one. What
//!    devices answer to reads goes into the recording in the guest's order.
//! 4. Devices of this process write memory as visitors, while nobody runs. Those whose requests other
//!    processes serve ([`Beside`]) rest while somebody runs, and work between two runs.
//! 5. A run that is broken off because somebody wants in ends after a block of code, and the next one
//!    goes on as if nothing had been; a replay comes back at that block's end, too.

mod course;
mod tape;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mica_cpu::Meter;

use super::platform::Platform;
use super::waker::Waker;
use crate::bus::lock;
use crate::device::DeviceError;
use crate::memory::GuestMemory;
use crate::recording::{Place, Reader, Record, ReplayError, Writer};
use course::Course;
use tape::Tape;

pub use tape::{Loaded, Mark};

/// How long a unit lasts.
const NS_PER_UNIT: u64 = 4;

/// Devices whose requests other processes serve.
pub trait Beside: Send + Sync {
    /// Has them serve what the guest has asked for; `false` if that is nothing.
    ///
    /// # Errors
    ///
    /// A device cannot work.
    fn begin(&self) -> Result<bool, DeviceError>;

    /// How far they are.
    fn progress(&self) -> Progress;

    /// Stops them: afterwards they touch memory no more.
    ///
    /// # Errors
    ///
    /// A device does not come to rest.
    fn rest(&self) -> Result<(), DeviceError>;
}

/// How far [`Beside`] devices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All that the guest has asked for is served.
    Done,
    /// It is being served.
    Working,
    /// A device waits for a new backend.
    Waiting,
}

/// What a vCPU's thread gets when it asks for its turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Run, for so many units.
    Run(u64),
    /// It was kicked.
    Kicked,
    /// The recording says what is done to the machine here.
    Recorded,
}

/// What comes next for the thread whose vCPU has the turn.
enum Next {
    Run(u64),
    /// It is another vCPU's turn.
    Pass(usize),
    /// Nothing, until something comes from outside or so much time has passed.
    Wait(Duration),
    Recorded,
}

/// Who may do what now.
#[derive(Default)]
struct Gate {
    /// Whose turn it is.
    vcpu: usize,
    /// Its thread is at work.
    busy: bool,
    /// The flag that brings the running processor back.
    runner: Option<Arc<AtomicBool>>,
    /// Threads that are inside, or want to be, instead of vCPUs.
    visitors: u32,
    /// Something has come since the thread at work has looked.
    stirred: bool,
}

/// Why there is no turn any more.
#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    /// Nothing more can be recorded.
    #[error("cannot record: {0}")]
    Record(#[from] std::io::Error),
    /// Nothing more can be replayed.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// A device fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The turns of one machine.
pub struct Turns {
    meter: Arc<Meter>,
    /// How long all processors have slept.
    slept_ns: AtomicU64,
    /// The wall clock at time zero.
    realtime_ns: u64,
    memory: GuestMemory,
    tape: Mutex<Tape>,
    replays: bool,
    course: Mutex<Course>,
    gate: Mutex<Gate>,
    changed: Condvar,
    /// Lines and messages that are not taken yet.
    inputs: Mutex<Vec<Record>>,
    beside: OnceLock<Arc<dyn Beside>>,
    /// Somebody may have written memory.
    touched: AtomicBool,
    /// What went wrong inside a run.
    failed: Mutex<Option<TurnError>>,
}

impl Turns {
    /// Turns of a machine whose life goes into a recording.
    #[must_use]
    pub fn record(writer: Writer, vcpus: u32, memory: GuestMemory, realtime_ns: u64) -> Arc<Self> {
        Self::new(Tape::Record(writer), vcpus, memory, realtime_ns)
    }

    /// Turns of a machine whose life is a recording.
    #[must_use]
    pub fn replay(reader: Reader, vcpus: u32, memory: GuestMemory) -> Arc<Self> {
        let realtime_ns = reader.header().realtime_ns;
        Self::new(Tape::Replay(reader), vcpus, memory, realtime_ns)
    }

    fn new(tape: Tape, vcpus: u32, memory: GuestMemory, realtime_ns: u64) -> Arc<Self> {
        Arc::new(Self {
            meter: Arc::default(),
            slept_ns: AtomicU64::new(0),
            realtime_ns,
            replays: matches!(tape, Tape::Replay(_)),
            course: Mutex::new(Course::new(vcpus as usize, &memory)),
            memory,
            tape: Mutex::new(tape),
            gate: Mutex::default(),
            changed: Condvar::new(),
            inputs: Mutex::default(),
            beside: OnceLock::new(),
            touched: AtomicBool::new(false),
            failed: Mutex::default(),
        })
    }

    /// Names the devices that other processes serve, once, before anything runs.
    pub fn attach(&self, beside: Arc<dyn Beside>) {
        let _ = self.beside.set(beside);
    }

    /// Whether it is a replay.
    #[must_use]
    pub fn replays(&self) -> bool {
        self.replays
    }

    /// What the processors have used of their budgets.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.meter.used()
    }

    /// The meter that all processors count on.
    pub(super) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// The machine's monotonic clock.
    pub(super) fn now_ns(&self) -> u64 {
        let slept = self.slept_ns.load(Ordering::Relaxed);
        self.position()
            .wrapping_mul(NS_PER_UNIT)
            .wrapping_add(slept)
    }

    /// The wall clock.
    pub(super) fn realtime_ns(&self) -> u64 {
        self.realtime_ns.wrapping_add(self.now_ns())
    }

    /// Does something to devices while no vCPU runs.
    pub fn visit<R>(&self, work: impl FnOnce() -> R) -> R {
        let mut gate = lock(&self.gate);
        gate.visitors += 1;
        gate.bring_back();
        while gate.busy {
            gate = self.wait(gate);
        }
        drop(gate);
        let result = work();
        self.touched.store(true, Ordering::SeqCst);
        lock(&self.gate).visitors -= 1;
        self.stir();
        result
    }

    /// A line has changed, or a message has come.
    pub(super) fn push(&self, input: Record) {
        if !self.replays {
            lock(&self.inputs).push(input);
            self.stir();
        }
    }

    /// Has the thread whose turn it is look again.
    pub(super) fn stir(&self) {
        let mut gate = lock(&self.gate);
        gate.stirred = true;
        gate.bring_back();
        drop(gate);
        self.changed.notify_all();
    }

    /// Ends the run of the processor that runs, which knows a closer deadline now.
    pub(super) fn look_up(&self) {
        lock(&self.gate).bring_back();
    }

    fn wait<'a>(&self, gate: MutexGuard<'a, Gate>) -> MutexGuard<'a, Gate> {
        self.changed
            .wait(gate)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the vCPU may run, or shall do something else. `check` gives a checksum of its registers.
    pub(super) fn take(
        &self,
        chips: Chips<'_>,
        vcpu: usize,
        kicked: &AtomicBool,
        check: &dyn Fn() -> u32,
    ) -> Result<Turn, TurnError> {
        let mut gate = lock(&self.gate);
        loop {
            if kicked.swap(false, Ordering::SeqCst) {
                return Ok(Turn::Kicked);
            }
            if gate.vcpu != vcpu || gate.visitors != 0 || gate.busy {
                gate = self.wait(gate);
                continue;
            }
            gate.busy = true;
            gate.stirred = false;
            drop(gate);
            let next = self.next(chips, vcpu, check);
            gate = lock(&self.gate);
            let wait = match next {
                Ok(Next::Run(budget)) => {
                    let attention = chips.waker.attention(vcpu);
                    gate.runner = Some(attention);
                    if gate.stirred || gate.visitors != 0 {
                        gate.bring_back();
                    }
                    return Ok(Turn::Run(budget));
                }
                Ok(Next::Pass(other)) => {
                    gate.vcpu = other;
                    None
                }
                Ok(Next::Wait(time)) => Some(time),
                Ok(Next::Recorded) => {
                    gate.busy = false;
                    return Ok(Turn::Recorded);
                }
                Err(error) => {
                    gate.busy = false;
                    return Err(error);
                }
            };
            gate.busy = false;
            self.changed.notify_all();
            if let Some(time) = wait
                && !gate.stirred
            {
                let waited = self.changed.wait_timeout(gate, time);
                gate = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// The vCPU has run; whether it sleeps now.
    pub(super) fn give_back(&self, vcpu: usize, asleep: bool) {
        lock(&self.course).note_run(vcpu, asleep, self.position());
        let mut gate = lock(&self.gate);
        gate.runner = None;
        gate.busy = false;
        drop(gate);
        self.changed.notify_all();
    }

    /// A read that devices have to answer. A replay has their answer.
    pub(super) fn read(&self, place: Place, answer: impl FnOnce() -> u64) -> u64 {
        let position = self.position();
        let result = if self.replays {
            let mut tape = lock(&self.tape);
            let value = tape.replay_read(position, place);
            tape.pause_at_next(position, &self.meter);
            value.map_err(TurnError::from)
        } else {
            let value = answer();
            let record = Record::read(place, value);
            let added = lock(&self.tape).add(position, &record);
            added.map(|()| value).map_err(TurnError::from)
        };
        result.unwrap_or_else(|error| {
            lock(&self.failed).get_or_insert(error);
            self.look_up();
            u64::MAX
        })
    }
}

/// What of the engine turns need.
#[derive(Clone, Copy)]
pub(super) struct Chips<'a> {
    pub(super) platform: &'a Platform,
    pub(super) waker: &'a Waker,
}

impl Gate {
    fn bring_back(&self) {
        if let Some(attention) = &self.runner {
            attention.store(true, Ordering::SeqCst);
        }
    }
}
