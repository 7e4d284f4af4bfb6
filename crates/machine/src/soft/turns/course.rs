//! What happens between two runs.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use minicbor::bytes::ByteVec;
use vm_memory::{Bytes, GuestAddress};

use super::tape::Tape;
use super::{Chips, NS_PER_UNIT, Next, Progress, TurnError, Turns};
use crate::bus::lock;
use crate::memory::GuestMemory;
use crate::memory::dirty::{DirtyPages, DirtySource, DirtyTracker};
use crate::recording::{MAX_MEMORY, Record, ReplayError};
use crate::soft::waker::Waker;

/// The longest turn while others want one, in units.
const SLICE: u64 = 20_000;
/// Units between two checks.
const CHECK_EVERY: u64 = 1 << 24;
/// How often devices are asked whether they are done.
const POLL: Duration = Duration::from_micros(50);
/// How long devices may take for what a guest has asked for, before they are stopped all the same: it
/// may have asked for what cannot be.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long sleep lasts that no deadline ends.
const LONG: Duration = Duration::from_secs(1);

/// Where the machine stands.
pub(super) struct Course {
    /// What is left of the current turn.
    left: u64,
    /// Who has nothing to do until it is woken.
    asleep: Vec<bool>,
    /// The position at which the run began.
    began: u64,
    next_check: u64,
    /// Since when everybody sleeps.
    idle_since: Option<Instant>,
    /// The machine was held still, and its devices with it.
    entered: bool,
    /// Since when the devices of other processes work.
    working_since: Option<Instant>,
    written: DirtyTracker,
    pages: DirtyPages,
}

/// What came from outside.
enum Outside {
    Taken,
    Wait,
    Recorded,
}

impl Course {
    pub(super) fn new(vcpus: usize, memory: &GuestMemory) -> Self {
        Self {
            left: SLICE,
            asleep: vec![false; vcpus],
            began: 0,
            next_check: CHECK_EVERY,
            idle_since: None,
            entered: false,
            working_since: None,
            written: DirtyTracker::new(memory.clone(), Vec::new()),
            pages: DirtyPages::new(memory),
        }
    }

    /// As at the beginning; positions go on.
    fn restart(&mut self) {
        self.left = SLICE;
        self.asleep.fill(false);
        self.idle_since = None;
    }

    pub(super) fn note_run(&mut self, vcpu: usize, asleep: bool, position: u64) {
        self.left = self.left.saturating_sub(position - self.began);
        self.asleep[vcpu] = asleep;
    }

    /// Who runs next: who has the turn, as long as it lasts, else the next one that has something to do.
    /// Waking and beginning a turn cost a unit each: an input that is taken before such a choice and one
    /// that is taken after it must not have the same position.
    fn choose(&mut self, current: usize, waker: &Waker, turns: &Turns) -> Option<usize> {
        let count = self.asleep.len();
        let first = if self.left > 0 { current } else { current + 1 };
        for vcpu in (first..first + count).map(|vcpu| vcpu % count) {
            if self.asleep[vcpu] {
                if !waker.take_signal(vcpu) {
                    continue;
                }
                self.asleep[vcpu] = false;
                turns.meter.add(1);
            }
            if vcpu != current || self.left == 0 {
                self.left = SLICE;
                turns.meter.add(1);
            }
            return Some(vcpu);
        }
        None
    }
}

impl Turns {
    /// A machine that was held still goes on.
    pub(in crate::soft) fn enter(&self) {
        lock(&self.course).entered = true;
    }

    /// Everybody is as after power-on.
    pub(in crate::soft) fn restart(&self) {
        lock(&self.course).restart();
        lock(&self.inputs).clear();
        lock(&self.gate).vcpu = 0;
    }

    /// What the thread of the vCPU that has the turn does next. It alone is here.
    pub(super) fn next(
        &self,
        chips: Chips<'_>,
        vcpu: usize,
        check: &dyn Fn() -> u32,
    ) -> Result<Next, TurnError> {
        if let Some(error) = lock(&self.failed).take() {
            return Err(error);
        }
        let mut course = lock(&self.course);
        loop {
            chips.platform.expire(self.now_ns());
            if self.position() >= course.next_check {
                course.next_check = self.position() + CHECK_EVERY;
                lock(&self.tape).check(self.position(), check())?;
            }
            let outside = if self.replays {
                self.take_recorded(chips)?
            } else {
                self.take_inputs(&mut course, chips)?
            };
            match outside {
                Outside::Taken => {}
                Outside::Wait => return Ok(Next::Wait(POLL)),
                Outside::Recorded => return Ok(Next::Recorded),
            }
            match course.choose(vcpu, chips.waker, self) {
                Some(chosen) if chosen == vcpu => {
                    course.began = self.position();
                    return Ok(Next::Run(self.budget(&course, chips)));
                }
                Some(other) => return Ok(Next::Pass(other)),
                None => {
                    if let Some(time) = self.sleep(&mut course, chips)? {
                        return Ok(Next::Wait(time));
                    }
                }
            }
        }
    }

    /// Up to the end of the turn, the next deadline, or the next check.
    fn budget(&self, course: &Course, chips: Chips<'_>) -> u64 {
        let now = self.now_ns();
        let deadline = chips.platform.next_deadline().map_or(u64::MAX, |deadline| {
            deadline.saturating_sub(now).div_ceil(NS_PER_UNIT)
        });
        let check = course.next_check.saturating_sub(self.position());
        course.left.min(deadline).min(check).max(1)
    }

    /// Everybody sleeps. Gives the time until something is due; nothing if time has passed.
    fn sleep(&self, course: &mut Course, chips: Chips<'_>) -> Result<Option<Duration>, TurnError> {
        if self.replays {
            let ns = lock(&self.tape).replay_idle(self.position())?;
            self.slept_ns.fetch_add(ns, Ordering::Relaxed);
            return Ok(None);
        }
        let slept = course.idle_since.get_or_insert_with(Instant::now).elapsed();
        let due = self.due(chips);
        match due.map(|due| due.checked_sub(slept)) {
            Some(None | Some(Duration::ZERO)) => {
                self.pass(course, chips)?;
                Ok(None)
            }
            Some(Some(left)) => {
                lock(&self.tape).flush_in_time()?;
                Ok(Some(left))
            }
            None => {
                lock(&self.tape).flush_in_time()?;
                Ok(Some(LONG))
            }
        }
    }

    /// How far the next deadline is.
    fn due(&self, chips: Chips<'_>) -> Option<Duration> {
        let deadline = chips.platform.next_deadline()?;
        Some(Duration::from_nanos(deadline.saturating_sub(self.now_ns())))
    }

    /// Lets the time pass for which everybody has slept, at most up to the next deadline.
    fn pass(&self, course: &mut Course, chips: Chips<'_>) -> Result<(), TurnError> {
        let Some(since) = course.idle_since.take() else {
            return Ok(());
        };
        let slept = since.elapsed();
        let slept = self.due(chips).map_or(slept, |due| due.min(slept));
        let ns = u64::try_from(slept.as_nanos()).unwrap_or(u64::MAX);
        let record = Record::Idle { ns };
        lock(&self.tape).add(self.position(), &record)?;
        self.slept_ns.fetch_add(ns, Ordering::Relaxed);
        chips.platform.expire(self.now_ns());
        Ok(())
    }

    /// Takes what has come, and records it.
    fn take_inputs(&self, course: &mut Course, chips: Chips<'_>) -> Result<Outside, TurnError> {
        if !self.let_devices_work(course)? {
            return Ok(Outside::Wait);
        }
        let written = self.touched.swap(false, Ordering::SeqCst);
        if written {
            course.pages.clear();
            course.written.drain(&mut course.pages)?;
        }
        let written = written && course.pages.count() != 0;
        let inputs = std::mem::take(&mut *lock(&self.inputs));
        if !written && inputs.is_empty() {
            return Ok(Outside::Taken);
        }
        self.pass(course, chips)?;
        let mut tape = lock(&self.tape);
        if written {
            self.record_memory(&mut tape, &course.pages)?;
        }
        for input in &inputs {
            tape.add(self.position(), input)?;
            drive(chips, input);
        }
        Ok(Outside::Taken)
    }

    /// Lets other processes serve what the guest has asked for; whether they are through.
    fn let_devices_work(&self, course: &mut Course) -> Result<bool, TurnError> {
        let Some(beside) = self.beside.get() else {
            return Ok(true);
        };
        if std::mem::take(&mut course.entered) {
            beside.rest()?;
            course.working_since = None;
            self.touched.store(true, Ordering::SeqCst);
        }
        // Not only after a doorbell: who was stopped may have told the driver not to ring.
        if course.working_since.is_none() && beside.begin()? {
            course.working_since = Some(Instant::now());
        }
        if let Some(since) = course.working_since {
            match beside.progress() {
                Progress::Working if since.elapsed() < PATIENCE => return Ok(false),
                Progress::Working | Progress::Done => {}
                Progress::Waiting => {
                    course.working_since = Some(Instant::now());
                    return Ok(false);
                }
            }
            beside.rest()?;
            course.working_since = None;
            self.touched.store(true, Ordering::SeqCst);
        }
        Ok(true)
    }

    /// Takes what the recording has for this position.
    fn take_recorded(&self, chips: Chips<'_>) -> Result<Outside, TurnError> {
        let mut tape = lock(&self.tape);
        let position = self.position();
        while let Some(record) = tape.replay_input(position)? {
            match &record {
                Record::Memory { .. } | Record::Zeros { .. } => {
                    write_memory(&self.memory, &record)?;
                }
                input => drive(chips, input),
            }
        }
        if tape.is_over(position)? {
            return Ok(Outside::Recorded);
        }
        tape.pause_at_next(position, &self.meter);
        Ok(Outside::Taken)
    }

    /// Records what stands in those pages.
    pub(super) fn record_memory(
        &self,
        tape: &mut Tape,
        pages: &DirtyPages,
    ) -> Result<(), TurnError> {
        let mut bytes = Vec::new();
        for (GuestAddress(start), len) in pages.runs() {
            for at in (start..start + len).step_by(MAX_MEMORY) {
                bytes.resize((start + len - at).min(MAX_MEMORY as u64) as usize, 0);
                self.memory
                    .read_slice(&mut bytes, GuestAddress(at))
                    .map_err(std::io::Error::other)?;
                let record = if bytes.iter().all(|byte| *byte == 0) {
                    Record::Zeros {
                        address: at,
                        len: bytes.len() as u64,
                    }
                } else {
                    Record::Memory {
                        address: at,
                        bytes: ByteVec::from(bytes.clone()),
                    }
                };
                tape.add(self.position(), &record)?;
            }
        }
        Ok(())
    }

    /// Records all that was written since the last time.
    pub(super) fn record_written(&self, tape: &mut Tape) -> Result<(), TurnError> {
        let mut course = lock(&self.course);
        let course = &mut *course;
        course.pages.clear();
        course.written.drain(&mut course.pages)?;
        self.record_memory(tape, &course.pages)
    }

    /// Forgets what was written so far.
    pub(super) fn forget_written(&self) -> Result<(), TurnError> {
        Ok(lock(&self.course).written.start()?)
    }
}

/// Gives the chips an interrupt's line or message.
fn drive(chips: Chips<'_>, input: &Record) {
    match *input {
        Record::Line { gsi, level } => chips.platform.set_line(gsi, level),
        Record::Message { address, data } => {
            chips.platform.send_msi(address, data);
        }
        _ => {}
    }
}

/// Writes what devices have written.
pub(super) fn write_memory(memory: &GuestMemory, record: &Record) -> Result<(), TurnError> {
    let damaged = |_| ReplayError::damaged("memory that the machine does not have");
    match record {
        Record::Memory { address, bytes } => memory
            .write_slice(bytes, GuestAddress(*address))
            .map_err(damaged)?,
        Record::Zeros { address, len } => {
            let end = address.saturating_add(*len);
            for at in (*address..end).step_by(MAX_MEMORY) {
                let zeros = &[0; MAX_MEMORY][..(end - at).min(MAX_MEMORY as u64) as usize];
                memory
                    .write_slice(zeros, GuestAddress(at))
                    .map_err(damaged)?;
            }
        }
        _ => {}
    }
    Ok(())
}
