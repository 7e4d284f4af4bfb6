//! Control flow, faults and what they leave, locks, bounded string instructions.

use iced_x86::Register as R;
use iced_x86::code_asm::*;

use super::At::{Mem, Reg};
use super::{CODE, Code, Guest, HOLE, flags};
use crate::error::{Exception, Vector};
use crate::processor::Flow;
use crate::state::{SegmentName, rflags};

const DIVIDE: Exception = Exception::new(Vector::DivideError);
const WRITE_TO_HOLE: Exception = Exception::page_fault(HOLE, 2);

/// What, mode, instruction, registers before it, and the fault.
type Fault = (&'static str, u32, Code, &'static [(R, u64)], Exception);

#[rustfmt::skip] // a table
const FAULTS: &[Fault] = &[
    ("div by zero", 64, |a| a.div(ebx), &[(R::RAX, 1)], DIVIDE),
    ("div too large", 64, |a| a.div(bl), &[(R::RAX, 0x200), (R::RBX, 2)], DIVIDE),
    ("idiv lowest by -1", 64, |a| a.idiv(rbx),
        &[(R::RDX, u64::MAX), (R::RAX, 1 << 63), (R::RBX, u64::MAX)], DIVIDE),
    ("idiv widest by -1", 64, |a| a.idiv(rbx), &[(R::RDX, 1 << 63), (R::RBX, u64::MAX)], DIVIDE),
    ("aam 0", 32, |a| a.aam(0), &[(R::RAX, 5)], DIVIDE),
    ("push", 64, |a| a.push(rax), &[(R::RSP, HOLE + 8)], WRITE_TO_HOLE),
    ("push across pages", 64, |a| a.push(rax), &[(R::RSP, HOLE + 4)], WRITE_TO_HOLE),
    ("call", 64, |a| a.call(rax), &[(R::RAX, 0x8000), (R::RSP, HOLE + 8)], WRITE_TO_HOLE),
    ("pop to a hole", 64, |a| a.pop(qword_ptr(rax)), &[(R::RSP, 0x9000), (R::RAX, HOLE)], WRITE_TO_HOLE),
    ("add is a write", 64, |a| a.add(dword_ptr(rax), 1), &[(R::RAX, HOLE)], WRITE_TO_HOLE),
    ("shift by zero is a write", 64, |a| a.shl(dword_ptr(rax), cl), &[(R::RAX, HOLE)], WRITE_TO_HOLE),
    ("cmp is a read", 64, |a| a.cmp(dword_ptr(rax), 1), &[(R::RAX, HOLE)], Exception::page_fault(HOLE, 0)),
    ("cmov reads always", 64, |a| a.cmovne(ebx, dword_ptr(rax)), &[(R::RAX, HOLE)], Exception::page_fault(HOLE, 0)),
    ("xadd", 64, |a| a.xadd(dword_ptr(rbx), eax), &[(R::RAX, 3), (R::RBX, HOLE)], WRITE_TO_HOLE),
    ("cmpxchg", 64, |a| a.cmpxchg(dword_ptr(rbx), eax), &[(R::RAX, 3), (R::RBX, HOLE)], WRITE_TO_HOLE),
    ("movsb", 64, |a| a.movsb(), &[(R::RSI, 0x8000), (R::RDI, HOLE)], WRITE_TO_HOLE),
    ("enter", 64, |a| a.enter(0x100, 0), &[(R::RSP, HOLE + 0x1008), (R::RBP, 7)],
        Exception::page_fault(HOLE + 0xf00, 2)),
    ("pushad", 32, |a| a.pushad(), &[(R::RSP, 0x10)], Exception::with_code(Vector::StackFault, 0)),
    ("jump out of canonical", 64, |a| a.jmp(rax), &[(R::RAX, 1 << 47)], Exception::gp(0)),
    ("call out of canonical", 64, |a| a.call(rax), &[(R::RAX, 1 << 47), (R::RSP, 0x9000)], Exception::gp(0)),
    ("jump beyond the limit", 16, |a| a.jmp(eax), &[(R::RAX, 0x1_0000)], Exception::gp(0)),
    ("word across the limit", 16, |a| a.mov(ax, word_ptr(bx)), &[(R::RBX, 0xffff)], Exception::gp(0)),
    ("cmpxchg16b unaligned", 64, |a| a.cmpxchg16b(xmmword_ptr(rdi)), &[(R::RDI, 0x8008)], Exception::gp(0)),
    ("stack out of canonical", 64, |a| a.pop(rax), &[(R::RSP, 1 << 47)],
        Exception::with_code(Vector::StackFault, 0)),
];

#[test]
fn faults_leave_the_state() {
    for &(name, bits, code, before, exception) in FAULTS {
        let mut guest = Guest::new(bits);
        if name == "pushad" {
            // A stack that ends within what is pushed.
            let mut stack = *guest.processor.state.segment(SegmentName::Ss);
            stack.limit = 0xffff;
            guest.processor.state.set_segment(SegmentName::Ss, stack);
        }
        for &(register, value) in before {
            guest.set(Reg(register), value);
        }
        guest.set_flags(flags("CPAZSO"));
        let state = guest.processor.state.clone();
        assert_eq!(guest.execute(code), Err(exception), "{name}");
        assert_eq!(
            guest.processor.state, state,
            "{name}: the state has changed"
        );
    }
}

/// Executes and says where it goes.
fn goes(guest: &mut Guest, bytes: &[u8]) -> (Flow, u64) {
    let flow = guest.execute_bytes(bytes).unwrap();
    (flow, guest.processor.state.rip)
}

#[test]
fn jumps() {
    let mut guest = Guest::new(64);
    assert_eq!(goes(&mut guest, &[0xeb, 0x10]), (Flow::Jump, CODE + 0x12));
    assert_eq!(goes(&mut guest, &[0x74, 0x10]), (Flow::Next, CODE + 0x12));
    guest.set_flags(flags("Z"));
    assert_eq!(goes(&mut guest, &[0x74, 0xee]), (Flow::Jump, CODE + 2));
    // CALL and RET 8
    guest.set(Reg(R::RSP), 0x9000);
    assert_eq!(
        goes(&mut guest, &[0xe8, 0, 1, 0, 0]),
        (Flow::Jump, CODE + 0x107)
    );
    assert_eq!(guest.get(Mem(0x8ff8, 8)), CODE + 7);
    assert_eq!(goes(&mut guest, &[0xc2, 8, 0]), (Flow::Jump, CODE + 7));
    assert_eq!(guest.get(Reg(R::RSP)), 0x9008);
    // LOOP with ECX, then JRCXZ
    guest.set(Reg(R::RCX), 0xffff_ffff_0000_0002);
    assert_eq!(goes(&mut guest, &[0x67, 0xe2, 0]), (Flow::Jump, CODE + 10));
    assert_eq!(guest.get(Reg(R::RCX)), 1);
    assert_eq!(goes(&mut guest, &[0xe2, 0]), (Flow::Next, CODE + 10));
    assert_eq!(goes(&mut guest, &[0xe3, 5]), (Flow::Jump, CODE + 17));
    let mut guest = Guest::new(16);
    assert_eq!(goes(&mut guest, &[0xe9, 0xfd, 0x1f]), (Flow::Jump, 0x1000));
    guest.set(Reg(R::RCX), 0x5_0001);
    assert_eq!(goes(&mut guest, &[0xe2, 0]), (Flow::Next, 0x1000));
    assert_eq!(guest.get(Reg(R::RCX)), 0x5_0000);
}

#[test]
fn traps_leave_the_next_rip() {
    let mut guest = Guest::new(32);
    let breakpoint = Err(Exception::new(Vector::Breakpoint));
    assert_eq!(guest.execute_bytes(&[0xcc]), breakpoint);
    assert_eq!(guest.processor.state.rip, CODE + 1);
    assert_eq!(guest.execute_bytes(&[0xce]), Ok(Flow::Next));
    guest.set_flags(flags("O"));
    let overflow = Err(Exception::new(Vector::Overflow));
    assert_eq!(guest.execute_bytes(&[0xce]), overflow);
    // BOUND EAX, [EBX]
    guest.set(Reg(R::RBX), 0x8000);
    guest.set(Mem(0x8000, 8), 0x0000_0005_ffff_ffff);
    for (index, inside) in [
        (5, true),
        (0xffff_ffff, true),
        (6, false),
        (0xffff_fffe, false),
    ] {
        guest.set(Reg(R::RAX), index);
        let executed = guest.execute_bytes(&[0x62, 0x03]);
        assert_eq!(executed.is_ok(), inside, "{index:#x}: {executed:?}");
    }
}

#[test]
fn what_is_not_there_is_undefined() {
    for (name, bytes) in [
        ("lock add of registers", &[0xf0, 0x01, 0xd8][..]),
        ("lock mov", &[0xf0, 0x89, 0x07]),
        ("lock cmp", &[0xf0, 0x39, 0x07]),
        ("movbe", &[0x0f, 0x38, 0xf0, 0x07]),
    ] {
        let mut guest = Guest::new(64);
        guest.set(Reg(R::RDI), 0x8000);
        assert_eq!(guest.execute_bytes(bytes), Err(Exception::ud()), "{name}");
    }
    for (name, bytes) in [
        ("endbr64", &[0xf3, 0x0f, 0x1e, 0xfa][..]),
        ("rdsspq", &[0xf3, 0x48, 0x0f, 0x1e, 0xc8]),
        ("nop r/m", &[0x0f, 0x1f, 0x40, 0x00]),
        ("prefetchw", &[0x0f, 0x0d, 0x0f]),
        ("reserved prefetch", &[0x0f, 0x18, 0x27]),
        ("reserved nop", &[0x0f, 0x19, 0x07]),
        ("mpx", &[0x0f, 0x1a, 0x07]),
        ("0f 1c", &[0x0f, 0x1c, 0x07]),
        ("0f 1d", &[0x0f, 0x1d, 0x07]),
        ("mfence", &[0x0f, 0xae, 0xf0]),
        ("clflush", &[0x0f, 0xae, 0x3f]),
    ] {
        let mut guest = Guest::new(64);
        assert_eq!(guest.execute_bytes(bytes), Ok(Flow::Next), "{name}");
    }
}

#[test]
fn a_repeat_stops_at_a_fault_and_for_interrupts() {
    // REP STOSB into the hole: what came before it is done.
    let mut guest = Guest::new(64);
    guest.set(Reg(R::RDI), super::RAM - 3);
    guest.set(Reg(R::RCX), 10);
    let executed = guest.execute_bytes(&[0xf3, 0xaa]);
    assert_eq!(executed, Err(Exception::page_fault(super::RAM, 2)));
    assert_eq!(guest.get(Reg(R::RCX)), 7);
    assert_eq!(guest.get(Reg(R::RDI)), super::RAM);
    // A long REPNE SCASB comes back, and goes on.
    guest.set(Reg(R::RDI), 0x8000);
    guest.set(Reg(R::RCX), 300);
    guest.set(Reg(R::RAX), 1);
    assert_eq!(guest.execute_bytes(&[0xf2, 0xae]), Ok(Flow::Again));
    assert_eq!(guest.get(Reg(R::RCX)), 44);
    assert_eq!(guest.execute_bytes(&[0xf2, 0xae]), Ok(Flow::Next));
    assert_eq!(guest.get(Reg(R::RDI)), 0x8000 + 300);
    // Stepping, once each.
    guest.set_flags(rflags::TF);
    guest.set(Reg(R::RDI), 0x8000);
    guest.set(Reg(R::RCX), 2);
    assert_eq!(guest.execute_bytes(&[0xf3, 0xaa]), Ok(Flow::Again));
    assert_eq!(guest.execute_bytes(&[0xf3, 0xaa]), Ok(Flow::Next));
}

#[test]
fn popf_by_privilege() {
    let popped = rflags::IF | rflags::IOPL | rflags::CF;
    for (cpl, iopl, wanted) in [
        (0, 0, popped),
        (3, 0, rflags::CF),
        (3, 3, popped),
        (3, 1, rflags::CF | 1 << 12),
    ] {
        let mut guest = Guest::new(32);
        let mut stack = *guest.processor.state.segment(SegmentName::Ss);
        stack.attributes |= cpl << 5;
        guest.processor.state.set_segment(SegmentName::Ss, stack);
        guest.set_flags(iopl << 12);
        guest.set(Reg(R::RSP), 0x8000);
        guest.set(Mem(0x8000, 4), popped | rflags::RF | rflags::VM);
        assert_eq!(guest.execute_bytes(&[0x9d]), Ok(Flow::Jump));
        let is = guest.processor.state.rflags() & !rflags::FIXED;
        assert_eq!(is, wanted, "CPL {cpl}, IOPL {iopl}: {is:#x}");
        assert_eq!(guest.processor.state.rip, CODE + 1);
    }
    // PUSHF in virtual-8086 mode wants IOPL 3.
    let mut guest = Guest::new(16);
    guest.processor.state.cr0 |= 1;
    guest.set_flags(rflags::VM);
    assert_eq!(guest.execute_bytes(&[0x9c]), Err(Exception::gp(0)));
}
