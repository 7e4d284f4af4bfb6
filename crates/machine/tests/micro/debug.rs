//! Debug exceptions: single steps, INT1, breakpoints on instructions, data and debug registers.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

const NO_BREAKPOINTS: &[(&str, &str)] = &[(EMULATED_KVM, "it has no data breakpoints in ring 0")];
const ONE_STEP: &[(&str, &str)] = &[(EMULATED_KVM, "a repeated instruction is one step")];
/// DR6 (SDM 3B, 17.2.3).
const SINGLE_STEP: u64 = 1 << 14;
const GENERAL_DETECT: u64 = 1 << 13;
/// What of it always reads as one.
const DR6_ONES: u64 = 0xffff_0ff0;

/// Sets the trap flag.
fn set_trap_flag(a: &mut CodeAssembler) -> Assembled {
    a.pushfq()?;
    a.bts(qword_ptr(rsp), 8)?;
    a.popfq()
}

#[test]
fn a_single_step_traps_after_the_next_instruction() {
    on_every_engine(|guest| {
        let frame = guest.trap(DB, |a| {
            set_trap_flag(a)?;
            a.inc(ebx)
        });
        assert_eq!(guest.state.general.rbx, 1);
        assert_eq!(frame.rflags & FLAG_TF, FLAG_TF);
        assert_eq!(guest.state.general.rflags & FLAG_TF, 0);
        assert_eq!(guest.state.debug.dr6, DR6_ONES | SINGLE_STEP);
    });
}

#[test]
fn a_single_step_waits_for_the_instruction_after_mov_ss() {
    on_every_engine_but(&[(EMULATED_KVM, "the step is not held back")], |guest| {
        // SDM 3A, 6.8.3.
        let frame = guest.trap(DB, |a| {
            a.mov(ecx, i32::from(DATA))?;
            set_trap_flag(a)?;
            a.mov(ss, ecx)?;
            a.mov(rsp, Guest::STACK - 0x100)
        });
        assert_eq!(frame.rsp, Guest::STACK - 0x100);
    });
}

#[test]
fn each_iteration_of_a_repeated_instruction_is_a_step() {
    on_every_engine_but(ONE_STEP, |guest| {
        // SDM 3B, 17.3.1.4.
        let frame = guest.interrupted(|a| {
            a.mov(ecx, 3)?;
            a.mov(edi, Guest::SCRATCH as i32)?;
            set_trap_flag(a)?;
            a.rep().stosb()
        });
        assert_eq!((frame.vector, frame.rip), (DB, guest.last));
        assert_eq!(guest.state.general.rcx, 2);
    });
}

#[test]
fn user_code_is_stepped_too() {
    on_every_engine(|guest| {
        guest.user_mode();
        let frame = guest.trap(DB, |a| {
            set_trap_flag(a)?;
            a.inc(ebx)
        });
        assert_eq!((frame.cs, guest.state.general.rbx), (USER_CODE64, 1));
    });
}

#[test]
fn int1_is_a_debug_exception_that_leaves_dr6() {
    on_every_engine(|guest| {
        guest.state.debug.dr6 = DR6_ONES;
        guest.trap(DB, |a| a.int1());
        assert_eq!(guest.state.debug.dr6, DR6_ONES);
    });
}

#[test]
fn an_instruction_breakpoint_faults_and_rf_passes_it() {
    on_every_engine_but(&NO_BREAKPOINTS[1..], |guest| {
        let at = Guest::CODE + 0x100;
        guest.place(at, 64, |a| a.ud2());
        guest.state.debug.addresses = [at, 0, 0, 0];
        guest.state.debug.dr7 = 0x402;
        let frame = guest.interrupted(|a| {
            a.mov(rbx, at)?;
            a.jmp(rbx)
        });
        assert_eq!((frame.vector, frame.rip), (DB, at));
        assert_eq!(guest.state.debug.dr6, DR6_ONES | 1);
        // SDM 3B, 17.3.1.1: with RF the instruction runs.
        guest.state.general.rip = at;
        guest.state.general.rflags |= FLAG_RF;
        let Stop::Exception(frame) = guest.go() else {
            panic!("no exception");
        };
        assert_eq!((frame.vector, frame.rip), (UD, at));
    });
}

#[test]
fn a_data_breakpoint_traps_after_a_write_to_its_bytes() {
    on_every_engine_but(NO_BREAKPOINTS, |guest| {
        guest.state.debug.addresses = [0, Guest::SCRATCH + 4, 0, 0];
        // DR1: writes of 4 bytes.
        guest.state.debug.dr7 = 0x400 | 1 << 3 | 0xd << 20;
        guest.trap(DB, |a| {
            a.mov(eax, dword_ptr(Guest::SCRATCH + 4))?;
            a.mov(dword_ptr(Guest::SCRATCH), eax)?;
            a.mov(dword_ptr(Guest::SCRATCH + 8), eax)?;
            a.mov(byte_ptr(Guest::SCRATCH + 7), al)
        });
        assert_eq!(guest.state.debug.dr6, DR6_ONES | 2);
    });
}

#[test]
fn a_protected_debug_register_faults_before_it_is_used() {
    on_every_engine(|guest| {
        // SDM 3B, 17.2.4: DR7.GD, cleared for the handler.
        guest.state.debug.dr7 = 0x400 | 1 << 13;
        guest.fault(DB, None, |a| a.mov(rax, dr0));
        assert_eq!(guest.state.debug.dr6, DR6_ONES | GENERAL_DETECT);
        assert_eq!(guest.state.debug.dr7, 0x400);
    });
}

#[test]
fn upper_halves_of_dr6_and_dr7_are_refused() {
    on_every_engine(|guest| {
        guest.fault(GP, 0, |a| {
            a.mov(rax, 1_u64 << 32)?;
            a.mov(dr7, rax)
        });
    });
}

#[test]
fn debug_registers_keep_what_is_written() {
    on_every_engine(|guest| {
        guest.finish(|a| {
            a.mov(rax, 0x1234_5678_9abc_u64)?;
            a.mov(dr0, rax)?;
            a.mov(dr3, rax)?;
            a.mov(rbx, dr0)?;
            a.mov(rcx, dr3)
        });
        let general = &guest.state.general;
        assert_eq!([general.rbx, general.rcx], [0x1234_5678_9abc; 2]);
    });
}

#[test]
fn debug_registers_are_ring_0_s() {
    on_every_engine(|guest| {
        guest.user_mode();
        guest.fault(GP, 0, |a| a.mov(rax, dr0));
    });
}
