//! The state of a micro-guest goes out and comes back bit for bit, and the guest goes on with it.

use std::time::Duration;

use mica_base::units::Bytes;
use mica_machine::cpu_profile::CpuProfile;
use mica_machine::engine::Exit;
use mica_machine::engine::state::{ClockState, Msr, PlatformState, RunState, VcpuState};
use mica_machine::layout;
use mica_machine::memory::{self, MemoryOptions};
use vm_memory::{Bytes as _, GuestAddress};

use crate::micro::*;

/// Memory that the code uses.
const SCRATCH: u64 = 0x2000;
const PV_EOI_BYTE: u64 = 0x2100;

/// Leaves traces in every part of the state, reports, and then writes what it finds in registers to
/// ports.
fn busy_code() -> Vec<u8> {
    code![
        mov_eax(0x1ff), // local APIC: enabled, spurious vector 0xff
        store_eax(layout::LOCAL_APIC + 0xf0),
        mov_eax(0x10000 | 0x33), // its timer: masked
        store_eax(layout::LOCAL_APIC + 0x320),
        mov_eax(0x11), // I/O APIC: pin 1's redirection
        store_eax(layout::IO_APIC),
        mov_eax(0x0300_0000),
        store_eax(layout::IO_APIC + 0x10),
        [0xb0, 0x11, 0xe6, 0x20], // mov al, 0x11; out 0x20: initialize the 8259
        [0xb0, 0x30, 0xe6, 0x21], // mov al, 0x30; out 0x21: its vectors
        [0xb0, 0x04, 0xe6, 0x21], // mov al, 0x04; out 0x21: its cascade
        [0xb0, 0x01, 0xe6, 0x21], // mov al, 0x01; out 0x21: 8086 mode
        [0xb0, 0xfb, 0xe6, 0x21], // mov al, 0xfb; out 0x21: its mask
        [0xb0, 0xb6, 0xe6, 0x43], // mov al, 0xb6; out 0x43: counter 2, both bytes, mode 3
        [0xb0, 0x34, 0xe6, 0x42], // mov al, 0x34; out 0x42: the low byte, and no high byte yet
        [0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x02, 0x00, 0x00], // mov eax, cr4; or eax, OSFXSR
        [0x0f, 0x22, 0xe0],       // mov cr4, eax
        mov_eax(0x1122_3344),
        store_eax(SCRATCH),
        [0xf3, 0x0f, 0x6f, 0x1d], // movdqu xmm3, [SCRATCH]
        (SCRATCH as u32).to_le_bytes(),
        [0x0f, 0x23, 0xd0],             // mov dr2, eax
        [0xb9, 0x02, 0x01, 0x00, 0xc0], // mov ecx, 0xc0000102: the kernel's GS base
        [0x31, 0xd2],                   // xor edx, edx
        [0x0f, 0x30],                   // wrmsr
        [0xb9, 0x04, 0x4d, 0x56, 0x4b], // mov ecx, 0x4b564d04: PV EOI
        mov_eax(PV_EOI_BYTE as u32 | 1),
        [0x0f, 0x30],                   // wrmsr
        [0xb9, 0x05, 0x4d, 0x56, 0x4b], // mov ecx, 0x4b564d05: no polling
        mov_eax(0),
        [0x0f, 0x30],                   // wrmsr
        [0xb9, 0x02, 0x01, 0x00, 0xc0], // mov ecx, 0xc0000102, for later
        mov_eax(0x5566_7788),
        [0x89, 0xc3, 0x89, 0xc6, 0x89, 0xc7, 0x89, 0xc5], // mov ebx, eax; esi; edi; ebp
        [0xf9],                                           // stc
        OUT_REPORT,
        [0x93, 0xe7, 0x80],       // xchg eax, ebx; out 0x80, eax
        [0xf3, 0x0f, 0x7f, 0x1d], // movdqu [SCRATCH + 16], xmm3
        (SCRATCH as u32 + 16).to_le_bytes(),
        load_eax(SCRATCH + 16),
        [0xe7, 0x81],                   // out 0x81, eax
        [0x0f, 0x21, 0xd0, 0xe7, 0x82], // mov eax, dr2; out 0x82, eax
        [0x0f, 0x32, 0xe7, 0x83],       // rdmsr; out 0x83, eax
        load_eax(layout::LOCAL_APIC + 0x320),
        [0xe7, 0x84], // out 0x84, eax
        OUT_REPORT,
    ]
}

/// What it writes after the first report.
fn expected_traces() -> Vec<Access> {
    let word = |port, value: u32| Access::PortWrite(port, value.to_le_bytes().to_vec());
    vec![
        word(0x80, 0x5566_7788),
        word(0x81, 0x1122_3344),
        word(0x82, 0x1122_3344),
        word(0x83, 0x1122_3344),
        word(0x84, 0x0001_0033),
    ]
}

/// Time goes on while a state is taken; everything else stands still.
fn without_time(vcpu: &VcpuState, platform: &PlatformState) -> (VcpuState, PlatformState) {
    let vcpu = VcpuState {
        tsc: 0,
        ..vcpu.clone()
    };
    let platform = PlatformState {
        clock: ClockState::default(),
        ..platform.clone()
    };
    (vcpu, platform)
}

#[test]
fn state_comes_back_bit_for_bit_in_a_new_machine_and_the_guest_goes_on() {
    let Some(mut source) = Guest::new(&busy_code()) else {
        return;
    };
    assert_eq!(source.run(), []);
    let vcpu = source.vcpu.save().unwrap();
    let platform = source.engine.save_platform().unwrap();
    assert_traces(&vcpu, &platform);

    // As bytes, as it would be stored.
    let stored = (vcpu.to_saved(), platform.to_saved());
    drop(source);
    let vcpu = VcpuState::from_saved(&stored.0).unwrap();
    let platform = PlatformState::from_saved(&stored.1).unwrap();

    let mut target = Guest::empty().unwrap();
    target
        .memory
        .write_slice(&busy_code(), GuestAddress(CODE))
        .unwrap();
    target.engine.restore_platform(&platform).unwrap();
    target.vcpu.restore(&vcpu).unwrap();
    let again = target.vcpu.save().unwrap();
    let platform_again = target.engine.save_platform().unwrap();
    assert_eq!(
        without_time(&again, &platform_again),
        without_time(&vcpu, &platform)
    );
    assert!(again.tsc >= vcpu.tsc, "time went back");
    assert!(platform_again.clock.guest_ns >= platform.clock.guest_ns);

    assert_eq!(target.run(), expected_traces());
}

/// The guest's traces are where the architecture has them, not only where KVM does.
fn assert_traces(vcpu: &VcpuState, platform: &PlatformState) {
    assert_eq!(vcpu.general.rbp, 0x5566_7788);
    assert_eq!(vcpu.general.rflags & 1, 1, "carry");
    assert_eq!(vcpu.debug.addresses[2], 0x1122_3344);
    assert_eq!(vcpu.msr(0xc000_0102), Some(0x1122_3344));
    assert_eq!(vcpu.msr(0x4b56_4d04), Some(PV_EOI_BYTE | 1));
    assert_eq!(vcpu.msr(0x4b56_4d05), Some(0));
    assert_eq!(vcpu.special.cr0 & 1, 1);
    assert_eq!(vcpu.run_state, RunState::Running);
    // XMM3 in the legacy region.
    assert_eq!(vcpu.xsave[160 + 48..][..4], 0x1122_3344_u32.to_le_bytes());
    assert_eq!(vcpu.local_apic[0x320..][..4], 0x1_0033_u32.to_le_bytes());
    assert_eq!(platform.pic_master.irq_base, 0x30);
    assert_eq!(platform.pic_master.imr, 0xfb);
    assert_eq!(platform.pic_master.init_state, 0);
    assert_eq!(platform.io_apic.register_select, 0x11);
    assert_eq!(platform.io_apic.redirection[0] >> 56, 3);
    assert_eq!(platform.pit.channels[2].mode, 3);
    assert_eq!(platform.pit.channels[2].write_latch, 0x34);
}

#[test]
fn a_guest_goes_on_after_its_own_state_is_put_back() {
    let Some(mut guest) = Guest::new(&busy_code()) else {
        return;
    };
    guest.run();
    let state = guest.vcpu.save().unwrap();
    assert_eq!(guest.run(), expected_traces());
    guest.vcpu.restore(&state).unwrap();
    assert_eq!(guest.run(), expected_traces());
}

/// What a debugger writes is set, and nothing else: the clock goes on meanwhile.
#[test]
fn registers_are_set_alone() {
    let Some(mut guest) = Guest::new(&busy_code()) else {
        return;
    };
    guest.run();
    let before = guest.vcpu.save().unwrap();
    let mut general = before.general;
    general.rbx = 0x1357_9bdf;
    general.rip += 1; // past XCHG EAX, EBX
    general.rax = 0x0246_8ace;
    let mut xsave = before.xsave.clone();
    xsave[160 + 48..][..4].copy_from_slice(&0x8642_0eca_u32.to_le_bytes());
    // The debugger's user thinks.
    std::thread::sleep(Duration::from_millis(20));
    let later = guest.vcpu.save().unwrap().tsc;
    guest.vcpu.set_registers(&general, &xsave).unwrap();
    let after = guest.vcpu.save().unwrap();
    assert!(after.tsc >= later, "{} after {later}", after.tsc);
    let expected = VcpuState {
        general,
        xsave,
        tsc: after.tsc,
        ..before
    };
    assert_eq!(after, expected);
    let mut traces = expected_traces();
    traces[0] = Access::PortWrite(0x80, 0x0246_8ace_u32.to_le_bytes().to_vec());
    traces[1] = Access::PortWrite(0x81, 0x8642_0eca_u32.to_le_bytes().to_vec());
    assert_eq!(guest.run(), traces);
    let error = guest.vcpu.set_registers(&general, &[0; 100]).unwrap_err();
    assert!(error.operation.contains("vCPU 0"), "{error}");
}

/// As a machine does at its boot, and with time between the vCPUs.
#[test]
fn time_stamp_counters_agree_after_restores() {
    const VCPUS: u32 = 4;
    for apart in [Duration::ZERO, Duration::from_millis(5)] {
        let memory = memory::allocate(Bytes::mib(2), &MemoryOptions::default()).unwrap();
        let Some(engine) = crate::make_engine(&memory, VCPUS, CpuProfile::Host) else {
            return;
        };
        let engine = engine.unwrap();
        let mut vcpus: Vec<_> = (0..VCPUS)
            .map(|index| engine.create_vcpu(index).unwrap())
            .collect();
        for vcpu in &mut vcpus {
            let mut state = vcpu.save().unwrap();
            state.set_up_as_firmware();
            std::thread::sleep(apart);
            vcpu.restore(&state).unwrap();
        }
        let mut read = |index: usize| vcpus[index].save().unwrap().tsc;
        for index in 1..VCPUS as usize {
            let (before, now, after) = (read(0), read(index), read(0));
            assert!(
                (before..=after).contains(&now),
                "vCPU {index}, {apart:?} apart: {now} is not in {before}..={after}"
            );
        }
    }
}

#[test]
fn a_port_read_is_finished_before_a_state_is_taken() {
    // The kick comes while the access is served.
    struct KickingBus(std::sync::Arc<dyn mica_machine::engine::Kick>);
    impl mica_machine::engine::BusAccess for KickingBus {
        fn port_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
            self.0.kick();
        }
        fn port_write(&self, _: u16, _: &[u8]) {}
        fn memory_read(&self, _: u64, _: &mut [u8]) {}
        fn memory_write(&self, _: u64, _: &[u8]) {}
    }
    let Some(mut guest) = Guest::new(&code![[0xe5, 0x70], SPIN]) else {
        return;
    };
    let bus = KickingBus(guest.vcpu.kick_handle());
    assert_eq!(guest.vcpu.run(&bus).unwrap(), Exit::Kicked);
    let state = guest.vcpu.save().unwrap();
    assert_eq!(state.general.rax, 0x5a5a_5a5a);
    assert_eq!(state.general.rip, CODE + 2);
}

#[test]
fn an_impossible_state_is_refused() {
    let Some(mut guest) = Guest::empty() else {
        return;
    };
    let good = guest.vcpu.save().unwrap();
    type Spoil = fn(&mut VcpuState);
    let spoils: [Spoil; 4] = [
        |state| state.special.cr4 = u64::MAX,
        |state| {
            state.msrs[0] = Msr {
                index: 0x1234_5678,
                value: 1,
            }
        },
        |state| state.xsave.truncate(100),
        |state| state.xcr0 = u64::MAX,
    ];
    for spoil in spoils {
        let mut state = good.clone();
        spoil(&mut state);
        let error = guest.vcpu.restore(&state).unwrap_err();
        assert!(error.operation.contains("vCPU 0"), "{error}");
    }
    guest.vcpu.restore(&good).unwrap();
}

#[test]
fn application_processors_wait() {
    let memory = memory::allocate(Bytes::mib(2), &Default::default()).unwrap();
    let Some(engine) = crate::make_engine(&memory, 3, CpuProfile::Host) else {
        return;
    };
    let engine = engine.unwrap();
    let states: Vec<_> = (0..3)
        .map(|index| engine.create_vcpu(index).unwrap().save().unwrap())
        .collect();
    let run_states: Vec<_> = states.iter().map(|state| state.run_state).collect();
    use RunState::{Running, WaitForInit};
    assert_eq!(run_states, [Running, WaitForInit, WaitForInit]);
    // The APIC ID, in its register and in the base's bootstrap flag.
    for (index, state) in (0..).zip(&states) {
        assert_eq!(state.local_apic[0x23], index);
        assert_eq!(state.special.apic_base >> 8 & 1, u64::from(index == 0));
    }
    assert!(engine.create_vcpu(0).is_err(), "it exists");
    assert!(engine.create_vcpu(3).is_err(), "it is not configured");
}
