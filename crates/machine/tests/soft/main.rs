//! The software engine, by the tests of the KVM engine.

#![allow(clippy::unwrap_used)] // helpers of tests may, as tests do

#[macro_use]
#[path = "../kvm/micro.rs"]
mod micro;

#[path = "../kvm/engine.rs"]
mod engine;
mod paravirtual;
#[path = "../kvm/state.rs"]
mod state;

use std::sync::Arc;

use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::{Engine, EngineError};
use mica_machine::memory::GuestMemory;
use mica_machine::soft::{SoftConfig, SoftEngine};

/// The engine under test, which is there on every host, where that of KVM may be missing.
fn make_engine(
    memory: &GuestMemory,
    vcpus: u32,
    profile: CpuProfile,
) -> Option<Result<Arc<dyn Engine>, EngineError>> {
    let config = SoftConfig {
        memory: memory.clone(),
        vcpus,
        profile,
        turns: None,
    };
    Some(SoftEngine::new(config).map(|engine| Arc::new(engine) as Arc<dyn Engine>))
}

/// Whether level 2 must be there, and CPUID must be the table's.
fn gives_every_profile() -> bool {
    true
}

/// Whether breakpoints must work.
const HAS_BREAKPOINTS: bool = true;
