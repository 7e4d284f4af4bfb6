//! Arithmetic compared with the host's own, on edge values and pseudo-random ones.

use std::arch::asm;

use iced_x86::Register as R;
use iced_x86::code_asm::*;

use super::At::Reg;
use super::{Code, Guest};
use crate::processor::Flow;
use crate::state::rflags;

/// RAX, RDX, RCX and the status flags.
type Values = [u64; 4];

/// An instruction in both forms, and the flags that the manual leaves undefined.
struct Pair {
    name: &'static str,
    code: Code,
    host: fn(Values) -> Values,
    undefined: u64,
}

/// `pair!(undefined, instruction operands)`; the assembler's method may have another name.
macro_rules! pair {
    ($undefined:expr, $name:ident $($operand:ident),*) => {
        pair!($undefined, $name = $name $($operand),*)
    };
    ($undefined:expr, $method:ident = $name:ident $($operand:ident),*) => {
        Pair {
            name: concat!(stringify!($name), " ", stringify!($($operand),*)),
            code: |assembler| assembler.$method($($operand),*),
            host: |[mut a, mut d, mut c, mut flags]| {
                // SAFETY: arithmetic of these registers; only status flags are loaded.
                unsafe {
                    asm!(
                        "push {flags}",
                        "popfq",
                        concat!(stringify!($name), " ", stringify!($($operand),*)),
                        "pushfq",
                        "pop {flags}",
                        flags = inout(reg) flags,
                        inout("rax") a,
                        inout("rdx") d,
                        inout("rcx") c,
                    );
                }
                [a, d, c, flags & rflags::STATUS]
            },
            undefined: $undefined,
        }
    };
}

/// The same for each operand size.
macro_rules! sizes {
    ($list:ident, $undefined:expr, $($name:ident)*) => {
        $(
            $list.push(pair!($undefined, $name al, dl));
            $list.push(pair!($undefined, $name ah, dl));
            $list.push(pair!($undefined, $name ax, dx));
            $list.push(pair!($undefined, $name eax, edx));
            $list.push(pair!($undefined, $name rax, rdx));
        )*
    };
}

macro_rules! unary {
    ($list:ident, $undefined:expr, $($name:ident)*) => {
        $(
            $list.push(pair!($undefined, $name al));
            $list.push(pair!($undefined, $name dh));
            $list.push(pair!($undefined, $name ax));
            $list.push(pair!($undefined, $name eax));
            $list.push(pair!($undefined, $name rdx));
        )*
    };
}

macro_rules! shifts {
    ($list:ident, $undefined:expr, $($name:ident)*) => {
        $(
            $list.push(pair!($undefined, $name al, cl));
            $list.push(pair!($undefined, $name ax, cl));
            $list.push(pair!($undefined, $name eax, cl));
            $list.push(pair!($undefined, $name rax, cl));
        )*
    };
}

macro_rules! words {
    ($list:ident, $undefined:expr, $($method:ident = $name:ident)*) => {
        $(
            $list.push(pair!($undefined, $method = $name ax, dx));
            $list.push(pair!($undefined, $method = $name eax, edx));
            $list.push(pair!($undefined, $method = $name rax, rdx));
        )*
    };
}

fn pairs() -> Vec<Pair> {
    const BIT_TESTS: u64 = rflags::OF | rflags::SF | rflags::AF | rflags::PF;
    const PRODUCTS: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF;
    let mut list = Vec::new();
    sizes!(list, 0, add adc sub sbb cmp xadd cmpxchg);
    sizes!(list, rflags::AF, and or xor test);
    unary!(list, 0, inc dec neg not);
    unary!(list, PRODUCTS, mul imul);
    shifts!(list, rflags::AF | rflags::OF, shl shr sar);
    shifts!(list, rflags::OF, rol ror rcl rcr);
    words!(list, BIT_TESTS, bt = bt bts = bts btr = btr btc = btc);
    words!(list, BIT_TESTS | rflags::CF, bsf = bsf bsr = bsr);
    words!(list, PRODUCTS, imul_2 = imul);
    words!(list, 0, xchg = xchg cmovl = cmovl cmova = cmova cmovp = cmovp);
    list.push(pair!(rflags::AF | rflags::OF, shld eax, edx, cl));
    list.push(pair!(rflags::AF | rflags::OF, shld rax, rdx, cl));
    list.push(pair!(rflags::AF | rflags::OF, shrd eax, edx, cl));
    list.push(pair!(rflags::AF | rflags::OF, shrd rax, rdx, cl));
    list.push(pair!(0, movsx eax, dl));
    list.push(pair!(0, movzx rax, dx));
    list.push(pair!(0, setbe ah));
    list.push(pair!(0, setg dl));
    list.push(pair!(0, bswap rax));
    list.push(pair!(0, bswap edx));
    list
}

const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// Values to try: every pair of edges, then what a xorshift generator gives.
fn inputs() -> Vec<Values> {
    let mut seed: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut list: Vec<Values> = EDGES
        .iter()
        .flat_map(|&left| EDGES.map(|right| [left, right]))
        .map(|[left, right]| [left, right, random(), random() & rflags::STATUS])
        .collect();
    list.extend((0..400).map(|_| [random(), random(), random(), random() & rflags::STATUS]));
    list
}

#[test]
fn as_the_host_does() {
    let mut guest = Guest::new(64);
    let start = guest.processor.state.rip;
    let mut wrong = Vec::new();
    for pair in pairs() {
        for values in inputs() {
            let registers = [R::RAX, R::RDX, R::RCX];
            for (register, value) in registers.into_iter().zip(values) {
                guest.set(Reg(register), value);
            }
            guest.set_flags(values[3]);
            guest.processor.state.rip = start;
            assert_eq!(guest.execute(pair.code), Ok(Flow::Next), "{}", pair.name);
            let mut is = [0; 4];
            for (value, register) in is.iter_mut().zip(registers) {
                *value = guest.get(Reg(register));
            }
            let defined = rflags::STATUS & !pair.undefined;
            is[3] = guest.processor.state.rflags() & defined;
            let mut wanted = (pair.host)(values);
            wanted[3] &= defined;
            if is != wanted {
                wrong.push(format!(
                    "{} of {values:x?}: {is:x?}, on the host {wanted:x?}",
                    pair.name
                ));
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
