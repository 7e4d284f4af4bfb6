//! Breakpoints and single steps of a debugger outside the guest, which does not notice them.

use crate::mmu::PAGE_MASK;
use crate::processor::Processor;

/// What a debugger waits for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Debugger {
    step: bool,
    /// Linear addresses of instructions, in ascending order.
    breakpoints: Vec<u64>,
}

impl Debugger {
    /// Whether every instruction has to be looked at.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.step || !self.breakpoints.is_empty()
    }

    /// A step is one of the program, not the first of an interrupt's handler; but a halted processor
    /// has only the interrupt to go on with.
    #[inline]
    pub(crate) fn holds_interrupts(&self, halted: bool) -> bool {
        self.step && !halted
    }

    /// After an instruction: whether it was the step.
    pub(crate) fn step_is_done(&mut self) -> bool {
        std::mem::take(&mut self.step)
    }
}

impl Processor {
    /// From now on [`Processor::run`] stops before the instructions at these linear addresses, and after
    /// one instruction if `step` says so.
    pub fn set_debugger(&mut self, step: bool, breakpoints: &[u64]) {
        let mut breakpoints = breakpoints.to_vec();
        breakpoints.sort_unstable();
        self.debugger = Debugger { step, breakpoints };
        // It may have written code: what was translated is compared with memory when it is found again.
        self.tlb.flush();
    }

    /// Whether a breakpoint is where the processor is; a step passes it.
    pub(crate) fn at_debuggers_breakpoint(&self) -> bool {
        !self.debugger.step
            && self
                .debugger
                .breakpoints
                .binary_search(&self.code_linear())
                .is_ok()
    }

    /// The physical address of a linear one, whoever may access it; accessed bits stay as they are.
    #[must_use]
    pub fn translate_for_debugger(&self, linear: u64) -> Option<u64> {
        self.look_up(linear & !PAGE_MASK)
            .map(|page| page | linear & PAGE_MASK)
    }
}
