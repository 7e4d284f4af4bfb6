//! The local APIC, the timer and the interrupt controllers, as one processor's guest uses them.

use iced_x86::code_asm::*;

use crate::engines::on_every_engine;
use crate::guest::*;
use crate::tables::*;

const APIC: u64 = 0xfee0_0000;
const TPR: i32 = 0x80;
const EOI: i32 = 0xb0;
const SPURIOUS: i32 = 0xf0;
const ICR_LOW: i32 = 0x300;
const LVT_TIMER: i32 = 0x320;
const LVT_LINT0: i32 = 0x350;
const INITIAL_COUNT: i32 = 0x380;
const DIVIDE: i32 = 0x3e0;
/// ICR: fixed delivery to itself, asserted.
const TO_SELF: i32 = 1 << 18 | 1 << 14;

/// Enables the local APIC; its address stays in RSI.
fn enable(a: &mut CodeAssembler) -> Assembled {
    a.mov(rsi, APIC)?;
    a.mov(dword_ptr(rsi + SPURIOUS), 0x1ff)
}

/// Makes an interrupt of that vector wait for the guest's interrupt flag.
pub fn self_interrupt_pending(guest: &mut Guest, vector: i32) {
    guest.finish(|a| {
        enable(a)?;
        a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | vector)?;
        a.xor(eax, eax)
    });
    guest.state.general.rip = Guest::CODE;
}

#[test]
fn an_interrupt_to_itself_comes_when_interrupts_are_enabled() {
    on_every_engine(|guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
            a.mov(eax, 7)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!((frame.vector, frame.error), (0x61, None));
        assert_eq!(guest.state.general.rax, 7);
        assert_eq!(frame.rflags & FLAG_RF, 0);
    });
}

#[test]
fn the_higher_vector_comes_first_and_the_lower_after_its_end() {
    on_every_engine(|guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x72)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!(frame.vector, 0x72);
        // SDM 3A, 10.8.3.1: the processor's priority is that of the one in service.
        guest.state.general.rip = Guest::CODE;
        let frame = guest.interrupted(|a| {
            a.sti()?;
            a.nop()?;
            a.inc(ebp)?;
            a.mov(dword_ptr(rsi + EOI), 0)?;
            a.hlt()
        });
        assert_eq!((frame.vector, guest.state.general.rbp), (0x61, 1));
    });
}

#[test]
fn the_task_priority_holds_interrupts_of_its_class_back() {
    on_every_engine(|guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            a.mov(eax, 6)?;
            a.mov(cr8, rax)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
            a.sti()?;
            a.nop()?;
            a.mov(ebx, dword_ptr(rsi + TPR))?;
            a.xor(eax, eax)?;
            a.mov(cr8, rax)?;
            a.hlt()
        });
        assert_eq!(frame.vector, 0x61);
        // SDM 3A, 10.8.6.1: CR8 is bits 7 to 4 of the register.
        assert_eq!(guest.state.general.rbx, 0x60);
    });
}

#[test]
fn a_halted_processor_wakes_by_its_timer() {
    on_every_engine(|guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            a.mov(dword_ptr(rsi + DIVIDE), 0xb)?;
            a.mov(dword_ptr(rsi + LVT_TIMER), 0x70)?;
            a.mov(dword_ptr(rsi + INITIAL_COUNT), 1_000_000)?;
            a.sti()?;
            a.hlt()
        });
        // The saved RIP is behind HLT (SDM 2A, HLT).
        assert_eq!((frame.vector, frame.rip), (0x70, guest.end));
    });
}

#[test]
fn a_periodic_timer_comes_again() {
    on_every_engine(|guest| {
        let handler = 0x1_2000;
        let (_, _) = guest.place(handler, 64, |a| {
            a.mov(dword_ptr(rsi + EOI), 0)?;
            a.dec(ebp)?;
            a.mov(rsp, Guest::STACK)?;
            a.mov(rax, Guest::CODE + 0x800)?;
            a.jmp(rax)
        });
        guest.set_gate64(0x70, handler, INTERRUPT_GATE, 0);
        guest.place(Guest::CODE + 0x800, 64, |a| {
            let mut done = a.create_label();
            let mut again = a.create_label();
            a.test(ebp, ebp)?;
            a.je(done)?;
            a.set_label(&mut again)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(again)?;
            a.set_label(&mut done)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            enable(a)?;
            a.mov(ebp, 3)?;
            a.mov(dword_ptr(rsi + DIVIDE), 0xb)?;
            a.mov(dword_ptr(rsi + LVT_TIMER), 0x70 | 1 << 17)?;
            a.mov(dword_ptr(rsi + INITIAL_COUNT), 2_000_000)?;
            a.mov(rax, Guest::CODE + 0x800)?;
            a.jmp(rax)
        });
        assert_eq!((frame.vector, guest.state.general.rbp), (UD, 0));
    });
}

/// Writes a byte to a port.
fn out(a: &mut CodeAssembler, port: i32, value: i32) -> Assembled {
    a.mov(al, value)?;
    a.out(port, al)
}

/// Initializes the first 8259 with vectors from 0x20 and only IRQ 0 unmasked, and the interval timer as
/// a one-shot of about a millisecond.
fn program_pic_and_pit(a: &mut CodeAssembler) -> Assembled {
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0xfe),
        (0x43, 0x30),
        (0x40, 0xa9),
        (0x40, 0x04),
    ] {
        out(a, port, value)?;
    }
    Ok(())
}

#[test]
fn the_interval_timer_interrupts_real_mode_through_the_8259() {
    on_every_engine(|guest| {
        guest.real_mode();
        // Virtual wire mode, set by hand because real mode does not reach the registers: LINT0 passes
        // the 8259's interrupt on (SDM 3A, 10.5.1).
        let lint0 = guest.state.local_apic.get_mut(0x350..0x354).unwrap();
        lint0.copy_from_slice(&0x700_u32.to_le_bytes());
        let spurious = guest.state.local_apic.get_mut(0xf0..0xf4).unwrap();
        spurious.copy_from_slice(&0x1ff_u32.to_le_bytes());
        let frame = guest.interrupted(|a| {
            program_pic_and_pit(a)?;
            a.sti()?;
            a.hlt()
        });
        let behind_hlt = guest.end - Guest::CODE;
        assert_eq!((frame.vector, frame.rip), (0x20, behind_hlt));
        assert_eq!(frame.cs, (Guest::CODE >> 4) as u16);
    });
}

#[test]
fn the_interval_timer_interrupts_long_mode_through_the_8259() {
    on_every_engine(|guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            a.mov(dword_ptr(rsi + LVT_LINT0), 0x700)?;
            program_pic_and_pit(a)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!((frame.vector, frame.rip), (0x20, guest.end));
    });
}
