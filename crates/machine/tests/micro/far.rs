//! Far calls, jumps and returns: between code segments, rings and through call gates.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// Ring 3 of 32-bit code.
const RING_3: &[(&str, &str)] = &[(EMULATED_KVM, "ring 3 runs on the host's tables")];
/// Where the callee is.
const CALLEE: u64 = Guest::CODE + 0x1000;
const USER_CALLEE: u64 = Guest::USER + 0x1000;

#[test]
fn a_far_call_pushes_where_it_came_from_and_a_far_return_goes_there() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, 0, 0xf_ffff, CODE | BIG | GRANULAR);
        guest.place(CALLEE, 32, |a| {
            a.mov(ebx, cs)?;
            a.mov(ecx, dword_ptr(esp))?;
            a.mov(edx, dword_ptr(esp + 4))?;
            a.retf_1(8)
        });
        guest.finish(|a| {
            a.push(1)?;
            a.push(2)?;
            a.call_far(FREE, CALLEE as u32)?;
            a.mov(esi, esp)
        });
        let general = &guest.state.general;
        assert_eq!(general.rbx as u16, FREE);
        assert_eq!(general.rcx, guest.last);
        assert_eq!(general.rdx as u16, CODE32);
        assert_eq!(general.rsi, Guest::STACK);
        assert_eq!(guest.state.special.cs.selector, CODE32);
    });
}

#[test]
fn a_far_jump_wants_code_of_its_own_ring() {
    let selectors = [(DATA, DATA), (USER_CODE32, USER_CODE32 & !3), (0, 0)];
    for (selector, named) in selectors {
        on_every_engine(|guest| {
            guest.protected_mode();
            guest.fault(GP, u32::from(named), |a| a.jmp_far(selector, CALLEE as u32));
        });
    }
}

#[test]
fn conforming_code_runs_in_the_caller_s_ring() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.user_mode();
        guest.set_descriptor(FREE, 0, 0xf_ffff, CONFORMING | BIG | GRANULAR);
        guest.place(USER_CALLEE, 32, |a| a.ud2());
        let frame = guest.interrupted(|a| a.call_far(FREE, USER_CALLEE as u32));
        assert_eq!((frame.vector, frame.cs), (UD, FREE | 3));
    });
}

/// A gate to ring 0 that copies parameters.
fn call_gate(guest: &mut Guest, attributes: u32, parameters: u8) {
    let gate = gate(CODE32, CALLEE as u32, attributes, parameters);
    guest.write(Guest::slot(FREE), gate);
}

#[test]
fn a_call_gate_changes_ring_and_stack_and_copies_parameters() {
    on_every_engine_but(RING_3, |guest| {
        guest.protected_mode();
        call_gate(guest, CALL_GATE | DPL3, 2);
        guest.place(CALLEE, 32, |a| {
            a.mov(esi, esp)?;
            a.mov(ebx, cs)?;
            a.mov(ecx, dword_ptr(esp + 8))?;
            a.mov(edx, dword_ptr(esp + 12))?;
            // SDM 3A, figure 5-14: the caller's stack is above the parameters.
            a.mov(edi, dword_ptr(esp + 16))?;
            a.retf_1(8)
        });
        guest.user_mode();
        let frame = guest.interrupted(|a| {
            a.push(1)?;
            a.push(2)?;
            a.call_far(FREE | 3, 0)?;
            a.ud2()
        });
        assert_eq!(
            (frame.vector, frame.cs, frame.rip),
            (UD, USER_CODE32, guest.last)
        );
        assert_eq!((frame.rsp, frame.ss), (Guest::USER_STACK, USER_DATA));
        let general = &guest.state.general;
        assert_eq!(general.rsi, Guest::RING0_STACK - 6 * 4);
        assert_eq!(general.rbx as u16, CODE32);
        assert_eq!((general.rcx, general.rdx), (2, 1));
        assert_eq!(general.rdi, Guest::USER_STACK - 8);
    });
}

#[test]
fn a_call_gate_of_ring_0_is_not_for_ring_3() {
    on_every_engine_but(RING_3, |guest| {
        guest.protected_mode();
        call_gate(guest, CALL_GATE, 0);
        guest.user_mode();
        guest.fault(GP, u32::from(FREE), |a| a.call_far(FREE | 3, 0));
    });
}

#[test]
fn an_absent_call_gate_says_so() {
    on_every_engine_but(RING_3, |guest| {
        guest.protected_mode();
        call_gate(guest, CALL_GATE & !PRESENT | DPL3, 0);
        guest.user_mode();
        guest.fault(NP, u32::from(FREE), |a| a.call_far(FREE | 3, 0));
    });
}

#[test]
fn a_jump_through_a_call_gate_stays_in_its_ring() {
    on_every_engine_but(RING_3, |guest| {
        guest.protected_mode();
        call_gate(guest, CALL_GATE | DPL3, 0);
        guest.user_mode();
        // SDM 3A, 5.8.3: a jump cannot lead to more privileged code that does not conform.
        guest.fault(GP, u32::from(CODE32), |a| a.jmp_far(FREE | 3, 0));
    });
}

#[test]
fn a_call_gate_of_long_mode_pushes_eight_bytes_each() {
    on_every_engine_but(
        &[(EMULATED_KVM, "ring 3 runs on the host's tables")],
        |guest| {
            guest.write(
                Guest::slot(FREE),
                gate(CODE64, CALLEE as u32, CALL_GATE | DPL3, 0),
            );
            guest.write(Guest::slot(FREE) + 8, 0_u64);
            guest.place(CALLEE, 64, |a| {
                a.mov(rsi, rsp)?;
                a.mov(ebx, ss)?;
                // retfq
                a.db(&[0x48, 0xcb])
            });
            guest.user_mode();
            let pointer = Guest::USER + 0x1000;
            guest.write(pointer + 4, FREE | 3);
            let frame = guest.interrupted(|a| {
                a.mov(rdi, pointer)?;
                a.call(fword_ptr(rdi))?;
                a.ud2()
            });
            assert_eq!(
                (frame.vector, frame.cs, frame.rip),
                (UD, USER_CODE64, guest.last)
            );
            assert_eq!((frame.rsp, frame.ss), (Guest::USER_STACK, USER_DATA));
            assert_eq!(guest.state.general.rsi, Guest::RING0_STACK - 4 * 8);
            assert_eq!(guest.state.general.rbx, 0);
        },
    );
}

#[test]
fn a_far_return_goes_to_ring_3() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.place(Guest::USER, 32, |a| {
            a.mov(eax, ds)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            a.push(i32::from(USER_DATA))?;
            a.push(Guest::USER_STACK as i32)?;
            a.push(i32::from(USER_CODE32))?;
            a.push(Guest::USER as i32)?;
            a.retf()
        });
        assert_eq!(
            (frame.vector, frame.cs, frame.ss),
            (UD, USER_CODE32, USER_DATA)
        );
        assert_eq!(frame.rsp, Guest::USER_STACK);
        // SDM 2B, RET: DS was of ring 0.
        assert_eq!(guest.state.general.rax & 0xffff, 0);
    });
}

#[test]
fn a_far_return_to_a_more_privileged_ring_is_refused() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.user_mode();
        guest.fault(GP, u32::from(CODE32), |a| {
            a.push(i32::from(CODE32))?;
            a.push(CALLEE as i32)?;
            a.retf()
        });
    });
}

#[test]
fn a_code_segment_ends_at_its_limit() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, 0, 0x1fff, CODE | BIG);
        // SDM 2A, JMP: the target is checked before anything changes.
        guest.fault(GP, 0, |a| a.jmp_far(FREE, 0x2000));
    });
}

#[test]
fn a_jump_through_memory_changes_to_compatibility_mode_and_back() {
    on_every_engine(|guest| {
        let there = CALLEE;
        guest.write(Guest::SCRATCH, there as u32);
        guest.write(Guest::SCRATCH + 4, CODE32);
        guest.write(Guest::SCRATCH + 8, Guest::CODE as u32 + 0x800);
        guest.write(Guest::SCRATCH + 12, CODE64);
        guest.place(there, 32, |a| {
            // In 64-bit code this is a prefix: there EAX would not change.
            a.mov(eax, 1)?;
            a.inc(eax)?;
            a.jmp(fword_ptr(Guest::SCRATCH as u32 + 8))
        });
        guest.place(Guest::CODE + 0x800, 64, |a| {
            a.mov(rbx, 0x1234_5678_9abc_def0_u64)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            a.mov(rdi, Guest::SCRATCH)?;
            a.jmp(fword_ptr(rdi))
        });
        assert_eq!((frame.vector, frame.cs), (UD, CODE64));
        assert_eq!(guest.state.general.rax, 2);
        assert_eq!(guest.state.general.rbx, 0x1234_5678_9abc_def0);
    });
}
