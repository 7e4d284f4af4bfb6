//! Which engine executes the guest, and why.
//!
//! KVM is the only engine so far, so `auto` and `kvm` end the same way on every host; they will not
//! once there is a processor in software to fall back on.

use std::error::Error;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use mica_machine::kvm::{self, ProbeError};
use serde::{Deserialize, Serialize};

use super::options::EngineChoice;
use crate::runtime;

/// A chosen engine.
pub(crate) struct Engine {
    /// `/dev/kvm`, open.
    pub(crate) device: OwnedFd,
    /// Why this engine, for people.
    pub(crate) reason: String,
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
/// KVM is not there or not fit, and why.
pub(crate) fn choose(choice: EngineChoice) -> Result<Engine, Box<dyn Error>> {
    let refused = |error: ProbeError| match choice {
        EngineChoice::Kvm => format!("engine kvm: {error}"),
        EngineChoice::Auto => format!("no engine can run a guest on this host: {error}"),
    };
    let device = kvm::open().map_err(refused)?;
    let probed = match remembered() {
        Some(probed) => probed,
        None => {
            let report = kvm::probe(&device).map_err(refused)?;
            let boot = boot_identifier().unwrap_or_default();
            let probed = Probed {
                boot,
                mips: report.mips,
            };
            remember(&probed);
            probed
        }
    };
    let reason = format!("ring 0 at {} MIPS or more", probed.mips);
    Ok(Engine { device, reason })
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
