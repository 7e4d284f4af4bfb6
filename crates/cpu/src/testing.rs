//! A guest for tests: some memory, identity page tables, 64-bit mode at CPL 0, nothing around it.

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;

use crate::memory::{Ram, RamRange};
use crate::processor::{Environment, Processor};
use crate::state::{Segment, SegmentName};

/// Where the code of a test is.
pub(crate) const CODE: u64 = 0x1_0000;
/// Where its stack begins, downwards.
pub(crate) const STACK: u64 = 0x8_0000;
/// Where its data may be.
pub(crate) const DATA: u64 = 0x4_0000;
/// The first address that is not mapped.
pub(crate) const END: u64 = 0x20_0000;

/// An environment in which nothing happens.
pub(crate) struct Nothing;

impl Environment for Nothing {
    fn memory_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn memory_write(&self, _: u64, _: u8, _: u64) {}
}

/// The guest.
pub(crate) struct Guest {
    pub(crate) cpu: Processor,
}

impl Guest {
    /// A guest with this program at [`CODE`].
    pub(crate) fn new(program: impl FnOnce(&mut CodeAssembler)) -> Self {
        let range = RamRange::zeroed(0, END);
        let mut cpu = Processor::new(Arc::new(Ram::new(vec![range])));
        let state = &mut cpu.state;
        (state.cr0, state.cr3, state.cr4, state.efer) = (0x8001_0011, 0x1000, 0x20, 0x500);
        let segment = |attributes| Segment {
            selector: 8,
            limit: u32::MAX,
            attributes,
            ..Segment::default()
        };
        state.set_segment(SegmentName::Cs, segment(0xa09b));
        state.set_segment(SegmentName::Ss, segment(0xc093));
        state.rip = CODE;
        state.set_register(4, STACK);
        let mut guest = Self { cpu };
        for (address, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003)] {
            guest.poke(address, &u64::to_le_bytes(entry));
        }
        for page in 0..END >> 12 {
            guest.poke(0x4000 + 8 * page, &(page << 12 | 3).to_le_bytes());
        }
        let mut assembler = CodeAssembler::new(64).unwrap();
        program(&mut assembler);
        guest.poke(CODE, &assembler.assemble(CODE).unwrap());
        guest
    }

    /// Another processor on the same memory, at the start of a program of its own.
    pub(crate) fn second(
        &mut self,
        code: u64,
        stack: u64,
        program: impl FnOnce(&mut CodeAssembler),
    ) -> Processor {
        let mut cpu = Processor::new(Arc::clone(&self.cpu.ram));
        cpu.state = self.cpu.state.clone();
        cpu.state.rip = code;
        cpu.state.set_register(4, stack);
        let mut assembler = CodeAssembler::new(64).unwrap();
        program(&mut assembler);
        self.poke(code, &assembler.assemble(code).unwrap());
        cpu
    }

    /// Writes physical memory, as a device does that tells of it.
    pub(crate) fn poke(&mut self, address: u64, bytes: &[u8]) {
        self.cpu.ram.write(address, bytes);
        self.cpu.ram.written(address);
    }

    /// Eight bytes of physical memory.
    pub(crate) fn peek(&self, address: u64) -> u64 {
        self.cpu.ram.read_u64(address).unwrap()
    }
}
