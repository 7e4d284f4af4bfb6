//! An x86-64 processor in software.
//!
//! A [`Processor`] executes guest code on an x86-64 host without any help of the host's hypervisor:
//! it decodes (with `iced-x86`), translates blocks to [micro-operations](microop), executes those,
//! and walks the guest's page tables for every address that its TLB does not know. What lies outside
//! the processor's core (ports, device memory, the local APIC, time) is behind [`Environment`].
//!
//! ```text
//!   guest bytes ── translate ──▶ micro-operations ── interpret ──▶ registers, memory
//!                      │                                 ▲   │
//!                      └─ what is rare: Op::Complex ──▶ execute    mmu ─▶ memory (RAM)
//!                                                       (by the       └─▶ Environment (devices)
//!                                                        instruction)
//! ```
//!
//! | module | what |
//! |---|---|
//! | `state` | registers and modes |
//! | `memory` | guest RAM as the processor sees it: atomics, written code pages, the dirty log |
//! | `mmu` | linear to physical: page walks, the TLB, permissions |
//! | `microop`, `flags` | the form that hot code is translated to, and its lazily computed flags |
//! | `translate`, `interpret` | into that form, and its execution |
//! | `execute` | every other instruction, one at a time by its decoded form |
//! | `system` | exceptions, interrupts, segments, privileged registers |
//! | `vector`, `x87` | SSE and x87, whose arithmetic the host's own units do |

mod deliver;
mod error;
mod execute;
mod flags;
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
