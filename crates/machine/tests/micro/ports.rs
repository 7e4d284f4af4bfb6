//! IN and OUT: values, rights by IOPL and by the task's bitmap, strings.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

/// A port that the bitmap denies.
const OTHER_PORT: u32 = 0xe0;

#[test]
fn reads_replace_as_much_of_rax_as_they_are_wide() {
    on_every_engine(|guest| {
        guest.finish(|a| {
            a.mov(rax, u64::MAX)?;
            a.in_(al, OTHER_PORT)?;
            a.mov(rbx, rax)?;
            a.mov(rax, u64::MAX)?;
            a.mov(dx, OTHER_PORT)?;
            a.in_(ax, dx)?;
            a.mov(rcx, rax)?;
            a.mov(rax, u64::MAX)?;
            a.in_(eax, dx)
        });
        let general = &guest.state.general;
        assert_eq!(general.rbx, 0xffff_ffff_ffff_ff11);
        assert_eq!(general.rcx, 0xffff_ffff_ffff_2211);
        assert_eq!(general.rax, 0x4433_2211);
    });
}

#[test]
fn strings_come_and_go_in_both_directions() {
    on_every_engine(|guest| {
        guest.write(Guest::SCRATCH, [1_u16, 2, 3]);
        guest.finish(|a| {
            a.mov(dx, u32::from(Guest::REPORT))?;
            a.mov(esi, Guest::SCRATCH as i32)?;
            a.mov(ecx, 3)?;
            a.rep().outsw()?;
            a.std()?;
            a.mov(edi, Guest::SCRATCH as i32 + 0x20)?;
            a.mov(ecx, 2)?;
            a.mov(dx, OTHER_PORT)?;
            a.rep().insd()
        });
        assert_eq!(guest.reports(), [1, 2, 3]);
        let general = &guest.state.general;
        assert_eq!((general.rsi, general.rcx), (Guest::SCRATCH + 6, 0));
        assert_eq!(general.rdi, Guest::SCRATCH + 0x18);
        assert_eq!(
            guest.read::<u64>(Guest::SCRATCH + 0x1c),
            0x4433_2211_4433_2211
        );
    });
}

#[test]
fn the_bitmap_decides_for_ring_3() {
    on_every_engine(|guest| {
        guest.user_mode();
        // SDM volume 1, 19.5.2.
        guest.fault(GP, 0, |a| {
            a.mov(eax, 5)?;
            a.out(i32::from(Guest::REPORT), eax)?;
            a.out(OTHER_PORT, al)
        });
        assert_eq!(guest.reports(), [5]);
    });
}

#[test]
fn every_byte_of_a_wide_access_has_to_be_allowed() {
    on_every_engine(|guest| {
        guest.user_mode();
        // The bitmap allows up to 0x9f.
        guest.fault(GP, 0, |a| a.in_(ax, 0x9f));
    });
}

#[test]
fn a_port_beyond_the_bitmap_is_denied() {
    on_every_engine(|guest| {
        guest.user_mode();
        guest.fault(GP, 0, |a| {
            a.mov(dx, 0x3f8)?;
            a.in_(al, dx)
        });
    });
}

#[test]
fn a_task_without_a_bitmap_denies_all() {
    on_every_engine(|guest| {
        guest.state.special.tr.limit = 0x67;
        guest.user_mode();
        guest.fault(GP, 0, |a| a.out(i32::from(Guest::REPORT), eax));
    });
}

#[test]
fn an_iopl_of_3_allows_all() {
    on_every_engine_but(&[(EMULATED_KVM, "it asks the bitmap")], |guest| {
        guest.user_mode();
        guest.state.general.rflags |= 3 << 12;
        guest.fault(UD, None, |a| {
            a.in_(al, OTHER_PORT)?;
            a.ud2()
        });
        assert_eq!(guest.state.general.rax, 0x11);
    });
}

#[test]
fn a_string_read_to_a_page_that_faults_takes_nothing_from_the_port() {
    on_every_engine(|guest| {
        guest.set_page(Guest::SCRATCH, Guest::SCRATCH | P);
        guest.fault(PF, 3, |a| {
            a.mov(edi, Guest::SCRATCH as i32)?;
            a.mov(ecx, 2)?;
            a.mov(dx, OTHER_PORT)?;
            a.rep().insb()
        });
        let general = &guest.state.general;
        assert_eq!((general.rcx, general.rdi), (2, Guest::SCRATCH));
    });
}
