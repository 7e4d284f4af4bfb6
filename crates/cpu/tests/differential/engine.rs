//! Cases on the processor in software: 64-bit mode at CPL 3, with the case's pages at their addresses.
//! A case ends with the exception that its last instruction raises.

use std::sync::Arc;

use mica_cpu::{Environment, Exception, FxState, Processor, Segment, SegmentName, State};

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
const END: u64 = DATA_FRAME + DATA_LEN as u64;

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
        memory.write(CODE_FRAME, &[INT3; CODE_LEN as usize]);
        memory.write(RODATA_FRAME, background);
        Self {
            processor: Processor::new(Arc::new(memory.ram())),
            memory,
            prototype: user_state(),
            background: background[PAGE as usize..].to_vec(),
        }
    }

    pub(crate) fn run(&mut self, case: &Case) -> Outcome {
        self.load(case);
        // Repeated string instructions take several steps.
        let raised = (0..MAX_STEPS).find_map(|_| self.processor.step(&Nothing).err());
        let outcome = self.outcome(raised);
        let (frame, len) = place(case);
        self.memory.write(frame, &[INT3; MAX_CODE][..len]);
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
    state
}
