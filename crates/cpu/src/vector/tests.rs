use iced_x86::code_asm::*;

use crate::error::{Exception, Vector};
use crate::state::rflags;
use crate::x87::tests::{Memory, processor, run};

type Write = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

const AT: u64 = 0x2000;

fn floats(values: [f32; 4]) -> [u8; 16] {
    std::array::from_fn(|byte| values[byte / 4].to_le_bytes()[byte % 4])
}

fn doubles(values: [f64; 2]) -> [u8; 16] {
    std::array::from_fn(|byte| values[byte / 8].to_le_bytes()[byte % 8])
}

const A: [u8; 16] = *b"\x80\x7f\x01\xffMica vector\x91";
const B: [u8; 16] = *b"\x05\x82abcd\xfe\x10 host\x00\x00\xc3";

/// Runs `op xmm1, xmm2` on A and B.
fn binary(write: Write) -> u128 {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.fx.xmm[1] = A;
    cpu.state.fx.xmm[2] = B;
    run(&mut cpu, &memory, write).unwrap();
    u128::from_le_bytes(cpu.state.fx.xmm[1])
}

fn lanes<const N: usize, const S: usize>(f: impl Fn([u8; S], [u8; S]) -> [u8; S]) -> u128 {
    let lane = |bytes: &[u8; 16], lane: usize| bytes[lane * S..][..S].try_into().unwrap();
    let mut result = [0; 16];
    for index in 0..N {
        result[index * S..][..S].copy_from_slice(&f(lane(&A, index), lane(&B, index)));
    }
    u128::from_le_bytes(result)
}

#[test]
fn integers_lane_by_lane() {
    let word = |f: fn(i16, i16) -> i16| {
        lanes::<8, 2>(|a, b| f(i16::from_le_bytes(a), i16::from_le_bytes(b)).to_le_bytes())
    };
    let byte = |f: fn(u8, u8) -> u8| lanes::<16, 1>(|a, b| [f(a[0], b[0])]);
    let cases: [(&str, Write, u128); 9] = [
        ("paddw", |a| a.paddw(xmm1, xmm2), word(i16::wrapping_add)),
        (
            "psubsw",
            |a| a.psubsw(xmm1, xmm2),
            word(i16::saturating_sub),
        ),
        ("pmullw", |a| a.pmullw(xmm1, xmm2), word(i16::wrapping_mul)),
        ("pminsw", |a| a.pminsw(xmm1, xmm2), word(i16::min)),
        (
            "paddusb",
            |a| a.paddusb(xmm1, xmm2),
            byte(u8::saturating_add),
        ),
        ("pmaxub", |a| a.pmaxub(xmm1, xmm2), byte(u8::max)),
        ("pxor", |a| a.pxor(xmm1, xmm2), byte(|a, b| a ^ b)),
        ("pandn", |a| a.pandn(xmm1, xmm2), byte(|a, b| !a & b)),
        ("psraw", |a| a.psraw(xmm1, 3), word(|a, _| a >> 3)),
    ];
    for (name, write, expected) in cases {
        assert_eq!(binary(write), expected, "{name}");
    }
}

#[test]
fn shuffles_and_immediates() {
    let (a, b) = (u128::from_le_bytes(A), u128::from_le_bytes(B));
    let lane = |value: u128, lane: u32| value >> (32 * lane) & 0xffff_ffff;
    let four = |lanes: [u128; 4]| (0..4).fold(0, |all, i| all | lanes[i] << (32 * i));
    let cases: [(&str, Write, u128); 7] = [
        (
            "pshufd",
            |a| a.pshufd(xmm1, xmm2, 0x1b),
            four([3, 2, 1, 0].map(|i| lane(b, i))),
        ),
        (
            "shufps",
            |a| a.shufps(xmm1, xmm2, 0xe4),
            four([lane(a, 0), lane(a, 1), lane(b, 2), lane(b, 3)]),
        ),
        ("palignr", |a| a.palignr(xmm1, xmm2, 4), b >> 32 | a << 96),
        ("palignr", |a| a.palignr(xmm1, xmm2, 20), a >> 32),
        ("psrldq", |a| a.psrldq(xmm1, 5), a >> 40),
        ("pslldq", |a| a.pslldq(xmm1, 16), 0),
        (
            "blendpd",
            |a| a.blendpd(xmm1, xmm2, 2),
            a << 64 >> 64 | b >> 64 << 64,
        ),
    ];
    for (name, write, expected) in cases {
        assert_eq!(binary(write), expected, "{name}");
    }
}

#[test]
fn slots_are_what_their_table_says() {
    use iced_x86::{Code, Decoder, DecoderOptions, Register};
    let mut tables = 0;
    for code in Code::values() {
        let mnemonic = code.mnemonic();
        let xmm = format!("{code:?}").contains("_xmm_xmm");
        if !xmm || !super::native::has_immediate(mnemonic) {
            continue;
        }
        tables += 1;
        for immediate in 0..=255 {
            let bytes = super::native::slot_bytes(mnemonic, immediate).unwrap();
            let mut decoder = Decoder::new(64, &bytes, DecoderOptions::NONE);
            let instruction = decoder.decode();
            assert_eq!(instruction.code(), code);
            assert_eq!(instruction.op0_register(), Register::XMM0, "{code:?}");
            assert_eq!(instruction.op1_register(), Register::XMM1, "{code:?}");
            assert_eq!(instruction.immediate8(), immediate, "{code:?}");
            assert_eq!(decoder.decode().code(), Code::Retnq, "{code:?}");
        }
    }
    assert_eq!(tables, 27);
}

#[test]
fn pinsr_and_pextr() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.set_register(0, 0x1122_3344_5566_7788);
    run(&mut cpu, &memory, |a| {
        a.pinsrq(xmm1, rax, 1)?;
        a.pinsrb(xmm1, eax, 0x13)?; // lane 3
        a.pextrw(ecx, xmm1, 7)?;
        a.pextrd(dword_ptr(AT), xmm1, 2)?;
        a.pmovmskb(edx, xmm1)
    })
    .unwrap();
    assert_eq!(
        u128::from_le_bytes(cpu.state.fx.xmm[1]),
        0x1122_3344_5566_7788_0000_0000_8800_0000
    );
    assert_eq!(cpu.state.register(1), 0x1122);
    assert_eq!(memory.get(AT as usize), 0x5566_7788u32.to_le_bytes());
    assert_eq!(cpu.state.register(2), 0x108);
}

#[test]
fn scalars_keep_upper_lanes_and_read_their_bytes_only() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.fx.xmm[1] = floats([1.5, 2.0, 3.0, 4.0]);
    // The last four bytes below the end of the canonical half: eight would fault.
    let end = 0x0000_7fff_ffff_fffc_u64;
    memory.put(0xfffc, &2.25f32.to_le_bytes());
    cpu.state.set_register(0, end);
    run(&mut cpu, &memory, |a| a.addss(xmm1, dword_ptr(rax))).unwrap();
    assert_eq!(cpu.state.fx.xmm[1], floats([3.75, 2.0, 3.0, 4.0]));
    assert_eq!(
        run(&mut cpu, &memory, |a| a.addsd(xmm1, qword_ptr(rax))),
        Err(Exception::gp(0))
    );
    run(&mut cpu, &memory, |a| a.movss(xmm1, dword_ptr(rax))).unwrap();
    assert_eq!(cpu.state.fx.xmm[1], floats([2.25, 0.0, 0.0, 0.0]));
}

#[test]
fn rounding_is_the_guests() {
    let (mut cpu, memory) = (processor(), Memory::default());
    for (mode, expected) in [(0, 3), (1, 2), (2, 3), (3, 2)] {
        cpu.state.fx.mxcsr = 0x1f80 | mode << 13;
        cpu.state.fx.xmm[1] = doubles([2.6, 0.0]);
        run(&mut cpu, &memory, |a| a.cvtsd2si(rax, xmm1)).unwrap();
        assert_eq!(cpu.state.register(0), expected, "mode {mode}");
        assert_eq!(cpu.state.fx.mxcsr & 0x3f, 0x20, "inexact");
        let third = std::hint::black_box(1.0f64) / 3.0;
        assert_eq!(
            third.to_bits(),
            0x3fd5555555555555,
            "the host still rounds to nearest"
        );
    }
    run(&mut cpu, &memory, |a| a.cvttsd2si(eax, xmm1)).unwrap();
    assert_eq!(cpu.state.register(0), 2);
    cpu.state.set_register(1, (-7i64) as u64);
    run(&mut cpu, &memory, |a| a.cvtsi2sd(xmm1, rcx)).unwrap();
    assert_eq!(cpu.state.fx.xmm[1], doubles([-7.0, 0.0]));
}

#[test]
fn an_unmasked_exception_sets_flags_and_nothing_else() {
    let (mut cpu, memory) = (processor(), Memory::default());
    let before = doubles([1.0, 5.0]);
    cpu.state.fx.xmm[1] = before;
    cpu.state.fx.mxcsr = 0x1f80 & !0x200; // zero-divide
    let divide: Write = |a| a.divpd(xmm1, xmm2);
    let raised = run(&mut cpu, &memory, divide);
    // 1/0 raises; 5/0 too. Nothing is invalid.
    assert_eq!(raised, Err(Exception::new(Vector::SimdFloatingPoint)));
    assert_eq!(cpu.state.fx.xmm[1], before);
    assert_eq!(cpu.state.fx.mxcsr, 0x1d84);
    cpu.state.cr4 &= !0x400;
    assert_eq!(run(&mut cpu, &memory, divide), Err(Exception::ud()));
    cpu.state.fx.mxcsr = 0x1f80;
    run(&mut cpu, &memory, divide).unwrap();
    assert_eq!(cpu.state.fx.xmm[1], doubles([f64::INFINITY; 2]));
    assert_eq!(cpu.state.fx.mxcsr, 0x1f84);
}

#[test]
fn an_exact_denormal_raises_underflow_only_if_unmasked() {
    let (mut cpu, memory) = (processor(), Memory::default());
    let halve = |cpu: &mut crate::Processor, mxcsr| {
        cpu.state.fx.mxcsr = mxcsr;
        cpu.state.fx.xmm[1] = doubles([f64::MIN_POSITIVE, 0.0]);
        cpu.state.fx.xmm[2] = doubles([0.5, 0.0]);
        run(cpu, &memory, |a| a.mulsd(xmm1, xmm2))
    };
    halve(&mut cpu, 0x1f80).unwrap();
    assert_eq!(cpu.state.fx.mxcsr, 0x1f80);
    assert_eq!(cpu.state.fx.xmm[1], doubles([f64::MIN_POSITIVE / 2.0, 0.0]));
    let raised = halve(&mut cpu, 0x1f80 & !0x800);
    assert_eq!(raised, Err(Exception::new(Vector::SimdFloatingPoint)));
    assert_eq!(cpu.state.fx.mxcsr, 0x1790, "underflow, exact");
}

#[test]
fn comparisons_set_three_flags_and_clear_three() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.fx.xmm[2] = doubles([1.0, 0.0]);
    for (left, flags) in [
        (0.5, rflags::CF),
        (1.0, rflags::ZF),
        (2.0, 0),
        (f64::NAN, rflags::ZF | rflags::PF | rflags::CF),
    ] {
        cpu.state.set_rflags(rflags::STATUS);
        cpu.state.fx.xmm[1] = doubles([left, 0.0]);
        run(&mut cpu, &memory, |a| a.ucomisd(xmm1, xmm2)).unwrap();
        assert_eq!(cpu.state.rflags() & rflags::STATUS, flags, "{left}");
    }
    run(&mut cpu, &memory, |a| a.ptest(xmm2, xmm2)).unwrap();
    assert_eq!(cpu.state.rflags() & rflags::STATUS, rflags::CF);
}

#[test]
fn strings() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.fx.xmm[1] = *b"vo\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    memory.put(0x2001, b"mica, a virtual ");
    run(&mut cpu, &memory, |a| {
        a.pcmpistri(xmm1, xmmword_ptr(0x2001), 0)
    })
    .unwrap();
    assert_eq!(cpu.state.register(1), 8, "the first v or o");
    assert_eq!(cpu.state.rflags() & rflags::STATUS, rflags::CF | rflags::SF);
    cpu.state.set_register(0, 2);
    cpu.state.set_register(2, 5);
    run(&mut cpu, &memory, |a| {
        a.pcmpestrm(xmm1, xmmword_ptr(0x2001), 0)
    })
    .unwrap();
    assert_eq!(cpu.state.fx.xmm[0], [0; 16], "not in the first five");
}

#[test]
fn alignment() {
    let (mut cpu, memory) = (processor(), Memory::default());
    memory.put(0x2008, &A);
    let cases: [(&str, Write, bool); 6] = [
        ("movaps", |a| a.movaps(xmm1, xmmword_ptr(0x2008)), false),
        ("paddb", |a| a.paddb(xmm1, xmmword_ptr(0x2008)), false),
        ("movntdq", |a| a.movntdq(xmmword_ptr(0x2008), xmm1), false),
        ("movups", |a| a.movups(xmm1, xmmword_ptr(0x2008)), true),
        ("lddqu", |a| a.lddqu(xmm1, xmmword_ptr(0x2008)), true),
        ("addsd", |a| a.addsd(xmm1, qword_ptr(0x2004)), true),
    ];
    for (name, write, allowed) in cases {
        let expected = if allowed {
            Ok(())
        } else {
            Err(Exception::gp(0))
        };
        assert_eq!(run(&mut cpu, &memory, write), expected, "{name}");
    }
}

#[test]
fn mm_registers_are_the_x87s() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.set_register(0, 0x0102_0304_0506_0708);
    run(&mut cpu, &memory, |a| {
        a.fld1()?; // physical register 7
        a.movq(mm2, rax)?;
        a.paddb(mm2, mm7)
    })
    .unwrap();
    let fx = &cpu.state.fx;
    assert_eq!((fx.ftw, fx.top()), (0xff, 0));
    // 1.0 has the mantissa 8000000000000000.
    assert_eq!(
        u64::from_le_bytes(fx.st[2][..8].try_into().unwrap()),
        0x8102_0304_0506_0708
    );
    assert_eq!(fx.st[2][8..10], [0xff; 2]);
    assert_eq!(fx.st[7][8..10], [0xff, 0x3f], "only read");
    run(&mut cpu, &memory, |a| {
        a.movq2dq(xmm3, mm2)?;
        a.pshufw(mm1, mm2, 0)?;
        a.emms()
    })
    .unwrap();
    assert_eq!(
        u128::from_le_bytes(cpu.state.fx.xmm[3]),
        0x8102_0304_0506_0708
    );
    assert_eq!(cpu.state.fx.st[1][..8], [8, 7, 8, 7, 8, 7, 8, 7]);
    assert_eq!(cpu.state.fx.ftw, 0);
    assert_eq!(std::hint::black_box(3.0f64).sqrt(), 1.732_050_807_568_877_2);
}

#[test]
fn control_registers_turn_it_off() {
    let memory = Memory::default();
    let sse: Write = |a| a.addps(xmm1, xmm2);
    let mmx: Write = |a| a.paddb(mm1, mm2);
    let missing = Exception::new(Vector::DeviceNotAvailable);
    for (control0, control4, write, expected) in [
        (0x31, 0, sse, Err(Exception::ud())),
        (0x31, 0, mmx, Ok(())),
        (0x35, 0x600, sse, Err(Exception::ud())),
        (0x35, 0x600, mmx, Err(Exception::ud())),
        (0x39, 0x600, sse, Err(missing)),
        (0x39, 0x600, mmx, Err(missing)),
    ] {
        let mut cpu = processor();
        (cpu.state.cr0, cpu.state.cr4) = (control0, control4);
        assert_eq!(
            run(&mut cpu, &memory, write),
            expected,
            "{control0:#x} {control4:#x}"
        );
    }
    let mut cpu = processor();
    memory.put(0x2000, &0x1_1f80u32.to_le_bytes());
    assert_eq!(
        run(&mut cpu, &memory, |a| a.ldmxcsr(dword_ptr(AT))),
        Err(Exception::gp(0))
    );
}

#[test]
fn masked_stores_and_halves() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.set_register(7, AT);
    (cpu.state.fx.xmm[1], cpu.state.fx.xmm[2]) = (A, B);
    run(&mut cpu, &memory, |a| {
        a.maskmovdqu(xmm1, xmm2)?;
        a.movhlps(xmm3, xmm1)?;
        a.movhps(qword_ptr(AT + 32), xmm2)?;
        a.movlhps(xmm3, xmm2)
    })
    .unwrap();
    let expected: [u8; 16] = std::array::from_fn(|i| if B[i] & 0x80 != 0 { A[i] } else { 0 });
    assert_eq!(memory.get(AT as usize), expected);
    assert_eq!(memory.get::<8>(AT as usize + 32), B[8..]);
    assert_eq!(cpu.state.fx.xmm[3], [&A[8..], &B[..8]].concat()[..]);
}

#[test]
fn the_conversion_of_mm_registers_equals_the_scalar_one() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.set_register(0, 0xffff_fffd_0000_0005);
    cpu.state.fx.xmm[1] = floats([9.0, 9.0, 7.0, 8.0]);
    run(&mut cpu, &memory, |a| {
        a.movq(mm1, rax)?;
        a.cvtpi2ps(xmm1, mm1)?;
        a.cvtps2pi(mm2, xmm1)?;
        a.movq(rcx, mm2)
    })
    .unwrap();
    assert_eq!(cpu.state.fx.xmm[1], floats([5.0, -3.0, 7.0, 8.0]));
    assert_eq!(cpu.state.register(1), 0xffff_fffd_0000_0005);
    let one = u128::from_le_bytes(binary(|a| a.cvtdq2ps(xmm1, xmm2)).to_le_bytes());
    let expected = B
        .chunks_exact(4)
        .map(|lane| i32::from_le_bytes(lane.try_into().unwrap()) as f32)
        .collect::<Vec<_>>();
    assert_eq!(one.to_le_bytes(), floats(expected.try_into().unwrap()));
}
