//! CPUID tables between KVM's form and ours.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::cpu_profile::{CpuidLeaf, CpuidTable};
use crate::engine::{EngineError, invalid};
use crate::layout;
use crate::memory::GuestMemory;

/// Leaf 1, ECX: the local APIC's timer has a deadline mode. KVM emulates it and says so apart.
const TSC_DEADLINE_TIMER: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;

/// What the kernel and the processor of this host can give a guest.
///
/// # Errors
///
/// The kernel refuses.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuidTable, EngineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| EngineError::new("KVM_GET_SUPPORTED_CPUID", error))?;
    let mut leaves: Vec<_> = supported.as_slice().iter().map(from_entry).collect();
    if let Some(features) = leaves.iter_mut().find(|leaf| leaf.leaf == 1) {
        features.ecx |= HYPERVISOR;
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            features.ecx |= TSC_DEADLINE_TIMER;
        }
    }
    Ok(CpuidTable::new(leaves))
}

fn from_entry(entry: &kvm_cpuid_entry2) -> CpuidLeaf {
    let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidLeaf {
        leaf: entry.function,
        subleaf: indexed.then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

pub(super) fn to_kvm(table: &CpuidTable) -> Result<CpuId, EngineError> {
    let entries: Vec<_> = table.leaves().iter().map(to_entry).collect();
    CpuId::from_entries(&entries).map_err(|_| {
        let reason = format!("{} leaves, the kernel takes fewer", entries.len());
        EngineError::new("KVM_SET_CPUID2", invalid(reason))
    })
}

fn to_entry(leaf: &CpuidLeaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf.leaf,
        index: leaf.subleaf.unwrap_or(0),
        flags: leaf.subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}

/// Whether the host's processor addresses all that the guest may: profiles promise 40 bits, and many
/// processors have 39.
pub(super) fn check_address_width(
    supported: &CpuidTable,
    memory: &GuestMemory,
) -> Result<(), EngineError> {
    let bits = supported
        .get(0x8000_0008, 0)
        .map_or(36, |leaf| leaf.eax & 0xff);
    let ram: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    let end = layout::pci_window_64(ram).end;
    if bits < 64 && end > 1 << bits {
        let reason = format!(
            "the guest's addresses end at {end:#x}, the host's processor has {bits} address bits; \
             give the guest less RAM"
        );
        return Err(EngineError::new("create VM", invalid(reason)));
    }
    Ok(())
}
