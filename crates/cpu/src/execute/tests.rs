//! Single instructions, from assembler text to registers, flags and memory.

#![allow(unsafe_code)] // makes guest RAM

mod cases;
mod faults;
mod host;

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions, IcedError, Register};

use crate::memory::{PAGE, Ram, RamRange};
use crate::processor::{Environment, Executed, Processor};
use crate::state::{Segment, SegmentName, rflags};

/// Bytes of RAM; what is above is not mapped in 64-bit mode.
const RAM: u64 = 0x4_0000;
/// A page that is not mapped in 64-bit mode.
const HOLE: u64 = 0x2_0000;
/// Where the code is.
const CODE: u64 = 0x1_0000;

/// Nothing is around.
struct Nothing;

impl Environment for Nothing {
    fn memory_read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn memory_write(&self, _: u64, _: u8, _: u64) {}
}

/// What assembles one instruction.
type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Something with a value.
#[derive(Clone, Copy, Debug)]
enum At {
    /// A general register.
    Reg(Register),
    /// Bytes of memory: address and how many.
    Mem(u64, u8),
}

/// A processor with flat memory.
struct Guest {
    processor: Processor,
    bits: u32,
}

impl Guest {
    fn new(bits: u32) -> Self {
        let layout = std::alloc::Layout::from_size_align(RAM as usize, PAGE as usize).unwrap();
        // SAFETY: the layout has a size; the memory is never freed.
        let host = unsafe { std::alloc::alloc_zeroed(layout) };
        // SAFETY: as above, and nobody else knows it.
        let range = unsafe { RamRange::new(0, RAM, host) };
        let mut processor = Processor::new(Arc::new(Ram::new(vec![range])));
        let state = &mut processor.state;
        let (limit, code, data) = match bits {
            16 => (0xffff, 0x9b, 0x93),
            32 => (0xffff_ffff, 0xc09b, 0xc093),
            _ => (0xffff_ffff, 0xa09b, 0xc093),
        };
        for name in [
            SegmentName::Es,
            SegmentName::Ss,
            SegmentName::Ds,
            SegmentName::Fs,
            SegmentName::Gs,
            SegmentName::Cs,
        ] {
            let attributes = if name == SegmentName::Cs { code } else { data };
            state.set_segment(
                name,
                Segment {
                    selector: 8,
                    base: 0,
                    limit,
                    attributes,
                },
            );
        }
        state.rip = if bits == 16 { 0xf000 } else { CODE };
        state.cr0 = if bits == 16 { 0x10 } else { 0x11 };
        let mut guest = Self { processor, bits };
        if bits == 64 {
            for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
                guest.set(At::Mem(table, 8), next | 7);
            }
            for page in (0..RAM / PAGE).filter(|page| *page != HOLE / PAGE) {
                guest.set(At::Mem(0x4000 + 8 * page, 8), (page * PAGE) | 7);
            }
            let state = &mut guest.processor.state;
            state.cr3 = 0x1000;
            state.cr4 = 0x20;
            state.efer = 0x500;
            state.cr0 |= 1 << 31;
            guest.processor.state_changed();
        }
        guest
    }

    fn set(&mut self, at: At, value: u64) {
        match at {
            At::Reg(register) => self.processor.write_register(register, value),
            At::Mem(address, size) => self
                .processor
                .store_as(&Nothing, address, size, value, false)
                .unwrap(),
        }
    }

    fn get(&mut self, at: At) -> u64 {
        match at {
            At::Reg(register) => self.processor.read_register(register),
            At::Mem(address, size) => self
                .processor
                .load_as(&Nothing, address, size, false)
                .unwrap(),
        }
    }

    fn set_flags(&mut self, bits: u64) {
        self.processor.state.set_rflags(bits);
    }

    /// Executes the instruction that these bytes are.
    fn execute_bytes(&mut self, bytes: &[u8]) -> Executed {
        let rip = self.processor.state.rip;
        let instruction = Decoder::with_ip(self.bits, bytes, rip, DecoderOptions::NONE).decode();
        self.processor.execute(&Nothing, &instruction)
    }

    fn execute(&mut self, code: Code) -> Executed {
        let mut assembler = CodeAssembler::new(self.bits).unwrap();
        code(&mut assembler).unwrap();
        let bytes = assembler.assemble(self.processor.state.rip).unwrap();
        self.execute_bytes(&bytes)
    }
}

/// Status flags from their letters.
fn flags(letters: &str) -> u64 {
    letters
        .chars()
        .map(|letter| match letter {
            'C' => rflags::CF,
            'P' => rflags::PF,
            'A' => rflags::AF,
            'Z' => rflags::ZF,
            'S' => rflags::SF,
            'O' => rflags::OF,
            'D' => rflags::DF,
            _ => panic!("no flag {letter}"),
        })
        .sum()
}

/// One instruction that does not fault.
struct Case {
    name: &'static str,
    bits: u32,
    code: Code,
    before: &'static [(At, u64)],
    flags: &'static str,
    after: &'static [(At, u64)],
    flags_after: &'static str,
}

fn check(cases: &[Case]) {
    let mut wrong = Vec::new();
    for case in cases {
        let mut guest = Guest::new(case.bits);
        for &(at, value) in case.before {
            guest.set(at, value);
        }
        guest.set_flags(flags(case.flags));
        if let Err(exception) = guest.execute(case.code) {
            wrong.push(format!("{}: {exception:?}", case.name));
            continue;
        }
        for &(at, value) in case.after {
            let is = guest.get(at);
            if is != value {
                wrong.push(format!("{}: {at:x?} is {is:#x}, not {value:#x}", case.name));
            }
        }
        let is = guest.processor.state.rflags() & (rflags::STATUS | rflags::DF);
        let wanted = flags(case.flags_after);
        if is != wanted {
            wrong.push(format!("{}: flags {is:#x}, not {wanted:#x}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
