//! An x86-64 processor in software.
//!
//! A [`Processor`] executes guest code on an x86-64 host without any help of the host's hypervisor. So
//! far it has all that a user program sees: [`Processor::step`] decodes one instruction (with
//! `iced-x86`) and executes it from its decoded form, with segment and paging checks on every access,
//! and gives exceptions as values. What a kernel sees, delivery of exceptions and privileged
//! instructions, comes next, and then translation of whole blocks; until then a privileged
//! instruction is #UD and nothing in Mica runs a guest on this.
//!
//! | module | what |
//! |---|---|
//! | `state` | registers and modes |
//! | `flags` | the status flags, computed when somebody reads them |
//! | `memory` | guest RAM as the processor sees it |
//! | `mmu` | linear to physical: page walks, the TLB, permissions |
//! | `execute` | general-purpose instructions |
//! | `vector`, `x87` | SSE, MMX and x87, whose arithmetic the host's own units do |
//!
//! The proof is `tests/differential`: generated instructions run on the host's processor and here, and
//! everything that the manual defines is compared.

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
pub use processor::{Environment, Processor, Stop};
pub use state::{DescriptorTable, FxState, Mode, Segment, SegmentName, State};
