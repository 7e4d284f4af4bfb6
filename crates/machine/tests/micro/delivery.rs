//! How an exception or interrupt reaches its handler, and how IRET comes back.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// Ring 3 runs on the processor there.
const INT_OF_RING_3: &[(&str, &str)] = &[(EMULATED_KVM, "INT n of ring 3 is an invalid opcode")];
const LATE: &[(&str, &str)] = &[(EMULATED_KVM, "it delivers interrupts at exits only")];

#[test]
fn an_interrupt_gate_disables_interrupts_and_a_trap_gate_does_not() {
    for (attributes, enabled) in [(INTERRUPT_GATE, 0), (TRAP_GATE, FLAG_IF)] {
        on_every_engine(|guest| {
            guest.set_gate64(0x55, Guest::handler(0x55), attributes, 0);
            guest.state.general.rflags |= FLAG_IF;
            // SDM 3A, 6.12.1.3.
            let frame = guest.trap(0x55, |a| a.int(0x55));
            assert_eq!(frame.rflags & FLAG_IF, FLAG_IF);
            assert_eq!(guest.state.general.rflags & FLAG_IF, enabled);
        });
    }
}

#[test]
fn delivery_clears_trap_nested_task_and_resume_flags() {
    on_every_engine(|guest| {
        guest.state.general.rflags |= FLAG_NT | FLAG_RF;
        let frame = guest.trap(0x55, |a| a.int(0x55));
        assert_eq!(frame.rflags & FLAG_NT, FLAG_NT);
        let cleared = FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM;
        assert_eq!(guest.state.general.rflags & cleared, 0);
    });
}

#[test]
fn a_frame_is_aligned_to_16_bytes_in_long_mode() {
    on_every_engine(|guest| {
        guest.state.general.rsp = Guest::STACK - 7;
        // SDM 3A, 6.14.2: the stack pointer is aligned before the frame is pushed.
        let frame = guest.trap(0x55, |a| a.int(0x55));
        assert_eq!(frame.rsp, Guest::STACK - 7);
        assert_eq!(guest.state.general.rsp, Guest::STACK - 16 - 5 * 8);
    });
}

#[test]
fn an_interrupt_stack_is_taken_whatever_the_ring() {
    on_every_engine(|guest| {
        guest.set_gate64(0x55, Guest::handler(0x55), INTERRUPT_GATE, 1);
        // SDM 3A, 6.14.5: SS stays as there is no change of ring.
        let frame = guest.trap(0x55, |a| a.int(0x55));
        assert_eq!((frame.rsp, frame.ss), (Guest::STACK, DATA));
        assert_eq!(guest.state.general.rsp, Guest::IST1 - 5 * 8);
        assert_eq!(guest.state.special.ss.selector, DATA);
    });
}

#[test]
fn from_ring_3_the_stack_is_the_task_s() {
    on_every_engine(|guest| {
        guest.user_mode();
        // SDM 3A, 6.14.4: SS is null with the new RPL in it.
        let frame = guest.fault(UD, None, |a| a.ud2());
        assert_eq!((frame.cs, frame.ss), (USER_CODE64, USER_DATA));
        assert_eq!(frame.rsp, Guest::USER_STACK);
        assert_eq!(guest.state.general.rsp, Guest::RING0_STACK - 5 * 8);
        assert_eq!(guest.state.special.ss.selector, 0);
        assert_eq!(guest.state.special.cs.selector, CODE64);
    });
}

#[test]
fn ring_3_may_not_use_a_gate_of_ring_0() {
    on_every_engine_but(INT_OF_RING_3, |guest| {
        guest.user_mode();
        // SDM 3A, 6.12.1.1: vector * 8, IDT.
        guest.fault(GP, 0x55 * 8 + 2, |a| a.int(0x55));
    });
}

#[test]
fn ring_3_may_use_a_gate_of_ring_3() {
    on_every_engine_but(INT_OF_RING_3, |guest| {
        guest.set_gate64(0x55, Guest::handler(0x55), INTERRUPT_GATE | DPL3, 0);
        guest.user_mode();
        let frame = guest.trap(0x55, |a| a.int(0x55));
        assert_eq!(frame.cs, USER_CODE64);
    });
}

#[test]
fn a_vector_beyond_the_table_is_a_protection_fault() {
    on_every_engine(|guest| {
        guest.state.special.idt.limit = 16 * 0x40 - 1;
        guest.fault(GP, 0x40 * 8 + 2, |a| a.int(0x40));
    });
}

#[test]
fn a_gate_to_no_code_segment_names_the_selector() {
    on_every_engine(|guest| {
        let gate = IDT + 0x55 * 16;
        // SDM 2A, INT n: #GP(selector) if it is not one of code, #GP(0) if it is null.
        guest.write(gate, gate_to(DATA));
        guest.fault(GP, u32::from(DATA), |a| a.int(0x55));
    });
    on_every_engine(|guest| {
        guest.write(IDT + 0x55 * 16, gate_to(0));
        guest.fault(GP, 0, |a| a.int(0x55));
    });
}

fn gate_to(selector: u16) -> u64 {
    gate(selector, Guest::handler(0x55) as u32, INTERRUPT_GATE, 0)
}

#[test]
fn iret_in_the_same_ring_comes_back_with_its_flags_and_stack() {
    on_every_engine(|guest| {
        guest.place(0x1_2000, 64, |a| a.iretq());
        guest.set_gate64(0x55, 0x1_2000, INTERRUPT_GATE, 0);
        guest.finish(|a| {
            a.sti()?;
            a.stc()?;
            a.int(0x55)?;
            a.pushfq()?;
            a.pop(rax)?;
            a.mov(rbx, rsp)
        });
        assert_eq!(guest.state.general.rax & (FLAG_IF | 1), FLAG_IF | 1);
        assert_eq!(guest.state.general.rbx, Guest::STACK);
    });
}

/// Pushes what IRET to ring 3 pops, and does it.
fn iret_to(a: &mut CodeAssembler, code: u16, rip: u64, rflags: u64) -> Assembled {
    a.push(i32::from(USER_DATA))?;
    a.push(Guest::USER_STACK as i32)?;
    a.push(rflags as i32)?;
    a.push(i32::from(code))?;
    a.push(rip as i32)?;
    a.iretq()
}

#[test]
fn iret_goes_to_ring_3_and_nulls_segments_of_ring_0() {
    on_every_engine_but(&[(EMULATED_KVM, "ring 3 reads another CS")], |guest| {
        guest.place(Guest::USER, 64, |a| {
            a.mov(eax, ds)?;
            a.mov(ebx, cs)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| iret_to(a, USER_CODE64, Guest::USER, FLAG_IF));
        assert_eq!(
            (frame.vector, frame.cs, frame.ss),
            (UD, USER_CODE64, USER_DATA)
        );
        assert_eq!(frame.rflags & FLAG_IF, FLAG_IF);
        assert_eq!(frame.rsp, Guest::USER_STACK);
        // SDM 2A, IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL: DS was of DPL 0.
        assert_eq!(guest.state.general.rax, 0);
        assert_eq!(guest.state.general.rbx, u64::from(USER_CODE64));
    });
}

#[test]
fn iret_goes_to_compatibility_mode() {
    on_every_engine(|guest| {
        // In 64-bit code this would be a REX prefix and `inc eax` is lost.
        guest.place(Guest::USER, 32, |a| {
            a.mov(eax, 1)?;
            a.inc(eax)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| iret_to(a, USER_CODE32, Guest::USER, 0));
        assert_eq!((frame.vector, frame.cs), (UD, USER_CODE32));
        assert_eq!(guest.state.general.rax, 2);
    });
}

#[test]
fn iret_with_the_nested_task_flag_is_refused_in_long_mode() {
    on_every_engine(|guest| {
        guest.state.general.rflags |= FLAG_NT;
        guest.fault(GP, 0, |a| a.iretq());
    });
}

#[test]
fn iret_to_a_code_segment_beyond_the_table_faults_in_ring_0() {
    on_every_engine(|guest| {
        let frame = guest.fault(GP, 0x1f8, |a| iret_to(a, 0x1fb, Guest::USER, 0));
        assert_eq!(frame.cs, CODE64);
        assert_eq!(frame.rsp, Guest::STACK - 5 * 8);
    });
}

#[test]
fn ring_3_cannot_change_interrupt_flag_and_iopl_by_iret() {
    on_every_engine(|guest| {
        guest.user_mode();
        guest.state.general.rflags |= FLAG_IF;
        guest.place(Guest::USER + 0x100, 64, |a| a.ud2());
        let frame = guest.interrupted(|a| iret_to(a, USER_CODE64, Guest::USER + 0x100, 3 << 12));
        assert_eq!((frame.vector, frame.rip), (UD, Guest::USER + 0x100));
        assert_eq!(frame.rflags & (FLAG_IF | 3 << 12), FLAG_IF);
    });
}

#[test]
fn an_nmi_is_delivered_once_until_iret() {
    on_every_engine(|guest| {
        guest.state.events.nmi_pending = true;
        let frame = guest.interrupted(|a| {
            a.nop()?;
            a.nop()
        });
        assert_eq!((frame.vector, frame.error), (NMI, None));
        assert!(guest.state.events.nmi_masked);
        // SDM 3A, 6.7.1: another waits.
        guest.state.events.nmi_pending = true;
        guest.state.general.rip = Guest::CODE;
        guest.finish(|a| a.nop());
        assert!(guest.state.events.nmi_pending);
    });
}

#[test]
fn iret_unblocks_nmis() {
    on_every_engine_but(LATE, |guest| {
        guest.state.events.nmi_masked = true;
        guest.state.events.nmi_pending = true;
        guest.place(0x1_2000, 64, |a| a.nop());
        let frame = guest.interrupted(|a| {
            a.mov(rbx, rsp)?;
            a.push(i32::from(DATA))?;
            a.push(rbx)?;
            a.push(2)?;
            a.push(i32::from(CODE64))?;
            a.push(0x1_2000)?;
            a.iretq()
        });
        assert_eq!((frame.vector, frame.rip), (NMI, 0x1_2000));
    });
}

#[test]
fn interrupts_wait_for_the_instruction_after_sti() {
    on_every_engine_but(LATE, |guest| {
        crate::apic::self_interrupt_pending(guest, 0x55);
        // SDM 2B, STI: recognized after the next instruction.
        let frame = guest.interrupted(|a| {
            a.sti()?;
            a.inc(eax)?;
            a.inc(eax)
        });
        assert_eq!(frame.vector, 0x55);
        assert_eq!(guest.state.general.rax, 1);
    });
}
