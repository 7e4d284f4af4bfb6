//! One socket of N cores with one thread each, and their caches.
//!
//! The APIC ID of a vCPU is its index. Kernels read that from leaf 1, from leaf 0xB or 0x1F, or on
//! AMD from 0x8000_0008 and 0x8000_001E, so all of them are made to agree.

use super::features::{CMP_LEGACY, HTT};
use super::{CpuidLeaf, CpuidTable};

/// A cache as leaf 4 and leaf 0x8000_001D describe it.
struct Cache {
    /// 1 data, 2 instructions, 3 both.
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
}

const LINE: u32 = 64;

/// 32 KiB and 32 KiB, 1 MiB, and 16 MiB that all cores share.
const CACHES: [Cache; 4] = [
    Cache {
        kind: 1,
        level: 1,
        ways: 8,
        sets: 64,
    },
    Cache {
        kind: 2,
        level: 1,
        ways: 8,
        sets: 64,
    },
    Cache {
        kind: 3,
        level: 2,
        ways: 16,
        sets: 1024,
    },
    Cache {
        kind: 3,
        level: 3,
        ways: 16,
        sets: 16384,
    },
];

impl Cache {
    fn kib(&self) -> u32 {
        self.ways * self.sets * LINE / 1024
    }
}

/// Describes the frozen profiles' caches; [`apply`] says who shares them.
pub(super) fn add_caches(table: &mut CpuidTable, amd: bool) {
    let leaf = if amd { 0x8000_001d } else { 4 };
    for (index, cache) in (0..).zip(&CACHES) {
        table.set(CpuidLeaf {
            // Bit 8: self-initializing.
            eax: cache.kind | cache.level << 5 | 1 << 8,
            ebx: (LINE - 1) | (cache.ways - 1) << 22,
            ecx: cache.sets - 1,
            ..CpuidLeaf::indexed(leaf, index)
        });
    }
    table.set(CpuidLeaf::indexed(leaf, CACHES.len() as u32));
    if amd {
        // The older description: KiB, ways and lines per tag of L1, KiB of L2, half MiB of L3. 8 is
        // the code for 16 ways.
        let [l1d, l1i, l2, l3] = &CACHES;
        let l1 = |cache: &Cache| cache.kib() << 24 | cache.ways << 16 | 1 << 8 | LINE;
        table.set(CpuidLeaf {
            ecx: l1(l1d),
            edx: l1(l1i),
            ..CpuidLeaf::new(0x8000_0005)
        });
        table.set(CpuidLeaf {
            ecx: l2.kib() << 16 | 8 << 12 | 1 << 8 | LINE,
            edx: (l3.kib() / 512) << 18 | 8 << 12 | 1 << 8 | LINE,
            ..CpuidLeaf::new(0x8000_0006)
        });
    } else {
        // Leaf 2 refers to leaf 4.
        table.set(CpuidLeaf {
            eax: 0xff01,
            ..CpuidLeaf::new(2)
        });
    }
}

/// The bits of an APIC ID that tell cores apart.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// Makes the table one of a socket with `vcpus` cores.
pub(super) fn apply(table: &mut CpuidTable, vcpus: u32) {
    let amd = matches!(table.vendor().as_str(), "AuthenticAMD" | "HygonGenuine");
    for leaf in table.leaves_mut(1) {
        // EBX bits 16-23: logical processors.
        leaf.ebx = leaf.ebx & 0xff00_ffff | vcpus.min(255) << 16;
    }
    if vcpus > 1 {
        table.add(&HTT);
    } else {
        table.clear(&HTT);
        table.clear(&CMP_LEGACY);
    }
    // EAX bits 14-25: who shares the cache; 26-31 of leaf 4: cores in the socket, as far as six bits
    // count. Both as a number of APIC IDs, less one.
    let ids = 1 << core_bits(vcpus);
    for leaf in [4, 0x8000_001d] {
        for cache in table.leaves_mut(leaf).filter(|cache| cache.eax & 0x1f != 0) {
            let shared = cache.eax >> 5 & 7 == 3;
            let sharing = if shared { ids - 1 } else { 0 };
            let cores = if leaf == 4 { (ids - 1).min(63) } else { 0 };
            cache.eax = cache.eax & 0x3fff | sharing << 14 | cores << 26;
        }
    }
    add_extended_topology(table, 0xb, vcpus);
    if table.get(0, 0).is_some_and(|leaf| leaf.eax >= 0x1f) {
        add_extended_topology(table, 0x1f, vcpus);
    }
    // ECX: cores less one, and the width of an APIC ID's core part.
    for leaf in table.leaves_mut(0x8000_0008) {
        leaf.ecx = if amd {
            (vcpus - 1) | core_bits(vcpus) << 12
        } else {
            0
        };
    }
    if amd {
        // Filled in for each vCPU; one node.
        table.set(CpuidLeaf::new(0x8000_001e));
    }
}

/// Leaf 0xB or 0x1F: a thread level and a core level.
fn add_extended_topology(table: &mut CpuidTable, leaf: u32, vcpus: u32) {
    // Leaf 0x1F of a host may have more levels.
    table.retain(|other| other != leaf);
    let levels = [(0, 1, 1), (core_bits(vcpus), vcpus, 2), (0, 0, 0)];
    for (level, (shift, processors, kind)) in (0..).zip(levels) {
        table.set(CpuidLeaf {
            eax: shift,
            ebx: processors,
            ecx: level | kind << 8,
            ..CpuidLeaf::indexed(leaf, level)
        });
    }
}

/// Makes the table that of the vCPU with this APIC ID.
pub(super) fn set_apic_id(table: &mut CpuidTable, id: u32) {
    for leaf in table.leaves_mut(1) {
        leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24;
    }
    for number in [0xb, 0x1f] {
        for leaf in table.leaves_mut(number) {
            leaf.edx = id;
        }
    }
    for leaf in table.leaves_mut(0x8000_001e) {
        leaf.eax = id;
        leaf.ebx = id & 0xff;
        leaf.ecx = 0;
    }
}
