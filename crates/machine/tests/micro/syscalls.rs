//! The fast ways into the kernel and back: SYSCALL, SYSENTER, and SWAPGS.

use iced_x86::code_asm::*;

use crate::engines::{AMD_KVM, EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The kernel's entry.
const ENTRY: u64 = Guest::CODE + 0x1000;

const IN_RING_3: &[(&str, &str)] = &[(EMULATED_KVM, "ring 3 runs on the host's tables")];
/// Where AMD's manual differs (APM 3, SYSENTER).
const AMD: &[(&str, &str)] = &[
    (EMULATED_KVM, "ring 3 runs on the host's tables"),
    (AMD_KVM, "the processor has no SYSENTER in long mode"),
];

/// Has SYSCALL and SYSRET lead between ring 0's 64-bit code and ring 3.
fn set_syscall(guest: &mut Guest) {
    // SDM 2B, SYSCALL and SYSRET: CS and SS from bits 47-32; CS + 16 and SS + 8 of bits 63-48.
    let star = u64::from(USER_CODE32) << 48 | u64::from(CODE64) << 32;
    guest.state.set_msr(STAR, star);
    guest.state.set_msr(LSTAR, ENTRY);
    guest.state.set_msr(SFMASK, FLAG_IF | FLAG_TF | 1);
}

#[test]
fn syscall_enters_ring_0_and_leaves_the_stack() {
    on_every_engine_but(IN_RING_3, |guest| {
        set_syscall(guest);
        guest.place(ENTRY, 64, |a| a.ud2());
        guest.set_gate64(UD, Guest::handler(UD), INTERRUPT_GATE, 1);
        guest.user_mode();
        guest.state.general.rflags |= FLAG_IF;
        let frame = guest.interrupted(|a| {
            a.stc()?;
            a.syscall()
        });
        assert_eq!((frame.vector, frame.rip), (UD, ENTRY));
        assert_eq!((frame.cs, frame.ss), (CODE64, DATA));
        assert_eq!(frame.rsp, Guest::USER_STACK);
        assert_eq!(frame.rflags & (FLAG_IF | 1), 0);
        let general = &guest.state.general;
        assert_eq!(general.rcx, guest.end);
        assert_eq!(general.r11, FLAG_ONE | FLAG_IF | 1);
    });
}

#[test]
fn sysret_goes_to_64_bit_code_of_ring_3() {
    on_every_engine(|guest| {
        set_syscall(guest);
        guest.place(Guest::USER, 64, |a| a.ud2());
        let frame = guest.interrupted(|a| {
            a.mov(rcx, Guest::USER)?;
            a.mov(r11, FLAG_ONE | FLAG_IF | 1)?;
            a.sysretq()
        });
        assert_eq!((frame.vector, frame.rip), (UD, Guest::USER));
        assert_eq!((frame.cs, frame.ss), (USER_CODE64, USER_DATA));
        assert_eq!(frame.rflags & (FLAG_IF | 1), FLAG_IF | 1);
        assert_eq!(frame.rsp, Guest::STACK);
    });
}

#[test]
fn sysret_without_rex_goes_to_32_bit_code() {
    on_every_engine_but(IN_RING_3, |guest| {
        set_syscall(guest);
        guest.place(Guest::USER, 32, |a| {
            a.mov(eax, 1)?;
            a.inc(eax)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            a.mov(rcx, Guest::USER)?;
            a.mov(r11, FLAG_ONE)?;
            a.sysret()
        });
        assert_eq!(
            (frame.vector, frame.cs, frame.ss),
            (UD, USER_CODE32, USER_DATA)
        );
        assert_eq!(guest.state.general.rax, 2);
    });
}

#[test]
fn without_efer_sce_syscall_is_an_invalid_opcode() {
    on_every_engine_but(IN_RING_3, |guest| {
        guest.state.special.efer &= !EFER_SCE;
        guest.user_mode();
        guest.fault(UD, None, |a| a.syscall());
    });
}

#[test]
fn sysret_is_ring_0_s() {
    on_every_engine(|guest| {
        set_syscall(guest);
        guest.user_mode();
        guest.fault(GP, 0, |a| a.sysretq());
    });
}

#[test]
fn sysret_to_a_non_canonical_address_faults_in_ring_0() {
    on_every_engine_but(
        &[
            (EMULATED_KVM, "ring 3 runs on the host's tables"),
            (AMD_KVM, "the fault comes in ring 3"),
        ],
        |guest| {
            set_syscall(guest);
            let frame = guest.fault(GP, 0, |a| {
                a.mov(rcx, 0x8000_0000_0000_u64)?;
                a.mov(r11, FLAG_ONE)?;
                a.sysretq()
            });
            assert_eq!(frame.cs, CODE64);
        },
    );
}

/// Has SYSENTER lead to the kernel's entry.
fn set_sysenter(guest: &mut Guest, code: u16) {
    guest.state.set_msr(SYSENTER_CS, code.into());
    guest
        .state
        .set_msr(SYSENTER_ESP, Guest::RING0_STACK - 0x100);
    guest.state.set_msr(SYSENTER_EIP, ENTRY);
}

#[test]
fn sysenter_enters_ring_0_with_the_stack_of_its_register() {
    on_every_engine_but(AMD, |guest| {
        set_sysenter(guest, CODE64);
        guest.place(ENTRY, 64, |a| a.ud2());
        guest.user_mode();
        guest.state.general.rflags |= FLAG_IF;
        let frame = guest.interrupted(|a| a.sysenter());
        assert_eq!((frame.vector, frame.rip), (UD, ENTRY));
        assert_eq!((frame.cs, frame.ss), (CODE64, DATA));
        assert_eq!(frame.rsp, Guest::RING0_STACK - 0x100);
        assert_eq!(frame.rflags & FLAG_IF, 0);
    });
}

#[test]
fn sysenter_from_32_bit_code() {
    on_every_engine(|guest| {
        guest.protected_mode();
        // Code, and the stack 8 behind it.
        guest.set_descriptor(FREE, 0, 0xf_ffff, CODE | BIG | GRANULAR);
        guest.set_descriptor(FREE + 8, 0, 0xf_ffff, WRITABLE | BIG | GRANULAR);
        set_sysenter(guest, FREE);
        guest.place(ENTRY, 32, |a| {
            a.mov(esi, esp)?;
            a.ud2()
        });
        guest.user_mode();
        let frame = guest.interrupted(|a| a.sysenter());
        assert_eq!((frame.vector, frame.cs), (UD, FREE));
        assert_eq!(guest.state.general.rsi, Guest::RING0_STACK - 0x100);
        assert_eq!(guest.state.special.ss.selector, FREE + 8);
    });
}

#[test]
fn a_null_sysenter_code_is_a_protection_fault() {
    on_every_engine_but(AMD, |guest| {
        set_sysenter(guest, 0);
        guest.user_mode();
        guest.fault(GP, 0, |a| a.sysenter());
    });
}

#[test]
fn sysexit_goes_to_ring_3() {
    on_every_engine_but(&AMD[1..], |guest| {
        // SDM 2B, SYSEXIT: 64-bit code is CS + 32, the stack CS + 40.
        set_sysenter(guest, CODE64);
        guest.place(Guest::USER, 64, |a| a.ud2());
        let frame = guest.interrupted(|a| {
            a.mov(rdx, Guest::USER)?;
            a.mov(rcx, Guest::USER_STACK)?;
            a.sysexitq()
        });
        assert_eq!(
            (frame.vector, frame.rip, frame.rsp),
            (UD, Guest::USER, Guest::USER_STACK)
        );
        assert_eq!((frame.cs, frame.ss), (USER_CODE64, (CODE64 + 40) | 3));
    });
}

#[test]
fn swapgs_exchanges_the_bases() {
    on_every_engine(|guest| {
        guest.state.special.gs.base = 0x1234_5678_9abc;
        guest.state.set_msr(KERNEL_GS_BASE, Guest::SCRATCH);
        guest.write(Guest::SCRATCH + 8, 0x1234_5678_u32);
        guest.finish(|a| {
            a.swapgs()?;
            a.mov(ebx, dword_ptr(8).gs())?;
            a.mov(ecx, KERNEL_GS_BASE)?;
            a.rdmsr()?;
            a.mov(esi, eax)?;
            a.mov(ecx, GS_BASE)?;
            a.rdmsr()
        });
        let general = &guest.state.general;
        assert_eq!(general.rbx, 0x1234_5678);
        assert_eq!(general.rsi, 0x5678_9abc);
        assert_eq!(general.rax, Guest::SCRATCH);
    });
}

#[test]
fn swapgs_is_ring_0_s_and_64_bit_code_s() {
    on_every_engine(|guest| {
        guest.user_mode();
        guest.fault(GP, 0, |a| a.swapgs());
    });
    on_every_engine_but(&[(EMULATED_KVM, "it has SWAPGS everywhere")], |guest| {
        guest.protected_mode();
        guest.fault(UD, None, |a| a.db(&[0x0f, 0x01, 0xf8]));
    });
}

#[test]
fn a_fault_of_32_bit_code_in_long_mode_has_a_frame_of_64_bits() {
    on_every_engine(|guest| {
        guest.compatibility_mode();
        let frame = guest.fault(UD, None, |a| {
            a.mov(eax, 1)?;
            a.inc(eax)?;
            a.ud2()
        });
        assert_eq!((frame.cs, frame.ss), (USER_CODE32, USER_DATA));
        assert_eq!(guest.state.general.rsp, Guest::RING0_STACK - 5 * 8);
        assert_eq!(guest.state.special.cs.selector, CODE64);
        assert_eq!(guest.state.general.rax, 2);
    });
}
