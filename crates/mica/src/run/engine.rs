//! Which engine executes the guest, and why.
//!
//! `auto` takes KVM where its probe is satisfied and the processor in software elsewhere.

use std::error::Error;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use mica_machine::kvm::{self, ProbeError};
use mica_machine::vmm::channel::Attachments;
use mica_machine::vmm::config::EngineConfig;
use serde::{Deserialize, Serialize};

use super::options::EngineChoice;
use crate::runtime;

/// A chosen engine.
pub(crate) struct Engine {
    /// As users name it.
    pub(crate) name: &'static str,
    /// `/dev/kvm`, open, for KVM; nothing for the processor in software.
    device: Option<OwnedFd>,
    /// Why this engine, for people.
    pub(crate) reason: String,
}

impl Engine {
    /// What the VM process is told, with the descriptor that it needs.
    pub(crate) fn config(&mut self, attachments: &mut Attachments) -> EngineConfig {
        match self.device.take() {
            Some(device) => EngineConfig::Kvm {
                device: attachments.attach(device),
            },
            None => EngineConfig::Soft,
        }
    }

    fn soft(reason: impl Into<String>) -> Self {
        Self {
            name: "soft",
            device: None,
            reason: reason.into(),
        }
    }
}

/// What a probe has found, kept until the host boots anew.
#[derive(Serialize, Deserialize)]
struct Probed {
    /// Identifies the running kernel's boot.
    boot: String,
    mips: u64,
}

/// Chooses the engine.
///
/// # Errors
///
/// KVM was asked for and is not there or not fit, and why. `counted`: the run is recorded or replayed.
pub(crate) fn choose(choice: EngineChoice, counted: bool) -> Result<Engine, Box<dyn Error>> {
    match choice {
        EngineChoice::Kvm if counted => {
            Err("engine kvm: only the processor in software can be recorded".into())
        }
        _ if counted => Ok(Engine::soft("it counts instructions")),
        EngineChoice::Soft => Ok(Engine::soft("asked for")),
        EngineChoice::Kvm => Ok(choose_kvm().map_err(|error| {
            format!("engine kvm: {error}; --engine soft needs nothing of the host")
        })?),
        EngineChoice::Auto => {
            Ok(choose_kvm().unwrap_or_else(|error| Engine::soft(format!("no KVM: {error}"))))
        }
    }
}

fn choose_kvm() -> Result<Engine, ProbeError> {
    let device = kvm::open()?;
    let probed = match remembered() {
        Some(probed) => probed,
        None => {
            let report = kvm::probe(&device)?;
            let boot = boot_identifier().unwrap_or_default();
            let probed = Probed {
                boot,
                mips: report.mips,
            };
            remember(&probed);
            probed
        }
    };
    Ok(Engine {
        name: "kvm",
        device: Some(device),
        reason: format!("ring 0 at {} MIPS or more", probed.mips),
    })
}

fn boot_identifier() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}

fn memory() -> Option<PathBuf> {
    Some(runtime::make_directory().ok()?.join("kvm-probe.json"))
}

/// What an earlier probe in this boot has found. Only success is remembered: what made a probe fail
/// may have been mended.
fn remembered() -> Option<Probed> {
    let probed: Probed = serde_json::from_slice(&fs::read(memory()?).ok()?).ok()?;
    (boot_identifier()? == probed.boot).then_some(probed)
}

fn remember(probed: &Probed) {
    if let (Some(path), Ok(text)) = (memory(), serde_json::to_vec(probed)) {
        // Without it the next start probes again, which takes some milliseconds.
        let _ = fs::write(path, text);
    }
}
