//! CPUID's feature bits, by the names that Linux gives them, and the sets that profiles are made of.
//!
//! Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use Register::{Eax, Ebx, Ecx, Edx};

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the registers'
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// As in `/proc/cpuinfo` where it stands there.
    pub name: &'static str,
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question.
    pub subleaf: u32,
    /// Where in the answer.
    pub register: Register,
    /// Which bit of it.
    pub bit: u8,
}

impl Feature {
    const fn new(name: &'static str, leaf: u32, subleaf: u32, register: Register, bit: u8) -> Self {
        Self {
            name,
            leaf,
            subleaf,
            register,
            bit,
        }
    }

    /// The name of the feature at a place, or the place in words.
    pub(super) fn name_of(leaf: u32, subleaf: u32, register: Register, bit: u8) -> String {
        let place = (leaf, subleaf, register, bit);
        [BASE, V2, V3, HARDENING, PARAVIRTUAL, NEVER]
            .into_iter()
            .flatten()
            .find(|feature| (feature.leaf, feature.subleaf, feature.register, feature.bit) == place)
            .map_or_else(
                || format!("CPUID {leaf:#x}.{subleaf} {register:?} bit {bit}"),
                |feature| feature.name.to_owned(),
            )
    }
}

/// Leaf 1.
const fn f1(name: &'static str, register: Register, bit: u8) -> Feature {
    Feature::new(name, 1, 0, register, bit)
}

/// Leaf 7, subleaf 0.
const fn f7(name: &'static str, register: Register, bit: u8) -> Feature {
    Feature::new(name, 7, 0, register, bit)
}

const fn f7_2(name: &'static str, bit: u8) -> Feature {
    Feature::new(name, 7, 2, Edx, bit)
}

/// An extended leaf.
const fn fx(name: &'static str, low: u32, register: Register, bit: u8) -> Feature {
    Feature::new(name, 0x8000_0000 | low, 0, register, bit)
}

const fn pv(name: &'static str, bit: u8) -> Feature {
    Feature::new(name, 0x4000_0001, 0, Eax, bit)
}

/// What a kernel needs of any x86-64 processor, and the psABI's baseline. The last lines are the
/// local APIC, which engines emulate, and RDTSCP, which every processor of level 2 has.
pub(super) const BASE: &[Feature] = &[
    f1("fpu", Edx, 0),
    f1("de", Edx, 2),
    f1("pse", Edx, 3),
    f1("tsc", Edx, 4),
    f1("msr", Edx, 5),
    f1("pae", Edx, 6),
    f1("mce", Edx, 7),
    f1("cx8", Edx, 8),
    f1("apic", Edx, 9),
    f1("sep", Edx, 11),
    f1("mtrr", Edx, 12),
    f1("pge", Edx, 13),
    f1("mca", Edx, 14),
    f1("cmov", Edx, 15),
    f1("pat", Edx, 16),
    f1("pse36", Edx, 17),
    f1("clflush", Edx, 19),
    f1("mmx", Edx, 23),
    f1("fxsr", Edx, 24),
    f1("sse", Edx, 25),
    f1("sse2", Edx, 26),
    fx("syscall", 1, Edx, 11),
    fx("nx", 1, Edx, 20),
    fx("lm", 1, Edx, 29),
    fx("rdtscp", 1, Edx, 27),
    f1("x2apic", Ecx, 21),
    f1("tsc_deadline_timer", Ecx, 24),
    f1("hypervisor", Ecx, 31),
    Feature::new("arat", 6, 0, Eax, 2),
];

/// What level 2 of the psABI adds (x86-64 psABI 1.0, table 3.1).
pub(super) const V2: &[Feature] = &[
    f1("cx16", Ecx, 13),
    fx("lahf_lm", 1, Ecx, 0),
    f1("popcnt", Ecx, 23),
    f1("pni", Ecx, 0),
    f1("sse4_1", Ecx, 19),
    f1("sse4_2", Ecx, 20),
    f1("ssse3", Ecx, 9),
];

/// What level 3 adds. (OSXSAVE is the guest's own CR4 bit.)
pub(super) const V3: &[Feature] = &[
    f1("avx", Ecx, 28),
    f7("avx2", Ebx, 5),
    f7("bmi1", Ebx, 3),
    f7("bmi2", Ebx, 8),
    f1("f16c", Ecx, 29),
    f1("fma", Ecx, 12),
    fx("abm", 1, Ecx, 5),
    f1("movbe", Ecx, 22),
    f1("xsave", Ecx, 26),
];

/// What protects a guest's kernel from its users, where the host has it: mitigations of speculation
/// flaws, supervisor-mode protections, and PCID, without which page table isolation is dear.
pub(super) const HARDENING: &[Feature] = &[
    f1("pcid", Ecx, 17),
    f7("smep", Ebx, 7),
    f7("invpcid", Ebx, 10),
    f7("smap", Ebx, 20),
    f7("umip", Ecx, 2),
    f7("md_clear", Edx, 10),
    f7("spec_ctrl", Edx, 26),
    f7("intel_stibp", Edx, 27),
    f7("flush_l1d", Edx, 28),
    f7("arch_capabilities", Edx, 29),
    f7("spec_ctrl_ssbd", Edx, 31),
    f7_2("intel_psfd", 0),
    f7_2("ipred_ctrl", 1),
    f7_2("rrsba_ctrl", 2),
    f7_2("ddpd_u", 3),
    f7_2("bhi_ctrl", 4),
    f7_2("mcdt_no", 5),
    fx("amd_ibpb", 8, Ebx, 12),
    fx("amd_ibrs", 8, Ebx, 14),
    fx("amd_stibp", 8, Ebx, 15),
    fx("ibrs_always_on", 8, Ebx, 16),
    fx("amd_stibp_always_on", 8, Ebx, 17),
    fx("ibrs_preferred", 8, Ebx, 18),
    fx("ibrs_same_mode", 8, Ebx, 19),
    fx("amd_ssbd", 8, Ebx, 24),
    fx("virt_ssbd", 8, Ebx, 25),
    fx("amd_ssb_no", 8, Ebx, 26),
    fx("amd_psfd", 8, Ebx, 28),
    fx("btc_no", 8, Ebx, 29),
    fx("amd_ibpb_ret", 8, Ebx, 30),
    fx("no_nested_data_bp", 0x21, Eax, 0),
    fx("lfence_rdtsc", 0x21, Eax, 2),
    fx("null_sel_clr_base", 0x21, Eax, 6),
    fx("autoibrs", 0x21, Eax, 8),
    fx("sbpb", 0x21, Eax, 27),
    fx("ibpb_brtype", 0x21, Eax, 28),
    fx("srso_no", 0x21, Eax, 29),
    fx("srso_user_kernel_no", 0x21, Eax, 30),
];

/// Of KVM's paravirtual interface (`Documentation/virt/kvm/x86/cpuid.rst`): the clock, accounting
/// and what spares exits. Not asynchronous page faults, whose tokens would have to be waited for
/// before a state can be saved.
pub(super) const PARAVIRTUAL: &[Feature] = &[
    pv("kvmclock_old", 0),
    pv("nop_io_delay", 1),
    pv("kvmclock", 3),
    pv("steal_time", 5),
    pv("pv_eoi", 6),
    pv("pv_unhalt", 7),
    pv("pv_tlb_flush", 9),
    pv("pv_send_ipi", 11),
    pv("poll_control", 12),
    pv("pv_sched_yield", 13),
    pv("kvmclock_stable", 24),
];

/// What Mica never gives, not even to `host`: nested virtualization, performance counters, MWAIT,
/// SGX, processor trace.
pub(super) const NEVER: &[Feature] = &[
    f1("dtes64", Ecx, 2),
    f1("monitor", Ecx, 3),
    f1("vmx", Ecx, 5),
    f1("pdcm", Ecx, 15),
    f1("dts", Edx, 21),
    f7("sgx", Ebx, 2),
    f7("intel_pt", Ebx, 25),
    f7("sgx_lc", Ecx, 30),
    fx("svm", 1, Ecx, 2),
    fx("ibs", 1, Ecx, 10),
    fx("perfctr_core", 1, Ecx, 23),
    fx("perfctr_nb", 1, Ecx, 24),
    fx("perfctr_llc", 1, Ecx, 28),
];

/// Bits that a table has whatever the engine says: what we state about topology, and what repeats
/// leaf 1.
pub(super) const GIVEN: &[&str] = &[HTT.name, CMP_LEGACY.name, TOPOEXT.name];
/// Several logical processors in the package.
pub(super) const HTT: Feature = f1("CPUID 0x1.0 Edx bit 28", Edx, 28);
/// AMD: and they are cores.
pub(super) const CMP_LEGACY: Feature = fx("CPUID 0x80000001.0 Ecx bit 1", 1, Ecx, 1);
/// AMD: leaves 0x8000001d and 0x8000001e exist.
pub(super) const TOPOEXT: Feature = fx("CPUID 0x80000001.0 Ecx bit 22", 1, Ecx, 22);

/// Where feature bits are.
pub(super) const WORDS: [(u32, u32, Register); 16] = [
    (1, 0, Ecx),
    (1, 0, Edx),
    (6, 0, Eax),
    (7, 0, Ebx),
    (7, 0, Ecx),
    (7, 0, Edx),
    (7, 1, Eax),
    (7, 2, Edx),
    (0xd, 0, Eax),
    (0xd, 1, Eax),
    (0x4000_0001, 0, Eax),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_0021, 0, Eax),
];
