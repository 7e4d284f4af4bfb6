use super::features::{BASE, HARDENING, PARAVIRTUAL, V2, V3, WORDS};
use super::*;

/// A processor of `vendor` with every feature bit there is.
fn everything(vendor: &[u8; 12]) -> CpuidTable {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let full = |leaf: CpuidLeaf| CpuidLeaf {
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
        ..leaf
    };
    let mut leaves = vec![CpuidLeaf {
        eax: 0x1f,
        ebx: word(0),
        edx: word(4),
        ecx: word(8),
        ..CpuidLeaf::new(0)
    }];
    for leaf in [
        1,
        6,
        0x4000_0001,
        0x8000_0001,
        0x8000_0007,
        0x8000_0008,
        0x8000_0021,
    ] {
        leaves.push(full(CpuidLeaf::new(leaf)));
    }
    for (leaf, subleaf) in [(7, 0), (7, 1), (7, 2), (0xd, 0), (0xd, 1)] {
        leaves.push(full(CpuidLeaf::indexed(leaf, subleaf)));
    }
    CpuidTable::new(leaves)
}

/// A processor with just what `profile` requires.
fn barely(profile: CpuProfile) -> CpuidTable {
    let mut table = CpuidTable::new(vec![*everything(b"GenuineIntel").get(0, 0).unwrap()]);
    for feature in profile.required() {
        table.add(&feature);
    }
    table
}

/// The names of all feature bits that `table` has.
fn names(table: &CpuidTable) -> Vec<String> {
    let mut names = Vec::new();
    for (leaf, subleaf, register) in WORDS {
        let word = table.register(leaf, subleaf, register);
        let bits = (0..32).filter(|bit| word >> bit & 1 == 1);
        names.extend(bits.map(|bit| Feature::name_of(leaf, subleaf, register, bit)));
    }
    names.sort();
    names
}

/// The psABI's levels in Linux's names, with what Linux does not name apart (OSFXSR and OSXSAVE are
/// the guest's own CR4 bits).
const LEVEL_1: &str = "cmov cx8 fpu fxsr mmx syscall sse sse2";
const LEVEL_2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
const LEVEL_3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
/// What is no instruction of user programs, or in every processor of level 2.
const SYSTEM: &str = "de pse tsc msr pae mce apic sep mtrr pge mca pat pse36 clflush nx lm rdtscp \
     x2apic tsc_deadline_timer hypervisor arat";

/// Resolves on a host with every feature: exactly `levels`, [`SYSTEM`], hardening and the
/// paravirtual interface come out.
fn check_exact(profile: CpuProfile, levels: &[&str]) {
    let table = profile.resolve(&everything(b"GenuineIntel"), 1).unwrap();
    let mut expected: Vec<String> = levels
        .iter()
        .chain([&SYSTEM])
        .flat_map(|names| names.split_whitespace())
        .map(str::to_owned)
        .chain(
            [HARDENING, PARAVIRTUAL]
                .concat()
                .iter()
                .map(|feature| feature.name.to_owned()),
        )
        .collect();
    expected.extend(xcr0_bits(&table));
    expected.sort();
    expected.dedup();
    assert_eq!(names(&table), expected, "{profile}");
}

/// Leaf 0xD, subleaf 0 EAX holds state components rather than features.
fn xcr0_bits(table: &CpuidTable) -> Vec<String> {
    let word = table.register(0xd, 0, Register::Eax);
    (0..32)
        .filter(|bit| word >> bit & 1 == 1)
        .map(|bit| Feature::name_of(0xd, 0, Register::Eax, bit))
        .collect()
}

#[test]
fn frozen_profiles_are_exactly_the_psabi_s_levels() {
    check_exact(CpuProfile::X86_64V2, &[LEVEL_1, LEVEL_2]);
    check_exact(CpuProfile::X86_64V3, &[LEVEL_1, LEVEL_2, LEVEL_3]);
    let v2 = CpuProfile::X86_64V2
        .resolve(&everything(b"GenuineIntel"), 1)
        .unwrap();
    assert_eq!(v2.get(0xd, 0), None, "no XSAVE, no AVX");
    let v3 = CpuProfile::X86_64V3
        .resolve(&everything(b"AuthenticAMD"), 1)
        .unwrap();
    assert_eq!(v3.register(0xd, 0, Register::Eax), 0b111);
    assert_eq!(v3.register(0xd, 0, Register::Ecx), 832);
}

#[test]
fn a_frozen_profile_is_the_same_on_a_bare_and_on_a_rich_host_but_for_hardening() {
    for profile in [CpuProfile::X86_64V2, CpuProfile::X86_64V3] {
        let mut rich = profile.resolve(&everything(b"GenuineIntel"), 4).unwrap();
        let bare = profile.resolve(&barely(profile), 4).unwrap();
        for feature in [HARDENING, PARAVIRTUAL].concat() {
            rich.clear(&feature);
        }
        for (leaf, subleaf, register) in WORDS {
            assert_eq!(
                rich.register(leaf, subleaf, register),
                bare.register(leaf, subleaf, register),
                "{profile} {leaf:#x}.{subleaf} {register:?}"
            );
        }
        for leaf in [0, 1, 2, 4, 0xb, 0x8000_0000, 0x8000_0002] {
            assert_eq!(rich.get(leaf, 0), bare.get(leaf, 0), "{leaf:#x}");
        }
    }
}

#[test]
fn each_required_feature_is_missed_by_name() {
    for profile in [CpuProfile::X86_64V2, CpuProfile::X86_64V3] {
        for feature in profile.required() {
            let mut host = everything(b"AuthenticAMD");
            host.clear(&feature);
            let error = profile.resolve(&host, 1).unwrap_err();
            let missing = vec![feature.name.to_owned()];
            assert_eq!(error, ProfileError::Missing { profile, missing });
            assert!(error.to_string().contains(feature.name), "{error}");
        }
    }
    let error = CpuProfile::default().resolve(&everything(b"CentaurHauls"), 1);
    assert!(error.unwrap_err().to_string().contains("CentaurHauls"));
    CpuProfile::Host
        .resolve(&everything(b"CentaurHauls"), 1)
        .unwrap();
}

#[test]
fn no_two_features_share_a_bit() {
    let mut places: Vec<_> = [BASE, V2, V3, HARDENING, PARAVIRTUAL, features::NEVER]
        .concat()
        .iter()
        .map(|f| (f.leaf, f.subleaf, f.register as u32, f.bit))
        .collect();
    let count = places.len();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), count);
}

#[test]
fn what_is_never_virtualized_is_hidden_from_everybody() {
    for vendor in [b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine"] {
        for profile in CpuProfile::ALL {
            let table = profile.resolve(&everything(vendor), 2).unwrap();
            for feature in features::NEVER {
                assert!(!table.has(feature), "{profile} {}", feature.name);
            }
            let paravirtual = table.register(0x4000_0001, 0, Register::Eax);
            assert_eq!(
                paravirtual & (1 << 4 | 1 << 14),
                0,
                "asynchronous page faults"
            );
            assert_eq!(
                paravirtual & (1 << 3 | 1 << 5 | 1 << 6),
                1 << 3 | 1 << 5 | 1 << 6
            );
            assert_eq!(table.vendor().as_bytes(), vendor);
        }
    }
}

#[test]
fn ibrs_says_nothing_of_arch_capabilities_on_amd() {
    let name = |table: &CpuidTable| names(table).contains(&"arch_capabilities".to_owned());
    let resolve = |vendor| {
        CpuProfile::default()
            .resolve(&everything(vendor), 1)
            .unwrap()
    };
    assert!(name(&resolve(b"GenuineIntel")));
    assert!(!name(&resolve(b"AuthenticAMD")));
}

/// The topology that a kernel reads for vCPU `index` of `vcpus`.
fn check_topology(vcpus: u32, index: u32, core_bits: u32) {
    for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
        for profile in CpuProfile::ALL {
            let table = profile.resolve(&everything(vendor), vcpus).unwrap();
            let table = table.for_vcpu(index);
            let register = |leaf, subleaf, register| table.register(leaf, subleaf, register);
            assert_eq!(register(1, 0, Register::Ebx) >> 24, index);
            assert_eq!(register(1, 0, Register::Ebx) >> 16 & 0xff, vcpus);
            assert_eq!(
                register(1, 0, Register::Edx) >> 28 & 1,
                u32::from(vcpus > 1)
            );
            for level in 0..2 {
                assert_eq!(register(0xb, level, Register::Edx), index);
            }
            assert_eq!(register(0xb, 0, Register::Eax), 0, "one thread a core");
            assert_eq!(register(0xb, 1, Register::Eax), core_bits);
            assert_eq!(register(0xb, 1, Register::Ebx), vcpus);
            assert_eq!(register(0xb, 2, Register::Ecx), 2, "no third level");
            let sizes = register(0x8000_0008, 0, Register::Ecx);
            if vendor == b"AuthenticAMD" {
                assert_eq!((sizes & 0xff, sizes >> 12 & 0xf), (vcpus - 1, core_bits));
                assert_eq!(register(0x8000_001e, 0, Register::Eax), index);
            } else {
                assert_eq!(sizes, 0);
            }
        }
    }
}

#[test]
fn all_topology_leaves_agree() {
    check_topology(1, 0, 0);
    check_topology(2, 1, 1);
    check_topology(3, 2, 2);
    check_topology(64, 63, 6);
    check_topology(254, 253, 8);
}

#[test]
fn the_last_cache_is_shared_by_all() {
    let host = everything(b"GenuineIntel");
    let table = CpuProfile::default().resolve(&host, 6).unwrap();
    let sharing = |subleaf| table.register(4, subleaf, Register::Eax) >> 14 & 0xfff;
    assert_eq!([0, 1, 2, 3].map(sharing), [0, 0, 0, 7]);
    assert_eq!(table.register(4, 4, Register::Eax), 0);
}

#[test]
fn frozen_profiles_have_a_brand_and_forty_address_bits() {
    let host = everything(b"AuthenticAMD");
    let table = CpuProfile::X86_64V3.resolve(&host, 1).unwrap();
    let text: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .filter_map(|leaf| table.get(leaf, 0))
        .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    assert_eq!(text.len(), 48);
    assert!(text.starts_with(b"Mica x86-64-v3\0"));
    assert_eq!(table.register(0x8000_0008, 0, Register::Eax), 0x3028);
    assert_eq!(
        table.register(0x8000_0007, 0, Register::Edx),
        0,
        "no invariant TSC"
    );
}

#[test]
fn a_guest_moves_only_where_its_features_are() {
    let rich = everything(b"GenuineIntel");
    let guest = CpuProfile::default().resolve(&rich, 2).unwrap();
    assert!(missing_features(&guest, &rich).is_empty());
    let bare = barely(CpuProfile::default());
    let missing = missing_features(&guest, &bare);
    assert!(missing.contains(&"smep".to_owned()), "{missing:?}");
    assert!(!missing.contains(&"sse2".to_owned()), "{missing:?}");
    let local = CpuProfile::default().resolve(&bare, 2).unwrap();
    assert!(missing_features(&local, &rich).is_empty());
    assert_eq!(
        missing_features(&local, &everything(b"AuthenticAMD")),
        ["vendor GenuineIntel"]
    );
}

#[test]
fn names_are_what_users_write() {
    for profile in CpuProfile::ALL {
        assert_eq!(profile.to_string().parse(), Ok(profile));
    }
    let error = "x86-64-v4".parse::<CpuProfile>().unwrap_err();
    assert!(error.to_string().contains("x86-64-v2"), "{error}");
}
