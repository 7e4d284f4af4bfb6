//! The KVM engine on real KVM interfaces: this machine's, if it has one, and the lab's.

#![allow(clippy::unwrap_used)] // helpers of tests may, as tests do

#[macro_use]
mod micro;

mod engine;
mod probe;
mod state;

use std::fs::OpenOptions;
use std::sync::Arc;

use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::{Engine, EngineError};
use mica_machine::kvm::{KvmConfig, KvmEngine};
use mica_machine::memory::GuestMemory;
use xtask::lab::Lab;

/// The engine under test; nothing, and a word on why, where there is no `/dev/kvm`.
fn make_engine(
    memory: &GuestMemory,
    vcpus: u32,
    profile: CpuProfile,
) -> Option<Result<Arc<dyn Engine>, EngineError>> {
    let device = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: no usable /dev/kvm: {error}");
            return None;
        }
    };
    let config = KvmConfig {
        memory: memory.clone(),
        vcpus,
        profile,
    };
    Some(KvmEngine::new(device.into(), config).map(|engine| Arc::new(engine) as Arc<dyn Engine>))
}

/// Whether level 2 must be there, and CPUID must be the table's.
fn gives_every_profile() -> bool {
    probe::has_hardware_virtualization()
}

/// Whether breakpoints must work. QEMU's emulation of SVM, which the lab is on, ignores a guest's debug
/// registers, and so does a `/dev/kvm` that emulates ring 0.
const HAS_BREAKPOINTS: bool = false;

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
