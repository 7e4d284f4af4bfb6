//! Privileged instructions: control registers, model-specific registers, and who may use them.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;

const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SYSENTER_ESP: u32 = 0x175;
const PAT: u32 = 0x277;
const CR4_UMIP: u64 = 1 << 11;

/// Writes a model-specific register.
fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Assembled {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Reads one.
fn rdmsr(a: &mut CodeAssembler, index: u32) -> Assembled {
    a.mov(ecx, index)?;
    a.rdmsr()
}

#[test]
fn registers_keep_what_is_written() {
    let values = [
        (STAR, 0x0018_0008_0000_1234),
        (LSTAR, 0xffff_8000_0000_1234),
        (SFMASK, 0x4_7700),
        (FS_BASE, 0x1234_5678_9abc),
        (KERNEL_GS_BASE, 0xffff_ffff_8000_0000),
        (SYSENTER_ESP, 0x1234_5678),
        (PAT, 0x0007_0406_0007_0406),
    ];
    for (index, value) in values {
        on_every_engine(|guest| {
            guest.finish(|a| {
                wrmsr(a, index, value)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                rdmsr(a, index)
            });
            let general = &guest.state.general;
            assert_eq!(general.rdx << 32 | general.rax, value, "{index:#x}");
        });
    }
}

#[test]
fn impossible_values_of_registers_are_refused() {
    let values = [
        // Addresses that are not canonical.
        (LSTAR, 0x8000_0000_0000),
        (FS_BASE, 0x8000_0000_0000),
        (KERNEL_GS_BASE, 0x8000_0000_0000),
        // SDM 3A, 2.2.1: reserved bits, and LME cannot change while paging is on.
        (EFER, 0xd01 | 1 << 20),
        (EFER, 0x801),
    ];
    for (index, value) in values {
        on_every_engine(|guest| {
            println!("{value:#x} to {index:#x}");
            guest.fault(GP, 0, |a| wrmsr(a, index, value));
        });
    }
}

#[test]
fn a_reserved_memory_type_is_refused() {
    on_every_engine_but(&[(EMULATED_KVM, "it takes any")], |guest| {
        // SDM 3A, 11.12.2: type 2.
        guest.fault(GP, 0, |a| wrmsr(a, PAT, 2));
    });
}

#[test]
fn the_base_of_fs_is_its_register() {
    on_every_engine(|guest| {
        guest.write(Guest::SCRATCH + 8, 0x1234_5678_u32);
        guest.finish(|a| {
            wrmsr(a, FS_BASE, Guest::SCRATCH)?;
            a.mov(ebx, dword_ptr(8).fs())
        });
        assert_eq!(guest.state.general.rbx, 0x1234_5678);
    });
}

#[test]
fn efer_says_that_long_mode_is_active() {
    on_every_engine(|guest| {
        guest.finish(|a| rdmsr(a, EFER));
        assert_eq!(guest.state.general.rax & 0xd01, 0xd01);
    });
}

#[test]
fn an_unknown_register_is_a_protection_fault() {
    on_every_engine(|guest| {
        guest.fault(GP, 0, |a| rdmsr(a, 0x1234_5678));
    });
    on_every_engine(|guest| {
        guest.fault(GP, 0, |a| wrmsr(a, 0x1234_5678, 0));
    });
}

#[test]
fn impossible_values_of_control_registers_are_refused() {
    // SDM 3A, 2.5, and 2B, MOV to control registers.
    let cases: [(&str, u64, &[u8]); 5] = [
        (
            "CR0 with PG and without PE",
            0x8000_0020,
            &[0x0f, 0x22, 0xc0],
        ),
        (
            "CR0 with NW and without CD",
            0xa000_0021,
            &[0x0f, 0x22, 0xc0],
        ),
        ("CR4 without PAE in long mode", 0, &[0x0f, 0x22, 0xe0]),
        (
            "CR4 with a reserved bit",
            1 << 31 | CR4_PAE,
            &[0x0f, 0x22, 0xe0],
        ),
        ("CR8 of 16", 16, &[0x44, 0x0f, 0x22, 0xc0]),
    ];
    for (what, value, code) in cases {
        on_every_engine(|guest| {
            println!("{what}");
            guest.fault(GP, 0, |a| {
                a.mov(rax, value)?;
                a.db(code)
            });
        });
    }
}

#[test]
fn the_upper_half_of_cr0_is_reserved() {
    on_every_engine_but(&[(EMULATED_KVM, "it ignores the upper half")], |guest| {
        guest.fault(GP, 0, |a| {
            a.mov(rax, cr0)?;
            a.bts(rax, 32)?;
            a.mov(cr0, rax)
        });
    });
}

#[test]
fn a_control_register_that_does_not_exist_is_an_invalid_opcode() {
    on_every_engine(|guest| {
        // mov cr1, rax
        guest.fault(UD, None, |a| a.db(&[0x0f, 0x22, 0xc8]));
    });
}

#[test]
fn ring_3_may_not_use_what_is_privileged() {
    let codes: [(&str, &[u8]); 14] = [
        ("hlt", &[0xf4]),
        ("cli", &[0xfa]),
        ("sti", &[0xfb]),
        ("mov rax, cr0", &[0x0f, 0x20, 0xc0]),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
        ("clts", &[0x0f, 0x06]),
        ("lmsw ax", &[0x0f, 0x01, 0xf0]),
        ("lgdt [rsp]", &[0x0f, 0x01, 0x14, 0x24]),
        ("lidt [rsp]", &[0x0f, 0x01, 0x1c, 0x24]),
        ("ltr ax", &[0x0f, 0x00, 0xd8]),
        ("lldt ax", &[0x0f, 0x00, 0xd0]),
        ("invlpg [rsp]", &[0x0f, 0x01, 0x3c, 0x24]),
        ("rdmsr", &[0x0f, 0x32]),
        ("wbinvd", &[0x0f, 0x09]),
    ];
    for (what, code) in codes {
        on_every_engine(|guest| {
            println!("{what}");
            guest.user_mode();
            guest.state.general.rsp = Guest::USER_STACK - 0x40;
            guest.fault(GP, 0, |a| a.db(code));
        });
    }
}

#[test]
fn umip_keeps_table_addresses_from_ring_3() {
    // SDM 3A, 2.5, CR4.UMIP: sgdt, sidt, smsw, str, sldt.
    let codes: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x04, 0x24],
        &[0x0f, 0x01, 0x0c, 0x24],
        &[0x0f, 0x01, 0xe0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x00, 0xc0],
    ];
    for code in codes {
        on_every_engine(|guest| {
            // SDM 2A, CPUID: 7, ECX bit 2.
            guest.finish(|a| {
                a.mov(eax, 7)?;
                a.xor(ecx, ecx)?;
                a.cpuid()
            });
            guest.user_mode();
            guest.state.general.rsp = Guest::USER_STACK - 0x40;
            if guest.state.general.rcx & 4 == 0 {
                println!("it has no UMIP");
                return;
            }
            guest.state.special.cr4 |= CR4_UMIP;
            guest.fault(GP, 0, |a| a.db(code));
        });
    }
}

#[test]
fn ring_3_s_popf_leaves_interrupt_flag_and_iopl() {
    on_every_engine(|guest| {
        guest.user_mode();
        guest.state.general.rflags |= FLAG_IF;
        // SDM 2B, POPF, table 4-15.
        let frame = guest.fault(UD, None, |a| {
            a.push(3 << 12 | 1)?;
            a.popfq()?;
            a.ud2()
        });
        assert_eq!(frame.rflags & (FLAG_IF | 3 << 12 | 1), FLAG_IF | 1);
    });
}

#[test]
fn with_an_iopl_of_3_ring_3_changes_the_interrupt_flag() {
    on_every_engine_but(
        &[(EMULATED_KVM, "ring 3 runs on the host's tables")],
        |guest| {
            guest.user_mode();
            guest.state.general.rflags |= FLAG_IF | 3 << 12;
            let frame = guest.fault(UD, None, |a| {
                a.cli()?;
                a.ud2()
            });
            assert_eq!(frame.rflags & FLAG_IF, 0);
        },
    );
}

#[test]
fn clts_and_lmsw_change_cr0() {
    on_every_engine(|guest| {
        guest.state.special.cr0 |= 1 << 3;
        guest.finish(|a| {
            a.clts()?;
            a.mov(rbx, cr0)?;
            // SDM 2A, LMSW: sets TS; cannot clear PE.
            a.mov(eax, 8)?;
            a.lmsw(ax)?;
            a.smsw(rcx)
        });
        assert_eq!(guest.state.general.rbx & 8, 0);
        assert_eq!(guest.state.general.rcx & 9, 9);
    });
}

#[test]
fn cpuid_answers_beyond_its_last_leaf_and_has_what_long_mode_needs() {
    on_every_engine(|guest| {
        guest.finish(|a| {
            a.mov(rax, u64::MAX)?;
            a.mov(eax, 0x8000_0001u32)?;
            a.cpuid()?;
            a.mov(esi, edx)?;
            a.mov(eax, 1)?;
            a.cpuid()
        });
        let general = &guest.state.general;
        // Long mode and SYSCALL; MSR, PAE, CX8, APIC. The upper halves are cleared.
        assert_eq!(general.rsi & (1 << 29 | 1 << 11), 1 << 29 | 1 << 11);
        let basic = 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9;
        assert_eq!(general.rdx & basic, basic);
        assert_eq!(general.rax >> 32, 0);
    });
}

#[test]
fn the_time_stamp_counter_is_denied_to_ring_3_by_cr4() {
    on_every_engine_but(
        &[(EMULATED_KVM, "ring 3 runs on the host's tables")],
        |guest| {
            guest.user_mode();
            guest.state.special.cr4 |= 1 << 2;
            guest.fault(GP, 0, |a| a.rdtsc());
        },
    );
}
