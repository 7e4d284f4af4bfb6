//! Small programs through translator, cache and interpreter.

mod dirty;
mod hypercall;
mod paging;
mod smp;

use iced_x86::code_asm::*;

use crate::processor::Stop;
use crate::state::rflags::{CF, OF, SF, STATUS, TF, ZF};
use crate::testing::{CODE, DATA, END, Guest, Nothing, STACK};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;

/// Runs so many instructions and expects no fault.
#[track_caller]
fn run(guest: &mut Guest, budget: u64) {
    let before = guest.cpu.meter.used();
    assert_eq!(guest.cpu.run(&Nothing, budget), Stop::Attention);
    assert_eq!(guest.cpu.meter.used() - before, budget, "used");
}

fn sum_loop(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.xor(eax, eax).unwrap();
    a.mov(ecx, 1000).unwrap();
    a.set_label(&mut again).unwrap();
    a.add(rax, rcx).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(again).unwrap();
    a.nop().unwrap();
}

#[test]
fn a_loop_adds_up() {
    let mut guest = Guest::new(sum_loop);
    run(&mut guest, 2 + 3000 + 1);
    assert_eq!(guest.cpu.state.register(RAX), 500_500);
    assert_eq!(guest.cpu.state.rflags() & (ZF | CF), ZF);
}

/// Whole blocks and single steps give the same state after every instruction.
#[test]
fn a_budget_is_exact_and_steps_are_equal() {
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, 5).unwrap();
        a.set_label(&mut again).unwrap();
        a.imul_3(rdx, rcx, 0x12345677).unwrap();
        a.add(dl, dl).unwrap();
        a.adc(qword_ptr(rbx + rcx * 8), rdx).unwrap();
        a.sbb(ax, cx).unwrap();
        a.rol(edx, 7).unwrap();
        a.sar(edx, 3).unwrap();
        a.mov(ah, dl).unwrap();
        a.shl(rdx, cl).unwrap();
        a.neg(dx).unwrap();
        a.setl(al).unwrap();
        a.cmovb(rsi, rdx).unwrap();
        a.movsx(edi, ah).unwrap();
        a.bswap(rdi).unwrap();
        a.inc(dword_ptr(rbx)).unwrap();
        a.push(rdx).unwrap();
        a.pop(r8).unwrap();
        a.xchg(r8, r9).unwrap();
        a.cmp(ecx, 2).unwrap();
        a.lea(rcx, qword_ptr(rcx - 1)).unwrap();
        a.test(ecx, ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    for length in 1..=2 + 5 * 21 {
        let (mut whole, mut stepped) = (Guest::new(program), Guest::new(program));
        run(&mut whole, length);
        (0..length).for_each(|_| run(&mut stepped, 1));
        let flags = |guest: &Guest| guest.cpu.state.rflags();
        assert_eq!(flags(&whole), flags(&stepped), "flags after {length}");
        whole.cpu.state.set_rflags(0);
        stepped.cpu.state.set_rflags(0);
        whole.cpu.state.lazy = stepped.cpu.state.lazy;
        assert_eq!(whole.cpu.state, stepped.cpu.state, "after {length}");
    }
}

#[test]
fn calls_return() {
    let mut guest = Guest::new(|a| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.jmp(over).unwrap();
        a.set_label(&mut function).unwrap();
        a.mov(rax, qword_ptr(rsp + 8)).unwrap();
        a.ret_1(8).unwrap();
        a.set_label(&mut over).unwrap();
        a.push(77).unwrap();
        a.call(function).unwrap();
        a.lea(rdx, qword_ptr(function)).unwrap();
        a.push(78).unwrap();
        a.call(rdx).unwrap();
    });
    run(&mut guest, 1 + 2 + 2);
    assert_eq!(guest.cpu.state.register(RAX), 77);
    assert_eq!(guest.cpu.state.register(RSP), STACK);
    run(&mut guest, 3 + 2);
    assert_eq!(guest.cpu.state.register(RAX), 78);
    assert_eq!(guest.cpu.state.register(RSP), STACK);
}

#[test]
fn code_that_rewrites_itself_is_seen() {
    // The immediate of the MOV behind it in the same block, twice over.
    let mut guest = Guest::new(|a| {
        let mut target = a.create_label();
        let mut again = a.create_label();
        a.mov(ecx, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.lea(rdx, qword_ptr(target)).unwrap();
        a.mov(dword_ptr(rdx + 1), ecx).unwrap();
        a.set_label(&mut target).unwrap();
        a.mov(eax, 0x1111).unwrap();
        a.add(rbx, rax).unwrap();
        a.inc(ecx).unwrap();
        a.cmp(ecx, 100).unwrap();
        a.jbe(again).unwrap();
    });
    run(&mut guest, 1 + 7 * 100);
    assert_eq!(guest.cpu.state.register(RBX), 5050);
}

/// Any byte of a block: at once where the device tells, when the page is mapped again where not.
#[test]
fn code_that_a_device_rewrites_is_seen() {
    let mut guest = Guest::new(|a| {
        let mut start = a.create_label();
        a.set_label(&mut start).unwrap();
        a.mov(rax, 0x1122_3344_5566_7788_u64).unwrap();
        a.xor(edx, 0x1122_3344).unwrap();
        a.mov(ecx, 0x1122_3344).unwrap();
        a.jmp(start).unwrap(); // a whole block
    });
    run(&mut guest, 4);
    for (first, register, len) in [(CODE + 2, RAX, 8), (CODE + 17, RCX, 4)] {
        for (byte, told) in (0..len).flat_map(|byte| [(byte, true), (byte, false)]) {
            let value = 0xf0 + 2 * byte as u8 + u8::from(told);
            if told {
                guest.poke(first + byte, &[value]);
            } else {
                guest.cpu.ram.write(first + byte, &[value]);
                guest.cpu.state_changed();
            }
            run(&mut guest, 4);
            let now = guest.cpu.state.register(register) >> (8 * byte);
            assert_eq!(now as u8, value, "byte {byte} of register {register}");
        }
    }
}

#[test]
fn faults_leave_the_state_before_the_instruction() {
    let mut guest = Guest::new(|a| {
        a.mov(rcx, END).unwrap();
        a.xor(eax, eax).unwrap(); // ZF, which the ADD behind the fault would overwrite
        a.add(rdx, qword_ptr(rcx)).unwrap();
        a.add(rax, 1).unwrap();
    });
    guest.cpu.state.set_register(RDX, 9);
    assert_eq!(guest.cpu.run(&Nothing, 4), Stop::TripleFault);
    let state = &guest.cpu.state;
    assert_eq!(guest.cpu.meter.used(), 3, "the one that faulted, too");
    assert_eq!(state.rip, CODE + 10 + 2);
    assert_eq!(state.register(RDX), 9);
    assert_eq!(state.rflags() & STATUS & !crate::state::rflags::PF, ZF);
}

#[test]
fn a_division_by_zero_faults() {
    let mut guest = Guest::new(|a| {
        a.mov(eax, 100).unwrap();
        a.cdq().unwrap();
        a.mov(ecx, 7).unwrap();
        a.idiv(ecx).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.div(rcx).unwrap();
    });
    run(&mut guest, 5);
    assert_eq!(guest.cpu.state.register(RAX), 14);
    assert_eq!(guest.cpu.state.register(RDX), 2);
    assert_eq!(guest.cpu.run(&Nothing, 1), Stop::TripleFault);
    assert_eq!(guest.cpu.state.register(RAX), 14);
}

#[test]
fn an_instruction_may_cross_pages() {
    let mut guest = Guest::new(|a| a.nop().unwrap());
    guest.poke(CODE + 0xffd, &[0xb8, 1, 2, 3, 4, 0x90]); // MOV EAX, 0x04030201
    for high in [4, 5] {
        guest.poke(CODE + 0x1001, &[high]);
        guest.cpu.state.rip = CODE + 0xffd;
        run(&mut guest, 2);
        let expected = u64::from(high) << 24 | 0x30201;
        assert_eq!(guest.cpu.state.register(RAX), expected);
    }
}

#[test]
fn one_block_serves_two_addresses() {
    let mut guest = Guest::new(|a| {
        let mut next = a.create_label();
        a.lea(rax, qword_ptr(next)).unwrap();
        a.call(next).unwrap();
        a.set_label(&mut next).unwrap();
        a.pop(rcx).unwrap();
    });
    let alias = 0x10_0000;
    guest.poke(0x4000 + 8 * (alias >> 12), &(CODE | 3).to_le_bytes());
    for base in [CODE, alias] {
        guest.cpu.state.rip = base;
        run(&mut guest, 3);
        assert_eq!(guest.cpu.state.register(RAX), base + 12);
        assert_eq!(guest.cpu.state.register(RCX), base + 12);
    }
}

#[test]
fn flags_of_comparisons_are_the_processors() {
    let cases = [
        (1u32, 2u32, CF | SF),
        (2, 2, ZF),
        (0x8000_0000, 1, OF),
        (0x7fff_ffff, u32::MAX, CF | OF | SF),
    ];
    for (left, right, expected) in cases {
        let mut guest = Guest::new(|a| {
            let mut out = a.create_label();
            a.mov(eax, left).unwrap();
            a.mov(ecx, right).unwrap();
            a.cmp(eax, ecx).unwrap();
            a.jl(out).unwrap();
            a.set_label(&mut out).unwrap();
            a.nop().unwrap();
        });
        run(&mut guest, 4);
        let flags = guest.cpu.state.rflags() & (CF | ZF | SF | OF);
        assert_eq!(flags, expected, "cmp {left:#x}, {right:#x}");
    }
}

/// Jumps after a comparison that is fused with them, and one that is not, agree with Rust.
#[test]
fn fused_jumps_take_the_right_way() {
    type Jump = fn(&mut CodeAssembler, CodeLabel) -> Result<(), iced_x86::IcedError>;
    type Holds = fn(i32, i32) -> bool;
    let jumps: [(Jump, Holds); 10] = [
        (|a, to| a.je(to), |l, r| l == r),
        (|a, to| a.jne(to), |l, r| l != r),
        (|a, to| a.jb(to), |l, r| (l as u32) < r as u32),
        (|a, to| a.jae(to), |l, r| l as u32 >= r as u32),
        (|a, to| a.jbe(to), |l, r| l as u32 <= r as u32),
        (|a, to| a.ja(to), |l, r| l as u32 > r as u32),
        (|a, to| a.jl(to), |l, r| l < r),
        (|a, to| a.jge(to), |l, r| l >= r),
        (|a, to| a.jle(to), |l, r| l <= r),
        (|a, to| a.jg(to), |l, r| l > r),
    ];
    let values = [0, 1, -1, 5, i32::MIN, i32::MAX];
    for (number, (jump, holds)) in jumps.iter().enumerate() {
        for (left, right) in values.iter().flat_map(|l| values.map(|r| (*l, r))) {
            for fused in [true, false] {
                let mut guest = Guest::new(|a| {
                    let mut out = a.create_label();
                    a.mov(eax, left).unwrap();
                    a.cmp(eax, right).unwrap();
                    if !fused {
                        a.nop().unwrap();
                        a.lea(rsi, qword_ptr(rsi)).unwrap();
                    }
                    jump(a, out).unwrap();
                    a.mov(edx, 1).unwrap();
                    a.set_label(&mut out).unwrap();
                    a.nop().unwrap();
                });
                let taken = holds(left, right);
                run(&mut guest, 4 + 2 * u64::from(!fused));
                let fell = guest.cpu.state.register(RDX) == 1;
                assert_eq!(fell, !taken, "jump {number} after {left} and {right}");
            }
        }
    }
}

#[test]
fn a_push_to_a_noncanonical_stack_faults() {
    let mut guest = Guest::new(|a| a.push(rax).unwrap());
    guest.cpu.state.set_register(RSP, 1 << 48);
    assert_eq!(guest.cpu.run(&Nothing, 1), Stop::TripleFault);
    assert_eq!(guest.cpu.state.register(RSP), 1 << 48);
    assert_eq!(guest.cpu.state.rip, CODE);
}

#[test]
fn single_steps_trap() {
    let mut guest = Guest::new(sum_loop);
    let flags = guest.cpu.state.rflags();
    guest.cpu.state.set_rflags(flags | TF);
    assert_eq!(guest.cpu.run(&Nothing, 100), Stop::TripleFault); // no IDT
    assert_eq!(guest.cpu.meter.used(), 1);
    assert_eq!(guest.cpu.state.dr[4] & 1 << 14, 1 << 14);
}

#[test]
fn stores_and_loads_meet() {
    let mut guest = Guest::new(|a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(qword_ptr(rbx), 0x11223344).unwrap();
        a.mov(byte_ptr(rbx + 7), 0x80u32 as i32).unwrap();
        a.mov(rax, qword_ptr(rbx + 1)).unwrap();
        a.movsx(ecx, byte_ptr(rbx + 7)).unwrap();
    });
    run(&mut guest, 5);
    assert_eq!(guest.peek(DATA), 0x8000_0000_1122_3344);
    assert_eq!(guest.cpu.state.register(RAX), 0x0080_0000_0011_2233);
    assert_eq!(guest.cpu.state.register(RCX), 0xffff_ff80);
}
