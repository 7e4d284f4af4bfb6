//! Page tables that change, and what the TLB may still know of them.

use std::sync::atomic::Ordering;

use iced_x86::code_asm::*;

use super::{RAX, RBX, RCX, RDX, run};
use crate::processor::Stop;
use crate::state::rflags::STATUS;
use crate::testing::{DATA, END, Guest, Nothing};

/// The page table of [`Guest`].
const TABLE: u64 = 0x4000;
/// The page directory of [`Guest`].
const DIRECTORY: u64 = 0x3000;
/// A page table for the second 2 MiB.
const SECOND_TABLE: u64 = 0x6000;

fn code_epoch(guest: &Guest) -> u64 {
    guest.cpu.ram.code_epoch.load(Ordering::SeqCst)
}

/// A store over two pages: the walk for the first sets an accessed bit in a page that holds code, too,
/// and the second is not mapped. Nothing of the instruction is executed.
#[test]
fn a_fault_after_a_walk_through_code_leaves_the_state() {
    let function = DIRECTORY + 0x800;
    let mut guest = Guest::new(|a| {
        a.mov(rcx, function).unwrap();
        a.mov(rdx, 0x3f_fffe_u64).unwrap();
        a.mov(eax, 1).unwrap();
        a.call(rcx).unwrap();
        a.add(dword_ptr(rdx), eax).unwrap();
        a.nop().unwrap();
    });
    guest.poke(function, &[0xc3]);
    guest.poke(DIRECTORY + 8, &(SECOND_TABLE | 3).to_le_bytes());
    guest.poke(SECOND_TABLE + 8 * 511, &(DATA | 3).to_le_bytes());
    guest.poke(DATA + 0xff8, &u64::MAX.to_le_bytes());
    guest.cpu.state.set_rflags(STATUS | 2);
    run(&mut guest, 5);
    let add = guest.cpu.state.rip;
    let epoch = code_epoch(&guest);
    assert_eq!(guest.cpu.run(&Nothing, 2), Stop::TripleFault); // no IDT
    assert_ne!(code_epoch(&guest), epoch, "the walk met code");
    assert_eq!(guest.cpu.state.rip, add);
    assert_eq!(guest.cpu.state.rflags() & STATUS, STATUS);
    assert_eq!(guest.cpu.state.cr2, 0x40_0000);
    assert_eq!(guest.peek(DATA + 0xff8), u64::MAX);
    assert_eq!(guest.cpu.state.register(RAX), 1);
}

/// INVLPG of a small page leaves other translations in place; that of any part of a large page forgets
/// all its parts.
#[test]
fn invlpg_forgets_small_pages_alone_and_large_ones_whole() {
    const LARGE: u64 = 0x80;
    let (small, other) = (0x10_0000_u64, 0x11_0000_u64);
    let mut guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.invlpg(ptr(rcx)).unwrap();
        for (register, address) in [(rax, small), (rbx, other), (rdx, END + DATA + 0x1000)] {
            a.mov(register, address).unwrap();
            a.mov(register, qword_ptr(register)).unwrap();
        }
        a.jmp(again).unwrap();
    });
    let seen = |guest: &mut Guest, invalidated: u64| {
        guest.cpu.state.set_register(RCX, invalidated);
        run(guest, 8);
        [RAX, RBX, RDX].map(|register| guest.cpu.state.register(register))
    };
    let map = |guest: &mut Guest, frame: u64| {
        for page in [small, other] {
            guest.poke(TABLE + 8 * (page >> 12), &(frame | 3).to_le_bytes());
        }
    };
    for frame in 4..=6u64 {
        guest.poke(frame << 16, &frame.to_le_bytes());
        guest.poke((frame << 16) + 0x1000, &frame.to_le_bytes());
    }
    // The first 2 MiB again.
    guest.poke(DIRECTORY + 8, &(LARGE | 3).to_le_bytes());
    map(&mut guest, 0x4_0000);
    assert_eq!(seen(&mut guest, 0), [4, 4, 4]);
    map(&mut guest, 0x5_0000);
    assert_eq!(seen(&mut guest, small), [5, 4, 4]);
    assert_eq!(seen(&mut guest, END - 0x1000), [5, 4, 4]);
    assert_eq!(seen(&mut guest, 2 * END), [5, 4, 4]);
    // Now of small pages.
    guest.poke(DIRECTORY + 8, &(SECOND_TABLE | 3).to_le_bytes());
    let part = SECOND_TABLE + 8 * ((DATA + 0x1000) >> 12);
    guest.poke(part, &(0x6_0000_u64 | 3).to_le_bytes());
    assert_eq!(seen(&mut guest, other), [5, 5, 4]);
    assert_eq!(seen(&mut guest, 2 * END - 1), [5, 5, 6]);
}

/// A page table's entry is changed to another frame, without execution, and nobody says so. Code on the
/// page is the old frame's or none.
#[test]
fn the_rights_of_one_frame_do_not_open_another() {
    const NO_EXECUTE: u64 = 1 << 63;
    let (page, old) = (0x10_0000_u64, 0x5_0000_u64);
    let mut guest = Guest::new(|a| {
        a.mov(rcx, page).unwrap();
        a.mov(rdx, TABLE + 8 * (page >> 12)).unwrap();
        a.mov(rbx, DATA | NO_EXECUTE | 3).unwrap();
        a.call(rcx).unwrap();
        a.mov(qword_ptr(rdx), rbx).unwrap();
        a.mov(dword_ptr(rcx + 0x800), 1).unwrap();
        a.add(rcx, 0x10).unwrap();
        a.call(rcx).unwrap();
    });
    guest.cpu.state.efer |= 0x800; // NXE
    guest.poke(TABLE + 8 * (page >> 12), &(old | 3).to_le_bytes());
    for frame in [old, DATA] {
        guest.poke(frame, &[0xc3]);
        guest.poke(frame + 0x10, &[0x31, 0xdb, 0xc3]); // XOR EBX, EBX
    }
    run(&mut guest, 9);
    assert_eq!(guest.peek(DATA + 0x800), 1, "the new frame is written");
    assert_eq!(guest.cpu.state.rip, page + 0x10);
    assert_eq!(guest.cpu.run(&Nothing, 1), Stop::TripleFault); // no IDT
    assert_eq!(guest.cpu.state.cr2, page + 0x10);
    assert_ne!(guest.cpu.state.register(RBX), 0);
}
