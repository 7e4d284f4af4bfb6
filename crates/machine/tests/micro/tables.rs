//! Descriptors, gates and page tables, as the host writes them for a guest.

use mica_machine::engine::state::{DescriptorTable, Segment};

use crate::guest::Guest;

/// Where the tables are.
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const PAGE_DIRECTORY: u64 = 0x3000;
/// Of the first 2 MiB.
pub const PAGE_TABLE: u64 = 0x4000;
/// Of the last GiB below 4, where the local APIC is.
const HIGH_DIRECTORY: u64 = 0x5000;
pub const GDT: u64 = 0x8000;
pub const IDT: u64 = 0x9000;
pub const TSS: u64 = 0xa000;
/// A task state segment of 32-bit code.
pub const TSS32: u64 = 0xb000;
pub const LDT: u64 = 0xc000;
/// One stub for each vector.
pub const HANDLERS: u64 = 0x2_0000;
pub const HANDLER_SIZE: u64 = 16;

/// Selectors. The order around [`USER_CODE32`] is the one that SYSRET and SYSEXIT want.
pub const CODE64: u16 = 0x08;
pub const DATA: u16 = 0x10;
pub const USER_CODE32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE64: u16 = 0x2b;
pub const CODE32: u16 = 0x30;
pub const CODE16: u16 = 0x38;
pub const DATA16: u16 = 0x40;
pub const TSS64_SELECTOR: u16 = 0x48;
pub const TSS32_SELECTOR: u16 = 0x58;
pub const LDT_SELECTOR: u16 = 0x60;
/// Free for cases, 16 bytes.
pub const FREE: u16 = 0x80;
/// The last byte of the GDT.
pub const GDT_LIMIT: u16 = 0xff;

/// Attributes of descriptors, in the form of [`Segment::attributes`].
pub const ACCESSED: u32 = 1;
pub const READ_ONLY: u32 = 1 << 4 | PRESENT;
pub const WRITABLE: u32 = 0x2 | 1 << 4 | PRESENT;
pub const EXPAND_DOWN: u32 = 0x6 | 1 << 4 | PRESENT;
pub const EXECUTE_ONLY: u32 = 0x8 | 1 << 4 | PRESENT;
pub const CODE: u32 = 0xa | 1 << 4 | PRESENT;
pub const CONFORMING: u32 = 0xe | 1 << 4 | PRESENT;
pub const PRESENT: u32 = 1 << 7;
pub const LONG: u32 = 1 << 13;
pub const BIG: u32 = 1 << 14;
pub const GRANULAR: u32 = 1 << 15;
pub const DPL3: u32 = 3 << 5;
/// System descriptors.
pub const LDT_TYPE: u32 = 0x2 | PRESENT;
pub const TASK_GATE: u32 = 0x5 | PRESENT;
pub const AVAILABLE_TSS: u32 = 0x9 | PRESENT;
pub const BUSY_TSS: u32 = 0xb | PRESENT;
pub const CALL_GATE: u32 = 0xc | PRESENT;
pub const INTERRUPT_GATE: u32 = 0xe | PRESENT;
pub const TRAP_GATE: u32 = 0xf | PRESENT;

/// Bits of page table entries.
pub const P: u64 = 1;
pub const RW: u64 = 1 << 1;
pub const US: u64 = 1 << 2;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const G: u64 = 1 << 8;
pub const XD: u64 = 1 << 63;

/// A segment descriptor (SDM 3A, figure 3-8). The limit is in units of the granularity.
pub fn descriptor(base: u32, limit: u32, attributes: u32) -> u64 {
    let (base, limit, attributes) = (u64::from(base), u64::from(limit), u64::from(attributes));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (attributes & 0xf0ff) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24) << 56
}

/// A gate of 32-bit code (SDM 3A, figure 6-2): selector, offset, attributes and, of a call gate, its
/// parameters.
pub fn gate(selector: u16, offset: u32, attributes: u32, parameters: u8) -> u64 {
    let offset = u64::from(offset);
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(parameters) << 32
        | u64::from(attributes) << 40
        | (offset >> 16) << 48
}

/// All memory from zero up to some address, in units of 4 KiB.
const FLAT: u32 = 0xf_ffff;

impl Guest {
    /// Writes everything that a guest starts with.
    pub fn write_tables(&mut self) {
        self.write_page_tables();
        let all = GRANULAR | ACCESSED;
        let descriptors = [
            (CODE64, CODE | LONG | all),
            (DATA, WRITABLE | BIG | all),
            (USER_CODE32, CODE | BIG | DPL3 | all),
            (USER_DATA, WRITABLE | BIG | DPL3 | all),
            (USER_CODE64, CODE | LONG | DPL3 | all),
            (CODE32, CODE | BIG | all),
        ];
        for (selector, attributes) in descriptors {
            self.set_descriptor(selector, 0, FLAT, attributes);
        }
        self.set_descriptor(CODE16, 0, 0xffff, CODE | ACCESSED);
        self.set_descriptor(DATA16, 0, 0xffff, WRITABLE | ACCESSED);
        self.set_descriptor(TSS64_SELECTOR, TSS as u32, 0x68 + 32, AVAILABLE_TSS);
        self.set_descriptor(TSS32_SELECTOR, TSS32 as u32, 0x68 + 32, AVAILABLE_TSS);
        self.set_descriptor(LDT_SELECTOR, LDT as u32, 0xff, LDT_TYPE);
        for tss in [TSS, TSS32] {
            // The bitmap: no port but the harness's own (SDM volume 1, 19.5.2).
            self.write(tss + 0x66, 0x68_u16);
            for byte in 0..=32 {
                self.write(tss + 0x68 + byte, 0xff_u8);
            }
            self.write(tss + 0x68 + u64::from(Guest::DONE) / 8, 0_u8);
        }
        for vector in 0..=255 {
            // out EXCEPTION, al; jmp $
            self.write(
                Self::handler(vector),
                [0xe6, Self::EXCEPTION as u8, 0xeb, 0xfe],
            );
        }
    }

    /// Everything below 2 MiB in small pages and up to 1 GiB in pages of 2 MiB, mapped to itself for the
    /// supervisor, but for the user's page; and the local APIC.
    fn write_page_tables(&mut self) {
        // Rights are taken away in the last level only.
        let table = P | RW | US;
        self.write(PML4, PDPT | table);
        self.write(PDPT, PAGE_DIRECTORY | table);
        self.write(PDPT + 3 * 8, HIGH_DIRECTORY | table);
        self.write(PAGE_DIRECTORY, PAGE_TABLE | table);
        for index in 1..512 {
            self.write(PAGE_DIRECTORY + index * 8, index << 21 | PS | P | RW);
        }
        for index in 0..512 {
            self.write(PAGE_TABLE + index * 8, index << 12 | P | RW);
        }
        let apic = 0xfee0_0000_u64;
        let index = apic >> 21 & 511;
        self.write(HIGH_DIRECTORY + index * 8, apic | PS | P | RW);
        for page in (Self::USER..Self::USER_STACK).step_by(0x1000) {
            self.set_page(page, page | P | RW | US);
        }
    }

    /// Where the handler of a vector is.
    pub fn handler(vector: u8) -> u64 {
        HANDLERS + u64::from(vector) * HANDLER_SIZE
    }

    /// The entry of a page below 2 MiB.
    pub fn page(&self, address: u64) -> u64 {
        self.read(PAGE_TABLE + (address >> 12) * 8)
    }

    /// Changes it.
    pub fn set_page(&mut self, address: u64, entry: u64) {
        self.write(PAGE_TABLE + (address >> 12) * 8, entry);
    }

    /// Writes a descriptor to the GDT, or to the LDT if the selector says so.
    pub fn set_descriptor(&mut self, selector: u16, base: u32, limit: u32, attributes: u32) {
        self.write(Self::slot(selector), descriptor(base, limit, attributes));
    }

    /// Where the descriptor of a selector is.
    pub fn slot(selector: u16) -> u64 {
        let table = if selector & 4 == 0 { GDT } else { LDT };
        table + u64::from(selector & !7)
    }

    /// The segment register that loading `selector` gives.
    pub fn segment(&self, selector: u16) -> Segment {
        let raw: u64 = self.read(Self::slot(selector));
        let attributes = (raw >> 40) as u32 & 0xf0ff;
        let limit = (raw & 0xffff) as u32 | ((raw >> 32) as u32 & 0xf_0000);
        let limit = if attributes & GRANULAR == 0 {
            limit
        } else {
            limit << 12 | 0xfff
        };
        let base = (raw >> 16 & 0xff_ffff) as u32 | (raw >> 56 << 24) as u32;
        Segment {
            selector,
            base: base.into(),
            limit,
            attributes,
        }
    }

    /// Points a gate of the long-mode IDT (SDM 3A, figure 6-8) at `offset`, with a stack of the TSS if
    /// `ist` is not zero.
    pub fn set_gate64(&mut self, vector: u8, offset: u64, attributes: u32, ist: u8) {
        let at = IDT + u64::from(vector) * 16;
        self.write(at, gate(CODE64, offset as u32, attributes, ist));
        self.write(at + 8, offset >> 32);
    }

    /// The same in the protected-mode IDT.
    pub fn set_gate32(&mut self, vector: u8, offset: u64, attributes: u32) {
        let at = IDT + u64::from(vector) * 8;
        self.write(at, gate(CODE32, offset as u32, attributes, 0));
    }

    /// Takes the handler of `vector` away: its gate is not present.
    pub fn remove_gate64(&mut self, vector: u8) {
        self.set_gate64(vector, 0, INTERRUPT_GATE & !PRESENT, 0);
    }

    /// The limits of the tables.
    pub fn set_table_registers(&mut self, idt_entry: u16) {
        self.state.special.gdt = DescriptorTable {
            base: GDT,
            limit: GDT_LIMIT,
        };
        self.state.special.idt = DescriptorTable {
            base: IDT,
            limit: 256 * idt_entry - 1,
        };
    }
}
