//! The KVM engine on a real KVM interface: what a guest does comes out, what happens outside goes in.

use std::sync::Arc;
use std::sync::mpsc;

use mica_machine::cpu_profile::{CpuProfile, Register};
use mica_machine::engine::{DebugRequest, DoorbellAddress, Exit};
use mica_machine::layout;
use mica_machine::memory::dirty::{DirtyPages, DirtySource, DirtyTracker};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::micro::*;

/// Runs `code` to its report and checks what came out.
fn check(code: &[u8], expected: &[Access]) {
    let code = [code, &OUT_REPORT].concat();
    let Some(mut guest) = Guest::new(&code) else {
        return;
    };
    assert_eq!(guest.run(), expected);
}

#[test]
fn ports_are_read_and_written_in_every_width() {
    check(
        &[
            0xe4,
            0x40 + 0x20, // in al, 0x60
            0xe6,
            0x80, // out 0x80, al
            0x66,
            0xe5,
            0x70, // in ax, 0x70
            0x66,
            0xe7,
            0x80, // out 0x80, ax
            0xe5,
            0x70, // in eax, 0x70
            0xe7,
            0x80, // out 0x80, eax
        ],
        &[
            Access::PortRead(0x60, 1),
            Access::PortWrite(0x80, vec![0x11]),
            Access::PortRead(0x70, 2),
            Access::PortWrite(0x80, vec![0x11, 0x22]),
            Access::PortRead(0x70, 4),
            Access::PortWrite(0x80, vec![0x11, 0x22, 0x33, 0x44]),
        ],
    );
}

#[test]
fn a_repeated_string_access_comes_out_unit_by_unit() {
    check(
        &code![
            [0xbe, 0x00, 0x10, 0x00, 0x00], // mov esi, CODE: the code itself is the string
            [0xb9, 0x03, 0x00, 0x00, 0x00], // mov ecx, 3
            [0x66, 0xba, 0xf8, 0x03],       // mov dx, 0x3f8
            [0xf3, 0x6e],                   // rep outsb
            [0xbf, 0x00, 0x20, 0x00, 0x00], // mov edi, 0x2000
            [0xb9, 0x02, 0x00, 0x00, 0x00], // mov ecx, 2
            [0xf3, 0x66, 0x6d],             // rep insw
            load_eax(0x2000),
            [0xe7, 0x80], // out 0x80, eax
        ],
        &[
            Access::PortWrite(0x3f8, vec![0xbe]),
            Access::PortWrite(0x3f8, vec![0x00]),
            Access::PortWrite(0x3f8, vec![0x10]),
            Access::PortRead(0x3f8, 2),
            Access::PortRead(0x3f8, 2),
            Access::PortWrite(0x80, vec![0x11, 0x22, 0x11, 0x22]),
        ],
    );
}

#[test]
fn memory_outside_ram_is_a_bus_access() {
    check(
        &code![
            load_eax(MMIO + 4),
            store_eax(MMIO + 8),
            [0x66, 0xa3, 0x02, 0x00, 0x00, 0xd0], // mov [MMIO + 2], ax
            [0xa0, 0x01, 0x00, 0x00, 0xd0],       // mov al, [MMIO + 1]
        ],
        &[
            Access::MemoryRead(MMIO + 4, 4),
            Access::MemoryWrite(MMIO + 8, vec![0x11, 0x22, 0x33, 0x44]),
            Access::MemoryWrite(MMIO + 2, vec![0x11, 0x22]),
            Access::MemoryRead(MMIO + 1, 1),
        ],
    );
}

#[test]
fn doorbells_signal_without_reaching_the_bus() {
    let bells = code![
        store_eax(MMIO),
        [0x66, 0xa3, 0x00, 0x00, 0x00, 0xd0], // mov [MMIO], ax
        [0xe6, 0x50],                         // out 0x50, al
        OUT_REPORT,
    ];
    let Some(mut guest) = Guest::new(&code![bells, bells]) else {
        return;
    };
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (memory, port) = (event(), event());
    let (at_memory, at_port) = (DoorbellAddress::Memory(MMIO), DoorbellAddress::Port(0x50));
    guest.engine.add_doorbell(at_memory, &memory).unwrap();
    guest.engine.add_doorbell(at_port, &port).unwrap();
    assert!(guest.engine.add_doorbell(at_port, &memory).is_err());

    assert_eq!(guest.run(), []);
    assert_eq!(memory.read().unwrap(), 2);
    assert_eq!(port.read().unwrap(), 1);

    guest.engine.remove_doorbell(at_memory, &memory).unwrap();
    assert!(guest.engine.remove_doorbell(at_memory, &memory).is_err());
    assert_eq!(guest.run().len(), 2);
    assert!(memory.read().is_err());
    assert_eq!(port.read().unwrap(), 1);
}

/// Vector 0x40's handler and an IDT with it; the guest reports, then waits with interrupts enabled
/// and reports each interrupt.
fn interrupt_guest(before: &[u8]) -> Option<Guest> {
    const IDT: u64 = 0x3000;
    const HANDLER: u64 = 0x4000;
    const IDT_POINTER: u64 = 0x5000;
    const GDT: u64 = 0x6000;
    const GDT_POINTER: u64 = 0x5008;
    let code = code![
        [0x0f, 0x01, 0x15], // lgdt [GDT_POINTER]
        (GDT_POINTER as u32).to_le_bytes(),
        [0x0f, 0x01, 0x1d], // lidt [IDT_POINTER]
        (IDT_POINTER as u32).to_le_bytes(),
        mov_eax(0x1ff), // local APIC: enabled, spurious vector 0xff
        store_eax(layout::LOCAL_APIC + 0xf0),
        before,
        OUT_REPORT,
        [0xfb],             // sti
        [0xf4, 0xeb, 0xfd], // hlt; jmp to it
    ];
    let guest = Guest::new(&code)?;
    let handler = code![
        mov_eax(0),
        store_eax(layout::LOCAL_APIC + 0xb0), // end of interrupt
        OUT_REPORT,
        // Wait here for the next, rather than by IRET, which an emulating KVM does not know.
        [0xbc], // mov esp, STACK
        (STACK as u32).to_le_bytes(),
        [0xfb],             // sti
        [0xf4, 0xeb, 0xfd], // hlt; jmp to it
    ];
    let write = |bytes: &[u8], at| guest.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    write(&handler, HANDLER);
    // An interrupt gate: selector 8, present.
    write(
        &[0x00, 0x40, 0x08, 0x00, 0x00, 0x8e, 0x00, 0x00],
        IDT + 8 * 0x40,
    );
    write(&[0xff, 0x07, 0x00, 0x30, 0x00, 0x00], IDT_POINTER);
    // Null, flat code, flat data.
    write(&0x00cf_9b00_0000_ffff_u64.to_le_bytes(), GDT + 8);
    write(&0x00cf_9300_0000_ffff_u64.to_le_bytes(), GDT + 16);
    write(&[0x17, 0x00, 0x00, 0x60, 0x00, 0x00], GDT_POINTER);
    Some(guest)
}

#[test]
fn an_msi_reaches_the_guest_and_a_masked_one_waits() {
    let Some(mut guest) = interrupt_guest(&[]) else {
        return;
    };
    let vector = guest.engine.msi_vector().unwrap();
    let other = guest.engine.msi_vector().unwrap();
    assert_eq!(guest.run(), []);

    // Masked: the signal is kept.
    vector.route(0xfee0_0000, 0x40).unwrap();
    vector.eventfd().write(1).unwrap();
    assert!(vector.pending());
    other.route(0xfee0_0000, 0x41).unwrap();
    other.set_masked(false).unwrap();
    vector.set_masked(false).unwrap();
    assert_eq!(guest.run(), []);
    assert!(!vector.pending());

    // Unmasked: straight on, with the guest halted or not.
    vector.eventfd().write(1).unwrap();
    assert_eq!(guest.run(), []);

    // Masked again, and dropped while it is not.
    vector.set_masked(true).unwrap();
    vector.eventfd().write(1).unwrap();
    assert!(vector.pending());
    vector.set_masked(false).unwrap();
    assert_eq!(guest.run(), []);
    drop(vector);
    let reused = guest.engine.msi_vector().unwrap();
    reused.route(0xfee0_0000, 0x40).unwrap();
    reused.set_masked(false).unwrap();
    reused.eventfd().write(1).unwrap();
    assert_eq!(guest.run(), []);
}

#[test]
fn a_line_is_the_sum_of_its_drivers() {
    // I/O APIC, pin 20: level-triggered, vector 0x40. Its handler's EOI re-raises while the line is
    // high.
    let select = |register: u32| code![mov_eax(register), store_eax(layout::IO_APIC)];
    let program = code![
        select(0x10 + 2 * 20 + 1),
        mov_eax(0),
        store_eax(layout::IO_APIC + 0x10),
        select(0x10 + 2 * 20),
        mov_eax(0x40 | 1 << 15),
        store_eax(layout::IO_APIC + 0x10),
    ];
    let Some(mut guest) = interrupt_guest(&program) else {
        return;
    };
    assert_eq!(guest.run(), []);
    let one = guest.engine.line(20);
    let two = guest.engine.line(20);
    one.set(true);
    two.set(true);
    one.set(false);
    assert_eq!(guest.run(), [], "one driver still holds the line");
    assert_eq!(guest.run(), [], "and the interrupt comes again");
    two.set(false);
    // The last interrupt may have been taken before the line fell; then the guest halts, and only a
    // kick gets it out.
    let kick = guest.vcpu.kick_handle();
    let (running, told) = mpsc::channel();
    let kicker = std::thread::spawn(move || {
        told.recv().unwrap();
        kick.kick();
    });
    running.send(()).unwrap();
    assert_eq!(guest.vcpu.run(&*guest.bus).unwrap(), Exit::Kicked);
    kicker.join().unwrap();
    assert!(guest.bus.take().len() <= 1);
}

#[test]
fn a_kick_ends_an_endless_loop_once() {
    let Some(mut guest) = Guest::new(&SPIN) else {
        return;
    };
    let kick = guest.vcpu.kick_handle();
    // Before it runs: several are one.
    kick.kick();
    kick.kick();
    assert_eq!(guest.vcpu.run(&*guest.bus).unwrap(), Exit::Kicked);
    // While it runs, again and again, from another thread: each `run` ends, none is lost.
    let (entered, seen) = mpsc::channel();
    let kicker = std::thread::spawn(move || {
        let mut kicks = 0;
        while seen.recv().is_ok() {
            kick.kick();
            kicks += 1;
        }
        kicks
    });
    for _ in 0..1000 {
        entered.send(()).unwrap();
        assert_eq!(guest.vcpu.run(&*guest.bus).unwrap(), Exit::Kicked);
    }
    drop(entered);
    assert_eq!(kicker.join().unwrap(), 1000);
}

#[test]
fn a_kick_after_the_vcpu_is_gone_does_nothing() {
    let Some(guest) = Guest::new(&SPIN) else {
        return;
    };
    let kick = guest.vcpu.kick_handle();
    drop(guest);
    kick.kick();
}

#[test]
fn a_triple_fault_and_a_reset() {
    // ud2 without an interrupt table.
    let Some(mut guest) = Guest::new(&[0x0f, 0x0b]) else {
        return;
    };
    assert_eq!(guest.vcpu.run(&*guest.bus).unwrap(), Exit::TripleFault);
    guest.vcpu.reset().unwrap();
    guest.engine.reset_platform().unwrap();
    let state = guest.vcpu.save().unwrap();
    // The architecture's reset vector.
    assert_eq!(state.general.rip, 0xfff0);
    assert_eq!(state.special.cs.base, 0xffff_0000);
}

#[test]
fn an_unknown_msr_faults_and_is_named_once() {
    let read = [
        0xb9, 0x78, 0x56, 0x34, 0x12, // mov ecx, 0x12345678
        0x0f, 0x32, // rdmsr
    ];
    // The fault finds no handler.
    let Some(mut guest) = Guest::new(&read) else {
        return;
    };
    assert_eq!(guest.vcpu.run(&*guest.bus).unwrap(), Exit::TripleFault);
    assert_eq!(guest.engine.unknown_msr_accesses(), 1);
    assert_eq!(guest.engine.take_unknown_msrs(), [0x1234_5678]);
    assert!(guest.engine.take_unknown_msrs().is_empty());
}

#[test]
fn what_the_guest_writes_is_in_the_dirty_log() {
    let pass = code![
        store_eax(0x10_0000),
        store_eax(0x10_1ffe), // two pages
        OUT_REPORT,
    ];
    let Some(mut guest) = Guest::new(&code![pass, pass, pass]) else {
        return;
    };
    let log = guest.engine.dirty_source();
    let tracker = DirtyTracker::new(guest.memory.clone(), vec![Arc::clone(&log)]);
    guest.run();
    tracker.start().unwrap();
    let mut dirty = DirtyPages::new(&guest.memory);
    tracker.drain(&mut dirty).unwrap();
    assert_eq!(dirty.count(), 0);

    guest.run();
    guest
        .memory
        .write_obj(1u8, GuestAddress(0x18_0000))
        .unwrap();
    tracker.drain(&mut dirty).unwrap();
    let runs: Vec<_> = dirty.runs().map(|(at, len)| (at.0, len)).collect();
    assert_eq!(runs, [(0x10_0000, 0x3000), (0x18_0000, 0x1000)]);

    dirty.clear();
    tracker.drain(&mut dirty).unwrap();
    assert_eq!(dirty.count(), 0);
    guest.run();
    log.stop().unwrap();
    log.start().unwrap();
    log.drain(&mut dirty).unwrap();
    assert_eq!(dirty.count(), 0, "a new log begins empty");
}

/// What CPUID answers a guest of `profile` to leaf 1 is its table's entry.
fn check_profile(profile: CpuProfile) {
    let code = code![
        mov_eax(1),
        [0x0f, 0xa2, 0xe7, 0x80], // cpuid; out 0x80, eax
        [0x89, 0xd8, 0xe7, 0x80], // mov eax, ebx; out 0x80, eax
        [0x89, 0xc8, 0xe7, 0x80], // mov eax, ecx; out 0x80, eax
        [0x89, 0xd0, 0xe7, 0x80], // mov eax, edx; out 0x80, eax
        OUT_REPORT,
    ];
    let hardware = crate::gives_every_profile();
    let mut guest = match Guest::with_profile(profile) {
        None => return,
        Some(Ok(guest)) => guest.start(&code),
        Some(Err(error)) => {
            assert!(error.to_string().contains("it lacks"), "{error}");
            // Hardware with virtualization has level 2 at the least.
            assert!(!hardware, "{error}");
            return;
        }
    };
    let table = guest.engine.cpuid().for_vcpu(0);
    let word = |register| {
        let word = table.register(1, 0, register);
        Access::PortWrite(0x80, word.to_le_bytes().to_vec())
    };
    use Register::{Eax, Ebx, Ecx, Edx};
    let seen = guest.run();
    // A KVM that emulates may let CPUID through to the host's processor.
    if hardware {
        assert_eq!(seen, [Eax, Ebx, Ecx, Edx].map(word), "{profile}");
    }
}

#[test]
fn the_guest_sees_its_profile_s_processor() {
    for profile in [CpuProfile::X86_64V2, CpuProfile::Host] {
        check_profile(profile);
    }
}

/// Three instructions, of which a debugger is to see each, and a guest at the first.
fn debuggee() -> Option<Guest> {
    Guest::new(&code![
        mov_eax(1),
        mov_eax(2),
        mov_eax(3),
        [0xe7, 0x80], // out 0x80, eax
        OUT_REPORT,
    ])
}

fn assert_is_at(guest: &mut Guest, rip: u64, rax: u64) {
    let state = guest.vcpu.save().unwrap();
    assert_eq!((state.general.rip, state.general.rax), (rip, rax));
}

/// What the guest does when the debugger leaves it alone.
fn assert_goes_on(guest: &mut Guest) {
    guest.vcpu.set_debug(&DebugRequest::default()).unwrap();
    let three = Access::PortWrite(0x80, 3u32.to_le_bytes().to_vec());
    assert_eq!(guest.run(), [three]);
}

/// A step stops after its instruction, and the guest does not notice.
#[test]
fn a_debugger_steps() {
    let Some(mut guest) = debuggee() else { return };
    let request = DebugRequest {
        single_step: true,
        ..DebugRequest::default()
    };
    for (rip, rax) in [(CODE + 5, 1), (CODE + 10, 2)] {
        guest.vcpu.set_debug(&request).unwrap();
        let exit = guest.vcpu.run(&*guest.bus).unwrap();
        if exit == Exit::Kicked && !crate::gives_every_profile() {
            println!("skipped: a /dev/kvm that emulates ring 0 has no steps");
            return;
        }
        assert_eq!(exit, Exit::Debug);
        assert_is_at(&mut guest, rip, rax);
    }
    assert_eq!(guest.vcpu.translate(CODE + 15).unwrap(), Some(CODE + 15));
    assert_goes_on(&mut guest);
}

/// A breakpoint stops before its instruction.
#[test]
fn a_debugger_breaks() {
    let Some(mut guest) = debuggee() else { return };
    let request = DebugRequest {
        breakpoints: vec![CODE + 10],
        ..DebugRequest::default()
    };
    guest.vcpu.set_debug(&request).unwrap();
    let exit = guest.vcpu.run(&*guest.bus).unwrap();
    if exit == Exit::Kicked && !crate::HAS_BREAKPOINTS {
        println!("not compared: this processor ignores debug registers in guests");
        return;
    }
    assert_eq!(exit, Exit::Debug);
    assert_is_at(&mut guest, CODE + 10, 2);
    assert_goes_on(&mut guest);
}
