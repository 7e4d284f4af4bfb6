//! Which instructions are generated: everything of the profile that a user program may execute,
//! without what leaves the process, differs from run to run, or reads what the processors do not
//! share.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// One kind of instruction.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) code: Code,
    pub(crate) operands: Vec<OpCodeOperandKind>,
}

/// All instructions, and how many were left out because the host does not have them.
pub(crate) fn catalogue() -> (Vec<Entry>, usize) {
    let all: Vec<Code> = Code::values().filter(|&code| belongs(code)).collect();
    let entries: Vec<Entry> = all
        .iter()
        .filter(|code| {
            code.cpuid_features()
                .iter()
                .all(|&feature| host_has(feature))
        })
        .map(|&code| Entry {
            code,
            operands: code.op_code().op_kinds().to_vec(),
        })
        .collect();
    let missing = all.len() - entries.len();
    (entries, missing)
}

fn belongs(code: Code) -> bool {
    let info = code.op_code();
    info.is_instruction()
        && info.encoding() == EncodingKind::Legacy
        && info.mode64()
        && info.long_mode()
        && info.cpl3()
        && info.intel_decoder64()
        && info.amd_decoder64()
        && info.decoder_option() == 0
        && !info.is_input_output()
        && !info.is_privileged()
        && !info.is_reserved_nop()
        && code
            .cpuid_features()
            .iter()
            .all(|&feature| in_profile(feature))
        && !info.op_kinds().iter().any(|&kind| excluded_operand(kind))
        && !excluded(code.mnemonic())
        && !excluded_code(code)
}

fn in_profile(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CMPXCHG16B
            | F::CX8
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::POPCNT
            | F::CLFSH
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
    )
}

fn host_has(feature: CpuidFeature) -> bool {
    match feature {
        CpuidFeature::SSE3 => std::is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        CpuidFeature::POPCNT => std::is_x86_feature_detected!("popcnt"),
        CpuidFeature::CMPXCHG16B => std::is_x86_feature_detected!("cmpxchg16b"),
        _ => true,
    }
}

fn excluded_operand(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::farbr2_2 | K::farbr4_2 | K::cr_reg | K::dr_reg | K::tr_reg | K::mem_mpx
    )
}

fn excluded(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    // Into the kernel, or by its leave.
    let kernel = matches!(
        mnemonic,
        M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysret
            | M::Int
            | M::Int1
            | M::Int3
            | M::Into
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Retf
            | M::Hlt
            | M::In
            | M::Out
            | M::Cli
            | M::Sti
            | M::Swapgs
            | M::Monitor
            | M::Mwait
    );
    // Descriptor tables, machine status: the host's differ, or UMIP hides them.
    let tables = matches!(
        mnemonic,
        M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lmsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Lss
            | M::Lfs
            | M::Lgs
    );
    // Time, identity, and the last x87 instruction's addresses, which processors keep differently.
    let own = matches!(
        mnemonic,
        M::Rdtsc
            | M::Rdtscp
            | M::Cpuid
            | M::Rdpmc
            | M::Xgetbv
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
    );
    kernel || tables || own
}

/// Loads of segment registers, and far transfers through memory.
fn excluded_code(code: Code) -> bool {
    use OpCodeOperandKind as K;
    let info = code.op_code();
    let loads_segment = matches!(code.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
        && matches!(
            info.op0_kind(),
            K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs
        );
    let far = matches!(
        code,
        Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
    );
    // BSWAP of 16 bits is undefined.
    // How many bytes it reads differs between vendors.
    let vendors_own = matches!(code, Code::Movsxd_r16_rm16 | Code::Bswap_r16);
    loads_segment || far || vendors_own
}
