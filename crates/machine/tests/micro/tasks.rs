//! Task switches of 32-bit code, and virtual-8086 mode.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// The other task's segment, code and stack.
const TASK: u64 = 0xd000;
const TASK_CODE: u64 = Guest::CODE + 0x1000;
const TASK_STACK: u64 = 0x3_c000;

const NO_TASKS: &[(&str, &str)] = &[(EMULATED_KVM, "its emulator has no task switch by itself")];

/// Fields of a 32-bit task state segment (SDM 3A, figure 7-2).
const LINK: u64 = 0x00;
const CR3: u64 = 0x1c;
const EIP: u64 = 0x20;
const EFLAGS: u64 = 0x24;
const EAX: u64 = 0x28;
const ESP: u64 = 0x38;
const ES: u64 = 0x48;
const LDTR: u64 = 0x60;

/// Protected mode with a task to switch to in [`FREE`].
fn two_tasks(guest: &mut Guest) {
    guest.protected_mode();
    guest.set_descriptor(FREE, TASK as u32, 0x67, AVAILABLE_TSS);
    guest.write(TASK + CR3, 0_u32);
    guest.write(TASK + EIP, TASK_CODE as u32);
    guest.write(TASK + EFLAGS, 2_u32);
    guest.write(TASK + EAX, 0x1234_5678_u32);
    guest.write(TASK + ESP, TASK_STACK as u32);
    // ES, CS, SS, DS, FS, GS
    for (index, selector) in (0..).zip([DATA, CODE32, DATA, DATA, DATA, DATA]) {
        guest.write(TASK + ES + index * 4, u32::from(selector));
    }
    guest.write(TASK + LDTR, 0_u32);
}

fn is_busy(guest: &Guest, selector: u16) -> bool {
    guest.segment(selector).attributes & 2 != 0
}

#[test]
fn a_jump_to_a_task_saves_the_one_and_loads_the_other() {
    on_every_engine_but(NO_TASKS, |guest| {
        two_tasks(guest);
        guest.place(TASK_CODE, 32, |a| {
            a.str(ebx)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            a.mov(eax, 7)?;
            a.jmp_far(FREE, 0)
        });
        assert_eq!((frame.vector, frame.cs), (UD, CODE32));
        let general = &guest.state.general;
        assert_eq!(general.rax, 0x1234_5678);
        assert_eq!(general.rbx as u16, FREE);
        // SDM 3A, 7.3: the old task is saved with the next instruction's address and is free.
        assert_eq!(guest.read::<u32>(TSS32 + EAX), 7);
        assert_eq!(u64::from(guest.read::<u32>(TSS32 + EIP)), guest.end);
        assert_eq!(guest.read::<u32>(TSS32 + ESP), Guest::STACK as u32);
        assert!(!is_busy(guest, TSS32_SELECTOR));
        assert!(is_busy(guest, FREE));
        // CR0.TS.
        assert_eq!(guest.state.special.cr0 & 8, 8);
        assert_eq!(frame.rflags & FLAG_NT, 0);
    });
}

#[test]
fn a_called_task_returns_to_its_caller() {
    on_every_engine_but(NO_TASKS, |guest| {
        two_tasks(guest);
        guest.place(TASK_CODE, 32, |a| {
            a.pushfd()?;
            a.pop(dword_ptr(Guest::SCRATCH as u32))?;
            a.iretd()
        });
        guest.finish(|a| {
            a.mov(eax, 7)?;
            a.call_far(FREE, 0)?;
            a.inc(eax)
        });
        assert_eq!(guest.state.general.rax, 8);
        // SDM 3A, 7.4: NT is set in the called task, and its link names the caller.
        let flags: u32 = guest.read(Guest::SCRATCH);
        assert_eq!(u64::from(flags) & FLAG_NT, FLAG_NT);
        assert_eq!(guest.read::<u16>(TASK + LINK), TSS32_SELECTOR);
        assert!(is_busy(guest, TSS32_SELECTOR));
        assert!(!is_busy(guest, FREE));
    });
}

#[test]
fn an_exception_through_a_task_gate_switches_and_pushes_its_error_code() {
    on_every_engine_but(NO_TASKS, |guest| {
        two_tasks(guest);
        guest.write(IDT + u64::from(GP) * 8, gate(FREE, 0, TASK_GATE, 0));
        guest.place(TASK_CODE, 32, |a| {
            a.pop(ebx)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            a.mov(eax, 0x100)?;
            a.mov(ds, eax)
        });
        assert_eq!(frame.vector, UD);
        assert_eq!(guest.state.general.rbx, 0x100);
        // The fault's own address is where the task goes on (SDM 3A, 6.12.2).
        assert_eq!(u64::from(guest.read::<u32>(TSS32 + EIP)), guest.last);
        assert_eq!(guest.read::<u16>(TASK + LINK), TSS32_SELECTOR);
    });
}

#[test]
fn a_busy_task_is_not_switched_to() {
    on_every_engine_but(NO_TASKS, |guest| {
        two_tasks(guest);
        guest.fault(GP, u32::from(TSS32_SELECTOR), |a| {
            a.jmp_far(TSS32_SELECTOR, 0)
        });
    });
}

/// Enters virtual-8086 mode at [`Guest::USER`] with that privilege for I/O.
fn enter_virtual_8086(a: &mut CodeAssembler, iopl: u32) -> Assembled {
    // GS, FS, DS, ES, SS, ESP, EFLAGS, CS, EIP (SDM 3A, 20.2.5)
    let stack = [0x10, 0x20, 0x30, 0x40, 0x5000, 0x7000];
    let flags = [FLAG_VM as u32 | FLAG_ONE as u32 | iopl << 12, 0x5000, 0];
    for value in stack.into_iter().chain(flags) {
        a.push(value as i32)?;
    }
    a.iretd()
}

/// What the processor pushes when it leaves virtual-8086 mode: SS, ES, DS, FS, GS above the frame.
fn pushed_segments(guest: &Guest, error: bool) -> [u32; 5] {
    let stack = guest.state.general.rsp + 4 * (4 + u64::from(error));
    [0, 1, 2, 3, 4].map(|index| guest.read(stack + index * 4))
}

const NO_VIRTUAL_8086: &[(&str, &str)] = &[(EMULATED_KVM, "it has no virtual-8086 mode")];

#[test]
fn virtual_8086_code_sees_real_mode_s_segments() {
    on_every_engine_but(NO_VIRTUAL_8086, |guest| {
        guest.protected_mode();
        guest.write(0x300 + 8, 0x1234_u16);
        guest.place(Guest::USER, 16, |a| {
            a.mov(bx, word_ptr(8))?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| enter_virtual_8086(a, 0));
        assert_eq!((frame.vector, frame.cs, frame.rip), (UD, 0x5000, 4));
        assert_eq!(frame.rflags & FLAG_VM, FLAG_VM);
        assert_eq!(guest.state.general.rflags & FLAG_VM, 0);
        assert_eq!(guest.state.general.rbx, 0x1234);
        // SDM 3A, figure 20-4; the handler has null segments.
        assert_eq!(
            pushed_segments(guest, false),
            [0x5000, 0x40, 0x30, 0x20, 0x10]
        );
        assert_eq!(guest.state.special.ds.selector, 0);
        assert_eq!(guest.state.general.rsp, Guest::RING0_STACK - 9 * 4);
    });
}

#[test]
fn virtual_8086_code_without_iopl_may_not_touch_the_interrupt_flag() {
    // cli, pushf, popf, int 0x55, iret
    let codes: [&[u8]; 5] = [&[0xfa], &[0x9c], &[0x9d], &[0xcd, 0x55], &[0xcf]];
    for code in codes {
        on_every_engine_but(NO_VIRTUAL_8086, |guest| {
            println!("{code:x?}");
            guest.protected_mode();
            guest.place(Guest::USER, 16, |a| a.db(code));
            let frame = guest.interrupted(|a| enter_virtual_8086(a, 0));
            // SDM 3A, 20.2.7.
            assert_eq!((frame.vector, frame.error, frame.rip), (GP, Some(0), 0));
            assert_eq!(pushed_segments(guest, true)[0], 0x5000);
        });
    }
}

#[test]
fn virtual_8086_code_with_iopl_may() {
    on_every_engine_but(NO_VIRTUAL_8086, |guest| {
        guest.protected_mode();
        guest.place(Guest::USER, 16, |a| {
            a.sti()?;
            a.nop()?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| enter_virtual_8086(a, 3));
        assert_eq!((frame.vector, frame.rflags & FLAG_IF), (UD, FLAG_IF));
    });
}
