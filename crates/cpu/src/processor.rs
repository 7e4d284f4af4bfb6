//! The processor, and its step from one instruction to the next.

mod environment;
mod meter;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};

use crate::debugger::Debugger;
use crate::error::{Exception, Vector};
use crate::interpret::Ended;
use crate::memory::{PAGE, Ram};
use crate::mmu::{Access, Tlb};
use crate::state::{Mode, SegmentName, State, rflags, slot};
use crate::system::{Hits, TripleFault};
use crate::translate::{BlockCache, CodeRights, Key};
pub use environment::Environment;
pub use meter::Meter;

/// The longest instruction in bytes (SDM volume 2, 2.3.11).
const MAX_INSTRUCTION: usize = 15;

/// Blocks in a row between two looks around.
const CHAIN: u32 = 64;
/// Such rows between two looks for interrupts that nobody announced.
const LOOK_EVERY: u32 = 16;

/// Why [`Processor::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Somebody set the attention flag, or the instruction budget is used up.
    Attention,
    /// HLT, and no interrupt is there.
    Halted,
    /// A fault while delivering a double fault.
    TripleFault,
    /// A debugger's breakpoint is at the next instruction, or its single step is done.
    Debug,
}

/// One processor core.
pub struct Processor {
    /// Its registers. After a change from outside call [`Processor::state_changed`].
    pub state: State,
    pub(crate) ram: Arc<Ram>,
    pub(crate) tlb: Tlb,
    /// A vector operand between two micro-operations.
    pub(crate) vector_temp: [u8; 16],
    blocks: BlockCache,
    pub(crate) meter: Arc<Meter>,
    /// What data breakpoints see of the instruction that is executed; nothing while there are none.
    pub(crate) accesses: Option<Hits>,
    /// What a debugger waits for.
    pub(crate) debugger: Debugger,
    /// How many bits a physical address has.
    pub(crate) address_bits: u32,
    /// Whether there are pages of 1 GiB.
    pub(crate) gib_pages: bool,
    /// Set by anybody who wants [`Processor::run`] to look up: a kick, an interrupt.
    attention: Arc<AtomicBool>,
}

/// How an instruction went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next instruction follows; the caller advances RIP.
    Next,
    /// RIP is set.
    Jump,
    /// A string instruction with iterations left: RIP stays, interrupts may come in between.
    Again,
}

/// What every instruction's execution gives.
pub(crate) type Executed = Result<Flow, Exception>;

impl Processor {
    /// A processor after power-on.
    #[must_use]
    pub fn new(ram: Arc<Ram>) -> Self {
        Self {
            state: State::default(),
            ram,
            tlb: Tlb::default(),
            vector_temp: [0; 16],
            blocks: BlockCache::default(),
            meter: Arc::default(),
            accesses: None,
            debugger: Debugger::default(),
            address_bits: 52,
            gib_pages: true,
            attention: Arc::default(),
        }
    }

    /// Set it to make [`Processor::run`] look up soon.
    #[must_use]
    pub fn attention(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.attention)
    }

    /// From now on counts on that meter. Processors that take turns may share one.
    pub fn count_on(&mut self, meter: Arc<Meter>) {
        self.meter = meter;
    }

    #[inline]
    pub(crate) fn spend(&self, units: u64) {
        self.meter.add(units);
    }

    /// Physical addresses have that many bits (SDM volume 3, 4.1.4): entries of page tables with higher
    /// ones fault. At first 52.
    pub fn set_address_bits(&mut self, bits: u32) {
        self.address_bits = bits.clamp(32, 52);
        self.tlb.flush();
    }

    /// Whether there are pages of 1 GiB, as at first.
    pub fn set_gib_pages(&mut self, on: bool) {
        self.gib_pages = on;
        self.tlb.flush();
    }

    /// Call after changing [`Processor::state`] from outside: drops what was derived from it.
    pub fn state_changed(&mut self) {
        self.tlb.flush();
    }

    /// Executes the guest until it has to stop, at most `budget` instructions. One that faults counts,
    /// too, and so do each part of a repeated string instruction and the delivery of an interrupt: whatever
    /// changes a guest uses its budget.
    ///
    /// Interrupts are asked for at the start, when the guest may have begun to take them, and every
    /// few rows of blocks; who raises one sets the attention flag to have it delivered sooner.
    pub fn run(&mut self, env: &dyn Environment, budget: u64) -> Stop {
        let mut cache = std::mem::take(&mut self.blocks);
        // What others have marked meanwhile is known before the first block is chosen: where blocks end must
        // not depend on where a run was broken off.
        self.see_watched(&mut cache);
        let stop = self.run_cached(env, budget, &mut cache);
        self.see_watched(&mut cache);
        self.blocks = cache;
        self.state.file[slot::TEMP0 as usize..=slot::START as usize].fill(0);
        stop
    }

    fn run_cached(
        &mut self,
        env: &dyn Environment,
        mut budget: u64,
        cache: &mut BlockCache,
    ) -> Stop {
        let (mut look, mut rows) = (true, 0u32);
        loop {
            if budget == 0 || !self.state.halted && self.is_to_pause() {
                self.attention.store(false, Ordering::SeqCst);
                return Stop::Attention;
            }
            rows = rows.wrapping_add(1);
            let debugged = self.debugger.is_on();
            if debugged && self.at_debuggers_breakpoint() {
                return Stop::Debug;
            }
            if (look || rows.is_multiple_of(LOOK_EVERY))
                && !self.debugger.holds_interrupts(self.state.halted)
            {
                match self.take_interrupt(env) {
                    Err(TripleFault) => return Stop::TripleFault,
                    Ok(true) => {
                        self.spend(1);
                        budget -= 1;
                        look = false;
                        continue;
                    }
                    Ok(false) => {}
                }
                if self.state.halted {
                    return Stop::Halted;
                }
            }
            look = self.state.shadow;
            let step = self.state.flags & rflags::TF != 0;
            let limit = if look || step || debugged { 1 } else { budget };
            self.state.shadow = false;
            let resumed = self.take_resume_flag();
            let ended = if self.is_watched() {
                self.see_watched(cache);
                self.run_watched(env, resumed)
            } else {
                self.run_row(env, cache, limit)
            };
            look |= ended.look;
            let partly = u64::from(ended.again) + u64::from(ended.fault.is_some());
            self.spend(partly);
            budget = budget.saturating_sub(ended.retired + partly);
            if let Some(exception) = self.exception_after(&ended, step) {
                look = true;
                if self.deliver_exception(env, exception).is_err() {
                    return Stop::TripleFault;
                }
            }
            if debugged && self.debugger.step_is_done() {
                return Stop::Debug;
            }
        }
    }

    fn take_resume_flag(&mut self) -> bool {
        let resumed = self.state.flags & rflags::RF != 0;
        self.state.flags &= !rflags::RF;
        resumed
    }

    /// What was raised, or the trap after an instruction that began with TF set.
    fn exception_after(&mut self, ended: &Ended, step: bool) -> Option<Exception> {
        let done = ended.retired != 0 || ended.again;
        let trap = step && done && !ended.no_trap && !self.state.shadow;
        ended.fault.or_else(|| trap.then(|| self.step_trap()))
    }

    #[inline]
    fn is_to_pause(&self) -> bool {
        self.attention.load(Ordering::Relaxed) || self.meter.is_reached()
    }

    fn step_trap(&mut self) -> Exception {
        const BS: u64 = 1 << 14;
        self.state.dr[4] |= BS;
        Exception::new(Vector::Debug)
    }

    /// Delivers an NMI or an interrupt if there is one and the guest takes it; whether it did.
    fn take_interrupt(&mut self, env: &dyn Environment) -> Result<bool, TripleFault> {
        const NMI: u8 = 2;
        if self.state.shadow {
            return Ok(false);
        }
        if !self.state.nmi_blocked && env.take_nmi() {
            self.state.halted = false;
            self.deliver_interrupt(env, NMI)?;
            self.state.nmi_blocked = true;
            return Ok(true);
        }
        if self.state.flags & rflags::IF == 0 {
            return Ok(false);
        }
        match env.acknowledge_interrupt() {
            Some(vector) => {
                self.state.halted = false;
                self.deliver_interrupt(env, vector).map(|()| true)
            }
            None => Ok(false),
        }
    }

    /// Gives up what is watched by now.
    #[inline]
    fn see_watched(&mut self, cache: &mut BlockCache) {
        let watched = self.ram.watch_epoch.load(Ordering::SeqCst);
        if watched != cache.watched {
            self.tlb.see_watched(&self.ram);
            cache.watched = watched;
        }
    }

    /// Executes some blocks, or the first `limit` instructions of them.
    fn run_row(&mut self, env: &dyn Environment, cache: &mut BlockCache, limit: u64) -> Ended {
        let epoch = self.ram.code_epoch.load(Ordering::SeqCst);
        if epoch != cache.epoch {
            cache.drop_stale(&self.ram);
            cache.epoch = epoch;
        }
        let number = match self.find_block(cache) {
            Ok(number) => number,
            Err(exception) => return Ended::fault(exception),
        };
        self.see_watched(cache);
        let block = cache.block(number);
        if block.count() as u64 <= limit {
            let ended = self.run_block(env, block, epoch);
            return self.go_on(env, cache, limit, ended);
        }
        // The flags that a whole block leaves out may be needed where this one ends.
        let linear = self.code_linear();
        match self.translate_block(linear, limit) {
            Ok((block, _)) => self.run_block(env, &block, epoch),
            Err(exception) => Ended::fault(exception),
        }
    }

    /// Executes the blocks that follow one, as long as they are known and nothing has to be looked at.
    fn go_on(
        &mut self,
        env: &dyn Environment,
        cache: &BlockCache,
        limit: u64,
        first: Ended,
    ) -> Ended {
        let mut ended = first;
        if self.state.mode() != Mode::Bits64 || ended.look || ended.fault.is_some() {
            return ended;
        }
        // What these depend on changes only where there is something to look at.
        let stamps = self.stamps(cache, self.code_rights());
        let mut retired = ended.retired;
        for _ in 0..CHAIN {
            if self.is_to_pause()
                || self.ram.code_epoch.load(Ordering::SeqCst) != cache.epoch
                || self.ram.watch_epoch.load(Ordering::SeqCst) != cache.watched
            {
                break;
            }
            let Some(number) = cache.recent(self.state.rip, stamps) else {
                break;
            };
            let block = cache.block(number);
            if block.count() as u64 > limit - retired {
                break;
            }
            ended = self.run_block(env, block, cache.epoch);
            retired += ended.retired;
            if ended.look || ended.fault.is_some() {
                break;
            }
        }
        ended.retired = retired;
        ended
    }

    fn code_rights(&self) -> CodeRights {
        CodeRights {
            user: self.state.cpl() == 3,
            vectors: self.state.vectors_enabled(),
        }
    }

    /// What marks entries for 64-bit code that are valid now.
    fn stamps(&self, cache: &BlockCache, rights: CodeRights) -> [u64; 2] {
        [false, true].map(|global| cache.stamp(&self.tlb, global, Mode::Bits64, rights))
    }

    /// The linear address of RIP.
    pub(crate) fn code_linear(&self) -> u64 {
        if self.state.mode() == Mode::Bits64 {
            return self.state.rip;
        }
        let base = self.state.segment(SegmentName::Cs).base;
        self.state.rip.wrapping_add(base) & 0xffff_ffff
    }

    /// The number of the block at RIP.
    #[inline]
    fn find_block(&mut self, cache: &mut BlockCache) -> Result<u32, Exception> {
        let rights = self.code_rights();
        if self.state.mode() == Mode::Bits64 {
            let stamps = self.stamps(cache, rights);
            if let Some(number) = cache.recent(self.state.rip, stamps) {
                return Ok(number);
            }
        }
        self.find_block_by_address(cache, rights)
    }

    /// The same by its physical address. What is found there is compared with what it was translated
    /// from: a device or another process may have written the page since, and told nobody. Code that
    /// is loaded so is mapped afterwards, and that leads here.
    #[inline(never)]
    fn find_block_by_address(
        &mut self,
        cache: &mut BlockCache,
        rights: CodeRights,
    ) -> Result<u32, Exception> {
        let user = rights.user;
        let (rip, mode) = (self.state.rip, self.state.mode());
        let linear = self.linear(SegmentName::Cs, rip, 1, Access::Fetch)?;
        let place = self.translate(linear, Access::Fetch, user)?;
        let key = Key {
            physical: place.physical,
            rip: if mode == Mode::Bits64 { 0 } else { rip },
            mode,
            rights,
        };
        let mut global = place.global;
        let mut known = None;
        if let Some(number) = cache.find(&key) {
            let block = cache.block(number);
            let (first, rest) = block.parts();
            let mut fresh = self.holds(place.physical, first);
            if let Some((second, _)) = block.second {
                let next = (linear | (PAGE - 1)).wrapping_add(1);
                let now = self.translate(next, Access::Fetch, user)?;
                fresh &= now.physical == second && self.holds(second, rest);
                global &= now.global;
            }
            known = fresh.then_some(number);
        }
        let number = match known {
            Some(number) => number,
            None => {
                let (block, generation) = self.translate_block(linear, u64::MAX)?;
                global &= block.second.is_none();
                cache.insert(key, block, generation)
            }
        };
        let stamp = cache.stamp(&self.tlb, global, mode, rights);
        cache.remember(linear, stamp, number);
        Ok(number)
    }

    /// Executes one instruction, or a part of a repeated string instruction, which then stays where
    /// it is.
    ///
    /// # Errors
    ///
    /// The exception that it raised, for the caller to deliver. After a fault RIP is the
    /// instruction's own; after a trap (INT3, INTO) the next one's.
    pub fn step(&mut self, env: &dyn Environment) -> Result<(), Exception> {
        let instruction = self.decode()?;
        self.state.shadow = false;
        if self.execute(env, &instruction)? == Flow::Next {
            self.state.rip = self.next_rip(&instruction);
        }
        Ok(())
    }

    /// Fetches and decodes the instruction at RIP. The next page is touched only by an instruction
    /// that reaches into it.
    fn decode(&mut self) -> Result<Instruction, Exception> {
        let rip = self.state.rip;
        let start = self.linear(SegmentName::Cs, rip, 1, Access::Fetch)?;
        let first = MAX_INSTRUCTION.min((PAGE - start % PAGE) as usize);
        let mut bytes = [0; MAX_INSTRUCTION];
        self.fetch(start, &mut bytes[..first])?;
        let (mut instruction, mut error) = decode(self.state.mode(), rip, &bytes[..first]);
        if error == DecoderError::NoMoreBytes && first < MAX_INSTRUCTION {
            let rest = self.linear(SegmentName::Cs, rip + first as u64, 1, Access::Fetch)?;
            self.fetch(rest, &mut bytes[first..])?;
            (instruction, error) = decode(self.state.mode(), rip, &bytes);
        }
        if error == DecoderError::NoMoreBytes {
            return Err(Exception::gp(0)); // longer than an instruction may be
        }
        let len = instruction.len() as u64;
        if instruction.code() == Code::INVALID {
            return Err(Exception::ud());
        }
        self.linear(SegmentName::Cs, rip, len, Access::Fetch)?;
        Ok(instruction)
    }
}

fn decode(mode: Mode, rip: u64, bytes: &[u8]) -> (Instruction, DecoderError) {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (instruction, decoder.last_error())
}
