//! Which engines there are. Nothing else here knows one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::Engine;
use mica_machine::kvm::{self, KvmConfig, KvmEngine};
use mica_machine::memory::GuestMemory;
use mica_machine::soft::{SoftConfig, SoftEngine};

use crate::guest::{Fatal, Guest};

/// The host kernel's hypervisor on a processor's virtualization.
pub const KVM: &str = "kvm";
/// The same where the processor is AMD's.
pub const AMD_KVM: &str = "kvm on amd";
/// A `/dev/kvm` that emulates ring 0 instruction by instruction.
pub const EMULATED_KVM: &str = "emulated kvm";
/// What it says of an instruction that it does not know. A case with one is not compared there.
const NOT_EMULATED: &str = "KVM cannot emulate";
/// The processor in software.
const SOFT: &str = "soft";

/// A name, and what makes an engine with one vCPU of the profile that it always has.
type Candidate = (&'static str, fn(GuestMemory) -> Box<dyn Engine>);

/// All engines of this machine.
fn engines() -> Vec<Candidate> {
    let mut engines: Vec<Candidate> = vec![(SOFT, soft)];
    engines.extend(kvm_name().as_ref().ok().map(|name| (*name, kvm as _)));
    engines
}

fn soft(memory: GuestMemory) -> Box<dyn Engine> {
    let config = SoftConfig {
        memory,
        vcpus: 1,
        profile: CpuProfile::Host,
        turns: None,
    };
    Box::new(SoftEngine::new(config).unwrap())
}

fn kvm(memory: GuestMemory) -> Box<dyn Engine> {
    let config = KvmConfig {
        memory,
        vcpus: 1,
        profile: CpuProfile::Host,
    };
    Box::new(KvmEngine::new(kvm::open().unwrap(), config).unwrap())
}

/// Which KVM this is, or why there is none.
fn kvm_name() -> &'static Result<&'static str, String> {
    static NAME: OnceLock<Result<&str, String>> = OnceLock::new();
    NAME.get_or_init(|| {
        let device = kvm::open().map_err(|error| error.to_string())?;
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let hardware = text
            .split_whitespace()
            .any(|word| word == "vmx" || word == "svm");
        match kvm::probe(device) {
            Err(_) if !hardware => Ok(EMULATED_KVM),
            _ if text.contains("AuthenticAMD") => Ok(AMD_KVM),
            _ => Ok(KVM),
        }
    })
}

/// Runs a case in a new guest of each engine.
pub fn on_every_engine(case: impl Fn(&mut Guest)) {
    on_every_engine_but(&[], case);
}

/// The same without the engines that are known to differ from the manual here, each with how.
pub fn on_every_engine_but(except: &[(&str, &str)], case: impl Fn(&mut Guest)) {
    if let Err(reason) = kvm_name() {
        println!("skipped on kvm: there is no kvm: {reason}");
    }
    let mut failed = Vec::new();
    for (name, make) in engines() {
        if let Some((_, reason)) = except.iter().find(|(engine, _)| *engine == name) {
            println!("not compared on {name}: {reason}");
            continue;
        }
        // A failure on one engine is compared with what the others do.
        println!("on {name}:");
        let run = AssertUnwindSafe(|| case(&mut Guest::new(make)));
        let Err(panic) = catch_unwind(run) else {
            continue;
        };
        match panic.downcast_ref::<Fatal>() {
            Some(Fatal(reason)) if name == EMULATED_KVM && reason.contains(NOT_EMULATED) => {
                println!("not compared on {name}: {reason}");
            }
            Some(Fatal(reason)) => failed.push(format!("{name}: {reason}")),
            None => failed.push(name.to_owned()),
        }
    }
    assert!(failed.is_empty(), "fails on {}", failed.join(" and "));
}
