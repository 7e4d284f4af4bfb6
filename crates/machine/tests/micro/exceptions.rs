//! Faults, traps and aborts: vector, error code, and the RIP and flags that are saved.

use iced_x86::code_asm::*;

use crate::engines::{AMD_KVM, EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// Not canonical with 48 address bits.
const NON_CANONICAL: u64 = 0x8000_0000_0000;

#[test]
fn a_division_by_zero_is_a_fault() {
    on_every_engine(|guest| {
        // SDM 3A, 6.15, interrupt 0: a fault without an error code. 18.3.1.1: RF is set in the saved
        // flags of a fault.
        let frame = guest.fault(DE, None, |a| {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        });
        assert_eq!(frame.cs, CODE64);
        assert_eq!(frame.ss, DATA);
        assert_eq!(frame.rsp, Guest::STACK);
        assert_eq!(frame.rflags & FLAG_RF, FLAG_RF);
    });
}

#[test]
fn a_quotient_that_does_not_fit_is_the_same_fault() {
    on_every_engine(|guest| {
        // SDM 2A, IDIV: 0x80000000 / -1 is too large for 32 bits.
        guest.fault(DE, None, |a| {
            a.mov(eax, 0x8000_0000u32)?;
            a.cdq()?;
            a.mov(ecx, -1)?;
            a.idiv(ecx)
        });
    });
}

#[test]
fn an_invalid_opcode_is_a_fault() {
    on_every_engine(|guest| {
        let frame = guest.fault(UD, None, |a| a.ud2());
        assert_eq!(frame.rflags & FLAG_RF, FLAG_RF);
    });
}

#[test]
fn lock_on_a_register_is_an_invalid_opcode() {
    on_every_engine(|guest| {
        // SDM 2A, LOCK: #UD if the destination is no memory operand.
        guest.fault(UD, None, |a| a.db(&[0xf0, 0x01, 0xc8]));
    });
}

#[test]
fn instructions_that_long_mode_has_not_are_invalid() {
    // push es, into, aaa, lds (the encoding is VEX's then, without its second half), far call
    let gone: [&[u8]; 4] = [&[0x06], &[0xce], &[0x37], &[0x9a, 0, 0, 0, 0, 8, 0]];
    for code in gone {
        on_every_engine(|guest| {
            guest.fault(UD, None, |a| a.db(code));
        });
    }
}

#[test]
fn a_breakpoint_is_a_trap() {
    on_every_engine(|guest| {
        let frame = guest.trap(BP, |a| a.int3());
        assert_eq!(frame.error, None);
        assert_eq!(frame.rflags & FLAG_RF, 0);
    });
}

#[test]
fn into_traps_when_the_overflow_flag_is_set() {
    on_every_engine(|guest| {
        guest.protected_mode();
        let frame = guest.trap(OF, |a| {
            a.into()?;
            a.mov(eax, 0x7fff_ffff)?;
            a.inc(eax)?;
            a.into()
        });
        assert_eq!(frame.error, None);
    });
}

#[test]
fn bound_faults_outside_its_bounds() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.write(Guest::SCRATCH, [1_u32, 5]);
        // SDM 2A, BOUND: within the bounds, ends included, nothing happens.
        guest.fault(BR, None, |a| {
            for index in [1, 5] {
                a.mov(eax, index)?;
                a.bound(eax, qword_ptr(Guest::SCRATCH as u32))?;
            }
            a.mov(eax, 6)?;
            a.bound(eax, qword_ptr(Guest::SCRATCH as u32))
        });
    });
}

#[test]
fn a_non_canonical_address_is_a_protection_fault() {
    on_every_engine(|guest| {
        guest.fault(GP, 0, |a| {
            a.mov(rbx, NON_CANONICAL)?;
            a.mov(rax, qword_ptr(rbx))
        });
    });
}

#[test]
fn a_non_canonical_stack_is_a_stack_fault() {
    on_every_engine(|guest| {
        // SDM 3A, 6.15, interrupt 12. The frame needs a stack of its own.
        guest.set_gate64(SS, Guest::handler(SS), INTERRUPT_GATE, 1);
        let frame = guest.fault(SS, 0, |a| {
            a.mov(rsp, NON_CANONICAL + 0x100)?;
            a.push(rax)
        });
        assert_eq!(frame.rsp, NON_CANONICAL + 0x100);
    });
}

#[test]
fn an_access_by_rbp_is_one_to_the_stack_segment() {
    on_every_engine(|guest| {
        guest.fault(SS, 0, |a| {
            a.mov(rbp, NON_CANONICAL)?;
            a.mov(rax, qword_ptr(rbp))
        });
    });
}

#[test]
fn a_jump_to_a_non_canonical_address_faults_at_the_jump() {
    on_every_engine_but(&[(AMD_KVM, "the fault comes at the target")], |guest| {
        guest.fault(GP, 0, |a| {
            a.mov(rbx, NON_CANONICAL)?;
            a.jmp(rbx)
        });
    });
}

#[test]
fn a_selector_beyond_the_table_is_named_in_the_error_code() {
    on_every_engine(|guest| {
        // SDM 3A, 6.13: the selector without its RPL; TI is bit 2.
        guest.fault(GP, 0x100, |a| {
            a.mov(eax, 0x103)?;
            a.mov(ds, eax)
        });
    });
}

#[test]
fn a_selector_of_an_absent_ldt_names_the_ldt() {
    on_every_engine(|guest| {
        guest.state.special.ldt.selector = 0;
        guest.state.special.ldt.attributes = 1 << 16;
        guest.fault(GP, 0xc, |a| {
            a.mov(eax, 0xc)?;
            a.mov(es, eax)
        });
    });
}

#[test]
fn an_absent_data_segment_is_a_fault_of_its_own() {
    on_every_engine(|guest| {
        guest.set_descriptor(FREE, 0, 0xffff, WRITABLE & !PRESENT);
        guest.fault(NP, u32::from(FREE), |a| {
            a.mov(eax, i32::from(FREE))?;
            a.mov(fs, eax)
        });
    });
}

#[test]
fn an_absent_stack_segment_is_a_stack_fault() {
    on_every_engine(|guest| {
        guest.set_descriptor(FREE, 0, 0xffff, WRITABLE & !PRESENT);
        guest.fault(SS, u32::from(FREE), |a| {
            a.mov(eax, i32::from(FREE))?;
            a.mov(ss, eax)
        });
    });
}

#[test]
fn a_task_with_a_short_segment_is_an_invalid_tss() {
    on_every_engine(|guest| {
        guest.protected_mode();
        // SDM 3A, 7.2.2: a limit below 0x67.
        guest.set_descriptor(FREE, 0xd000, 0x66, AVAILABLE_TSS);
        guest.fault(TS, u32::from(FREE), |a| a.jmp_far(FREE, 0));
    });
}

#[test]
fn a_fault_without_a_handler_is_a_double_fault() {
    on_every_engine(|guest| {
        guest.remove_gate64(GP);
        guest.set_gate64(DF, Guest::handler(DF), INTERRUPT_GATE, 1);
        // SDM 3A, 6.15, interrupt 8: #NP while delivering #GP; error code zero.
        let frame = guest.interrupted(|a| {
            a.mov(rbx, NON_CANONICAL)?;
            a.mov(rax, qword_ptr(rbx))
        });
        assert_eq!((frame.vector, frame.error), (DF, Some(0)));
        assert_eq!(guest.state.general.rsp, Guest::IST1 - 6 * 8);
    });
}

#[test]
fn a_benign_exception_without_a_handler_is_the_handler_s_fault() {
    on_every_engine_but(
        &[(EMULATED_KVM, "it makes a double fault of it")],
        |guest| {
            guest.remove_gate64(UD);
            // SDM 3A, table 6-5: the first is benign, so the second is handled serially. The error code is
            // the gate's: index 6, IDT, and EXT because the event was no INT n.
            let frame = guest.fault(NP, u32::from(UD) << 3 | 2 | 1, |a| a.ud2());
            assert_eq!(frame.rsp, Guest::STACK);
        },
    );
}

#[test]
fn a_page_fault_while_a_page_fault_is_delivered_is_a_double_fault() {
    on_every_engine_but(&[(EMULATED_KVM, "CR2 is the page's start")], |guest| {
        let stack = Guest::SCRATCH + 0x1000;
        guest.set_page(Guest::SCRATCH, 0);
        guest.set_gate64(DF, Guest::handler(DF), INTERRUPT_GATE, 1);
        guest.state.general.rsp = stack;
        let frame = guest.interrupted(|a| {
            a.mov(ebx, 0x60_0000)?;
            a.mov(rsp, Guest::SCRATCH + 0x800)?;
            a.mov(eax, dword_ptr(Guest::SCRATCH))
        });
        assert_eq!((frame.vector, frame.error), (DF, Some(0)));
        // The second fault's address: the frame, SS first, on a stack aligned to 16.
        assert_eq!(guest.cr2(), Guest::SCRATCH + 0x7f8);
    });
}

#[test]
fn a_fault_while_a_double_fault_is_delivered_is_the_end() {
    on_every_engine(|guest| {
        guest.remove_gate64(DF);
        guest.remove_gate64(GP);
        let stop = guest.run(|a| {
            a.mov(rbx, NON_CANONICAL)?;
            a.mov(rax, qword_ptr(rbx))
        });
        assert_eq!(stop, Stop::TripleFault);
    });
}

#[test]
fn the_fpu_is_not_available_while_a_task_switch_is_noted() {
    on_every_engine(|guest| {
        // SDM 3A, 2.5, CR0.TS and CR0.EM.
        guest.state.special.cr0 |= 1 << 3;
        guest.fault(NM, None, |a| a.fld1());
    });
}

/// CR0.AM, and the flag that goes with it.
const AM: u64 = 1 << 18;
const FLAG_AC: u64 = 1 << 18;

#[test]
fn ring_3_may_have_its_accesses_checked_for_alignment() {
    type Access = fn(&mut CodeAssembler) -> Assembled;
    let accesses: [Access; 6] = [
        |a| a.mov(ax, word_ptr(rsp + 1)),
        |a| a.mov(dword_ptr(rsp + 2), eax),
        |a| a.add(qword_ptr(rsp + 4), rax),
        |a| a.fld(qword_ptr(rsp + 4)),
        |a| a.xchg(dword_ptr(rsp + 1), eax),
        |a| a.push(qword_ptr(rsp + 4)),
    ];
    for access in accesses {
        on_every_engine(|guest| {
            guest.user_mode();
            guest.state.special.cr0 |= AM;
            // SDM 3A, 6.15, interrupt 17: a fault with an error code of zero; bytes and what is aligned
            // do not fault, nor does anything before the flag is set.
            let frame = guest.fault(AC, 0, |a| {
                a.sub(rsp, 32)?;
                a.mov(rax, qword_ptr(rsp + 3))?;
                a.pushfq()?;
                a.or(dword_ptr(rsp), FLAG_AC as i32)?;
                a.popfq()?;
                a.mov(al, byte_ptr(rsp + 3))?;
                a.mov(eax, dword_ptr(rsp + 4))?;
                access(a)
            });
            assert_eq!(frame.cs, USER_CODE64);
            assert_eq!(frame.rflags & FLAG_AC, FLAG_AC);
        });
    }
}

#[test]
fn ring_0_has_its_accesses_not_checked() {
    on_every_engine(|guest| {
        guest.state.special.cr0 |= AM;
        guest.state.general.rflags |= FLAG_AC;
        guest.fault(UD, None, |a| {
            a.mov(rax, qword_ptr(rsp - 13))?;
            a.ud2()
        });
    });
}
