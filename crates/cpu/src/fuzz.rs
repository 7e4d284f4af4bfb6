//! The entry points of the fuzz targets: what a hostile guest can make the processor execute, and
//! which page tables and descriptors it can give it.

use std::cell::Cell;
use std::sync::Arc;

use crate::memory::{PAGE, Ram, RamRange};
use crate::processor::{Environment, Processor, Stop};
use crate::state::{DescriptorTable, Segment, SegmentName};

/// Bytes of RAM; what follows is a device that answers anything.
const RAM: u64 = 0x4_0000;
const PAGE_TABLES: u64 = 0x1000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const HANDLER: u64 = 0x8000;
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x2_0000;
/// Instructions that one input may execute.
const BUDGET: u64 = 512;
/// The longest patch of a table.
const MAX_PATCH: usize = 32;

/// A board on which everything answers: ports, MSRs, CPUID with every feature, now and then an
/// interrupt.
struct Board {
    count: Cell<u32>,
}

impl Board {
    fn tick(&self) -> u32 {
        self.count
            .set(self.count.get().wrapping_mul(5).wrapping_add(1));
        self.count.get()
    }
}

impl Environment for Board {
    fn port_read(&self, _: u16, _: u8) -> u32 {
        self.tick()
    }
    fn port_write(&self, _: u16, _: u8, _: u32) {}
    fn memory_read(&self, _: u64, _: u8) -> u64 {
        self.tick().into()
    }
    fn memory_write(&self, _: u64, _: u8, _: u64) {}
    fn cpuid(&self, _: u32, _: u32) -> [u32; 4] {
        [u32::MAX; 4]
    }
    fn tsc(&self) -> u64 {
        self.tick().into()
    }
    fn read_msr(&self, index: u32) -> Option<u64> {
        (index & 1 != 0).then(|| self.tick().into())
    }
    fn write_msr(&self, index: u32, _: u64) -> bool {
        index & 1 != 0
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        let random = self.tick() >> 8;
        (random & 15 == 0).then_some((random >> 8) as u8)
    }
    fn take_nmi(&self) -> bool {
        self.tick() >> 8 & 63 == 0
    }
}

struct Guest {
    processor: Processor,
    board: Board,
}

impl Guest {
    /// A guest in real mode, in 32-bit protected mode or in 64-bit mode, as `shape` says, with tables
    /// that work.
    fn new(shape: u8) -> Self {
        let ram = Ram::new(vec![RamRange::zeroed(0, RAM)]);
        let mut guest = Self {
            processor: Processor::new(Arc::new(ram)),
            board: Board {
                count: Cell::new(shape.into()),
            },
        };
        let long = shape % 3 == 2;
        guest.write_tables(long);
        let state = &mut guest.processor.state;
        let (cr0, mode) = match shape % 3 {
            0 => (0x10, 0),
            1 => (0x11, Segment::DEFAULT_BIG),
            _ => (0x8000_0011, Segment::LONG),
        };
        state.cr0 = cr0;
        state.cr3 = PAGE_TABLES;
        state.cr4 = if long { 0x6a0 } else { 0x600 };
        state.efer = if long { 0xd01 } else { 0 };
        let user = shape & 0x80 != 0 && !shape.is_multiple_of(3);
        let level = if user { 3 } else { 0 };
        let flat = |selector: u16, attributes: u32| Segment {
            selector: selector | level,
            base: 0,
            limit: if cr0 & 1 == 0 { 0xffff } else { u32::MAX },
            attributes: attributes | u32::from(level) << 5,
        };
        let (code, data) = if user { (0x18, 0x20) } else { (8, 0x10) };
        let stack = flat(data, 0xc093);
        state.set_segment(SegmentName::Cs, flat(code, 0x809b | mode));
        for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Ss] {
            state.set_segment(name, stack);
        }
        state.gdt = table(GDT, 0x5f);
        state.idt = if cr0 & 1 == 0 {
            table(0, 0x3ff)
        } else {
            table(IDT, 0xfff)
        };
        state.tr = Segment {
            selector: 0x28,
            base: TSS,
            limit: 0x67,
            attributes: 0x8b,
        };
        state.rip = if cr0 & 1 == 0 { 0xc000 } else { CODE };
        state.set_register(4, if cr0 & 1 == 0 { 0xb000 } else { STACK });
        guest.processor.state_changed();
        guest
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        for (at, &byte) in (address..).zip(bytes) {
            // Before paging is on, every address is RAM's.
            let _ = self
                .processor
                .store_as(&self.board, at % RAM, 1, byte.into(), false);
        }
    }

    fn write_tables(&mut self, long: bool) {
        let entries: [(u64, u64); 3] = [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)];
        for (at, next) in entries {
            self.write(at, &(next | 7).to_le_bytes());
        }
        for page in 0..RAM / PAGE {
            let entry = (page * PAGE) | 7;
            self.write(0x4000 + 8 * page, &entry.to_le_bytes());
        }
        // Null, kernel code and data, user code and data, TSS (16 bytes in long mode).
        let code_bits = if long { 0x00af } else { 0x00cf } << 48;
        let gdt: [u64; 6] = [
            0,
            0x9b00_0000_ffff | code_bits,
            0x00cf_9300_0000_ffff,
            0xfb00_0000_ffff | code_bits,
            0x00cf_f300_0000_ffff,
            0x8b00_7000_0067,
        ];
        for (index, entry) in (0u64..).zip(gdt) {
            self.write(GDT + 8 * index, &entry.to_le_bytes());
        }
        let gate = HANDLER | 8 << 16 | 0xee << 40;
        for vector in 0u64..256 {
            let at = IDT + vector * if long { 16 } else { 8 };
            self.write(at, &gate.to_le_bytes());
        }
        self.write(TSS + 4, &(STACK + 0x1000).to_le_bytes());
        if !long {
            self.write(TSS + 8, &0x10u32.to_le_bytes());
        }
        self.write(HANDLER, &[0x48, 0xcf]); // iretq, or dec eax and iret
    }

    /// Runs what is there, both ways.
    fn run(&mut self) {
        if self.processor.run(&self.board, BUDGET) == Stop::TripleFault {
            return;
        }
        for _ in 0..BUDGET / 8 {
            if self.processor.step(&self.board).is_err() {
                return;
            }
        }
    }
}

const fn table(base: u64, limit: u16) -> DescriptorTable {
    DescriptorTable { base, limit }
}

/// Any bytes as instructions, in every mode, at CPL 0 and 3.
pub fn fuzz_cpu_instructions(data: &[u8]) {
    let Some((&shape, code)) = data.split_first() else {
        return;
    };
    let mut guest = Guest::new(shape);
    place_code(&mut guest, code);
    guest.run();
}

fn place_code(guest: &mut Guest, code: &[u8]) {
    let code = &code[..code.len().min(PAGE as usize)];
    // Written through identity-mapped pages, whatever mode the guest is in.
    let rip = guest.processor.state.rip;
    guest.write(rip, code);
}

/// Page tables, descriptors and task state that are patched at random, and code that uses them. A patch
/// is an offset of two bytes, a length, and bytes; a length of zero ends them.
pub fn fuzz_cpu_tables(data: &[u8]) {
    let Some((&shape, mut rest)) = data.split_first() else {
        return;
    };
    let mut guest = Guest::new(shape);
    let mut patches = Vec::new();
    while let [low, high, len, tail @ ..] = rest {
        rest = tail;
        let len = usize::from(*len).min(MAX_PATCH).min(tail.len());
        if len == 0 {
            break;
        }
        let offset = u64::from(u16::from_le_bytes([*low, *high])) % (HANDLER - PAGE_TABLES);
        patches.push((PAGE_TABLES + offset, &tail[..len]));
        rest = &tail[len..];
    }
    // The code first: a patch may unmap it.
    place_code(&mut guest, rest);
    for (address, bytes) in patches {
        guest.write(address, bytes);
    }
    guest.processor.state_changed();
    guest.run();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_guest_is_survived() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..2000 {
            let data: Vec<u8> = (0..random() % 200).map(|_| random() as u8).collect();
            if round % 2 == 0 {
                fuzz_cpu_instructions(&data);
            } else {
                fuzz_cpu_tables(&data);
            }
        }
    }

    #[test]
    fn the_tables_work_in_every_mode() {
        for shape in [0, 1, 2, 0x82, 0x83] {
            let mut guest = Guest::new(shape);
            place_code(&mut guest, &[0xcd, 0x80, 0x90, 0xeb, 0xfe]); // int 0x80; nop; jmp $
            let real = guest.processor.state.cr0 & 1 == 0;
            let stop = guest.processor.run(&Quiet, 16);
            assert_eq!(stop, Stop::Attention, "shape {shape}");
            let rip = guest.processor.state.rip;
            assert!(real || rip == CODE + 3, "shape {shape} ends at {rip:#x}");
        }
    }

    struct Quiet;

    impl Environment for Quiet {
        fn memory_read(&self, _: u64, _: u8) -> u64 {
            0
        }
        fn memory_write(&self, _: u64, _: u8, _: u64) {}
    }
}
