//! The processor that a guest sees, as data for any engine.
//!
//! A profile turns what an engine can give (a [`CpuidTable`]) into what the guest gets. The frozen
//! profiles `x86-64-v2` and `x86-64-v3` give the instruction set level of that name in the psABI
//! and nothing that a user program could come to depend on beyond it, so that a VM runs on every
//! host of that level and vendor, and moves between them. Family, model, caches and address width
//! are frozen too. The one thing that differs between hosts is the hardening: mitigations of
//! speculation flaws and supervisor protections are passed on wherever the host has them. What a VM
//! has come up with is kept in its table, and [`missing_features`] says whether another host has it.
//!
//! `host` passes on all that the engine can give, for guests that stay where they are.
//!
//! Why the vendor is the host's, and where the frozen numbers come from:
//! `docs/decisions/003-cpu-profiles.md`.

mod emulated;
mod features;
mod frozen;
mod table;
mod topology;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use emulated::ARCH_CAPABILITIES;
pub use features::{Feature, Register};
pub use table::{CpuidLeaf, CpuidTable};

/// A processor model for guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuProfile {
    /// SSE4.2, POPCNT, CMPXCHG16B: every x86 server since 2009.
    #[default]
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// With AVX2, BMI and FMA: since 2013, AMD since 2017.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
    /// Whatever this host has.
    #[serde(rename = "host")]
    Host,
}

impl CpuProfile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::X86_64V2, Self::X86_64V3, Self::Host];

    /// The profile's name, as users write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
            Self::Host => "host",
        }
    }

    /// The table of a guest with `vcpus` vCPUs on an engine that can give `supported`. What depends
    /// on the vCPU is filled in by [`CpuidTable::for_vcpu`].
    ///
    /// # Errors
    ///
    /// See [`ProfileError`].
    pub fn resolve(self, supported: &CpuidTable, vcpus: u32) -> Result<CpuidTable, ProfileError> {
        let mut table = match self {
            Self::X86_64V2 | Self::X86_64V3 => frozen::resolve(self, supported)?,
            Self::Host => pass_on(supported),
        };
        add_paravirtual_leaves(&mut table, supported);
        topology::apply(&mut table, vcpus);
        Ok(table)
    }

    /// The features without which the profile is not given. `host` has none.
    #[must_use]
    pub fn required(self) -> Vec<Feature> {
        let sets: &[&[Feature]] = match self {
            Self::X86_64V2 => &[features::BASE, features::V2],
            Self::X86_64V3 => &[features::BASE, features::V2, features::V3],
            Self::Host => &[],
        };
        sets.concat()
    }
}

impl fmt::Display for CpuProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpuProfile {
    type Err = UnknownProfile;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.name() == text)
            .ok_or_else(|| UnknownProfile(text.to_owned()))
    }
}

/// No profile has that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU profile '{0}'; there are x86-64-v2, x86-64-v3 and host")]
pub struct UnknownProfile(String);

/// Why a host cannot give a profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// The processor, or the engine on it, lacks features.
    #[error("this host cannot give CPU profile {profile}: it lacks {}", missing.join(", "))]
    Missing {
        /// The profile.
        profile: CpuProfile,
        /// The features' names, as in Linux's `/proc/cpuinfo`.
        missing: Vec<String>,
    },
    /// Frozen profiles exist for Intel, AMD and Hygon.
    #[error("CPU profile {profile} is not defined for processors of {vendor}; use 'host'")]
    Vendor {
        /// The profile.
        profile: CpuProfile,
        /// CPUID's vendor string.
        vendor: String,
    },
}

/// The features of a guest's table that an engine with `supported` does not have, by name or by
/// place: empty if a guest with that table can go on there. The vendor counts as one.
#[must_use]
pub fn missing_features(guest: &CpuidTable, supported: &CpuidTable) -> Vec<String> {
    let mut missing = Vec::new();
    if guest.vendor() != supported.vendor() {
        missing.push(format!("vendor {}", guest.vendor()));
    }
    for (leaf, subleaf, register) in features::WORDS {
        let wanted = guest.register(leaf, subleaf, register);
        let lacking = wanted & !supported.register(leaf, subleaf, register);
        let bits = (0..32).filter(|bit| lacking >> bit & 1 == 1);
        missing.extend(
            bits.map(|bit| Feature::name_of(leaf, subleaf, register, bit))
                .filter(|name| !features::GIVEN.contains(&name.as_str())),
        );
    }
    missing
}

/// The leaves of KVM's paravirtual interface, which begin with a signature like CPUID itself.
const PARAVIRTUAL: u32 = 0x4000_0000;
const KVM_SIGNATURE: [u32; 3] = [
    u32::from_le_bytes(*b"KVMK"),
    u32::from_le_bytes(*b"VMKV"),
    u32::from_le_bytes(*b"M\0\0\0"),
];

fn add_paravirtual_leaves(table: &mut CpuidTable, supported: &CpuidTable) {
    let offered = features::PARAVIRTUAL
        .iter()
        .fold(0, |bits, feature| bits | 1 << feature.bit);
    let given = supported.register(PARAVIRTUAL + 1, 0, Register::Eax) & offered;
    let [ebx, ecx, edx] = KVM_SIGNATURE;
    table.set(CpuidLeaf {
        eax: PARAVIRTUAL + 1,
        ebx,
        ecx,
        edx,
        ..CpuidLeaf::new(PARAVIRTUAL)
    });
    table.set(CpuidLeaf {
        eax: given,
        ..CpuidLeaf::new(PARAVIRTUAL + 1)
    });
}

/// The `host` profile: everything but what Mica does not virtualize.
fn pass_on(supported: &CpuidTable) -> CpuidTable {
    let mut table = supported.clone();
    // The performance counters, SGX, processor trace, SVM and memory encryption, and what the
    // engine says about itself, which `add_paravirtual_leaves` says again.
    table.retain(|leaf| {
        !matches!(
            leaf,
            0xa | 0x12 | 0x14 | 0x4000_0000
                ..=0x4fff_ffff | 0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0022
        )
    });
    for feature in features::NEVER {
        table.clear(feature);
    }
    table
}

#[cfg(test)]
mod tests;
