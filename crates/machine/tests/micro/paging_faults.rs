//! Page faults: when, with which error code, at which address (SDM 3A, 4.6 and 4.7).

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// Error codes (SDM 3A, figure 4-12).
const PRESENT_PAGE: u32 = 1;
const WRITE: u32 = 1 << 1;
const USER: u32 = 1 << 2;
const RESERVED: u32 = 1 << 3;
const FETCH: u32 = 1 << 4;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;

/// A supervisor's page and a user's.
const KERNEL: u64 = Guest::SCRATCH;
const PAGE: u64 = Guest::USER + 0x1000;

/// How a page is used.
#[derive(Clone, Copy, Debug)]
enum Access {
    Read,
    Write,
    Fetch,
}
use Access::{Fetch, Read, Write};

/// Accesses `address`; the code there, if it is executed, returns.
fn access(a: &mut CodeAssembler, access: Access, address: u64) -> Assembled {
    a.mov(rbx, address)?;
    match access {
        Read => a.mov(eax, dword_ptr(rbx)),
        Write => a.mov(dword_ptr(rbx), 0xc3),
        Fetch => a.call(rbx),
    }
}

/// Has `address` mapped by `entry` and accesses it: no fault, or one with that error code.
fn check(guest: &mut Guest, entry: u64, kind: Access, address: u64, error: Option<u32>) {
    println!("{kind:?} of {entry:#x}, expected {error:x?}");
    let ret = 0xc3_u8;
    guest.write(address, ret);
    guest.set_page(address, entry);
    let Some(error) = error else {
        // Ring 3 has no other way to say that it was there.
        let stop = guest.run(|a| {
            access(a, kind, address)?;
            a.ud2()
        });
        assert!(
            matches!(stop, Stop::Exception(Frame { vector: UD, .. })),
            "{stop:x?}"
        );
        return;
    };
    let frame = guest.interrupted(|a| access(a, kind, address));
    assert_eq!((frame.vector, frame.error), (PF, Some(error)));
    assert_eq!(guest.cr2(), address);
    // A fetch is of the instruction at the target: the call is done.
    let rip = if matches!(kind, Fetch) {
        address
    } else {
        guest.last
    };
    assert_eq!(frame.rip, rip);
    assert_eq!(frame.rflags & FLAG_RF, FLAG_RF);
}

#[test]
fn the_supervisor_s_accesses_fault_by_present_writable_and_execute_disable() {
    let cases = [
        (P | RW, Read, None),
        (P | RW, Write, None),
        (P | RW, Fetch, None),
        (0, Read, Some(0)),
        (0, Write, Some(WRITE)),
        (0, Fetch, Some(FETCH)),
        // What else is in an entry that is not present does not count.
        (RW | US | XD, Read, Some(0)),
        (P, Read, None),
        (P, Write, Some(PRESENT_PAGE | WRITE)),
        (P | RW | XD, Read, None),
        (P | RW | XD, Fetch, Some(PRESENT_PAGE | FETCH)),
        (P | US, Write, Some(PRESENT_PAGE | WRITE)),
        (P | RW | US, Write, None),
        (P | RW | US, Fetch, None),
    ];
    for (flags, kind, error) in cases {
        on_every_engine(|guest| check(guest, KERNEL | flags, kind, KERNEL, error));
    }
}

#[test]
fn the_user_s_accesses_fault_by_the_user_bit_too() {
    let cases = [
        (P | RW | US, Read, None),
        (P | RW | US, Write, None),
        (P | RW | US, Fetch, None),
        (0, Read, Some(USER)),
        (0, Write, Some(USER | WRITE)),
        (0, Fetch, Some(USER | FETCH)),
        (P | RW, Read, Some(PRESENT_PAGE | USER)),
        (P | RW, Write, Some(PRESENT_PAGE | USER | WRITE)),
        (P | RW, Fetch, Some(PRESENT_PAGE | USER | FETCH)),
        (P | US, Write, Some(PRESENT_PAGE | USER | WRITE)),
        (P | RW | US | XD, Read, None),
        (P | RW | US | XD, Fetch, Some(PRESENT_PAGE | USER | FETCH)),
    ];
    for (flags, kind, error) in cases {
        on_every_engine(|guest| {
            guest.user_mode();
            check(guest, PAGE | flags, kind, PAGE, error);
        });
    }
}

#[test]
fn rights_are_those_of_all_levels_together() {
    on_every_engine(|guest| {
        // SDM 3A, 4.6.1: the directory's entry takes the right away.
        guest.write(PAGE_DIRECTORY + 8, 0x20_0000 | PS | P);
        let frame = guest.fault(PF, PRESENT_PAGE | WRITE, |a| access(a, Write, 0x20_0000));
        assert_eq!(frame.error, Some(3));
    });
    on_every_engine(|guest| {
        guest.write(PML4, PDPT | P | RW);
        guest.user_mode();
        // Even the first fetch.
        let frame = guest.interrupted(|a| a.nop());
        assert_eq!((frame.vector, frame.rip), (PF, Guest::USER));
        assert_eq!(frame.error, Some(PRESENT_PAGE | USER | FETCH));
    });
    on_every_engine(|guest| {
        guest.write(PML4 + 8, 0_u64);
        let address = 1 << 39 | 0x1234;
        guest.fault(PF, 0, |a| access(a, Read, address));
        assert_eq!(guest.cr2(), address);
    });
}

#[test]
fn without_write_protection_the_supervisor_writes_read_only_pages() {
    on_every_engine(|guest| {
        guest.state.special.cr0 &= !CR0_WP;
        check(guest, KERNEL | P, Write, KERNEL, None);
        assert_eq!(guest.read::<u8>(KERNEL), 0xc3);
        assert_eq!(guest.page(KERNEL) & D, D);
    });
    on_every_engine(|guest| {
        guest.state.special.cr0 &= !CR0_WP;
        guest.user_mode();
        let error = Some(PRESENT_PAGE | USER | WRITE);
        check(guest, PAGE | P | US, Write, PAGE, error);
    });
}

#[test]
fn a_reserved_bit_is_named_in_the_error_code() {
    // SDM 3A, 4.7: P is set with RSVD. Bits beyond the physical address; bit 63 without EFER.NXE; bits 20
    // to 13 of a large page.
    on_every_engine(|guest| {
        guest.finish(|a| {
            a.mov(eax, 0x8000_0008u32)?;
            a.cpuid()
        });
        guest.state.general.rip = Guest::CODE;
        if guest.state.general.rax & 0xff < 52 {
            let entry = KERNEL | 1 << 51 | P | RW;
            check(guest, entry, Read, KERNEL, Some(RESERVED | PRESENT_PAGE));
        }
    });
    on_every_engine(|guest| {
        guest.state.special.efer &= !EFER_NXE;
        let error = Some(RESERVED | PRESENT_PAGE | WRITE);
        check(guest, KERNEL | P | RW | XD, Write, KERNEL, error);
    });
    on_every_engine(|guest| {
        guest.write(PAGE_DIRECTORY + 8, 0x20_0000 | 1 << 13 | PS | P | RW);
        guest.fault(PF, RESERVED | PRESENT_PAGE, |a| access(a, Read, 0x20_0000));
    });
}

#[test]
fn smep_keeps_the_supervisor_from_executing_user_pages() {
    on_every_engine(|guest| {
        guest.state.special.cr4 |= CR4_SMEP;
        check(
            guest,
            PAGE | P | RW | US,
            Fetch,
            PAGE,
            Some(PRESENT_PAGE | FETCH),
        );
    });
    on_every_engine(|guest| {
        guest.state.special.cr4 |= CR4_SMEP;
        check(guest, PAGE | P | RW | US, Write, PAGE, None);
    });
}

#[test]
fn smap_keeps_the_supervisor_from_user_data_until_stac() {
    for (kind, error) in [(Read, PRESENT_PAGE), (Write, PRESENT_PAGE | WRITE)] {
        on_every_engine(|guest| {
            guest.state.special.cr4 |= CR4_SMAP;
            check(guest, PAGE | P | RW | US, kind, PAGE, Some(error));
        });
        on_every_engine(|guest| {
            guest.state.special.cr4 |= CR4_SMAP;
            guest.fault(PF, error, |a| {
                a.stac()?;
                access(a, kind, PAGE)?;
                a.clac()?;
                access(a, kind, PAGE)
            });
        });
    }
}

#[test]
fn stac_is_an_invalid_opcode_in_ring_3() {
    on_every_engine(|guest| {
        guest.user_mode();
        guest.fault(UD, None, |a| a.stac());
    });
}

#[test]
fn an_access_across_pages_reports_the_page_that_faults() {
    on_every_engine(|guest| {
        guest.set_page(KERNEL + 0x1000, 0);
        guest.fault(PF, WRITE, |a| {
            a.mov(rbx, KERNEL + 0xffd)?;
            a.mov(qword_ptr(rbx), 0)
        });
        assert_eq!(guest.cr2(), KERNEL + 0x1000);
    });
    on_every_engine(|guest| {
        guest.set_page(KERNEL, 0);
        guest.fault(PF, 0, |a| {
            a.mov(rbx, KERNEL + 0xffd)?;
            a.mov(rax, qword_ptr(rbx))
        });
        assert_eq!(guest.cr2(), KERNEL + 0xffd);
    });
}

#[test]
fn nothing_is_written_when_the_second_page_faults() {
    on_every_engine_but(&[(EMULATED_KVM, "it writes page by page")], |guest| {
        guest.set_page(KERNEL + 0x1000, 0);
        guest.write(KERNEL + 0xff8, 0x1122_3344_5566_7788_u64);
        guest.fault(PF, WRITE, |a| {
            a.mov(rbx, KERNEL + 0xffd)?;
            a.mov(qword_ptr(rbx), 0)
        });
        assert_eq!(guest.read::<u64>(KERNEL + 0xff8), 0x1122_3344_5566_7788);
    });
}

#[test]
fn an_instruction_across_pages_faults_at_the_second_page() {
    on_every_engine(|guest| {
        let start = KERNEL + 0xffe;
        guest.set_page(KERNEL + 0x1000, 0);
        // mov eax, 0x12345678: two bytes here, three there.
        guest.write(start, [0xb8_u8, 0x78]);
        let frame = guest.interrupted(|a| {
            a.mov(rbx, start)?;
            a.jmp(rbx)
        });
        assert_eq!(
            (frame.vector, frame.error, frame.rip),
            (PF, Some(FETCH), start)
        );
        assert_eq!(guest.cr2(), KERNEL + 0x1000);
    });
}

#[test]
fn a_push_that_faults_leaves_the_stack_pointer() {
    on_every_engine(|guest| {
        guest.set_page(KERNEL, KERNEL | P);
        guest.set_gate64(PF, Guest::handler(PF), INTERRUPT_GATE, 1);
        let frame = guest.fault(PF, PRESENT_PAGE | WRITE, |a| {
            a.mov(rsp, KERNEL + 0x1000)?;
            a.push(rax)
        });
        assert_eq!(frame.rsp, KERNEL + 0x1000);
        assert_eq!(guest.cr2(), KERNEL + 0xff8);
    });
}

#[test]
fn a_read_modify_write_of_a_read_only_page_is_a_write_fault() {
    on_every_engine(|guest| {
        guest.set_page(KERNEL, KERNEL | P);
        guest.fault(PF, PRESENT_PAGE | WRITE, |a| {
            a.mov(rbx, KERNEL)?;
            a.add(dword_ptr(rbx), 1)
        });
    });
}

#[test]
fn a_repeated_move_stops_at_the_page_that_faults() {
    on_every_engine(|guest| {
        guest.set_page(KERNEL + 0x1000, 0);
        guest.fault(PF, WRITE, |a| {
            a.mov(esi, 0x6_0000)?;
            a.mov(edi, (KERNEL + 0xff0) as i32)?;
            a.mov(ecx, 0x20)?;
            a.rep().movsb()
        });
        // The registers say what is left (SDM 2B, REP).
        let general = &guest.state.general;
        assert_eq!((general.rcx, general.rdi), (0x10, KERNEL + 0x1000));
        assert_eq!(general.rsi, 0x6_0010);
    });
}
