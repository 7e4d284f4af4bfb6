//! KVM's paravirtual features where it takes two processors, or a saved state, to see them.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use mica_base::units::Bytes;
use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::state::RunState;
use mica_machine::engine::{Engine, Exit, Kick, Vcpu};
use mica_machine::memory::{self, GuestMemory, MemoryOptions};
use vm_memory::{Bytes as _, GuestAddress};

use crate::micro::*;

/// Kicks the processor with that APIC ID.
fn kick(id: u32) -> Vec<u8> {
    code![
        [0xbb, 0, 0, 0, 0], // mov ebx, 0
        [0xb9],             // mov ecx, id
        id.to_le_bytes(),
        mov_eax(5),
        [0x0f, 0x01, 0xc1], // vmcall
    ]
}

const HLT: [u8; 1] = [0xf4];
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_kick_before_the_halt_is_part_of_the_state() {
    // Interrupts are off: only a kick ends the halt.
    let code = code![kick(0), OUT_REPORT, HLT, OUT_REPORT];
    let mut source = Guest::new(&code).unwrap();
    assert_eq!(source.run(), []);
    let state = source.vcpu.save().unwrap();
    assert!(state.events.kicked);
    assert_eq!(state.run_state, RunState::Running);

    let mut target = Guest::new(&code).unwrap();
    target.vcpu.restore(&state).unwrap();
    assert!(target.vcpu.save().unwrap().events.kicked);
    {
        let _watchdog = Watchdog::new(target.vcpu.kick_handle());
        assert_eq!(target.run(), []);
    }
    let state = target.vcpu.save().unwrap();
    assert!(!state.events.kicked, "once");
}

/// Stops a processor that does not end by itself.
struct Watchdog {
    _ended: mpsc::Sender<()>,
}

impl Watchdog {
    fn new(kick: Arc<dyn Kick>) -> Self {
        let (ended, wait) = mpsc::channel();
        std::thread::spawn(move || {
            if wait.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        Self { _ended: ended }
    }
}

/// A machine with two processors.
struct Pair {
    memory: GuestMemory,
    engine: Arc<dyn Engine>,
}

impl Pair {
    fn new() -> Self {
        let memory = memory::allocate(Bytes::mib(2), &MemoryOptions::default()).unwrap();
        let engine = crate::make_engine(&memory, 2, CpuProfile::Host).unwrap();
        Self {
            memory,
            engine: engine.unwrap(),
        }
    }

    /// A processor at the start of its code, whether it is the first or not.
    fn start(&self, index: u32, address: u64, code: &[u8]) -> (Box<dyn Vcpu>, Recorder) {
        let mut vcpu = self.engine.create_vcpu(index).unwrap();
        self.memory
            .write_slice(code, GuestAddress(address))
            .unwrap();
        let mut state = vcpu.save().unwrap();
        state.pvh_start(address, 0);
        state.run_state = RunState::Running;
        vcpu.restore(&state).unwrap();
        let bus = Recorder::default();
        *bus.kick.lock().unwrap() = Some(vcpu.kick_handle());
        (vcpu, bus)
    }
}

/// As on KVM: the kernel of a processor that is started anew registers again.
#[test]
fn init_turns_everything_off_but_the_poll_control() {
    const MSRS: [(u32, u64); 4] = [
        (0x4b56_4d01, 0x5001),
        (0x4b56_4d03, 0x6001),
        (0x4b56_4d04, 0x7001),
        (0x4b56_4d05, 0),
    ];
    let write = |(msr, value): (u32, u64)| {
        code![
            [0xb9], // mov ecx, msr
            msr.to_le_bytes(),
            mov_eax(value as u32),
            [0x0f, 0x30], // wrmsr
        ]
    };
    let code = [
        vec![0x31, 0xd2], // xor edx, edx
        MSRS.map(write).concat(),
        kick(1),
        OUT_REPORT.to_vec(),
    ];
    let pair = Pair::new();
    let (mut vcpu, bus) = pair.start(1, CODE, &code.concat());
    assert_eq!(vcpu.run(&bus).unwrap(), Exit::Kicked);
    let state = vcpu.save().unwrap();
    assert_eq!(
        MSRS.map(|(msr, _)| state.msr(msr)),
        MSRS.map(|it| Some(it.1))
    );
    assert!(state.events.kicked);
    // INIT to APIC ID 1, by a message.
    let init = pair.engine.msi_vector().unwrap();
    init.route(0xfee0_1000, 0x500).unwrap();
    init.eventfd().write(1).unwrap();
    init.set_masked(false).unwrap();
    // The thread behind the eventfd delivers it.
    let deadline = Instant::now() + LIMIT;
    let mut state = vcpu.save().unwrap();
    while state.run_state == RunState::Running && Instant::now() < deadline {
        std::thread::yield_now();
        state = vcpu.save().unwrap();
    }
    assert_eq!(state.run_state, RunState::WaitForSipi);
    assert_eq!(MSRS.map(|(msr, _)| state.msr(msr)), [Some(0); 4]);
    assert!(!state.events.kicked);
    // A reset also lets the host poll again.
    vcpu.reset().unwrap();
    assert_eq!(vcpu.save().unwrap().msr(0x4b56_4d05), Some(1));
}

#[test]
fn a_processor_wakes_another_from_a_halt_without_interrupts() {
    const OTHER: u64 = 0x3000;
    let pair = Pair::new();
    let (mut waiter, bus) = pair.start(1, OTHER, &code![HLT, OUT_REPORT]);
    let thread = std::thread::spawn(move || {
        let _watchdog = Watchdog::new(waiter.kick_handle());
        assert_eq!(waiter.run(&bus).unwrap(), Exit::Kicked);
        waiter.save().unwrap()
    });
    // A processor that is not there; then the other one. The answer in EAX is zero.
    let (mut waker, own) = pair.start(
        0,
        CODE,
        &code![kick(77), kick(1), [0xe7, 0x80], OUT_REPORT], // out 0x80, eax
    );
    assert_eq!(waker.run(&own).unwrap(), Exit::Kicked);
    assert_eq!(own.take()[0], Access::PortWrite(0x80, vec![0; 4]));
    let state = thread.join().unwrap();
    assert_eq!(state.general.rip, OTHER + 3);
    assert_eq!(state.general.rflags >> 9 & 1, 0, "interrupts are off");
    assert_eq!(state.run_state, RunState::Running);
}
