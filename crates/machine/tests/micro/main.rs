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
mod ports;
mod privileged;
mod segments;
mod syscalls;
mod tables;
mod tasks;

use xtask::lab::Lab;

/// This very program runs once more where `/dev/kvm` is the kernel's own on a processor with SVM.
#[test]
fn all_of_it_in_the_lab() {
    let outcome = Lab::new()
        .memory_mib(1024)
        .file(std::env::current_exe().unwrap(), "/usr/bin/micro-tests")
        .run("micro-tests --skip all_of_it_in_the_lab --nocapture 2>&1")
        .unwrap();
    let output = outcome.output;
    assert_eq!(outcome.status, 0, "{output}");
    assert!(!output.contains("there is no kvm"), "{output}");
    assert!(output.contains("test result: ok."), "{output}");
}
