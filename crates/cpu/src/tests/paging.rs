//! Page tables that change, and what the TLB may still know of them.

use std::sync::atomic::Ordering;

use iced_x86::code_asm::*;

use super::{RAX, RBX, run};
use crate::processor::Stop;
use crate::state::rflags::STATUS;
use crate::testing::{DATA, Guest, Nothing};

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
