//! One instruction each: expected values follow from the manual by hand.

use iced_x86::Register as R;
use iced_x86::code_asm::*;

use super::At::{Mem, Reg};
use super::{Case, check};

/// A [`Case`] on one line or two.
macro_rules! case {
    ($name:literal, $bits:literal, $code:expr, $before:expr, $flags:literal => $after:expr, $flags_after:literal) => {
        Case {
            name: $name,
            bits: $bits,
            code: $code,
            before: $before,
            flags: $flags,
            after: $after,
            flags_after: $flags_after,
        }
    };
}

#[test]
#[rustfmt::skip] // a table
fn arithmetic() {
    check(&[
        case!("add8 wraps", 64, |a| a.add(al, bl), &[(Reg(R::RAX), 0xffff_ff80), (Reg(R::RBX), 0x80)], ""
            => &[(Reg(R::RAX), 0xffff_ff00)], "CPZO"),
        case!("add32 clears the upper half", 64, |a| a.add(eax, ebx), &[(Reg(R::RAX), 0xffff_ffff_7fff_ffff), (Reg(R::RBX), 1)], ""
            => &[(Reg(R::RAX), 0x8000_0000)], "PASO"),
        case!("add64 to memory", 64, |a| a.add(qword_ptr(rdi + 8), rax), &[(Reg(R::RAX), 1), (Reg(R::RDI), 0x8000), (Mem(0x8008, 8), 0xffff_ffff_ffff_ffff)], ""
            => &[(Mem(0x8008, 8), 0)], "CPAZ"),
        case!("adc with carry", 64, |a| a.adc(rax, rbx), &[(Reg(R::RAX), 0xffff_ffff_ffff_ffff), (Reg(R::RBX), 0xffff_ffff_ffff_ffff)], "C"
            => &[(Reg(R::RAX), 0xffff_ffff_ffff_ffff)], "CPAS"),
        case!("sub borrows", 64, |a| a.sub(cx, dx), &[(Reg(R::RCX), 0x1_0000), (Reg(R::RDX), 1)], ""
            => &[(Reg(R::RCX), 0x1_ffff)], "CPAS"),
        case!("sbb equal", 64, |a| a.sbb(eax, eax), &[(Reg(R::RAX), 5)], "C"
            => &[(Reg(R::RAX), 0xffff_ffff)], "CPAS"),
        case!("sbb byte overflow", 32, |a| a.sbb(al, bl), &[(Reg(R::RAX), 0x80), (Reg(R::RBX), 0x7f)], "C"
            => &[(Reg(R::RAX), 0)], "PZAO"),
        case!("cmp leaves", 64, |a| a.cmp(rax, -1), &[(Reg(R::RAX), 0)], ""
            => &[(Reg(R::RAX), 0)], "CA"),
        case!("and imm sign extends", 64, |a| a.and(rax, -16), &[(Reg(R::RAX), 0x1234_5678_9abc_def7)], "CO"
            => &[(Reg(R::RAX), 0x1234_5678_9abc_def0)], "P"),
        case!("xor", 64, |a| a.xor(ah, ah), &[(Reg(R::RAX), 0xff12)], "CO"
            => &[(Reg(R::RAX), 0x12)], "PZ"),
        case!("test", 64, |a| a.test(rax, rax), &[(Reg(R::RAX), 0x8000_0000_0000_0000)], "C"
            => &[], "PS"),
        case!("inc keeps carry", 64, |a| a.inc(al), &[(Reg(R::RAX), 0x7f)], "C"
            => &[(Reg(R::RAX), 0x80)], "CASO"),
        case!("dec keeps carry", 32, |a| a.dec(dword_ptr(edi)), &[(Reg(R::RDI), 0x8000)], "C"
            => &[(Mem(0x8000, 4), 0xffff_ffff)], "CPAS"),
        case!("neg of zero", 64, |a| a.neg(eax), &[(Reg(R::RAX), 0)], "C"
            => &[(Reg(R::RAX), 0)], "PZ"),
        case!("neg of the lowest", 64, |a| a.neg(al), &[(Reg(R::RAX), 0x80)], ""
            => &[(Reg(R::RAX), 0x80)], "CSO"),
        case!("not has no flags", 64, |a| a.not(ax), &[(Reg(R::RAX), 0x1_00ff)], "COS"
            => &[(Reg(R::RAX), 0x1_ff00)], "COS"),
        case!("lock add", 64, |a| a.lock().add(dword_ptr(rdi), eax), &[(Reg(R::RDI), 0x8001), (Reg(R::RAX), 3), (Mem(0x8001, 4), 0xffff_fffe)], ""
            => &[(Mem(0x8001, 4), 1)], "CA"),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn multiplication() {
    check(&[
        case!("mul8", 64, |a| a.mul(bl), &[(Reg(R::RAX), 0x5510), (Reg(R::RBX), 0x10)], ""
            => &[(Reg(R::RAX), 0x100)], "CO"),
        case!("mul64", 64, |a| a.mul(rbx), &[(Reg(R::RAX), 0xffff_ffff_ffff_ffff), (Reg(R::RBX), 0xffff_ffff_ffff_ffff)], ""
            => &[(Reg(R::RAX), 1), (Reg(R::RDX), 0xffff_ffff_ffff_fffe)], "CO"),
        case!("mul32 fits", 64, |a| a.mul(ebx), &[(Reg(R::RAX), 7), (Reg(R::RBX), 6), (Reg(R::RDX), 0xffff_ffff_ffff_ffff)], "CO"
            => &[(Reg(R::RAX), 42), (Reg(R::RDX), 0)], ""),
        case!("imul16", 32, |a| a.imul(bx), &[(Reg(R::RAX), 0xffff), (Reg(R::RBX), 2)], ""
            => &[(Reg(R::RAX), 0xfffe), (Reg(R::RDX), 0xffff)], ""),
        case!("imul 2 operands", 64, |a| a.imul_2(rax, rbx), &[(Reg(R::RAX), 0x4000_0000_0000_0000), (Reg(R::RBX), 2)], ""
            => &[(Reg(R::RAX), 0x8000_0000_0000_0000)], "CO"),
        case!("imul 3 operands", 64, |a| a.imul_3(eax, ebx, -3), &[(Reg(R::RBX), 5)], ""
            => &[(Reg(R::RAX), 0xffff_fff1)], ""),
        case!("div8", 64, |a| a.div(bl), &[(Reg(R::RAX), 0x101), (Reg(R::RBX), 2)], ""
            => &[(Reg(R::RAX), 0x180)], ""),
        case!("div64", 64, |a| a.div(rbx), &[(Reg(R::RDX), 1), (Reg(R::RAX), 0), (Reg(R::RBX), 3)], ""
            => &[(Reg(R::RAX), 0x5555_5555_5555_5555), (Reg(R::RDX), 1)], ""),
        case!("idiv32", 64, |a| a.idiv(ebx), &[(Reg(R::RAX), 0xffff_fff9), (Reg(R::RDX), 0xffff_ffff), (Reg(R::RBX), 2)], ""
            => &[(Reg(R::RAX), 0xffff_fffd), (Reg(R::RDX), 0xffff_ffff)], ""),
        case!("idiv64 lowest quotient", 64, |a| a.idiv(rbx), &[(Reg(R::RAX), 0x8000_0000_0000_0000), (Reg(R::RDX), 0xffff_ffff_ffff_ffff), (Reg(R::RBX), 1)], ""
            => &[(Reg(R::RAX), 0x8000_0000_0000_0000), (Reg(R::RDX), 0)], ""),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn shifts() {
    check(&[
        case!("shl1", 64, |a| a.shl(al, 1u32), &[(Reg(R::RAX), 0xc0)], ""
            => &[(Reg(R::RAX), 0x80)], "CAS"),
        case!("shl by zero", 64, |a| a.shl(eax, cl), &[(Reg(R::RAX), 0xffff_ffff_0000_0001), (Reg(R::RCX), 0x20)], "CO"
            => &[(Reg(R::RAX), 1)], "CO"),
        case!("shl8 by 8", 64, |a| a.shl(al, 8u32), &[(Reg(R::RAX), 0x1)], ""
            => &[(Reg(R::RAX), 0)], "CPZOA"),
        case!("shr64 by 63", 64, |a| a.shr(rax, cl), &[(Reg(R::RAX), 0xc000_0000_0000_0000), (Reg(R::RCX), 63)], ""
            => &[(Reg(R::RAX), 1)], "CA"),
        case!("shr1 overflow", 64, |a| a.shr(ax, 1u32), &[(Reg(R::RAX), 0x8001)], ""
            => &[(Reg(R::RAX), 0x4000)], "CPOA"),
        case!("sar", 64, |a| a.sar(eax, 4u32), &[(Reg(R::RAX), 0x8000_0008)], ""
            => &[(Reg(R::RAX), 0xf800_0000)], "CPSA"),
        case!("sar8 by 31", 64, |a| a.sar(al, 31u32), &[(Reg(R::RAX), 0x80)], ""
            => &[(Reg(R::RAX), 0xff)], "CPSA"),
        case!("rol8 by 8", 64, |a| a.rol(al, 8u32), &[(Reg(R::RAX), 0x81)], "ZS"
            => &[(Reg(R::RAX), 0x81)], "CZS"),
        case!("rol16", 64, |a| a.rol(ax, 4u32), &[(Reg(R::RAX), 0x1234)], ""
            => &[(Reg(R::RAX), 0x2341)], "CO"),
        case!("ror", 64, |a| a.ror(eax, 1u32), &[(Reg(R::RAX), 1)], ""
            => &[(Reg(R::RAX), 0x8000_0000)], "CO"),
        case!("rcl8", 64, |a| a.rcl(al, 1u32), &[(Reg(R::RAX), 0x80)], "C"
            => &[(Reg(R::RAX), 1)], "CO"),
        case!("rcl8 by 9", 64, |a| a.rcl(al, 9u32), &[(Reg(R::RAX), 0x55)], "C"
            => &[(Reg(R::RAX), 0x55)], "CO"),
        case!("rcr64", 64, |a| a.rcr(rax, 2u32), &[(Reg(R::RAX), 2)], "C"
            => &[(Reg(R::RAX), 0x4000_0000_0000_0000)], "CO"),
        case!("shld", 64, |a| a.shld(eax, ebx, 4u32), &[(Reg(R::RAX), 0x1234_5678), (Reg(R::RBX), 0xabcd_ef01)], ""
            => &[(Reg(R::RAX), 0x2345_678a)], "COA"),
        case!("shrd64", 64, |a| a.shrd(rax, rbx, cl), &[(Reg(R::RAX), 0xf0), (Reg(R::RBX), 1), (Reg(R::RCX), 4)], ""
            => &[(Reg(R::RAX), 0x1000_0000_0000_000f)], "PA"),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn bits() {
    check(&[
        case!("bt register wraps", 64, |a| a.bt(eax, ebx), &[(Reg(R::RAX), 2), (Reg(R::RBX), 33)], "Z"
            => &[], "CZ"),
        case!("bts memory beyond", 64, |a| a.bts(dword_ptr(rdi), eax), &[(Reg(R::RDI), 0x8008), (Reg(R::RAX), 0xffff_ffff)], ""
            => &[(Mem(0x8004, 4), 0x8000_0000)], ""),
        case!("btr immediate stays", 64, |a| a.btr(qword_ptr(rdi), 65u32), &[(Reg(R::RDI), 0x8008), (Mem(0x8008, 8), 3)], ""
            => &[(Mem(0x8008, 8), 1)], "C"),
        case!("lock btc", 64, |a| a.lock().btc(dword_ptr(rdi), eax), &[(Reg(R::RDI), 0x8000), (Reg(R::RAX), 32)], ""
            => &[(Mem(0x8004, 4), 1)], ""),
        case!("bsf", 64, |a| a.bsf(rax, rbx), &[(Reg(R::RBX), 0x100)], "Z"
            => &[(Reg(R::RAX), 8)], ""),
        case!("bsf of zero", 64, |a| a.bsf(eax, ebx), &[(Reg(R::RAX), 0x1_0000_0007)], ""
            => &[(Reg(R::RAX), 0x1_0000_0007)], "ZP"),
        case!("bsr16", 64, |a| a.bsr(ax, bx), &[(Reg(R::RBX), 0x1_8000)], ""
            => &[(Reg(R::RAX), 15)], "P"),
        case!("lzcnt is bsr", 64, |a| a.lzcnt(eax, ebx), &[(Reg(R::RBX), 0x10)], ""
            => &[(Reg(R::RAX), 4)], ""),
        case!("tzcnt is bsf", 64, |a| a.tzcnt(eax, ebx), &[(Reg(R::RBX), 0x30)], ""
            => &[(Reg(R::RAX), 4)], ""),
        case!("popcnt", 64, |a| a.popcnt(rax, rbx), &[(Reg(R::RBX), 0xff00_0000_0000_0001)], "CPAZSO"
            => &[(Reg(R::RAX), 9)], ""),
        case!("crc32 of '1'", 64, |a| a.crc32(eax, bl), &[(Reg(R::RAX), 0xffff_ffff), (Reg(R::RBX), 0x31)], ""
            => &[(Reg(R::RAX), 0x6f0a_661c)], ""),
        case!("bswap32", 64, |a| a.bswap(eax), &[(Reg(R::RAX), 0xffff_ffff_1122_3344)], ""
            => &[(Reg(R::RAX), 0x4433_2211)], ""),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn moves() {
    check(&[
        case!("mov imm64", 64, |a| a.mov(rax, 0x1122_3344_5566_7788i64), &[], ""
            => &[(Reg(R::RAX), 0x1122_3344_5566_7788)], ""),
        case!("mov high byte", 64, |a| a.mov(ah, bl), &[(Reg(R::RAX), 0x1111), (Reg(R::RBX), 0x22)], ""
            => &[(Reg(R::RAX), 0x2211)], ""),
        case!("movzx", 64, |a| a.movzx(eax, byte_ptr(rdi)), &[(Reg(R::RAX), 0xffff_ffff_ffff_ffff), (Reg(R::RDI), 0x8000), (Mem(0x8000, 2), 0xff80)], ""
            => &[(Reg(R::RAX), 0x80)], ""),
        case!("movsx", 64, |a| a.movsx(ax, bl), &[(Reg(R::RAX), 0x1_0000), (Reg(R::RBX), 0x80)], ""
            => &[(Reg(R::RAX), 0x1_ff80)], ""),
        case!("movsxd", 64, |a| a.movsxd(rax, ebx), &[(Reg(R::RBX), 0x8000_0000)], ""
            => &[(Reg(R::RAX), 0xffff_ffff_8000_0000)], ""),
        case!("lea 16", 64, |a| a.lea(ax, qword_ptr(rbx + rcx * 4 + 3)), &[(Reg(R::RAX), 0x7_0000), (Reg(R::RBX), 0xffff), (Reg(R::RCX), 1)], ""
            => &[(Reg(R::RAX), 0x7_0006)], ""),
        case!("lea 32-bit address", 64, |a| a.lea(rax, qword_ptr(ebx + 1)), &[(Reg(R::RBX), 0xffff_ffff)], ""
            => &[(Reg(R::RAX), 0)], ""),
        case!("cmov false clears", 64, |a| a.cmove(eax, ebx), &[(Reg(R::RAX), 0xffff_ffff_0000_0001), (Reg(R::RBX), 2)], ""
            => &[(Reg(R::RAX), 1)], ""),
        case!("cmov true", 64, |a| a.cmovl(rax, rbx), &[(Reg(R::RAX), 1), (Reg(R::RBX), 2)], "S"
            => &[(Reg(R::RAX), 2)], "S"),
        case!("setcc", 64, |a| a.seta(al), &[(Reg(R::RAX), 0x100)], ""
            => &[(Reg(R::RAX), 0x101)], ""),
        case!("cdqe", 64, |a| a.cdqe(), &[(Reg(R::RAX), 0x8000_0000)], ""
            => &[(Reg(R::RAX), 0xffff_ffff_8000_0000)], ""),
        case!("cwd", 64, |a| a.cwd(), &[(Reg(R::RAX), 0x8000), (Reg(R::RDX), 0x1_0000)], ""
            => &[(Reg(R::RDX), 0x1_ffff)], ""),
        case!("cqo", 64, |a| a.cqo(), &[(Reg(R::RAX), 1), (Reg(R::RDX), 5)], ""
            => &[(Reg(R::RDX), 0)], ""),
        case!("xlat", 64, |a| a.xlatb(), &[(Reg(R::RAX), 0x10), (Reg(R::RBX), 0x8000), (Mem(0x8010, 1), 0x77)], ""
            => &[(Reg(R::RAX), 0x77)], ""),
        case!("lahf", 64, |a| a.lahf(), &[], "CZ"
            => &[(Reg(R::RAX), 0x4300)], "CZ"),
        case!("sahf keeps OF", 64, |a| a.sahf(), &[(Reg(R::RAX), 0xff00)], "O"
            => &[], "CPAZSO"),
        case!("cmc", 64, |a| a.cmc(), &[], "CZ"
            => &[], "Z"),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn exchanges() {
    check(&[
        case!("xchg memory", 64, |a| a.xchg(dword_ptr(rdi), eax), &[(Reg(R::RAX), 0xffff_ffff_0000_0001), (Reg(R::RDI), 0x8000), (Mem(0x8000, 4), 9)], ""
            => &[(Reg(R::RAX), 9), (Mem(0x8000, 4), 1)], ""),
        case!("xchg halves", 64, |a| a.xchg(al, ah), &[(Reg(R::RAX), 0x1234)], ""
            => &[(Reg(R::RAX), 0x3412)], ""),
        case!("xadd", 64, |a| a.xadd(rax, rbx), &[(Reg(R::RAX), 1), (Reg(R::RBX), 2)], ""
            => &[(Reg(R::RAX), 3), (Reg(R::RBX), 1)], "P"),
        case!("xadd with itself", 64, |a| a.xadd(eax, eax), &[(Reg(R::RAX), 4)], ""
            => &[(Reg(R::RAX), 8)], ""),
        case!("lock xadd", 64, |a| a.lock().xadd(byte_ptr(rdi), al), &[(Reg(R::RAX), 1), (Reg(R::RDI), 0x8000), (Mem(0x8000, 1), 0xff)], ""
            => &[(Reg(R::RAX), 0xff), (Mem(0x8000, 1), 0)], "CPAZ"),
        case!("cmpxchg equal", 64, |a| a.cmpxchg(dword_ptr(rdi), ebx), &[(Reg(R::RAX), 0xffff_ffff_0000_0005), (Reg(R::RBX), 6), (Reg(R::RDI), 0x8000), (Mem(0x8000, 4), 5)], ""
            => &[(Reg(R::RAX), 0xffff_ffff_0000_0005), (Mem(0x8000, 4), 6)], "PZ"),
        case!("cmpxchg other", 64, |a| a.lock().cmpxchg(dword_ptr(rdi), ebx), &[(Reg(R::RAX), 0xffff_ffff_0000_0004), (Reg(R::RBX), 6), (Reg(R::RDI), 0x8000), (Mem(0x8000, 4), 5)], ""
            => &[(Reg(R::RAX), 5), (Mem(0x8000, 4), 5)], "CPAS"),
        case!("cmpxchg8b", 32, |a| a.cmpxchg8b(qword_ptr(edi)), &[(Reg(R::RDX), 1), (Reg(R::RAX), 2), (Reg(R::RCX), 3), (Reg(R::RBX), 4), (Reg(R::RDI), 0x8004), (Mem(0x8004, 8), 0x1_0000_0002)], ""
            => &[(Mem(0x8004, 8), 0x3_0000_0004)], "Z"),
        case!("cmpxchg16b equal", 64, |a| a.lock().cmpxchg16b(xmmword_ptr(rdi)), &[(Reg(R::RDX), 1), (Reg(R::RAX), 2), (Reg(R::RCX), 3), (Reg(R::RBX), 4), (Reg(R::RDI), 0x8010), (Mem(0x8010, 8), 2), (Mem(0x8018, 8), 1)], ""
            => &[(Mem(0x8010, 8), 4), (Mem(0x8018, 8), 3)], "Z"),
        case!("cmpxchg16b other", 64, |a| a.cmpxchg16b(xmmword_ptr(rdi)), &[(Reg(R::RDX), 1), (Reg(R::RAX), 2), (Reg(R::RDI), 0x8010), (Mem(0x8010, 8), 7), (Mem(0x8018, 8), 8)], "Z"
            => &[(Reg(R::RAX), 7), (Reg(R::RDX), 8), (Mem(0x8010, 8), 7)], ""),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn stacks() {
    check(&[
        case!("push64", 64, |a| a.push(-2i32), &[(Reg(R::RSP), 0x9000)], ""
            => &[(Reg(R::RSP), 0x8ff8), (Mem(0x8ff8, 8), 0xffff_ffff_ffff_fffe)], ""),
        case!("push rsp", 64, |a| a.push(rsp), &[(Reg(R::RSP), 0x9000)], ""
            => &[(Mem(0x8ff8, 8), 0x9000)], ""),
        case!("push16 in 64", 64, |a| a.push(ax), &[(Reg(R::RSP), 0x9000), (Reg(R::RAX), 0x1_2345)], ""
            => &[(Reg(R::RSP), 0x8ffe), (Mem(0x8ffe, 2), 0x2345)], ""),
        case!("push in real mode wraps", 16, |a| a.push(ax), &[(Reg(R::RSP), 0x5_0000), (Reg(R::RAX), 0x7777)], ""
            => &[(Reg(R::RSP), 0x5_fffe), (Mem(0xfffe, 2), 0x7777)], ""),
        case!("pop rsp", 64, |a| a.pop(rsp), &[(Reg(R::RSP), 0x9000), (Mem(0x9000, 8), 0x1234)], ""
            => &[(Reg(R::RSP), 0x1234)], ""),
        case!("pop memory after increment", 64, |a| a.pop(qword_ptr(rsp)), &[(Reg(R::RSP), 0x9000), (Mem(0x9000, 8), 5)], ""
            => &[(Reg(R::RSP), 0x9008), (Mem(0x9008, 8), 5)], ""),
        case!("pushad", 32, |a| a.pushad(), &[(Reg(R::RSP), 0x9000), (Reg(R::RAX), 1), (Reg(R::RDI), 8)], ""
            => &[(Reg(R::RSP), 0x8fe0), (Mem(0x8ffc, 4), 1), (Mem(0x8fec, 4), 0x9000), (Mem(0x8fe0, 4), 8)], ""),
        case!("popa keeps upper halves", 32, |a| a.popa(), &[(Reg(R::RSP), 0x9000), (Reg(R::RAX), 0x5_0000), (Mem(0x900e, 2), 7), (Mem(0x9006, 2), 0x1111)], ""
            => &[(Reg(R::RSP), 0x9010), (Reg(R::RAX), 0x5_0007)], ""),
        case!("pushfq", 64, |a| a.pushfq(), &[(Reg(R::RSP), 0x9000)], "CO"
            => &[(Mem(0x8ff8, 8), 0x803)], "CO"),
        case!("popfq", 64, |a| a.popfq(), &[(Reg(R::RSP), 0x9000), (Mem(0x9000, 8), 0x4d5)], "O"
            => &[(Reg(R::RSP), 0x9008)], "CPAZSD"),
        case!("enter 0", 64, |a| a.enter(0x20, 0), &[(Reg(R::RSP), 0x9000), (Reg(R::RBP), 0x9100)], ""
            => &[(Reg(R::RSP), 0x8fd8), (Reg(R::RBP), 0x8ff8), (Mem(0x8ff8, 8), 0x9100)], ""),
        case!("enter 2", 32, |a| a.enter(8, 2), &[(Reg(R::RSP), 0x9000), (Reg(R::RBP), 0x9100), (Mem(0x90fc, 4), 0xabcd)], ""
            => &[(Reg(R::RSP), 0x8fec), (Reg(R::RBP), 0x8ffc), (Mem(0x8ff8, 4), 0xabcd), (Mem(0x8ff4, 4), 0x8ffc)], ""),
        case!("leave", 64, |a| a.leave(), &[(Reg(R::RSP), 0x100), (Reg(R::RBP), 0x9000), (Mem(0x9000, 8), 0x42)], ""
            => &[(Reg(R::RSP), 0x9008), (Reg(R::RBP), 0x42)], ""),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn decimals() {
    check(&[
        case!("aaa", 32, |a| a.aaa(), &[(Reg(R::RAX), 0x0f)], ""
            => &[(Reg(R::RAX), 0x105)], "CA"),
        case!("aas", 32, |a| a.aas(), &[(Reg(R::RAX), 0x2ff)], ""
            => &[(Reg(R::RAX), 0x109)], "CA"),
        case!("daa", 32, |a| a.daa(), &[(Reg(R::RAX), 0x9a)], ""
            => &[(Reg(R::RAX), 0)], "CPAZ"),
        case!("das", 32, |a| a.das(), &[(Reg(R::RAX), 0x23)], "A"
            => &[(Reg(R::RAX), 0x1d)], "PA"),
        case!("das borrows", 32, |a| a.das(), &[(Reg(R::RAX), 0x02)], "A"
            => &[(Reg(R::RAX), 0xfc)], "CPAS"),
        case!("aam", 32, |a| a.aam(10), &[(Reg(R::RAX), 63)], ""
            => &[(Reg(R::RAX), 0x603)], "P"),
        case!("aad", 32, |a| a.aad(10), &[(Reg(R::RAX), 0x603)], ""
            => &[(Reg(R::RAX), 63)], "P"),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn strings() {
    check(&[
        case!("movsb backwards", 64, |a| a.movsb(), &[(Reg(R::RSI), 0x8000), (Reg(R::RDI), 0x8100), (Mem(0x8000, 1), 7)], "D"
            => &[(Reg(R::RSI), 0x7fff), (Reg(R::RDI), 0x80ff), (Mem(0x8100, 1), 7)], "D"),
        case!("rep movsq", 64, |a| a.rep().movsq(), &[(Reg(R::RSI), 0x8000), (Reg(R::RDI), 0x8100), (Reg(R::RCX), 2), (Mem(0x8000, 8), 1), (Mem(0x8008, 8), 2)], ""
            => &[(Reg(R::RSI), 0x8010), (Reg(R::RDI), 0x8110), (Reg(R::RCX), 0), (Mem(0x8100, 8), 1), (Mem(0x8108, 8), 2)], ""),
        case!("rep movsb overlapping", 64, |a| a.rep().movsb(), &[(Reg(R::RSI), 0x8000), (Reg(R::RDI), 0x8001), (Reg(R::RCX), 7), (Mem(0x8000, 1), 0x5a)], ""
            => &[(Mem(0x8000, 8), 0x5a5a_5a5a_5a5a_5a5a), (Reg(R::RCX), 0)], ""),
        case!("rep movsd across pages", 64, |a| a.rep().movsd(), &[(Reg(R::RSI), 0x8ffe), (Reg(R::RDI), 0xa000), (Reg(R::RCX), 2), (Mem(0x8ffe, 8), 0x1122_3344_5566_7788)], ""
            => &[(Mem(0xa000, 8), 0x1122_3344_5566_7788), (Reg(R::RSI), 0x9006)], ""),
        case!("rep stosw in real mode", 16, |a| a.rep().stosw(), &[(Reg(R::RAX), 0xbeef), (Reg(R::RDI), 0xfffc), (Reg(R::RCX), 0x5_0003)], ""
            => &[(Reg(R::RDI), 0x2), (Reg(R::RCX), 0x5_0000), (Mem(0x0, 4), 0xbeef), (Mem(0xfffc, 4), 0xbeef_beef)], ""),
        case!("rep stosd", 32, |a| a.rep().stosd(), &[(Reg(R::RAX), 0x1234), (Reg(R::RDI), 0x8ffc), (Reg(R::RCX), 2)], ""
            => &[(Mem(0x8ffc, 8), 0x1234_0000_1234), (Reg(R::RDI), 0x9004)], ""),
        case!("rep with no count", 64, |a| a.rep().stosb(), &[(Reg(R::RAX), 1), (Reg(R::RDI), 0x8000)], ""
            => &[(Mem(0x8000, 1), 0)], ""),
        case!("lodsw", 32, |a| a.lodsw(), &[(Reg(R::RAX), 0xffff_0000), (Reg(R::RSI), 0x8000), (Mem(0x8000, 2), 0x1234)], ""
            => &[(Reg(R::RAX), 0xffff_1234), (Reg(R::RSI), 0x8002)], ""),
        case!("repe cmpsb", 64, |a| a.repe().cmpsb(), &[(Reg(R::RSI), 0x8000), (Reg(R::RDI), 0x8100), (Reg(R::RCX), 8), (Mem(0x8000, 4), 0x0403_0201), (Mem(0x8100, 4), 0x0405_0201)], ""
            => &[(Reg(R::RSI), 0x8003), (Reg(R::RDI), 0x8103), (Reg(R::RCX), 5)], "CAS"),
        case!("repne scasb", 64, |a| a.repne().scasb(), &[(Reg(R::RAX), 3), (Reg(R::RDI), 0x8000), (Reg(R::RCX), 9), (Mem(0x8000, 4), 0x0403_0201)], ""
            => &[(Reg(R::RDI), 0x8003), (Reg(R::RCX), 6)], "PZ"),
    ]);
}

#[test]
#[rustfmt::skip] // a table
fn narrow_modes() {
    check(&[
        case!("bp is in the stack segment", 16, |a| a.mov(al, byte_ptr(bp + si)), &[(Reg(R::RBP), 0xffff), (Reg(R::RSI), 0x11), (Mem(0x10, 1), 9)], ""
            => &[(Reg(R::RAX), 9)], ""),
        case!("moffs", 16, |a| a.mov(ax, word_ptr(0x1234)), &[(Mem(0x1234, 2), 0xabcd), (Reg(R::RAX), 0x5_0000)], ""
            => &[(Reg(R::RAX), 0x5_abcd)], ""),
        case!("32-bit operand", 16, |a| a.add(eax, 0x1_0000), &[(Reg(R::RAX), 0xffff)], ""
            => &[(Reg(R::RAX), 0x1_ffff)], "P"),
        case!("32-bit address", 16, |a| a.mov(ax, word_ptr(ebx + ecx * 2)), &[(Reg(R::RBX), 0x1000), (Reg(R::RCX), 4), (Mem(0x1008, 2), 7)], ""
            => &[(Reg(R::RAX), 7)], ""),
        case!("bts reaches down in 16 bits", 16, |a| a.bts(word_ptr(bx), ax), &[(Reg(R::RBX), 0), (Reg(R::RAX), 0xffff)], ""
            => &[(Mem(0xfffe, 2), 0x8000)], ""),
        case!("push of 32 bits", 16, |a| a.push(eax), &[(Reg(R::RAX), 0x1234_5678), (Reg(R::RSP), 0x8000)], ""
            => &[(Reg(R::RSP), 0x7ffc), (Mem(0x7ffc, 4), 0x1234_5678)], ""),
        case!("inc by one byte", 32, |a| a.inc(edx), &[(Reg(R::RDX), 0xffff_ffff)], ""
            => &[(Reg(R::RDX), 0)], "PAZ"),
        case!("shrd16 by more than its size", 32, |a| a.shrd(ax, bx, 20u32), &[(Reg(R::RAX), 0x1234), (Reg(R::RBX), 0xabcd)], ""
            => &[(Reg(R::RAX), 0x4abc)], "COA"),
    ]);
}
