//! Translation: sizes of pages, accessed and dirty bits, and when a change of a table is seen.

use iced_x86::code_asm::*;

use crate::engines::{EMULATED_KVM, on_every_engine, on_every_engine_but};
use crate::guest::*;
use crate::tables::*;

const PAGE: u64 = Guest::SCRATCH;
const OTHER: u64 = Guest::SCRATCH + 0x1000;
const ENTRY: u64 = PAGE_TABLE + (PAGE >> 12) * 8;
const CR4_PGE: u64 = 1 << 7;
const CR4_PCIDE: u64 = 1 << 17;

#[test]
fn a_read_sets_accessed_and_a_write_dirty() {
    on_every_engine(|guest| {
        guest.finish(|a| a.mov(eax, dword_ptr(PAGE)));
        assert_eq!(guest.page(PAGE) & (A | D), A);
        // SDM 3A, 4.8: every entry that was used is accessed.
        assert_eq!(guest.read::<u64>(PML4) & A, A);
        assert_eq!(guest.read::<u64>(PDPT) & A, A);
        assert_eq!(guest.read::<u64>(PAGE_DIRECTORY) & A, A);
        assert_eq!(guest.page(OTHER) & (A | D), 0);
    });
    on_every_engine(|guest| {
        // Also when the translation is cached from a read.
        guest.finish(|a| {
            a.mov(eax, dword_ptr(PAGE))?;
            a.mov(dword_ptr(PAGE), eax)
        });
        assert_eq!(guest.page(PAGE) & (A | D), A | D);
    });
}

#[test]
fn a_write_that_faults_leaves_dirty_clear() {
    on_every_engine(|guest| {
        guest.set_page(PAGE, PAGE | P);
        guest.fault(PF, 3, |a| a.mov(dword_ptr(PAGE), eax));
        assert_eq!(guest.page(PAGE) & D, 0);
    });
}

#[test]
fn executing_sets_accessed_only() {
    on_every_engine(|guest| {
        guest.finish(|a| a.nop());
        assert_eq!(guest.page(Guest::CODE) & (A | D), A);
    });
}

#[test]
fn a_cleared_dirty_bit_is_set_again_after_invlpg() {
    on_every_engine(|guest| {
        guest.finish(|a| {
            a.mov(rbx, PAGE)?;
            a.mov(dword_ptr(rbx), eax)?;
            a.mov(qword_ptr(ENTRY), (PAGE | P | RW) as i32)?;
            a.invlpg(ptr(rbx))?;
            a.mov(dword_ptr(rbx), eax)
        });
        assert_eq!(guest.page(PAGE) & (A | D), A | D);
    });
}

#[test]
fn large_pages_translate_and_are_marked_in_their_own_entry() {
    on_every_engine(|guest| {
        // 0x60_0000 is mapped to 0x40_0000.
        guest.write(PAGE_DIRECTORY + 3 * 8, 0x40_0000 | PS | P | RW);
        guest.write(0x41_2340, 0x1234_5678_u32);
        guest.finish(|a| {
            a.mov(eax, dword_ptr(0x61_2340))?;
            a.mov(dword_ptr(0x61_2344), eax)
        });
        assert_eq!(guest.state.general.rax, 0x1234_5678);
        assert_eq!(guest.read::<u32>(0x41_2344), 0x1234_5678);
        let entry: u64 = guest.read(PAGE_DIRECTORY + 3 * 8);
        assert_eq!(entry & (A | D), A | D);
    });
}

#[test]
fn pages_of_a_gib_translate_where_cpuid_has_them() {
    on_every_engine(|guest| {
        // SDM 2A, CPUID: 0x80000001, EDX bit 26.
        guest.finish(|a| {
            a.mov(eax, 0x8000_0001u32)?;
            a.cpuid()
        });
        guest.state.general.rip = Guest::CODE;
        // At 1 GiB, memory from zero.
        guest.write(PDPT + 8, PS | P | RW);
        guest.write(0x71_2340, 0x1234_5678_u32);
        let address = 1 << 30 | 0x71_2340;
        if guest.state.general.rdx & 1 << 26 == 0 {
            guest.fault(PF, 9, |a| a.mov(eax, dword_ptr(address)));
            return;
        }
        guest.finish(|a| a.mov(eax, dword_ptr(address)));
        assert_eq!(guest.state.general.rax, 0x1234_5678);
    });
}

/// Reads the page, maps it to the other, does `flush`, and reads again: EAX and then ECX.
fn remap(
    guest: &mut Guest,
    entry: u64,
    flush: impl FnOnce(&mut CodeAssembler) -> Assembled,
) -> (u64, u64) {
    guest.set_page(PAGE, PAGE | (entry & 0xfff));
    guest.write(PAGE, 1_u32);
    guest.write(OTHER, 2_u32);
    guest.finish(|a| {
        a.mov(rbx, PAGE)?;
        a.mov(rdx, cr3)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.mov(qword_ptr(ENTRY), (OTHER | entry & 0xfff) as i32)?;
        flush(a)?;
        a.mov(ecx, dword_ptr(rbx))
    });
    (guest.state.general.rax, guest.state.general.rcx)
}

#[test]
fn invlpg_shows_the_new_mapping() {
    on_every_engine(|guest| {
        assert_eq!(remap(guest, P | RW, |a| a.invlpg(ptr(rbx))), (1, 2));
    });
    on_every_engine(|guest| {
        // SDM 2A, INVLPG: of a global page too.
        guest.state.special.cr4 |= CR4_PGE;
        assert_eq!(remap(guest, P | RW | G, |a| a.invlpg(ptr(rbx))), (1, 2));
    });
}

#[test]
fn a_load_of_cr3_shows_the_new_mapping() {
    on_every_engine(|guest| {
        assert_eq!(remap(guest, P | RW, |a| a.mov(cr3, rdx)), (1, 2));
    });
}

#[test]
fn a_change_of_global_pages_shows_the_new_mapping_of_a_global_page() {
    on_every_engine(|guest| {
        guest.state.special.cr4 |= CR4_PGE;
        // SDM 3A, 4.10.4.1: a change of CR4.PGE invalidates all.
        let pair = remap(guest, P | RW | G, |a| {
            a.mov(rsi, cr4)?;
            a.mov(rdi, rsi)?;
            a.and(rsi, !(CR4_PGE as i32))?;
            a.mov(cr4, rsi)?;
            a.mov(cr4, rdi)
        });
        assert_eq!(pair, (1, 2));
    });
}

#[test]
fn a_change_of_write_protection_shows_at_once() {
    on_every_engine(|guest| {
        guest.state.special.cr0 &= !CR0_WP;
        guest.set_page(PAGE, PAGE | P);
        guest.fault(PF, 3, |a| {
            a.mov(dword_ptr(PAGE), eax)?;
            a.mov(rax, cr0)?;
            a.bts(rax, 16)?;
            a.mov(cr0, rax)?;
            a.mov(dword_ptr(PAGE), eax)
        });
    });
}

#[test]
fn a_table_s_new_entry_is_seen_without_invalidation() {
    on_every_engine(|guest| {
        // SDM 3A, 4.10.4.3: what was not present is not cached.
        guest.set_page(PAGE, 0);
        guest.write(PAGE, 7_u32);
        let handler = 0x1_2000;
        guest.place(handler, 64, |a| {
            a.mov(qword_ptr(ENTRY), (PAGE | P) as i32)?;
            a.mov(eax, dword_ptr(PAGE))?;
            a.ud2()
        });
        guest.set_gate64(PF, handler, INTERRUPT_GATE, 0);
        let frame = guest.interrupted(|a| a.mov(eax, dword_ptr(PAGE)));
        assert_eq!((frame.vector, guest.state.general.rax), (UD, 7));
    });
}

#[test]
fn process_contexts_have_mappings_of_their_own() {
    on_every_engine(|guest| {
        // SDM 2A, CPUID: 1, ECX bit 17.
        guest.finish(|a| {
            a.mov(eax, 1)?;
            a.cpuid()
        });
        guest.state.general.rip = Guest::CODE;
        if guest.state.general.rcx & 1 << 17 == 0 {
            println!("it has no PCIDs");
            return;
        }
        guest.state.special.cr4 |= CR4_PCIDE;
        // With bit 63 a load keeps what is cached of the context that it enters, but that of another
        // context is never seen (SDM 3A, 4.10.4.1). Context 1 has not been used.
        let pair = remap(guest, P | RW, |a| {
            a.or(rdx, 1)?;
            a.bts(rdx, 63)?;
            a.mov(cr3, rdx)
        });
        assert_eq!(pair, (1, 2));
        assert_eq!(guest.state.special.cr3, PML4 | 1);
    });
    on_every_engine(|guest| {
        // SDM 3A, 2.5: PCIDE can be set only while the context is 0.
        guest.state.special.cr3 |= 8;
        guest.fault(GP, 0, |a| {
            a.mov(rax, cr4)?;
            a.bts(rax, 17)?;
            a.mov(cr4, rax)
        });
    });
}

#[test]
fn the_physical_address_of_32_bit_paging_is_taken_from_two_levels() {
    on_every_engine_but(
        &[(EMULATED_KVM, "it ignores paging of 32-bit code")],
        |guest| {
            guest.protected_mode();
            // SDM 3A, 4.3: CR4.PSE gives pages of 4 MiB. The table at 0x6_0000 maps the first 4 MiB, page 0x41
            // to 0x40; the second directory entry is a large page onto zero.
            let (directory, table) = (0x6_1000_u64, 0x6_0000_u64);
            for page in 0..1024_u32 {
                let frame = if page == 0x41 { 0x40 } else { page };
                guest.write(table + u64::from(page) * 4, frame << 12 | 3);
            }
            guest.write(directory, table as u32 | 3);
            guest.write(directory + 4, 0x83_u32);
            guest.state.special.cr3 = directory;
            guest.state.special.cr4 = 1 << 4;
            guest.state.special.cr0 |= CR0_PG;
            guest.write(PAGE, 0x1234_5678_u32);
            guest.finish(|a| {
                a.mov(eax, dword_ptr(OTHER))?;
                a.mov(ecx, dword_ptr(0x40_0000 + PAGE))?;
                a.mov(dword_ptr(OTHER + 4), eax)
            });
            assert_eq!(guest.state.general.rax, 0x1234_5678);
            assert_eq!(guest.state.general.rcx, 0x1234_5678);
            let entry: u32 = guest.read(table + 0x41 * 4);
            assert_eq!(u64::from(entry) & (A | D), A | D);
        },
    );
}
