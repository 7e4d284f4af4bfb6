//! Micro-guests: a few hand-assembled instructions in 32-bit protected mode, as PVH enters it.

#![allow(unreachable_pub)] // shared by the modules of one test program

use std::sync::{Arc, Mutex};

use mica_base::units::Bytes;
use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::{BusAccess, Engine, EngineError, Exit, Kick, Vcpu};
use mica_machine::memory::{self, GuestMemory, MemoryOptions};
use vm_memory::{Bytes as _, GuestAddress};

/// Where a guest's code starts.
pub const CODE: u64 = 0x1000;
/// Its stack grows down from here.
pub const STACK: u64 = 0x8000;
/// A port that nobody else has, for guests to report by.
pub const REPORT: u16 = 0x99;
/// An address outside RAM.
pub const MMIO: u64 = 0xd000_0000;

/// One access that came out of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    PortRead(u16, usize),
    PortWrite(u16, Vec<u8>),
    MemoryRead(u64, usize),
    MemoryWrite(u64, Vec<u8>),
}

/// Remembers accesses, answers reads with 0x11, 0x22, ..., and kicks at the report port.
#[derive(Default)]
pub struct Recorder {
    pub accesses: Mutex<Vec<Access>>,
    pub kick: Mutex<Option<Arc<dyn Kick>>>,
}

impl Recorder {
    fn note(&self, access: Access) {
        self.accesses.lock().unwrap().push(access);
    }

    pub fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.accesses.lock().unwrap())
    }
}

fn answer(data: &mut [u8]) {
    for (index, byte) in (1..).zip(data) {
        *byte = index * 0x11;
    }
}

impl BusAccess for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        answer(data);
        self.note(Access::PortRead(port, data.len()));
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.note(Access::PortWrite(port, data.to_vec()));
        if port == REPORT
            && let Some(kick) = &*self.kick.lock().unwrap()
        {
            kick.kick();
        }
    }

    fn memory_read(&self, address: u64, data: &mut [u8]) {
        answer(data);
        self.note(Access::MemoryRead(address, data.len()));
    }

    fn memory_write(&self, address: u64, data: &[u8]) {
        self.note(Access::MemoryWrite(address, data.to_vec()));
    }
}

/// A VM with one vCPU, at the start of its code.
pub struct Guest {
    pub vcpu: Box<dyn Vcpu>,
    pub engine: Arc<dyn Engine>,
    pub memory: GuestMemory,
    pub bus: Arc<Recorder>,
}

impl Guest {
    /// A guest that executes `code`; `None` without the engine.
    pub fn new(code: &[u8]) -> Option<Self> {
        Some(Self::empty()?.start(code))
    }

    /// Puts the vCPU at the start of `code`.
    pub fn start(self, code: &[u8]) -> Self {
        let mut guest = self;
        guest.memory.write_slice(code, GuestAddress(CODE)).unwrap();
        let mut state = guest.vcpu.save().unwrap();
        state.pvh_start(CODE, 0);
        state.general.rsp = STACK;
        guest.vcpu.restore(&state).unwrap();
        guest
    }

    /// A guest as after power-on.
    pub fn empty() -> Option<Self> {
        // The one profile that every host gives.
        Some(Self::with_profile(CpuProfile::Host)?.unwrap())
    }

    /// The same with a certain processor, if the host gives it.
    pub fn with_profile(profile: CpuProfile) -> Option<Result<Self, EngineError>> {
        let memory = memory::allocate(Bytes::mib(2), &MemoryOptions::default()).unwrap();
        let engine = match crate::make_engine(&memory, 1, profile)? {
            Ok(engine) => engine,
            Err(error) => return Some(Err(error)),
        };
        let vcpu = engine.create_vcpu(0).unwrap();
        let bus = Arc::new(Recorder::default());
        *bus.kick.lock().unwrap() = Some(vcpu.kick_handle());
        Some(Ok(Self {
            vcpu,
            engine,
            memory,
            bus,
        }))
    }

    /// Runs until the guest writes to the report port, and gives what it did until then, the report
    /// excluded.
    pub fn run(&mut self) -> Vec<Access> {
        assert_eq!(self.vcpu.run(&*self.bus).unwrap(), Exit::Kicked);
        let mut accesses = self.bus.take();
        let report = accesses.pop();
        assert!(
            matches!(report, Some(Access::PortWrite(REPORT, _))),
            "{report:?}"
        );
        accesses
    }
}

/// Assembles: pieces of code one after the other.
#[macro_export]
macro_rules! code {
    ($($piece:expr),* $(,)?) => {{
        let mut code: Vec<u8> = Vec::new();
        $(code.extend_from_slice(AsRef::<[u8]>::as_ref(&$piece));)*
        code
    }};
}

/// `out REPORT, al`
pub const OUT_REPORT: [u8; 2] = [0xe6, REPORT as u8];
/// `jmp $`
pub const SPIN: [u8; 2] = [0xeb, 0xfe];

/// `mov eax, value`
pub fn mov_eax(value: u32) -> Vec<u8> {
    [&[0xb8][..], &value.to_le_bytes()].concat()
}

/// `mov [address], eax`
pub fn store_eax(address: u64) -> Vec<u8> {
    [&[0xa3][..], &(address as u32).to_le_bytes()].concat()
}

/// `mov eax, [address]`
pub fn load_eax(address: u64) -> Vec<u8> {
    [&[0xa1][..], &(address as u32).to_le_bytes()].concat()
}
