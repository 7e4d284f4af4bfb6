//! Segments in protected mode: limits, types, rights, and the instructions that ask about them.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// Ring 3 of 32-bit code.
const RING_3: &[(&str, &str)] = &[(EMULATED_KVM, "ring 3 runs on the host's tables")];
/// Flat memory that ends at some address, expands down or whatever the case wants.
const BASE: u32 = Guest::SCRATCH as u32;

/// Loads a data segment register other than SS.
fn load_es(a: &mut CodeAssembler, selector: u16) -> Assembled {
    a.mov(eax, u32::from(selector))?;
    a.mov(es, eax)
}

#[test]
fn an_access_is_relative_to_its_segment_and_ends_at_its_limit() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, BASE, 0xf, WRITABLE | BIG);
        guest.write(Guest::SCRATCH + 12, 0x1234_5678_u32);
        guest.fault(GP, 0, |a| {
            load_es(a, FREE)?;
            a.mov(ebx, dword_ptr(12).es())?;
            a.mov(ecx, dword_ptr(13).es())
        });
        assert_eq!(guest.state.general.rbx, 0x1234_5678);
    });
}

#[test]
fn a_load_marks_the_descriptor_as_accessed() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, BASE, 0xf, WRITABLE | BIG);
        guest.finish(|a| load_es(a, FREE));
        // SDM 3A, 3.4.5.1.
        let attributes = guest.segment(FREE).attributes;
        assert_eq!(attributes, WRITABLE | BIG | ACCESSED);
    });
}

#[test]
fn a_segment_that_expands_down_begins_above_its_limit() {
    on_every_engine(|guest| {
        guest.protected_mode();
        // SDM 3A, 5.3: from limit + 1 to 0xffffffff.
        guest.set_descriptor(FREE, 0, BASE - 1, EXPAND_DOWN | BIG);
        guest.fault(GP, 0, |a| {
            load_es(a, FREE)?;
            a.mov(ebx, dword_ptr(BASE).es())?;
            a.mov(ebx, dword_ptr(BASE - 1).es())
        });
    });
}

#[test]
fn a_read_only_segment_is_not_written() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, BASE, 0xf, READ_ONLY | BIG);
        guest.fault(GP, 0, |a| {
            load_es(a, FREE)?;
            a.mov(ebx, dword_ptr(0).es())?;
            a.mov(dword_ptr(0).es(), ebx)
        });
    });
}

#[test]
fn code_is_not_written_and_read_only_if_it_may() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.fault(GP, 0, |a| {
            a.mov(ebx, dword_ptr(Guest::CODE as u32).cs())?;
            a.mov(dword_ptr(BASE).cs(), ebx)
        });
        assert_ne!(guest.state.general.rbx, 0);
    });
    on_every_engine(|guest| {
        guest.protected_mode();
        // SDM 2B, MOV to a segment register: code that cannot be read is refused.
        guest.set_descriptor(FREE, 0, 0xfffff, EXECUTE_ONLY | BIG | GRANULAR);
        guest.fault(GP, u32::from(FREE), |a| load_es(a, FREE));
    });
}

#[test]
fn a_null_selector_faults_when_it_is_used() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.fault(GP, 0, |a| {
            load_es(a, 3)?;
            a.mov(ebx, dword_ptr(BASE).es())
        });
        assert_eq!(guest.state.special.es.selector, 3);
    });
}

#[test]
fn a_null_selector_is_no_stack() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.fault(GP, 0, |a| {
            a.xor(eax, eax)?;
            a.mov(ss, eax)
        });
    });
    on_every_engine(|guest| {
        // SDM 2B, MOV: in 64-bit mode below ring 3 it is.
        guest.finish(|a| {
            a.xor(eax, eax)?;
            a.mov(ss, eax)?;
            a.push(7)?;
            a.pop(rbx)
        });
        assert_eq!(guest.state.general.rbx, 7);
    });
}

#[test]
fn a_stack_segment_is_writable_data_of_the_same_ring() {
    let selectors = [
        (CODE32, WRITABLE),
        (USER_DATA, WRITABLE),
        (DATA | 3, WRITABLE),
        (FREE, READ_ONLY),
    ];
    for (selector, attributes) in selectors {
        on_every_engine(|guest| {
            guest.protected_mode();
            guest.set_descriptor(FREE, 0, 0xf_ffff, attributes | BIG | GRANULAR);
            guest.fault(GP, u32::from(selector & !3), |a| {
                a.mov(eax, u32::from(selector))?;
                a.mov(ss, eax)
            });
        });
    }
}

#[test]
fn ring_3_may_not_load_data_of_ring_0_but_conforming_code() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.user_mode();
        guest.set_descriptor(FREE, 0, 0xf_ffff, CONFORMING | BIG | GRANULAR);
        guest.fault(GP, u32::from(DATA), |a| {
            load_es(a, FREE | 3)?;
            load_es(a, USER_DATA)?;
            load_es(a, DATA)
        });
        assert_eq!(guest.state.special.es.selector, USER_DATA);
    });
}

#[test]
fn a_requested_ring_counts_like_the_current() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.fault(GP, u32::from(DATA), |a| load_es(a, DATA | 3));
    });
}

#[test]
fn the_stack_s_limit_is_a_stack_fault() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, 0, 0x30, WRITABLE | BIG | GRANULAR);
        guest.fault(SS, 0, |a| {
            a.mov(eax, u32::from(FREE))?;
            a.mov(ss, eax)?;
            a.mov(ebx, dword_ptr(0x4_0000u32).ss())
        });
    });
}

#[test]
fn a_small_stack_wraps_at_64_kib() {
    on_every_engine(|guest| {
        guest.protected_mode();
        // SDM 3A, 6.2.3 of volume 1: the B flag chooses SP; the upper half of ESP stays.
        guest.set_descriptor(FREE, 0x1_0000, 0xffff, WRITABLE);
        guest.finish(|a| {
            a.mov(eax, u32::from(FREE))?;
            a.mov(ss, eax)?;
            a.mov(esp, 0x1234_0000u32)?;
            a.push(0x5566_7788u32 as i32)?;
            a.mov(ebx, esp)
        });
        assert_eq!(guest.state.general.rbx, 0x1234_fffc);
        assert_eq!(guest.read::<u32>(0x1_fffc), 0x5566_7788);
    });
}

#[test]
fn the_local_table_is_used_by_the_selector_s_bit() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(0xc, BASE, 0xf, WRITABLE | BIG);
        guest.write(Guest::SCRATCH, 0x1234_5678_u32);
        guest.finish(|a| {
            a.mov(eax, u32::from(LDT_SELECTOR))?;
            a.lldt(ax)?;
            load_es(a, 0xc)?;
            a.mov(ebx, dword_ptr(0).es())?;
            a.sldt(ecx)
        });
        assert_eq!(guest.state.general.rbx, 0x1234_5678);
        assert_eq!(guest.state.general.rcx as u16, LDT_SELECTOR);
    });
}

#[test]
fn lldt_and_ltr_want_descriptors_of_their_type() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.fault(GP, u32::from(DATA), |a| {
            a.mov(eax, u32::from(DATA))?;
            a.lldt(ax)
        });
    });
    on_every_engine(|guest| {
        // SDM 2A, LTR: a busy one is refused.
        guest.fault(GP, u32::from(TSS64_SELECTOR), |a| {
            a.mov(eax, u32::from(TSS64_SELECTOR))?;
            a.ltr(ax)
        });
    });
    on_every_engine(|guest| {
        guest.set_descriptor(FREE, TSS as u32, 0x67, AVAILABLE_TSS);
        guest.write(Guest::slot(FREE) + 8, 0_u64);
        guest.finish(|a| {
            a.mov(eax, u32::from(FREE))?;
            a.ltr(ax)?;
            a.str(ebx)
        });
        assert_eq!(guest.state.general.rbx, u64::from(FREE));
        assert_eq!(guest.segment(FREE).attributes & 0xf, 0xb);
    });
}

#[test]
fn lar_and_lsl_tell_of_segments_that_may_be_seen() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.set_descriptor(FREE, 0, 0x12345, READ_ONLY | GRANULAR);
        guest.finish(|a| {
            a.mov(ecx, u32::from(FREE))?;
            a.lar(eax, ecx)?;
            a.sete(dl)?;
            a.lsl(ebx, ecx)?;
            a.sete(dh)?;
            // Beyond the table: ZF is clear, the register stays.
            a.mov(ecx, 0x1f8)?;
            a.mov(esi, 5)?;
            a.lar(esi, ecx)?;
            a.mov(edi, 6)?;
            a.lsl(edi, ecx)?;
            a.sete(cl)
        });
        let general = &guest.state.general;
        // SDM 2A, LAR: bits 19 to 16 are undefined.
        assert_eq!(general.rax & !0xf_0000, 0x0080_9000);
        assert_eq!(general.rbx, 0x1234_5fff);
        assert_eq!(general.rdx & 0xffff, 0x101);
        assert_eq!((general.rsi, general.rdi, general.rcx & 0xff), (5, 6, 0));
    });
}

#[test]
fn verr_and_verw_ask_whether_a_segment_can_be_used() {
    on_every_engine_but(RING_3, |guest| {
        guest.protected_mode();
        guest.user_mode();
        let questions = [
            (USER_DATA, true),
            (DATA, false),
            (USER_CODE32, false),
            (0, false),
            (TSS32_SELECTOR, false),
        ];
        guest.interrupted(|a| {
            a.xor(ebx, ebx)?;
            for (bit, (selector, _)) in (0..).zip(questions) {
                a.mov(ecx, u32::from(selector))?;
                a.xor(eax, eax)?;
                a.verw(cx)?;
                a.sete(al)?;
                a.shl(eax, bit)?;
                a.or(ebx, eax)?;
            }
            a.mov(ecx, u32::from(USER_CODE32))?;
            a.verr(cx)?;
            a.sete(dl)?;
            a.ud2()
        });
        let expected = (0..)
            .zip(questions)
            .map(|(bit, (_, yes))| u64::from(yes) << bit);
        assert_eq!(guest.state.general.rbx, expected.sum::<u64>());
        assert_eq!(guest.state.general.rdx & 1, 1);
    });
}

#[test]
fn arpl_raises_the_requested_ring() {
    on_every_engine(|guest| {
        guest.protected_mode();
        guest.finish(|a| {
            a.mov(eax, 0x10)?;
            a.mov(ecx, 0x23)?;
            a.arpl(ax, cx)?;
            a.sete(dl)?;
            a.arpl(ax, cx)?;
            a.sete(dh)
        });
        assert_eq!(guest.state.general.rax, 0x13);
        assert_eq!(guest.state.general.rdx & 0xffff, 1);
    });
}
