//! Several processors on one memory, each on a thread of its own.

use std::thread;

use iced_x86::code_asm::*;

use crate::processor::{Processor, Stop};
use crate::testing::{CODE, DATA, Guest, Nothing, STACK};

/// The second processor's code and stack.
const OTHER_CODE: u64 = 0x2_0000;
const OTHER_STACK: u64 = 0x9_0000;
/// A page with a function that is rewritten, and data beside it.
const FUNCTION: u64 = 0x3_0000;

/// Runs to HLT.
fn run_to_halt(cpu: &mut Processor) {
    for _ in 0..100_000 {
        match cpu.run(&Nothing, 1_000_000) {
            Stop::Halted => return,
            Stop::Attention => {}
            Stop::TripleFault | Stop::Debug => panic!("a stop at {:#x}", cpu.state.rip),
        }
    }
    panic!("no end");
}

fn run_both(mut first: Guest, mut second: Processor) -> Guest {
    thread::scope(|scope| {
        scope.spawn(|| run_to_halt(&mut second));
        run_to_halt(&mut first.cpu);
    });
    first
}

#[test]
fn locked_instructions_are_atomic() {
    const ROUNDS: u32 = 100_000;
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, ROUNDS).unwrap();
        a.set_label(&mut again).unwrap();
        a.lock().inc(dword_ptr(rbx)).unwrap();
        a.mov(eax, 3).unwrap();
        a.lock().xadd(qword_ptr(rbx + 8), rax).unwrap();
        a.lock().add(word_ptr(rbx + 16), 1).unwrap();
        a.lock().btc(dword_ptr(rbx + 24), 5).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    let mut guest = Guest::new(program);
    let second = guest.second(OTHER_CODE, OTHER_STACK, program);
    let guest = run_both(guest, second);
    let both = u64::from(2 * ROUNDS);
    assert_eq!(guest.peek(DATA), both);
    assert_eq!(guest.peek(DATA + 8), 3 * both);
    assert_eq!(guest.peek(DATA + 16) & 0xffff, both & 0xffff);
    assert_eq!(guest.peek(DATA + 24), 0, "an even number of flips");
}

/// One processor rewrites a function and publishes the new version, the other sees the publication,
/// serializes itself and calls: it must get the new version (SDM volume 3, 9.1.3).
#[test]
fn rewritten_code_is_seen_after_its_publication() {
    const VERSIONS: u32 = 5_000;
    let writer = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut wait = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.mov(rdi, FUNCTION).unwrap();
        a.mov(ecx, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rdi + 1), ecx).unwrap(); // the immediate of MOV EAX
        a.mov(dword_ptr(rdi + 0x800), ecx).unwrap(); // data on the same page
        a.mov(dword_ptr(rbx), ecx).unwrap(); // publishes
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(rbx + 8), ecx).unwrap();
        a.jne(wait).unwrap();
        a.inc(ecx).unwrap();
        a.cmp(ecx, VERSIONS).unwrap();
        a.jbe(again).unwrap();
        a.hlt().unwrap();
    };
    let reader = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut fine = a.create_label();
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, FUNCTION).unwrap();
        a.xor(ebp, ebp).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rdi).unwrap(); // also while it is being rewritten
        a.mov(r8d, dword_ptr(rsi)).unwrap();
        a.cmp(r8d, ebp).unwrap();
        a.je(again).unwrap();
        a.cpuid().unwrap();
        a.call(rdi).unwrap();
        a.cmp(eax, r8d).unwrap();
        a.je(fine).unwrap();
        a.inc(dword_ptr(rsi + 16)).unwrap(); // stale
        a.set_label(&mut fine).unwrap();
        a.mov(ebp, r8d).unwrap();
        a.mov(dword_ptr(rsi + 8), ebp).unwrap(); // acknowledges
        a.cmp(ebp, VERSIONS).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    };
    let mut guest = Guest::new(reader);
    let second = guest.second(OTHER_CODE, OTHER_STACK, writer);
    guest.poke(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]); // mov eax, 0; ret
    let guest = run_both(guest, second);
    assert_eq!(guest.peek(DATA + 8), VERSIONS.into());
    assert_eq!(guest.peek(DATA + 16), 0, "stale code was executed");
    assert_eq!(guest.cpu.state.register(4), STACK);
    assert_eq!(guest.cpu.state.rip, CODE + code_len(reader));
}

/// The length of a program whose last instruction is its end.
fn code_len(program: impl FnOnce(&mut CodeAssembler)) -> u64 {
    let mut assembler = CodeAssembler::new(64).unwrap();
    program(&mut assembler);
    assembler.assemble(CODE).unwrap().len() as u64
}

/// Stores of one processor are seen by the other in their order (SDM volume 3, 9.2.2).
#[test]
fn messages_arrive_in_order() {
    const MESSAGES: u32 = 20_000;
    let sender = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut wait = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbx + 64), ecx).unwrap();
        a.mov(dword_ptr(rbx + 0x1001), ecx).unwrap(); // not aligned, on another page
        a.mov(dword_ptr(rbx), ecx).unwrap();
        a.set_label(&mut wait).unwrap();
        a.cmp(dword_ptr(rbx + 8), ecx).unwrap();
        a.jne(wait).unwrap();
        a.inc(ecx).unwrap();
        a.cmp(ecx, MESSAGES).unwrap();
        a.jbe(again).unwrap();
        a.hlt().unwrap();
    };
    let receiver = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        let mut fine = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.xor(ebp, ebp).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(r8d, dword_ptr(rbx)).unwrap();
        a.cmp(r8d, ebp).unwrap();
        a.je(again).unwrap();
        a.mov(eax, dword_ptr(rbx + 64)).unwrap();
        a.xor(eax, dword_ptr(rbx + 0x1001)).unwrap();
        a.add(eax, dword_ptr(rbx + 64)).unwrap();
        a.cmp(eax, r8d).unwrap();
        a.je(fine).unwrap();
        a.inc(dword_ptr(rbx + 16)).unwrap();
        a.set_label(&mut fine).unwrap();
        a.mov(ebp, r8d).unwrap();
        a.mov(dword_ptr(rbx + 8), ebp).unwrap();
        a.cmp(ebp, MESSAGES).unwrap();
        a.jne(again).unwrap();
        a.hlt().unwrap();
    };
    let mut guest = Guest::new(receiver);
    let second = guest.second(OTHER_CODE, OTHER_STACK, sender);
    let guest = run_both(guest, second);
    assert_eq!(guest.peek(DATA + 8), MESSAGES.into());
    assert_eq!(guest.peek(DATA + 16), 0, "messages out of order");
}
