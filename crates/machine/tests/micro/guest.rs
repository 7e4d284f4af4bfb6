//! A guest of one vCPU, and how its code is run and looked at.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{BlockEncoderOptions, IcedError};
use mica_base::units::Bytes;
use mica_machine::engine::state::{GeneralRegisters, VcpuState};
use mica_machine::engine::{BusAccess, Engine, Exit, Kick, MsiVector, Vcpu};
use mica_machine::memory::{self, GuestMemory, MemoryOptions};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};

use crate::tables::*;

/// What assembles a piece of code.
pub type Assembled = Result<(), IcedError>;

/// CR0: protection, write protection and paging; and what else is always on.
pub const CR0_PE: u64 = 1;
pub const CR0_WP: u64 = 1 << 16;
pub const CR0_PG: u64 = 1 << 31;
const CR0_ET_NE: u64 = 1 << 4 | 1 << 5;
pub const CR4_PAE: u64 = 1 << 5;
pub const EFER_SCE: u64 = 1;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
pub const EFER_NXE: u64 = 1 << 11;
/// RFLAGS.
pub const FLAG_ONE: u64 = 1 << 1;
pub const FLAG_TF: u64 = 1 << 8;
pub const FLAG_IF: u64 = 1 << 9;
pub const FLAG_NT: u64 = 1 << 14;
pub const FLAG_RF: u64 = 1 << 16;
pub const FLAG_VM: u64 = 1 << 17;

/// Vectors.
pub const DE: u8 = 0;
pub const DB: u8 = 1;
pub const NMI: u8 = 2;
pub const BP: u8 = 3;
pub const OF: u8 = 4;
pub const BR: u8 = 5;
pub const UD: u8 = 6;
pub const NM: u8 = 7;
pub const DF: u8 = 8;
pub const TS: u8 = 10;
pub const NP: u8 = 11;
pub const SS: u8 = 12;
pub const GP: u8 = 13;
pub const PF: u8 = 14;
pub const AC: u8 = 17;

/// Which port writes end a run, and which are collected.
struct Reports {
    kick: Arc<dyn Kick>,
    /// The port that has ended the run.
    end: Mutex<Option<u16>>,
    values: Mutex<Vec<u32>>,
}

impl BusAccess for Reports {
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        for (index, byte) in (1..).zip(data) {
            *byte = index * 0x11;
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        match port {
            Guest::DONE | Guest::EXCEPTION => {
                self.end.lock().unwrap().get_or_insert(port);
                self.kick.kick();
            }
            _ => {
                let mut value = [0; 4];
                value[..data.len()].copy_from_slice(data);
                self.values.lock().unwrap().push(u32::from_le_bytes(value));
            }
        }
    }

    fn memory_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn memory_write(&self, _address: u64, _data: &[u8]) {}
}

/// Why a guest stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At the end of its code.
    Done,
    /// In the handler of an exception or interrupt.
    Exception(Frame),
    TripleFault,
}

/// The panic of a case whose guest the engine cannot execute, with the engine's reason.
pub struct Fatal(pub String);

/// What the processor has pushed for a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub vector: u8,
    pub error: Option<u32>,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    /// If they were pushed.
    pub rsp: u64,
    pub ss: u16,
}

/// A VM with one vCPU.
pub struct Guest {
    /// What the vCPU starts with; after a run, what it has stopped with.
    pub state: VcpuState,
    /// Linear address of the last instruction of the code that was run, and of what follows it.
    pub last: u64,
    pub end: u64,
    vcpu: Box<dyn Vcpu>,
    /// Outlives the vCPU.
    engine: Box<dyn Engine>,
    memory: GuestMemory,
    reports: Arc<Reports>,
}

impl Guest {
    /// Ends a run.
    pub const DONE: u16 = 0x98;
    /// What handlers end it with.
    pub const EXCEPTION: u16 = 0x99;
    /// What is written here is collected.
    pub const REPORT: u16 = 0x9c;
    /// Where code is, where its stack ends, the stacks of the TSS, free pages.
    pub const CODE: u64 = 0x1_0000;
    pub const STACK: u64 = 0x3_0000;
    pub const RING0_STACK: u64 = 0x3_4000;
    pub const IST1: u64 = 0x3_8000;
    pub const SCRATCH: u64 = 0x4_0000;
    /// Eight pages that user mode may use: code at first, the end of its stack last.
    pub const USER: u64 = 0x5_0000;
    pub const USER_STACK: u64 = 0x5_8000;

    /// A guest in long mode at [`Self::CODE`], interrupts disabled.
    pub fn new(make: fn(GuestMemory) -> Box<dyn Engine>) -> Self {
        let memory = memory::allocate(Bytes::mib(8), &MemoryOptions::default()).unwrap();
        let engine = make(memory.clone());
        let mut vcpu = engine.create_vcpu(0).unwrap();
        let reports = Arc::new(Reports {
            kick: vcpu.kick_handle(),
            end: Mutex::default(),
            values: Mutex::default(),
        });
        let mut guest = Self {
            state: vcpu.save().unwrap(),
            last: 0,
            end: 0,
            vcpu,
            engine,
            memory,
            reports,
        };
        guest.write_tables();
        guest.long_mode();
        guest
    }

    /// Long mode, ring 0.
    fn long_mode(&mut self) {
        for vector in 0..=255 {
            self.set_gate64(vector, Self::handler(vector), INTERRUPT_GATE, 0);
        }
        self.write(TSS + 4, Self::RING0_STACK);
        self.write(TSS + 0x24, Self::IST1);
        self.set_table_registers(16);
        self.state.general = GeneralRegisters {
            rip: Self::CODE,
            rsp: Self::STACK,
            rflags: FLAG_ONE,
            ..GeneralRegisters::default()
        };
        let special = &mut self.state.special;
        special.cr0 = CR0_PE | CR0_ET_NE | CR0_WP | CR0_PG;
        special.cr3 = PML4;
        special.cr4 = CR4_PAE;
        special.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
        self.set_segments(CODE64, DATA);
        self.set_task(TSS64_SELECTOR);
    }

    /// Protected mode without paging, ring 0, 32-bit code.
    pub fn protected_mode(&mut self) {
        for vector in 0..=255 {
            self.set_gate32(vector, Self::handler(vector), INTERRUPT_GATE);
        }
        self.write(TSS32 + 4, Self::RING0_STACK as u32);
        self.write(TSS32 + 8, u32::from(DATA));
        self.set_table_registers(8);
        let special = &mut self.state.special;
        special.cr0 = CR0_PE | CR0_ET_NE;
        special.cr3 = 0;
        special.cr4 = 0;
        special.efer = 0;
        self.set_segments(CODE32, DATA);
        self.set_task(TSS32_SELECTOR);
    }

    /// Real mode: segments at zero but CS, whose base is [`Self::CODE`].
    pub fn real_mode(&mut self) {
        let mut segment = self.segment(DATA16);
        segment.selector = 0;
        let code = mica_machine::engine::state::Segment {
            selector: (Self::CODE >> 4) as u16,
            base: Self::CODE,
            ..segment
        };
        for vector in 0..=255_u8 {
            let stub = Self::handler(vector);
            let pointer = (stub & 0xf) as u32 | (stub as u32 >> 4) << 16;
            self.write(u64::from(vector) * 4, pointer);
        }
        self.protected_mode();
        let special = &mut self.state.special;
        special.cr0 = CR0_ET_NE;
        special.idt.base = 0;
        special.idt.limit = 0x3ff;
        special.cs = code;
        for data in [
            &mut special.ds,
            &mut special.es,
            &mut special.fs,
            &mut special.gs,
            &mut special.ss,
        ] {
            *data = segment;
        }
        self.state.general.rip = 0;
        self.state.general.rsp = 0xf000;
    }

    /// Ring 3 with the code and stack of the user's pages, in the mode that was set.
    pub fn user_mode(&mut self) {
        let long = self.state.special.efer & EFER_LMA != 0;
        self.set_segments(if long { USER_CODE64 } else { USER_CODE32 }, USER_DATA);
        self.state.general.rip = Self::USER;
        self.state.general.rsp = Self::USER_STACK;
    }

    /// Ring 3, 32-bit code in long mode.
    pub fn compatibility_mode(&mut self) {
        self.user_mode();
        self.state.special.cs = self.segment(USER_CODE32);
    }

    fn set_segments(&mut self, code: u16, data: u16) {
        let (code, data) = (self.segment(code), self.segment(data));
        let special = &mut self.state.special;
        special.cs = code;
        (special.ds, special.es, special.ss) = (data, data, data);
        (special.fs, special.gs) = (data, data);
    }

    /// The task register, with the descriptor busy as LTR makes it.
    fn set_task(&mut self, selector: u16) {
        let mut task = self.segment(selector);
        task.attributes = BUSY_TSS;
        self.state.special.tr = task;
        self.set_descriptor(selector, task.base as u32, task.limit, BUSY_TSS);
    }

    /// Writes to guest physical memory.
    pub fn write<T: ByteValued>(&mut self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Reads it.
    pub fn read<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Assembles code and writes it to `at`; gives the addresses of its last instruction and of what
    /// follows.
    pub fn place(
        &mut self,
        at: u64,
        bits: u32,
        code: impl FnOnce(&mut CodeAssembler) -> Assembled,
    ) -> (u64, u64) {
        let base = self.state.special.cs.base;
        let mut assembler = CodeAssembler::new(bits).unwrap();
        code(&mut assembler).unwrap();
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = assembler.assemble_options(at - base, options).unwrap();
        let bytes = result.inner.code_buffer;
        let last = result.inner.new_instruction_offsets.last().copied();
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        (at + u64::from(last.unwrap_or(0)), at + bytes.len() as u64)
    }

    /// Runs code from where the vCPU is, in its mode.
    pub fn run(&mut self, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Stop {
        let bits = match self.state.special.cs.attributes {
            attributes if attributes & LONG != 0 => 64,
            attributes if attributes & BIG != 0 => 32,
            _ => 16,
        };
        let at = self.state.special.cs.base + self.state.general.rip;
        (self.last, self.end) = self.place(at, bits, code);
        // out DONE, al; jmp $
        self.write(self.end, [0xe6, Self::DONE as u8, 0xeb, 0xfe]);
        self.go()
    }

    /// Lets the vCPU go on from its state.
    pub fn go(&mut self) -> Stop {
        self.vcpu.restore(&self.state).unwrap();
        *self.reports.end.lock().unwrap() = None;
        let exit = self.run_with_limit();
        self.state = self.vcpu.save().unwrap();
        match exit {
            Exit::TripleFault => Stop::TripleFault,
            Exit::Kicked => match *self.reports.end.lock().unwrap() {
                Some(Self::DONE) => Stop::Done,
                Some(_) => Stop::Exception(self.frame()),
                None => panic!("it does not end, and is at {:#x?}", self.state.general),
            },
            Exit::Fatal(reason) => std::panic::panic_any(Fatal(reason)),
            Exit::Debug => panic!("nobody debugs it"),
            Exit::Recorded => panic!("nobody replays it"),
        }
    }

    fn run_with_limit(&mut self) -> Exit {
        let kick = Arc::clone(&self.reports.kick);
        let (ended, wait) = mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if wait.recv_timeout(Duration::from_secs(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let exit = self.vcpu.run(&*self.reports).unwrap();
        drop(ended);
        watchdog.join().unwrap();
        exit
    }

    /// What the handler that the guest is in finds on its stack.
    fn frame(&self) -> Frame {
        let special = &self.state.special;
        let rip = special.cs.base + self.state.general.rip;
        let vector = ((rip - HANDLERS) / HANDLER_SIZE) as u8;
        let width = match special.efer & EFER_LMA {
            0 if special.cr0 & CR0_PE == 0 => 2,
            0 => 4,
            _ => 8,
        };
        let mut at = special.ss.base + self.state.general.rsp;
        let mut pop = || {
            let raw: u64 = self.read(at);
            at += width;
            raw & u64::MAX >> (64 - 8 * width)
        };
        let has_error = matches!(vector, DF | TS..=PF | 17) && width > 2;
        let error = has_error.then(|| pop() as u32);
        let mut frame = Frame {
            vector,
            error,
            rip: pop(),
            cs: pop() as u16,
            rflags: pop(),
            rsp: 0,
            ss: 0,
        };
        if width == 8 || (frame.cs & 3 != special.cs.selector & 3 && width == 4) {
            frame.rsp = pop();
            frame.ss = pop() as u16;
        }
        frame
    }

    /// Runs code that has to reach its end.
    pub fn finish(&mut self, code: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        let stop = self.run(code);
        assert_eq!(stop, Stop::Done, "last {:#x}", self.last);
    }

    /// Runs code that has to end in a handler.
    pub fn interrupted(&mut self, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Frame {
        match self.run(code) {
            Stop::Exception(frame) => frame,
            stop => panic!(
                "{stop:?} instead of an exception; {:#x?}",
                self.state.general
            ),
        }
    }

    /// Runs code whose last instruction faults with that vector and error code.
    pub fn fault(
        &mut self,
        vector: u8,
        error: impl Into<Option<u32>>,
        code: impl FnOnce(&mut CodeAssembler) -> Assembled,
    ) -> Frame {
        let base = self.state.special.cs.base;
        let frame = self.interrupted(code);
        let expected = (vector, error.into(), self.last - base);
        assert_eq!(
            (frame.vector, frame.error, frame.rip),
            expected,
            "vector, error code, RIP; {frame:#x?}"
        );
        frame
    }

    /// Runs code whose last instruction is followed by a trap or interrupt of that vector.
    pub fn trap(
        &mut self,
        vector: u8,
        code: impl FnOnce(&mut CodeAssembler) -> Assembled,
    ) -> Frame {
        let base = self.state.special.cs.base;
        let frame = self.interrupted(code);
        assert_eq!(
            (frame.vector, frame.rip),
            (vector, self.end - base),
            "vector, RIP; {frame:#x?}"
        );
        frame
    }

    /// What was written to [`Self::REPORT`] since the last call.
    pub fn reports(&self) -> Vec<u32> {
        std::mem::take(&mut self.reports.values.lock().unwrap())
    }

    /// The memory, and an interrupt of that vector, for a thread that does something while the guest
    /// runs.
    pub fn outside(&self, vector: u8) -> (GuestMemory, Arc<dyn MsiVector>) {
        let interrupt = self.engine.msi_vector().unwrap();
        interrupt.route(0xfee0_0000, vector.into()).unwrap();
        interrupt.set_masked(false).unwrap();
        (self.memory.clone(), interrupt)
    }

    /// CR2.
    pub fn cr2(&self) -> u64 {
        self.state.special.cr2
    }
}
