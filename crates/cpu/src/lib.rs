//! An x86-64 processor in software.
//!
//! A [`Processor`] executes guest code on an x86-64 host without any help of the host's hypervisor:
//! user programs and kernels, in every mode from real to 64-bit. It has level 2 of the psABI's
//! instruction sets. What is around it (ports, device memory, interrupts, clocks) is its
//! [`Environment`].
//!
//! [`Processor::run`] translates code to blocks of micro-operations and interprets those;
//! [`Processor::step`] executes one instruction from its decoded form, which is also how blocks execute
//! what is rare. `docs/software-processor.md` argues the form.
//!
//! | module | what |
//! |---|---|
//! | `processor` | the run loop and the seam to what surrounds it |
//! | `state` | registers and modes |
//! | `memory` | guest RAM as the processor sees it; code and dirty pages |
//! | `mmu` | linear to physical: page walks, the TLB, permissions |
//! | `microop`, `flags` | the form of hot code; the status flags, computed when somebody reads them |
//! | `translate`, `interpret` | into that form, and its execution |
//! | `execute` | general-purpose instructions |
//! | `debugger` | breakpoints and steps of a debugger outside the guest |
//! | `system` | exceptions, interrupts, segments, tasks, privileged registers, ports |
//! | `vector`, `x87` | SSE, MMX and x87, whose arithmetic the host's own units do |
//!
//! The proof is `tests/differential`: generated instructions run on the host's processor and here, both
//! ways, and everything that the manual defines is compared. Kernels are `machine`'s to test.

mod debugger;
mod error;
mod execute;
mod flags;
pub mod fuzz;
mod interpret;
mod memory;
mod microop;
mod mmu;
mod processor;
mod state;
mod system;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod translate;
mod vector;
mod x87;

pub use error::{Exception, Vector};
pub use memory::{Ram, RamRange};
pub use processor::{Environment, Meter, Processor, Stop};
pub use state::{DescriptorTable, FxState, Mode, Segment, SegmentName, State};
pub use system::Hypercall;
