//! The architecture by micro-guests: a few instructions each, what the manual says of them, and
//! every engine there is.
//!
//! A case assembles code, runs it in a guest of a few MiB whose tables the host has written, and
//! checks how it stopped, the registers and the memory. "SDM" is Intel's manual. Each case is a
//! test that runs on all of [`engines::engines`]; where an engine is known to differ from the
//! manual, the case names it and the reason.

#![allow(clippy::unwrap_used)] // helpers of tests may, as tests do
#![allow(unreachable_pub)] // shared by the modules of one test program

mod apic;
mod debug;
mod delivery;
mod engines;
mod exceptions;
mod far;
mod guest;
mod modes;
mod paging;
mod paging_faults;
mod paravirtual;
mod ports;
mod privileged;
mod segments;
mod syscalls;
mod tables;
mod tasks;
