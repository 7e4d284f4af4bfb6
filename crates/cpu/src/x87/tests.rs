mod profile;

use std::cell::RefCell;
use std::sync::Arc;

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions};

use crate::error::{Exception, Vector};
use crate::memory::Ram;
use crate::processor::{Environment, Processor};
use crate::state::{SegmentName, rflags};

/// 64 KiB of memory that is all devices: no RAM, so no unsafe code, is needed to test instructions.
pub(crate) struct Memory(pub(crate) RefCell<Vec<u8>>);

impl Default for Memory {
    fn default() -> Self {
        Self(RefCell::new(vec![0; 0x10000]))
    }
}

impl Memory {
    pub(crate) fn put(&self, at: usize, bytes: &[u8]) {
        self.0.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.borrow()[at..at + N].try_into().unwrap()
    }
}

impl Environment for Memory {
    fn memory_read(&self, address: u64, size: u8) -> u64 {
        let memory = self.0.borrow();
        (0..size).fold(0, |value, byte| {
            let at = (address as usize + usize::from(byte)) & 0xffff;
            value | u64::from(memory[at]) << (8 * byte)
        })
    }
    fn memory_write(&self, address: u64, size: u8, value: u64) {
        for byte in 0..usize::from(size) {
            self.0.borrow_mut()[(address as usize + byte) & 0xffff] = (value >> (8 * byte)) as u8;
        }
    }
}

/// A processor in 64-bit mode (without paging, which the mode does not ask for) with SSE enabled.
pub(crate) fn processor() -> Processor {
    let mut cpu = Processor::new(Arc::new(Ram::new(Vec::new())));
    cpu.state.cr0 = 0x31;
    cpu.state.cr4 = 0x600;
    cpu.state.efer = 0x500;
    let mut code = *cpu.state.segment(SegmentName::Cs);
    code.attributes |= 1 << 13;
    cpu.state.set_segment(SegmentName::Cs, code);
    cpu
}

/// Assembles and executes instructions by this crate's vector and x87 modules.
pub(crate) fn run(
    cpu: &mut Processor,
    memory: &Memory,
    write: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Exception> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    write(&mut assembler).unwrap();
    let bytes = assembler.assemble(0x1000).unwrap();
    let mut decoder = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        cpu.state.rip = instruction.ip();
        cpu.vector_instruction(memory, &instruction)
            .or_else(|| cpu.x87_instruction(memory, &instruction))
            .unwrap_or_else(|| panic!("{:?} is nobody's", instruction.code()))?;
    }
    Ok(())
}

type IcedError = iced_x86::IcedError;

pub(crate) const AT: usize = 0x2000;

fn at() -> AsmMemoryOperand {
    ptr(AT as u64)
}

fn result(cpu: &mut Processor, memory: &Memory) -> f64 {
    run(cpu, memory, |a| a.fstp(qword_ptr(AT as u64 + 0x100))).unwrap();
    f64::from_le_bytes(memory.get(AT + 0x100))
}

#[test]
fn arithmetic_equals_the_hosts() {
    type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [(&str, Write, f64); 9] = [
        ("fadd", |a| a.fadd(qword_ptr(0x2008)), 10.0),
        ("fsub", |a| a.fsub(qword_ptr(0x2008)), 6.0),
        ("fsubr", |a| a.fsubr(qword_ptr(0x2008)), -6.0),
        ("fmul", |a| a.fmul(qword_ptr(0x2008)), 16.0),
        ("fdiv", |a| a.fdiv(qword_ptr(0x2008)), 4.0),
        ("fdivr", |a| a.fdivr(qword_ptr(0x2008)), 0.25),
        ("fiadd", |a| a.fiadd(word_ptr(0x2010)), 5.0),
        ("fild", |a| a.fild(word_ptr(0x2010)), -3.0),
        ("fsqrt", |a| a.fsqrt(), 8f64.sqrt()),
    ];
    for (name, write, expected) in cases {
        let (mut cpu, memory) = (processor(), Memory::default());
        memory.put(AT, &8f64.to_le_bytes());
        memory.put(AT + 8, &2f64.to_le_bytes());
        memory.put(AT + 16, &(-3i16).to_le_bytes());
        run(&mut cpu, &memory, |a| a.fld(qword_ptr(AT as u64))).unwrap();
        run(&mut cpu, &memory, write).unwrap();
        assert_eq!(result(&mut cpu, &memory), expected, "{name}");
        assert_eq!(cpu.state.fx.fip, 0x1000, "{name}");
    }
}

#[test]
fn constants_register_forms_and_wide_stores() {
    let (mut cpu, memory) = (processor(), Memory::default());
    run(&mut cpu, &memory, |a| {
        a.fldpi()?;
        a.fld1()?;
        a.fxch(st0, st1)?;
        a.fstp(tbyte_ptr(AT as u64))?;
        a.fldz()?;
        a.faddp(st1, st0)
    })
    .unwrap();
    let pi: [u8; 10] = memory.get(AT);
    assert_eq!(
        pi,
        [0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40]
    );
    assert_eq!(cpu.state.fx.ftw, 0x80);
    assert_eq!(result(&mut cpu, &memory), 1.0);
    assert_eq!(cpu.state.fx.ftw, 0);
}

#[test]
fn comparisons_and_conditional_moves_use_the_guests_flags() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.set_rflags(rflags::STATUS);
    run(&mut cpu, &memory, |a| {
        a.fldpi()?;
        a.fld1()?;
        a.fcomi(st0, st1)
    })
    .unwrap();
    assert_eq!(cpu.state.rflags() & rflags::STATUS, rflags::CF, "1 < pi");
    run(&mut cpu, &memory, |a| a.fcmovb(st0, st1)).unwrap();
    assert_eq!(result(&mut cpu, &memory), std::f64::consts::PI);
    cpu.state.set_rflags(0);
    run(&mut cpu, &memory, |a| {
        a.fld1()?;
        a.fcmovb(st0, st1)
    })
    .unwrap();
    assert_eq!(result(&mut cpu, &memory), 1.0, "CF is clear");
}

#[test]
fn stack_overflow_is_flagged() {
    let (mut cpu, memory) = (processor(), Memory::default());
    for _ in 0..8 {
        run(&mut cpu, &memory, |a| a.fld1()).unwrap();
    }
    assert_eq!(cpu.state.fx.fsw & 0xff, 0);
    run(&mut cpu, &memory, |a| a.fld1()).unwrap();
    assert_eq!(cpu.state.fx.fsw & 0x2ff, 0x241, "IE, SF and C1");
    assert!(result(&mut cpu, &memory).is_nan());
}

#[test]
fn unmasked_exceptions_wait_for_the_next_instruction() {
    let (mut cpu, memory) = (processor(), Memory::default());
    memory.put(AT, &0x37bu16.to_le_bytes()); // zero-divide unmasked
    run(&mut cpu, &memory, |a| {
        a.fldcw(at())?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)
    })
    .unwrap();
    assert_eq!(cpu.state.fx.fsw & 0x80ff, 0x8084);
    assert_eq!(cpu.state.fx.ftw, 0xc0, "nothing was popped");
    let pending = Err(Exception::new(Vector::FloatingPoint));
    assert_eq!(run(&mut cpu, &memory, |a| a.fld1()), pending);
    assert_eq!(run(&mut cpu, &memory, |a| a.wait()), pending);
    assert_eq!(run(&mut cpu, &memory, |a| a.pxor(mm0, mm0)), pending);
    run(&mut cpu, &memory, |a| {
        a.fnstsw(ax)?;
        a.fnclex()?;
        a.wait()
    })
    .unwrap();
    assert_eq!(cpu.state.register(0) & 0x80ff, 0x8084);
    assert_eq!(result(&mut cpu, &memory), 0.0, "the divisor is still there");
}

#[test]
fn an_unmasked_invalid_store_stores_nothing() {
    let (mut cpu, memory) = (processor(), Memory::default());
    memory.put(AT, &0x37eu16.to_le_bytes());
    memory.put(AT + 8, &f64::NAN.to_le_bytes());
    memory.put(AT + 16, &[0x55; 4]);
    run(&mut cpu, &memory, |a| {
        a.fldcw(at())?;
        a.fld(qword_ptr(AT as u64 + 8))?;
        a.fistp(dword_ptr(AT as u64 + 16))
    })
    .unwrap();
    assert_eq!(memory.get(AT + 16), [0x55; 4]);
    assert_eq!(cpu.state.fx.ftw, 0x80, "not popped");
    assert_eq!(cpu.state.fx.fsw & 0x81, 0x81);
}

#[test]
fn environments_have_the_manuals_layout() {
    let (mut cpu, memory) = (processor(), Memory::default());
    run(&mut cpu, &memory, |a| {
        a.fld1()?;
        a.fldz()?;
        a.fnstenv(at())
    })
    .unwrap();
    let words: [u8; 28] = memory.get(AT);
    let word = |index: usize| u32::from_le_bytes(words[index * 4..][..4].try_into().unwrap());
    assert_eq!(word(0), 0xffff_037f);
    assert_eq!(word(1), 0xffff_3000, "TOP is 6");
    assert_eq!(
        word(2),
        0xffff_1fff,
        "register 7 valid, 6 zero, the others empty"
    );
    assert_eq!(word(3), 0x1002, "the second load");
    // A whole state, there and back.
    let before = cpu.state.fx;
    run(&mut cpu, &memory, |a| a.fnsave(at())).unwrap();
    assert_eq!((cpu.state.fx.ftw, cpu.state.fx.fsw), (0, 0));
    run(&mut cpu, &memory, |a| a.frstor(at())).unwrap();
    assert_eq!(cpu.state.fx.st, before.st);
    assert_eq!(
        (cpu.state.fx.ftw, cpu.state.fx.fsw),
        (before.ftw, before.fsw)
    );
}

#[test]
fn fxsave_and_fxrstor_are_inverse_and_checked() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.fx.xmm[15] = [0xa5; 16];
    memory.put(AT, &[0x77; 512]);
    run(&mut cpu, &memory, |a| {
        a.fldpi()?;
        a.fxsave64(at())
    })
    .unwrap();
    assert_eq!(memory.get(AT + 400), [0xa5; 16]);
    assert_eq!(memory.get(AT + 416), [0x77; 96], "not the processor's");
    let before = cpu.state.fx;
    cpu.state.fx = crate::state::FxState::default();
    run(&mut cpu, &memory, |a| a.fxrstor64(at())).unwrap();
    assert_eq!(cpu.state.fx, before);
    let unaligned = run(&mut cpu, &memory, |a| a.fxsave(ptr(AT as u64 + 8)));
    assert_eq!(unaligned, Err(Exception::gp(0)));
    memory.put(AT + 24, &[0xff; 4]);
    let reserved = run(&mut cpu, &memory, |a| a.fxrstor(at()));
    assert_eq!(reserved, Err(Exception::gp(0)));
}

#[test]
fn control_registers_turn_it_off() {
    let memory = Memory::default();
    for (control0, wait) in [(0x35, false), (0x39, false), (0x3b, true)] {
        let mut cpu = processor();
        cpu.state.cr0 = control0;
        let missing = Err(Exception::new(Vector::DeviceNotAvailable));
        assert_eq!(
            run(&mut cpu, &memory, |a| a.fninit()),
            missing,
            "{control0:#x}"
        );
        assert_eq!(
            run(&mut cpu, &memory, |a| a.wait()).is_err(),
            wait,
            "{control0:#x}"
        );
    }
}

#[test]
fn the_hosts_own_state_survives() {
    let (mut cpu, memory) = (processor(), Memory::default());
    cpu.state.fx.fcw = 0xf7f; // towards zero
    cpu.state.fx.mxcsr = 0xff80;
    run(&mut cpu, &memory, |a| a.fldpi()).unwrap();
    assert_eq!(std::hint::black_box(1.0f64) / 3.0, 0.333_333_333_333_333_3);
    assert_eq!(cpu.state.fx.mxcsr, 0xff80);
}

#[test]
fn unmasked_overflow_gives_the_wrapped_result() {
    let (mut cpu, memory) = (processor(), Memory::default());
    memory.put(AT, &0x377u16.to_le_bytes()); // overflow unmasked
    let mut big = [0; 10]; // 2 to the 16000
    big[7] = 0x80;
    big[8..].copy_from_slice(&(16383u16 + 16000).to_le_bytes());
    memory.put(AT + 16, &big);
    run(&mut cpu, &memory, |a| {
        a.fldcw(at())?;
        a.fld(tbyte_ptr(AT as u64 + 16))?;
        a.fmul_2(st0, st0)
    })
    .unwrap();
    let st = cpu.state.fx.st[0];
    let exponent = i32::from(u16::from_le_bytes([st[8], st[9]])) - 16383;
    assert_eq!(exponent, 32000 - 24576);
    assert_eq!(cpu.state.fx.fsw & 0x80ff, 0x8088);
}
