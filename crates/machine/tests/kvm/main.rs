//! The KVM engine on real KVM interfaces: this machine's, if it has one, and the lab's.

#![allow(clippy::unwrap_used)] // helpers of tests may, as tests do

#[macro_use]
mod micro;

mod engine;
mod probe;
mod state;

use xtask::lab::Lab;

/// This very program runs once more where `/dev/kvm` is the kernel's own on a processor with SVM.
#[test]
fn all_of_it_in_the_lab() {
    let outcome = Lab::new()
        .memory_mib(1024)
        .file(std::env::current_exe().unwrap(), "/usr/bin/kvm-tests")
        .run("kvm-tests --skip all_of_it_in_the_lab --nocapture 2>&1")
        .unwrap();
    let output = outcome.output;
    assert_eq!(outcome.status, 0, "{output}");
    assert!(!output.contains("skipped"), "{output}");
    assert!(output.contains("test result: ok."), "{output}");
}
