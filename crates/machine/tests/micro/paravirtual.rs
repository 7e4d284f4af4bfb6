//! What KVM's guests have beside the architecture: hypercalls, PV EOI, steal time. The reference is
//! `Documentation/virt/kvm/x86` in the kernel's source.

use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::SeqCst;

use iced_x86::code_asm::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, VolatileMemory as _};

use crate::engines::{AMD_KVM, EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

const APIC: u64 = 0xfee0_0000;
const EOI: i32 = 0xb0;
const SPURIOUS: i32 = 0xf0;
const ISR_3: u64 = APIC + 0x130;
const ICR_LOW: i32 = 0x300;
/// ICR: fixed delivery to itself, asserted.
const TO_SELF: i32 = 1 << 18 | 1 << 14;

const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const POLL_CONTROL: u32 = 0x4b56_4d05;

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;

const EPERM: i64 = -1;
const EFAULT: i64 = -14;
const EINVAL: i64 = -22;
const EOPNOTSUPP: i64 = -95;
const ENOSYS: i64 = -1000;

/// Where the guest's structures are.
const AREA: u64 = Guest::SCRATCH;

/// A `/dev/kvm` that emulates ring 0 shows the features all the same.
const NOT_EMULATED: &[(&str, &str)] = &[(EMULATED_KVM, "it does not do what it shows")];

/// Calls the hypervisor; what is in RAX afterwards.
fn call(guest: &mut Guest, number: u64, arguments: [u64; 4]) -> i64 {
    guest.state.general.rip = Guest::CODE;
    guest.finish(|a| {
        load(a, number, arguments)?;
        native_call(a)
    });
    guest.state.general.rax.cast_signed()
}

/// The registers of a hypercall.
fn load(a: &mut CodeAssembler, number: u64, [first, second, third, fourth]: [u64; 4]) -> Assembled {
    a.mov(rax, number)?;
    a.mov(rbx, first)?;
    a.mov(rcx, second)?;
    a.mov(rdx, third)?;
    a.mov(rsi, fourth)
}

fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) -> Assembled {
    a.mov(ecx, msr)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Enables the local APIC; its address stays in RSI.
fn enable(a: &mut CodeAssembler) -> Assembled {
    a.mov(rsi, APIC)?;
    a.mov(dword_ptr(rsi + SPURIOUS), 0x1ff)
}

#[test]
fn hypercalls_answer() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        let cases = [
            (VAPIC_POLL_IRQ, [0; 4], 0),
            (SCHED_YIELD, [0; 4], 0),
            (SCHED_YIELD, [99, 0, 0, 0], 0),
            (SCHED_YIELD, [u64::MAX; 4], 0),
            (KICK_CPU, [0, 99, 0, 0], 0),
            (KICK_CPU, [0, u64::MAX, 0, 0], 0),
            // Nobody has these IDs.
            (SEND_IPI, [0b10, 0, 0, 0x61], 0),
            (SEND_IPI, [0, u64::MAX, 0, 0x61], 0),
            (SEND_IPI, [u64::MAX, u64::MAX, 255, 0x61], 0),
            // Neither logical destinations nor shorthands.
            (SEND_IPI, [1, 0, 0, 0x861], EINVAL),
            (SEND_IPI, [1, 0, 0, 0x4_0061], EINVAL),
            (SEND_IPI, [1, 0, 0, 0x8_0061], EINVAL),
            (CLOCK_PAIRING, [AREA, 1, 0, 0], EOPNOTSUPP),
            (0, [0; 4], ENOSYS),
            (2, [0; 4], ENOSYS),
            (12, [0; 4], ENOSYS),
            (u64::MAX, [u64::MAX; 4], ENOSYS),
        ];
        for (number, arguments, expected) in cases {
            let result = call(guest, number, arguments);
            assert_eq!(result, expected, "{number} {arguments:x?}");
        }
    });
}

/// Intel's instruction and AMD's are the same thing.
#[test]
fn both_instructions_call() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        guest.finish(|a| {
            load(a, VAPIC_POLL_IRQ, [0; 4])?;
            a.vmcall()
        });
        assert_eq!(guest.state.general.rax, 0);
        guest.state.general.rip = Guest::CODE;
        guest.finish(|a| {
            load(a, 999, [0; 4])?;
            a.vmmcall()
        });
        assert_eq!(guest.state.general.rax.cast_signed(), ENOSYS);
    });
}

#[test]
fn users_may_not_call() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        guest.user_mode();
        guest.interrupted(|a| {
            load(a, SCHED_YIELD, [0; 4])?;
            native_call(a)?;
            a.int3()
        });
        assert_eq!(guest.state.general.rax.cast_signed(), EPERM);
    });
}

/// The processor's own instruction: KVM rewrites the other vendor's, which it can in kernel mode only.
fn native_call(a: &mut CodeAssembler) -> Assembled {
    if is_amd() { a.vmmcall() } else { a.vmcall() }
}

fn is_amd() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.contains("AuthenticAMD")
}

#[test]
fn code_of_32_bits_calls_with_halves() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        guest.protected_mode();
        guest.finish(|a| {
            a.mov(eax, 999)?;
            native_call(a)
        });
        assert_eq!(guest.state.general.rax, u64::from(ENOSYS as u32));
    });
}

#[test]
fn a_kick_ends_a_halt_without_an_interrupt() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        // Interrupts are off: nothing else could.
        guest.finish(|a| {
            load(a, KICK_CPU, [0; 4])?;
            native_call(a)?;
            a.hlt()?;
            a.inc(ebp)
        });
        let general = &guest.state.general;
        assert_eq!((general.rax, general.rbp), (0, 1));
        assert_eq!(general.rflags & FLAG_IF, 0);
    });
}

#[test]
fn an_interrupt_to_a_bitmap_comes() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            load(a, SEND_IPI, [0b11, 0, 0, 0x61])?;
            native_call(a)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!((frame.vector, frame.error), (0x61, None));
        assert_eq!(guest.state.general.rax, 1, "one has taken it");
    });
}

#[test]
fn an_nmi_to_a_bitmap_comes() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        let frame = guest.interrupted(|a| {
            load(a, SEND_IPI, [1, 0, 0, 0x400])?;
            native_call(a)?;
            a.hlt()
        });
        assert_eq!(frame.vector, NMI);
    });
}

#[test]
fn paired_clocks_are_written_to_ram_only() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        let result = call(guest, CLOCK_PAIRING, [AREA, 0, 0, 0]);
        if result == EOPNOTSUPP {
            println!("not compared: the host's clock is not its time-stamp counter");
            return;
        }
        assert_eq!(result, 0);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let seconds: u64 = guest.read(AREA);
        assert!(seconds.abs_diff(now.as_secs()) < 60, "{seconds}");
        assert!(guest.read::<u64>(AREA + 8) < 1_000_000_000);
        for outside in [1 << 30, 0xff_ffff_f000, u64::MAX - 10] {
            let result = call(guest, CLOCK_PAIRING, [outside, 0, 0, 0]);
            assert_eq!(result, EFAULT, "{outside:#x}");
        }
    });
}

/// An interrupt whose handler finds the bit: it clears it instead of writing EOI, and the next interrupt
/// of the same priority comes.
#[test]
fn the_end_of_an_interrupt_is_spared() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        let frame = guest.interrupted(|a| {
            enable(a)?;
            write_msr(a, PV_EOI, AREA | 1)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!(frame.vector, 0x61);
        // The handler has left the guest for its report, so the end is no longer spared.
        assert_eq!(guest.read::<u8>(AREA), 0);
        assert_eq!(guest.state.msr(PV_EOI), Some(AREA | 1));
        let isr: [u8; 4] = guest.state.local_apic[0x130..0x134].try_into().unwrap();
        assert_eq!(u32::from_le_bytes(isr), 1 << 1, "it is in service");
    });
}

/// Puts a handler of that vector in place which ends its interrupt as Linux does: by clearing the bit, or
/// if it is clear by EOI. It counts the interrupts in EBP, and in EBX those whose end was spared.
fn frugal_handler(guest: &mut Guest, vector: u8) {
    let handler = 0x1_2000;
    guest.place(handler, 64, |a| {
        let mut done = a.create_label();
        a.inc(ebp)?;
        a.inc(ebx)?;
        a.btr(dword_ptr(AREA), 0)?;
        a.jb(done)?;
        a.dec(ebx)?;
        a.mov(dword_ptr(rsi + EOI), 0)?;
        a.set_label(&mut done)?;
        a.iretq()
    });
    guest.set_gate64(vector, handler, INTERRUPT_GATE, 0);
}

#[test]
fn a_cleared_bit_is_the_end() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        frugal_handler(guest, 0x61);
        guest.finish(|a| {
            enable(a)?;
            write_msr(a, PV_EOI, AREA | 1)?;
            a.xor(ebx, ebx)?;
            for _ in 0..9 {
                a.cli()?;
                a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
                a.sti()?;
                a.hlt()?;
            }
            a.cli()?;
            // Nothing is in service.
            a.mov(rdx, ISR_3)?;
            a.mov(edx, dword_ptr(rdx))
        });
        let general = &guest.state.general;
        assert_eq!(general.rbp, 9);
        // On KVM the guest leaves now and then, when it touches a page at first or the host has an
        // interrupt, and then it is not spared the end.
        assert!((1..=9).contains(&general.rbx), "{}", general.rbx);
        assert_eq!(general.rdx, 0);
    });
}

/// Another interrupt waits behind the first: its end has to be written, or it would never come.
#[test]
fn the_end_is_not_spared_while_another_interrupt_waits() {
    on_every_engine(|guest| {
        let handler = 0x1_2000;
        guest.place(handler, 64, |a| {
            // What the bit is, and EOI as a guest writes it that finds it clear.
            a.movzx(ebx, byte_ptr(AREA))?;
            a.mov(dword_ptr(rsi + EOI), 0)?;
            a.mov(rax, Guest::CODE + 0x800)?;
            a.jmp(rax)
        });
        guest.set_gate64(0x72, handler, INTERRUPT_GATE, 0);
        guest.place(Guest::CODE + 0x800, 64, |a| {
            a.sti()?;
            a.hlt()
        });
        let frame = guest.interrupted(|a| {
            enable(a)?;
            write_msr(a, PV_EOI, AREA | 1)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x72)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!((frame.vector, guest.state.general.rbx), (0x61, 0));
    });
}

/// Written though it was spared: the interrupt has one end.
#[test]
fn an_end_that_is_written_all_the_same_is_one_end() {
    on_every_engine(|guest| {
        let handler = 0x1_2000;
        guest.place(handler, 64, |a| {
            a.mov(dword_ptr(rsi + EOI), 0)?;
            a.movzx(ebx, byte_ptr(AREA))?;
            a.mov(rax, ISR_3)?;
            a.mov(ebp, dword_ptr(rax))?;
            a.mov(rax, Guest::CODE + 0x800)?;
            a.jmp(rax)
        });
        guest.set_gate64(0x61, handler, INTERRUPT_GATE, 0);
        guest.place(Guest::CODE + 0x800, 64, |a| a.ud2());
        let frame = guest.interrupted(|a| {
            enable(a)?;
            write_msr(a, PV_EOI, AREA | 1)?;
            a.mov(dword_ptr(rsi + ICR_LOW), TO_SELF | 0x61)?;
            a.sti()?;
            a.hlt()
        });
        let general = &guest.state.general;
        assert_eq!((frame.vector, general.rbx, general.rbp), (UD, 0, 0));
    });
}

#[test]
fn addresses_of_msrs_are_checked() {
    on_every_engine(|guest| {
        for (msr, value) in [
            (PV_EOI, AREA | 2),
            (PV_EOI, AREA | 3),
            (STEAL_TIME, AREA | 0x20 | 1),
            (POLL_CONTROL, 2),
        ] {
            guest.state.general.rip = Guest::CODE;
            guest.state.general.rsp = Guest::STACK;
            guest.fault(GP, 0, |a| write_msr(a, msr, value));
        }
    });
}

/// KVM ends the run with an error for the first, which no guest has been seen to do.
#[test]
fn an_address_outside_ram_faults_or_is_lost() {
    let differs = "it fails where the guest should";
    on_every_engine_but(
        &[
            (crate::engines::KVM, differs),
            (AMD_KVM, differs),
            (EMULATED_KVM, differs),
        ],
        |guest| {
            guest.fault(GP, 0, |a| write_msr(a, PV_EOI, 1 << 30 | 1));
            guest.state.general.rip = Guest::CODE;
            guest.state.general.rsp = Guest::STACK;
            guest.finish(|a| write_msr(a, STEAL_TIME, 1 << 30 | 1));
        },
    );
}

#[test]
fn the_poll_control_is_on_and_keeps_its_bit() {
    on_every_engine(|guest| {
        assert_eq!(guest.state.msr(POLL_CONTROL), Some(1));
        guest.finish(|a| write_msr(a, POLL_CONTROL, 0));
        assert_eq!(guest.state.msr(POLL_CONTROL), Some(0));
    });
}

/// The structure is written from the moment when the guest wants it.
#[test]
fn steal_time_is_kept_up() {
    on_every_engine_but(NOT_EMULATED, |guest| {
        guest.write(AREA, 1_000_u64);
        // Some other vCPU's mark, of which nothing is left when this one runs.
        guest.write(AREA + 16, 1_u8);
        guest.finish(|a| {
            write_msr(a, STEAL_TIME, AREA | 1)?;
            a.mov(bl, byte_ptr(AREA + 16))
        });
        let time: u64 = guest.read(AREA);
        assert!(time >= 1_000, "{time}");
        let version: u32 = guest.read(AREA + 8);
        assert!(version != 0 && version.is_multiple_of(2), "{version}");
        assert_eq!(guest.state.general.rbx & 0xff, 0);
    });
}

/// Another vCPU finds that this one does not run, changes a translation, and leaves word instead of
/// sending an interrupt: the translation is gone when this one runs again.
#[test]
fn a_sleeper_flushes_its_translations_when_it_is_told() {
    const PREEMPTED: GuestAddress = GuestAddress(AREA + 16);
    const PAGE: u64 = Guest::SCRATCH + 0x1000;
    const OTHER: u64 = Guest::SCRATCH + 0x2000;
    const ENTRY: GuestAddress = GuestAddress(PAGE_TABLE + (PAGE >> 12) * 8);
    on_every_engine_but(NOT_EMULATED, |guest| {
        guest.write(PAGE, 1_u32);
        guest.write(OTHER, 2_u32);
        let (memory, interrupt) = guest.outside(0x61);
        guest.place(0x1_2000, 64, |a| {
            a.mov(ecx, dword_ptr(PAGE))?;
            a.ud2()
        });
        guest.set_gate64(0x61, 0x1_2000, INTERRUPT_GATE, 0);
        let other = std::thread::spawn(move || {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            let slice = memory.get_slice(PREEMPTED, 1).unwrap();
            let preempted = slice.get_atomic_ref::<AtomicU8>(0).unwrap();
            while preempted.load(SeqCst) == 0 && std::time::Instant::now() < deadline {
                std::thread::yield_now();
            }
            memory.write_obj(OTHER | P | RW, ENTRY).unwrap();
            let told = || preempted.compare_exchange(1, 3, SeqCst, SeqCst).is_ok();
            while !told() && std::time::Instant::now() < deadline {
                std::thread::yield_now();
            }
            interrupt.eventfd().write(1).unwrap();
            // It lives until its signal is taken.
            interrupt
        });
        let frame = guest.interrupted(|a| {
            enable(a)?;
            write_msr(a, STEAL_TIME, AREA | 1)?;
            a.mov(eax, dword_ptr(PAGE))?;
            a.mov(ebx, eax)?;
            a.sti()?;
            a.hlt()
        });
        drop(other.join().unwrap());
        let general = &guest.state.general;
        assert_eq!((frame.vector, general.rbx, general.rcx), (UD, 1, 2));
        assert_eq!(guest.read::<u8>(AREA + 16) & 2, 0);
    });
}
