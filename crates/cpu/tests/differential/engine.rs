//! Cases on the processor in software: 64-bit mode at CPL 3, with the case's pages at their addresses.
//! A case ends with the exception that its last instruction raises.

use std::sync::Arc;

use mica_cpu::{
    DescriptorTable, Environment, Exception, FxState, Processor, Segment, SegmentName, State, Stop,
};

use crate::case::{
    BASE, CODE, CODE_LEN, Case, DATA, DATA_LEN, FS_BASE, GS_BASE, MAX_CODE, Outcome, PAGE, RODATA,
    STUCK,
};
use crate::host::memory::Physical;

// Physical pages.
const PML4: u64 = PAGE;
const USER_PDPT: u64 = 2 * PAGE;
const USER_PD: u64 = 3 * PAGE;
const USER_PT: u64 = 4 * PAGE;
const CODE_FRAME: u64 = 5 * PAGE;
const RODATA_FRAME: u64 = CODE_FRAME + CODE_LEN;
const DATA_FRAME: u64 = RODATA_FRAME + PAGE;
/// What a kernel needs: tables, handlers, a stack.
const KERNEL_PDPT: u64 = DATA_FRAME + DATA_LEN as u64;
const TABLES: u64 = KERNEL_PDPT + PAGE;
const IDT: u64 = TABLES;
const TSS: u64 = TABLES + 0x400;
const GDT: u64 = TABLES + 0x800;
/// A HLT for each vector.
const HANDLERS: u64 = TABLES + 0xc00;
const STACK_TOP: u64 = TABLES + 2 * PAGE;
const END: u64 = STACK_TOP;
/// Where all of physical memory is for supervisors.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// How a case is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Each instruction by its decoded form; the exception is taken as a value.
    Steps,
    /// Translated to blocks; the exception is delivered to a kernel.
    Blocks,
}

impl Way {
    pub(crate) const ALL: [Self; 2] = [Self::Steps, Self::Blocks];
}

/// More than the longest repeated string instruction of a case takes.
const MAX_STEPS: u32 = 1 << 18;
const INT3: u8 = 0xcc;

/// A machine of nothing but RAM.
struct Nothing;

impl Environment for Nothing {
    fn memory_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn memory_write(&self, _: u64, _: u8, _: u64) {}
}

/// The processor under test.
pub(crate) struct Engine {
    processor: Processor,
    memory: Physical,
    prototype: State,
    background: Vec<u8>,
}

impl Engine {
    /// `background`: the read-only page and the data pages.
    pub(crate) fn new(background: &[u8]) -> Self {
        let memory = Physical::new(END as usize);
        page_tables(&memory);
        kernel(&memory);
        memory.write(CODE_FRAME, &[INT3; CODE_LEN as usize]);
        memory.write(RODATA_FRAME, background);
        Self {
            processor: Processor::new(Arc::new(memory.ram())),
            memory,
            prototype: user_state(),
            background: background[PAGE as usize..].to_vec(),
        }
    }

    pub(crate) fn run(&mut self, case: &Case, way: Way) -> Outcome {
        self.load(case);
        let outcome = match way {
            Way::Steps => {
                // Repeated string instructions take several steps.
                let raised = (0..MAX_STEPS).find_map(|_| self.processor.step(&Nothing).err());
                self.outcome(raised)
            }
            Way::Blocks => self.run_blocks(),
        };
        let (frame, len) = place(case);
        self.memory.write(frame, &[INT3; MAX_CODE][..len]);
        outcome
    }

    /// Runs to the kernel's handler and reads from its stack what the program looked like.
    fn run_blocks(&mut self) -> Outcome {
        let stop = self.processor.run(&Nothing, MAX_STEPS.into());
        let mut outcome = self.outcome(None);
        if stop != Stop::Halted {
            return outcome;
        }
        let vector = (outcome.rip - 1 - KERNEL - HANDLERS) / 2;
        let mut at = outcome.registers[4] - KERNEL;
        let mut pop = || {
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes);
            at += 8;
            u64::from_le_bytes(bytes)
        };
        if matches!(vector, 8 | 10..=14 | 17) {
            outcome.error = pop();
        }
        outcome.trap = vector;
        outcome.rip = pop();
        assert_eq!(pop(), 0x33, "CS");
        // As the host's: a fault's image has RF, which is not compared.
        outcome.rflags = pop();
        outcome.registers[4] = pop();
        if vector == 14 {
            outcome.address = self.processor.state.cr2;
        }
        outcome
    }

    fn load(&mut self, case: &Case) {
        self.memory.write(DATA_FRAME, &self.background);
        for patch in case.patches() {
            let bytes = &patch.bytes[..patch.len as usize];
            self.memory
                .write(DATA_FRAME + u64::from(patch.offset), bytes);
        }
        let (frame, len) = place(case);
        self.memory.write(frame, &case.code()[..len]);
        let state = &mut self.processor.state;
        state.clone_from(&self.prototype);
        for (index, value) in case.registers.iter().enumerate() {
            state.set_register(index, *value);
        }
        state.rip = case.rip;
        state.set_rflags(case.rflags);
        state.fx = FxState {
            mxcsr_mask: state.fx.mxcsr_mask,
            ..case.fx
        };
        self.processor.state_changed();
    }

    fn outcome(&self, raised: Option<Exception>) -> Outcome {
        let state = &self.processor.state;
        let mut outcome = Outcome {
            fx: state.fx,
            registers: std::array::from_fn(|index| state.register(index)),
            rflags: state.rflags(),
            rip: state.rip,
            ..Outcome::default()
        };
        self.memory.read(DATA_FRAME, &mut outcome.memory);
        outcome.trap = STUCK;
        if let Some(exception) = raised {
            outcome.trap = exception.vector as u64;
            outcome.error = exception.error_code.unwrap_or(0).into();
            outcome.address = exception.address;
        }
        outcome
    }
}

/// Physical address of a case's code, and how much of it is in the pages.
fn place(case: &Case) -> (u64, usize) {
    let offset = case.rip.wrapping_sub(CODE).min(CODE_LEN);
    let len = ((CODE_LEN - offset) as usize).min(case.code().len());
    (CODE_FRAME + offset, len)
}

/// Handlers that halt, and the way to them.
fn kernel(memory: &Physical) {
    memory.write_u64(PML4 + 256 * 8, KERNEL_PDPT | 3);
    memory.write_u64(KERNEL_PDPT, 0x83);
    memory.write_u64(GDT + 8, 0x00af_9b00_0000_ffff);
    memory.write_u64(TSS + 4, KERNEL + STACK_TOP);
    for vector in 0..32 {
        let handler = KERNEL + HANDLERS + 2 * vector;
        // An interrupt gate that any program may use, to selector 8.
        let gate = handler & 0xffff | 8 << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48;
        memory.write_u64(IDT + 16 * vector, gate);
        memory.write_u64(IDT + 16 * vector + 8, handler >> 32);
        memory.write(HANDLERS + 2 * vector, &[0xf4, 0xf4]);
    }
}

fn page_tables(memory: &Physical) {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 2;
    const USER: u64 = 4;
    const NO_EXECUTE: u64 = 1 << 63;
    let table = PRESENT | WRITE | USER;
    memory.write_u64(PML4, USER_PDPT | table);
    memory.write_u64(USER_PDPT, USER_PD | table);
    memory.write_u64(USER_PD + (BASE >> 21) * 8, USER_PT | table);
    let map = |linear: u64, frame: u64, len: u64, rights: u64| {
        for offset in (0..len).step_by(PAGE as usize) {
            let entry = USER_PT + ((linear - BASE + offset) / PAGE) * 8;
            memory.write_u64(entry, (frame + offset) | rights | PRESENT | USER);
        }
    };
    map(CODE, CODE_FRAME, CODE_LEN, 0);
    map(RODATA, RODATA_FRAME, PAGE, NO_EXECUTE);
    map(DATA, DATA_FRAME, DATA_LEN as u64, NO_EXECUTE | WRITE);
}

/// As a Linux process has it.
fn user_state() -> State {
    let mut state = State::default();
    let user = |selector, base, attributes| Segment {
        selector,
        base,
        limit: u32::MAX,
        attributes,
    };
    const UNUSABLE: u32 = 1 << 16;
    state.set_segment(SegmentName::Cs, user(0x33, 0, 0xa0fb));
    state.set_segment(SegmentName::Ss, user(0x2b, 0, 0xc0f3));
    state.set_segment(SegmentName::Ds, user(0, 0, UNUSABLE));
    state.set_segment(SegmentName::Es, user(0, 0, UNUSABLE));
    state.set_segment(SegmentName::Fs, user(0, FS_BASE, 0xc0f3));
    state.set_segment(SegmentName::Gs, user(0, GS_BASE, 0xc0f3));
    // PG, AM, WP, NE, ET, MP, PE.
    state.cr0 = 0x8005_0033;
    // PAE, OSFXSR, OSXMMEXCPT.
    state.cr4 = 0x620;
    // NXE, LMA, LME, SCE.
    state.efer = 0xd01;
    state.cr3 = PML4;
    state.gdt = DescriptorTable {
        base: KERNEL + GDT,
        limit: 15,
    };
    state.idt = DescriptorTable {
        base: KERNEL + IDT,
        limit: 32 * 16 - 1,
    };
    state.tr = Segment {
        selector: 0x40,
        base: KERNEL + TSS,
        limit: 0x67,
        attributes: 0x8b,
    };
    state
}
