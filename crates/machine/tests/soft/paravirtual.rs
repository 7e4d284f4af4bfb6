//! Kicks (`KVM_HC_KICK_CPU`) between processors, and in a saved state.

use mica_base::units::Bytes;
use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::state::RunState;
use mica_machine::engine::{Exit, Vcpu};
use mica_machine::memory;
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
    assert_eq!(target.run(), []);
    let state = target.vcpu.save().unwrap();
    assert!(!state.events.kicked, "once");
}

#[test]
fn a_processor_wakes_another_from_a_halt_without_interrupts() {
    const OTHER: u64 = 0x3000;
    let memory = memory::allocate(Bytes::mib(2), &Default::default()).unwrap();
    let engine = crate::make_engine(&memory, 2, CpuProfile::Host)
        .unwrap()
        .unwrap();
    let start = |index: u32, address: u64, code: &[u8]| -> (Box<dyn Vcpu>, Recorder) {
        let mut vcpu = engine.create_vcpu(index).unwrap();
        memory.write_slice(code, GuestAddress(address)).unwrap();
        let mut state = vcpu.save().unwrap();
        state.pvh_start(address, 0);
        state.run_state = RunState::Running;
        vcpu.restore(&state).unwrap();
        let bus = Recorder::default();
        *bus.kick.lock().unwrap() = Some(vcpu.kick_handle());
        (vcpu, bus)
    };
    let (mut waiter, bus) = start(1, OTHER, &code![HLT, OUT_REPORT]);
    let thread = std::thread::spawn(move || {
        assert_eq!(waiter.run(&bus).unwrap(), Exit::Kicked);
        waiter.save().unwrap()
    });
    // A processor that is not there; then the other one. The answer in EAX is zero.
    let (mut waker, own) = start(
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
