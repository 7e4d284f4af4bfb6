//! What the processor in software can give.
//!
//! It is an Intel processor, so that guests see the same one on every host. It does not speculate, so it
//! says that it has none of the flaws that kernels work around at great cost.

use super::features::{BASE, HARDENING, PARAVIRTUAL, V2};
use super::{CpuProfile, CpuidLeaf, CpuidTable, Feature, ProfileError, Register};

/// Of the hardening. The controls of speculation exist because kernels use them in place of slower ways.
const PROTECTION: [&str; 8] = [
    "pcid",
    "smep",
    "invpcid",
    "smap",
    "umip",
    "spec_ctrl",
    "intel_stibp",
    "arch_capabilities",
];

/// IA32_ARCH_CAPABILITIES (SDM volume 4, table 2-2): not susceptible to anything that it can name, and
/// restricted speculation is always on.
pub const ARCH_CAPABILITIES: u64 = {
    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const PSCHANGE_MC_NO: u64 = 1 << 6;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const ITS_NO: u64 = 1 << 62;
    RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO
};

impl CpuidTable {
    /// What the processor in software can give a guest: level 2 and no more, on every host.
    #[must_use]
    pub fn emulated() -> Self {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let vendor = CpuidLeaf {
            ebx: word(b"Genu"),
            edx: word(b"ineI"),
            ecx: word(b"ntel"),
            ..CpuidLeaf::new(0)
        };
        let mut table = Self::new(vec![vendor]);
        let chosen =
            |names: &'static [&str]| move |feature: &&Feature| names.contains(&feature.name);
        let features = BASE
            .iter()
            .chain(V2)
            .chain(HARDENING.iter().filter(chosen(&PROTECTION)))
            .chain(PARAVIRTUAL);
        for feature in features {
            table.add(feature);
        }
        table
    }
}

/// Pages of 1 GiB, which no level asks for.
const GIB_PAGES: Feature = Feature {
    name: "pdpe1gb",
    leaf: 0x8000_0001,
    subleaf: 0,
    register: Register::Edx,
    bit: 26,
};

impl CpuProfile {
    /// The table of a guest with `vcpus` vCPUs on the processor in software; `host` is all that it has.
    ///
    /// # Errors
    ///
    /// See [`ProfileError`].
    pub fn resolve_emulated(self, vcpus: u32) -> Result<CpuidTable, ProfileError> {
        let level = match self {
            Self::Host => Self::X86_64V2,
            level => level,
        };
        let mut table = level.resolve(&CpuidTable::emulated(), vcpus)?;
        if self == Self::Host {
            table.add(&GIB_PAGES);
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_2_is_there_and_level_3_is_refused_by_name() {
        let table = CpuProfile::X86_64V2
            .resolve(&CpuidTable::emulated(), 4)
            .unwrap();
        assert_eq!(table.vendor(), "GenuineIntel");
        for feature in HARDENING.iter().filter(|f| PROTECTION.contains(&f.name)) {
            assert!(table.has(feature), "{}", feature.name);
        }
        let refused = CpuProfile::X86_64V3.resolve(&CpuidTable::emulated(), 4);
        let Err(ProfileError::Missing { missing, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert!(missing.contains(&"avx2".to_owned()), "{missing:?}");
    }

    #[test]
    fn every_name_is_a_feature() {
        let known = |name: &&str| HARDENING.iter().any(|feature| feature.name == *name);
        assert!(PROTECTION.iter().all(known));
    }
}
