//! The frozen profiles: the same answers on every host of a vendor, but for the hardening.

use super::features::{BASE, CMP_LEGACY, Feature, HARDENING, Register, TOPOEXT, V2, V3};
use super::{CpuProfile, CpuidLeaf, CpuidTable, ProfileError, topology};

/// Physical address bits, and linear ones.
const ADDRESS_BITS: u32 = 40 | 48 << 8;
/// CLFLUSH's line in units of 8 bytes, at its place in leaf 1 EBX.
const CLFLUSH_LINE: u32 = 8 << 8;
/// The bits of leaf 1 EDX that AMD repeats in 0x8000_0001 EDX.
const AMD_REPEATED: u32 = 0x0183_f3ff;
/// State components of XCR0: x87, SSE, AVX.
const XCR0: u32 = 0b111;
/// The AVX component of a standard XSAVE area: its size, and its offset.
const AVX_SIZE: u32 = 256;
const AVX_OFFSET: u32 = 576;

/// What of a profile depends on the vendor: instructions and flaws that kernels know by it.
struct Vendor {
    name: &'static str,
    /// Leaf 1 EAX: family, model and stepping.
    signature: u32,
    max_basic: u32,
    max_extended: u32,
    amd: bool,
}

/// Skylake-SP; Zen 2; Dhyana. Each has the flaws that a kernel must assume, see the decision record.
const VENDORS: [Vendor; 3] = [
    Vendor {
        name: "GenuineIntel",
        signature: 0x0005_0654,
        max_basic: 0x1f,
        max_extended: 0x8000_0008,
        amd: false,
    },
    Vendor {
        name: "AuthenticAMD",
        signature: 0x0083_0f10,
        max_basic: 0xd,
        max_extended: 0x8000_0021,
        amd: true,
    },
    Vendor {
        name: "HygonGenuine",
        signature: 0x0090_0f01,
        max_basic: 0xd,
        max_extended: 0x8000_0021,
        amd: true,
    },
];

pub(super) fn resolve(
    profile: CpuProfile,
    supported: &CpuidTable,
) -> Result<CpuidTable, ProfileError> {
    let name = supported.vendor();
    let vendor = VENDORS
        .iter()
        .find(|vendor| vendor.name == name)
        .ok_or_else(|| ProfileError::Vendor {
            profile,
            vendor: name.clone(),
        })?;
    let required = profile.required();
    let missing: Vec<_> = required
        .iter()
        .filter(|feature| !supported.has(feature))
        .map(|feature| feature.name.to_owned())
        .collect();
    if !missing.is_empty() {
        return Err(ProfileError::Missing { profile, missing });
    }

    let mut table = CpuidTable::new(vec![]);
    let hardening = HARDENING
        .iter()
        .filter(|feature| supported.has(feature) && applies(feature, vendor));
    for feature in required.iter().chain(hardening) {
        table.add(feature);
    }
    identify(&mut table, profile, vendor);
    if table.has(&V3[0]) {
        add_xsave(&mut table);
    }
    topology::add_caches(&mut table, vendor.amd);
    Ok(table)
}

/// ARCH_CAPABILITIES is Intel's way to say which flaws a processor has. KVM emulates it on AMD too,
/// where it says nothing and confuses some guests.
fn applies(feature: &Feature, vendor: &Vendor) -> bool {
    !(vendor.amd && feature.name == "arch_capabilities")
}

fn identify(table: &mut CpuidTable, profile: CpuProfile, vendor: &Vendor) {
    let mut name = vendor.name.as_bytes().chunks_exact(4).map(|bytes| {
        u32::from_le_bytes(bytes.try_into().expect("invariant: chunks of four bytes"))
    });
    let mut word = || {
        name.next()
            .expect("invariant: vendor names have twelve bytes")
    };
    let (ebx, edx, ecx) = (word(), word(), word());
    table.set(CpuidLeaf {
        eax: vendor.max_basic,
        ebx,
        ecx,
        edx,
        ..CpuidLeaf::new(0)
    });
    for leaf in table.leaves_mut(1) {
        leaf.eax = vendor.signature;
        leaf.ebx = CLFLUSH_LINE;
    }
    // The number of leaf 7's last subleaf.
    let last = if table.get(7, 2).is_some() { 2 } else { 0 };
    let mut structured = table.get(7, 0).copied();
    let structured = structured.get_or_insert(CpuidLeaf::indexed(7, 0));
    structured.eax = last;
    table.set(*structured);

    let vendor_again = if vendor.amd { [ebx, ecx, edx] } else { [0; 3] };
    table.set(CpuidLeaf {
        eax: vendor.max_extended,
        ebx: vendor_again[0],
        ecx: vendor_again[1],
        edx: vendor_again[2],
        ..CpuidLeaf::new(0x8000_0000)
    });
    if vendor.amd {
        let repeated = table.register(1, 0, Register::Edx) & AMD_REPEATED;
        for leaf in table.leaves_mut(0x8000_0001) {
            leaf.eax = vendor.signature;
            leaf.edx |= repeated;
        }
        table.add(&CMP_LEGACY);
        table.add(&TOPOEXT);
    }
    add_brand(table, profile);
    let mut addresses = table.get(0x8000_0008, 0).copied();
    let addresses = addresses.get_or_insert(CpuidLeaf::new(0x8000_0008));
    addresses.eax = ADDRESS_BITS;
    table.set(*addresses);
}

/// Leaves 0x8000_0002 to 4: 48 bytes of text.
fn add_brand(table: &mut CpuidTable, profile: CpuProfile) {
    let text = format!("Mica {profile}");
    let mut bytes = [0; 48];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    for (leaf, part) in (0x8000_0002..).zip(bytes.chunks_exact(16)) {
        let word = |index: usize| {
            let bytes = &part[index * 4..index * 4 + 4];
            u32::from_le_bytes(bytes.try_into().expect("invariant: four bytes"))
        };
        table.set(CpuidLeaf {
            eax: word(0),
            ebx: word(1),
            ecx: word(2),
            edx: word(3),
            ..CpuidLeaf::new(leaf)
        });
    }
}

/// Leaf 0xD: a standard XSAVE area with the AVX state. Engines put the size of the enabled part into
/// EBX of subleaf 0 as the guest changes XCR0.
fn add_xsave(table: &mut CpuidTable) {
    table.set(CpuidLeaf {
        eax: XCR0,
        ebx: AVX_OFFSET + AVX_SIZE,
        ecx: AVX_OFFSET + AVX_SIZE,
        ..CpuidLeaf::indexed(0xd, 0)
    });
    table.set(CpuidLeaf::indexed(0xd, 1));
    table.set(CpuidLeaf {
        eax: AVX_SIZE,
        ebx: AVX_OFFSET,
        ..CpuidLeaf::indexed(0xd, 2)
    });
}

// The sets are disjoint and in ascending strength; `V3[0]` is AVX, on which leaf 0xD depends.
const _: () = assert!(V3[0].bit == 28 && V2.len() == 7 && !BASE.is_empty());
