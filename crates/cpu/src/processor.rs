//! The processor, what surrounds it, and its run loop.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::error::Exception;
use crate::memory::Ram;
use crate::mmu::Tlb;
use crate::state::State;

/// What is around the processor's core. Called from inside [`Processor::run`].
pub trait Environment {
    /// An `in` instruction of 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, size: u8) -> u32;
    /// An `out` instruction of 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, size: u8, value: u32);
    /// A load of 1, 2, 4 or 8 bytes from a physical address outside RAM.
    fn memory_read(&self, address: u64, size: u8) -> u64;
    /// A store of 1, 2, 4 or 8 bytes to a physical address outside RAM.
    fn memory_write(&self, address: u64, size: u8, value: u64);
    /// CPUID's EAX, EBX, ECX and EDX.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// The time-stamp counter.
    fn tsc(&self) -> u64;
    /// The guest writes the time-stamp counter.
    fn set_tsc(&self, value: u64);
    /// Reads an MSR that is not of the core; nothing means #GP.
    fn read_msr(&self, index: u32) -> Option<u64>;
    /// Writes an MSR that is not of the core; `false` means #GP.
    fn write_msr(&self, index: u32, value: u64) -> bool;
    /// The task-priority register as CR8 shows it.
    fn task_priority(&self) -> u8;
    /// CR8 is written.
    fn set_task_priority(&self, value: u8);
    /// The vector of the interrupt to deliver now, which it acknowledges. Asked only when the guest
    /// takes interrupts.
    fn acknowledge_interrupt(&self) -> Option<u8>;
    /// Whether an NMI waits; it is taken.
    fn take_nmi(&self) -> bool;
}

/// Why [`Processor::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Somebody set the attention flag, or the instruction budget is used up.
    Attention,
    /// HLT, and no interrupt is there.
    Halted,
    /// A fault while delivering a double fault.
    TripleFault,
}

/// One processor core.
pub struct Processor {
    /// Its registers. After a change from outside call [`Processor::state_changed`].
    pub state: State,
    pub(crate) ram: Arc<Ram>,
    pub(crate) tlb: Tlb,
    pub(crate) blocks: crate::translate::BlockCache,
    /// Set by anybody who wants [`Processor::run`] to look up: a kick, an interrupt.
    pub(crate) attention: Arc<AtomicBool>,
    /// Instructions executed since power-on.
    pub(crate) retired: u64,
}

/// How an instruction that was executed by its decoded form went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next instruction follows; the caller advances RIP.
    Next,
    /// RIP is set, or mode, paging or interrupts may have changed: the block ends here.
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
            blocks: crate::translate::BlockCache::default(),
            attention: Arc::default(),
            retired: 0,
        }
    }

    /// Set it to make [`Processor::run`] look up: at the latest at the end of the block it is in.
    #[must_use]
    pub fn attention(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.attention)
    }

    /// Call after changing [`Processor::state`] from outside: drops what was derived from it.
    pub fn state_changed(&mut self) {
        self.tlb.flush();
    }

    /// Executes the guest until it has to stop, at most `budget` instructions.
    pub fn run(&mut self, env: &dyn Environment, budget: u64) -> Stop {
        let _ = (env, budget);
        Stop::Attention
    }
}
