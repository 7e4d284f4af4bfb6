//! Real mode, and the way from there to long mode and back.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// CS of real mode is writable data after RESET and stays so until the far jump (SDM 3A, table 9-1).
/// The code segment of real mode.
const SEGMENT: u16 = (Guest::CODE >> 4) as u16;

#[test]
fn a_segment_is_its_selector_times_16() {
    on_every_engine(|guest| {
        guest.real_mode();
        guest.write(0x4_0010_u64, 0x1234_u16);
        guest.finish(|a| {
            a.mov(ax, 0x4000)?;
            a.mov(ds, eax)?;
            a.mov(bx, word_ptr(0x10))?;
            a.mov(ax, 0x4001)?;
            a.mov(es, eax)?;
            a.mov(cx, word_ptr(0).es())
        });
        assert_eq!(guest.state.general.rbx, 0x1234);
        assert_eq!(guest.state.general.rcx, 0x1234);
        assert_eq!(guest.state.special.ds.base, 0x4_0000);
    });
}

#[test]
fn addresses_go_beyond_a_mib() {
    on_every_engine(|guest| {
        guest.real_mode();
        // 0xffff0 + 0x10: there is no gate on line 20.
        guest.write(0x10_0000_u64, 0x1234_u16);
        guest.finish(|a| {
            a.mov(ax, 0xffffu32 as i32)?;
            a.mov(ds, eax)?;
            a.mov(bx, word_ptr(0x10))
        });
        assert_eq!(guest.state.general.rbx, 0x1234);
    });
}

#[test]
fn an_offset_wraps_at_64_kib_and_an_operand_across_it_faults() {
    on_every_engine(|guest| {
        guest.real_mode();
        guest.write(0x4_0004_u64, 0x12_u8);
        let frame = guest.interrupted(|a| {
            a.mov(ax, 0x4000)?;
            a.mov(ds, eax)?;
            a.mov(bx, 0xfff8u32 as i32)?;
            a.mov(al, byte_ptr(bx + 0xc))?;
            a.mov(cx, word_ptr(0xffff))
        });
        // SDM 3A, 20.1.1 and 6.15: interrupt 13 without an error code.
        let rip = guest.last - Guest::CODE;
        assert_eq!((frame.vector, frame.error, frame.rip), (GP, None, rip));
        assert_eq!(guest.state.general.rax & 0xff, 0x12);
    });
}

#[test]
fn an_operand_across_the_end_of_the_stack_segment_is_a_stack_fault() {
    on_every_engine(|guest| {
        guest.real_mode();
        let frame = guest.interrupted(|a| a.mov(cx, word_ptr(0xffff).ss()));
        assert_eq!((frame.vector, frame.rip), (SS, guest.last - Guest::CODE));
    });
}

#[test]
fn an_interrupt_goes_by_the_vector_table_and_iret_comes_back() {
    on_every_engine(|guest| {
        guest.real_mode();
        guest.place(Guest::CODE + 0x800, 16, |a| {
            a.pushf()?;
            a.pop(cx)?;
            a.mov(bx, sp)?;
            a.iret()
        });
        guest.write(0x55 * 4, 0x800 | u32::from(SEGMENT) << 16);
        guest.finish(|a| {
            a.sti()?;
            a.stc()?;
            a.int(0x55)?;
            a.pushf()?;
            a.pop(ax)
        });
        let general = &guest.state.general;
        assert_eq!(general.rcx & FLAG_IF, 0);
        assert_eq!(general.rax & (FLAG_IF | 1), FLAG_IF | 1);
        assert_eq!((general.rbx, general.rsp), (0xf000 - 6, 0xf000));
    });
}

#[test]
fn a_division_by_zero_saves_the_instruction_s_own_address() {
    on_every_engine(|guest| {
        guest.real_mode();
        let frame = guest.interrupted(|a| {
            a.xor(cx, cx)?;
            a.div(cx)
        });
        assert_eq!((frame.vector, frame.cs), (DE, SEGMENT));
        assert_eq!(frame.rip, guest.last - Guest::CODE);
        assert_eq!(guest.state.general.rsp, 0xf000 - 6);
    });
}

#[test]
fn a_vector_beyond_the_table_s_limit_is_a_fault() {
    on_every_engine_but(&[(EMULATED_KVM, "it ignores the limit")], |guest| {
        guest.real_mode();
        guest.state.special.idt.limit = 0x55 * 4 - 1;
        let frame = guest.interrupted(|a| a.int(0x55));
        assert_eq!((frame.vector, frame.rip), (GP, guest.last - Guest::CODE));
    });
}

#[test]
fn a_far_call_returns_in_real_mode() {
    on_every_engine(|guest| {
        guest.real_mode();
        guest.place(0x4_0000, 16, |a| {
            a.mov(bx, cs)?;
            a.retf()
        });
        guest.finish(|a| a.call_far(0x4000, 0));
        assert_eq!(guest.state.general.rbx, 0x4000);
        assert_eq!(guest.state.special.cs.selector, SEGMENT);
    });
}

#[test]
fn what_protected_mode_brought_is_an_invalid_opcode_in_real_mode() {
    // lldt ax, ltr ax, sldt ax, verr ax, arpl ax, ax
    let codes: [&[u8]; 5] = [
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xe0],
        &[0x63, 0xc0],
    ];
    for code in codes {
        on_every_engine(|guest| {
            guest.real_mode();
            let frame = guest.interrupted(|a| a.db(code));
            assert_eq!((frame.vector, frame.rip), (UD, 0));
        });
    }
}

#[test]
fn segments_keep_their_limits_from_protected_mode() {
    on_every_engine(|guest| {
        guest.real_mode();
        // SDM 3A, 9.9.2: also called unreal mode.
        guest.write(0x40_0000, 0x1234_5678_u32);
        guest.finish(|a| {
            a.mov(eax, cr0)?;
            a.or(al, 1)?;
            a.mov(cr0, eax)?;
            a.mov(cx, u32::from(DATA))?;
            a.mov(ds, ecx)?;
            a.and(al, 0xfe)?;
            a.mov(cr0, eax)?;
            a.xor(cx, cx)?;
            a.mov(ds, ecx)?;
            a.mov(esi, 0x40_0000)?;
            a.mov(ebx, dword_ptr(esi))
        });
        assert_eq!(guest.state.general.rbx, 0x1234_5678);
        assert_eq!(guest.state.special.ds.limit, u32::MAX);
    });
}

/// 32-bit code that goes on to long mode.
fn enter_long_mode(a: &mut CodeAssembler) -> Assembled {
    a.mov(eax, u32::from(DATA))?;
    a.mov(ds, eax)?;
    a.mov(ss, eax)?;
    a.mov(eax, CR4_PAE as u32)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PML4 as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.rdmsr()?;
    a.bts(eax, 8)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.bts(eax, 31)?;
    a.mov(cr0, eax)?;
    a.jmp_far(CODE64, Guest::CODE as u32 + 0x200)
}

#[test]
fn the_way_to_long_mode_and_back_to_real_mode() {
    on_every_engine(|guest| {
        guest.real_mode();
        guest.set_descriptor(CODE16, Guest::CODE as u32, 0xffff, CODE | ACCESSED);
        guest.place(Guest::CODE + 0x100, 32, enter_long_mode);
        guest.place(Guest::CODE + 0x200, 64, |a| {
            a.mov(rbx, 0x1234_5678_9abc_def0_u64)?;
            a.mov(rdi, Guest::SCRATCH)?;
            a.jmp(fword_ptr(rdi))
        });
        guest.write(Guest::SCRATCH, 0x300_u32);
        guest.write(Guest::SCRATCH + 4, CODE16);
        // 16-bit compatibility mode: paging off, long mode off, protection off.
        guest.place(Guest::CODE + 0x300, 16, |a| {
            a.mov(eax, cr0)?;
            a.btr(eax, 31)?;
            a.mov(cr0, eax)?;
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.mov(esi, eax)?;
            a.btr(eax, 8)?;
            a.wrmsr()?;
            a.mov(eax, cr0)?;
            a.and(al, 0xfe)?;
            a.mov(cr0, eax)?;
            a.jmp_far(SEGMENT, 0x400)
        });
        guest.place(Guest::CODE + 0x400, 16, |a| {
            a.xor(ax, ax)?;
            a.mov(ss, eax)?;
            a.mov(sp, 0xf000u32 as i32)?;
            a.mov(cx, cs)?;
            a.ud2()
        });
        let frame = guest.interrupted(|a| {
            a.mov(eax, cr0)?;
            a.or(al, 1)?;
            a.mov(cr0, eax)?;
            // jmp dword CODE32:CODE + 0x100
            a.db(&[0x66, 0xea, 0x00, 0x01, 0x01, 0x00, CODE32 as u8, 0x00])
        });
        assert_eq!((frame.vector, frame.cs), (UD, SEGMENT));
        let general = &guest.state.general;
        assert_eq!(general.rbx, 0x1234_5678_9abc_def0);
        assert_eq!(general.rcx & 0xffff, u64::from(SEGMENT));
        // Leaving paging leaves long mode: LMA is clear, LME is not (SDM 3A, 9.8.5.4).
        assert_eq!(general.rsi & 0x500, 0x100);
        assert_eq!(guest.state.special.efer & 0x500, 0);
        assert_eq!(guest.state.special.cr0 & (CR0_PE | CR0_PG), 0);
    });
}

#[test]
fn paging_with_long_mode_enabled_needs_physical_address_extension() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.state.special.efer = 1 << 8;
        guest.state.special.cr3 = PML4;
        // SDM 3A, 2.5, CR0.PG.
        guest.fault(GP, 0, |a| {
            a.mov(eax, cr0)?;
            a.bts(eax, 31)?;
            a.mov(cr0, eax)
        });
    });
}
