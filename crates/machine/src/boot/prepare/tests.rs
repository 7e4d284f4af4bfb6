use super::*;
use crate::boot::elf::Kernel;
use crate::boot::{BootFile, bytes};

const BASE: u64 = 0xffff_ffff_8100_0000;
const LOAD_AT: u64 = 0x100_0000;
const W: u64 = SHF_WRITE;
const X: u64 = SHF_EXECINSTR;

/// An ELF kernel of one segment with `flags` that begins in the file at 64 KiB, and sections of
/// (flags, length in KiB) in it, each full of sevens.
fn kernel(flags: u32, sections: &[(u64, u64)], bss_kib: u64) -> Vec<u8> {
    const OFFSET: u64 = 64 << 10;
    let len: u64 = sections.iter().map(|(_, kib)| kib << 10).sum();
    let table = OFFSET + len;
    let mut file = vec![7; table as usize + sections.len() * SECTION_HEADER_LEN];
    file[..OFFSET as usize].fill(0);
    let mut set = |at: u64, value: u64, width: usize| {
        bytes::put(&mut file, at as usize, &value.to_le_bytes()[..width]);
    };
    set(0, 0x0001_0102_464c_457f, 8);
    set(18, 62, 2);
    set(24, LOAD_AT, 8);
    set(32, 64, 8);
    set(40, table, 8);
    set(54, 56, 2);
    set(56, 1, 2);
    set(58, SECTION_HEADER_LEN as u64, 2);
    set(60, sections.len() as u64, 2);
    for (field, value) in [
        (8, OFFSET),
        (16, BASE),
        (24, LOAD_AT),
        (32, len),
        (40, len + (bss_kib << 10)),
    ] {
        set(64 + field, value, 8);
    }
    set(64, PT_LOAD.into(), 4);
    set(68, flags.into(), 4);
    let mut address = BASE;
    for (index, (flags, kib)) in sections.iter().enumerate() {
        let header = table + (index * SECTION_HEADER_LEN) as u64;
        set(header + 4, 1, 4);
        set(header + 8, flags | SHF_ALLOC, 8);
        set(header + 16, address, 8);
        set(header + 32, kib << 10, 8);
        address += kib << 10;
    }
    file
}

/// (flags, KiB in the file, KiB in memory) of each segment.
fn segments(file: &[u8]) -> Vec<(u32, u64, u64)> {
    let count = usize::from(u16_at(file, 56));
    file[64..]
        .chunks_exact(PROGRAM_HEADER_LEN)
        .take(count)
        .map(|header| {
            let kib = |field| u64_at(header, field) >> 10;
            (u32_at(header, 4), kib(32), kib(40))
        })
        .collect()
}

#[test]
fn what_is_only_read_becomes_segments_of_their_own() {
    const RX: u32 = PF_R | PF_X;
    const RW: u32 = PF_R | PF_W;
    const RWX: u32 = RX | RW;
    type Case<'a> = (u32, &'a [(u64, u64)], &'a [(u32, u64, u64)]);
    let cases: &[Case<'_>] = &[
        // Data beside code, some of it called writable; small sections join their neighbours.
        (
            RX,
            &[(X, 512), (W, 300), (0, 8), (0, 300)],
            &[(RX, 512, 512), (PF_R, 608, 608), (RX, 0, 64)],
        ),
        // Tables among data.
        (
            RW,
            &[(W, 100), (0, 300), (0, 200), (W, 4)],
            &[(RW, 100, 100), (PF_R, 500, 500), (RW, 4, 68)],
        ),
        // Too small for a segment.
        (RW, &[(W, 100), (0, 200), (W, 4)], &[(RW, 304, 368)]),
        // Freed after the boot, whatever it is.
        (RWX, &[(X, 400), (0, 400)], &[(RWX, 800, 864)]),
        (RX, &[], &[(RX, 0, 64)]),
    ];
    for (flags, sections, expected) in cases {
        let mut file = kernel(*flags, sections, 64);
        let before = file.clone();
        prepare(&mut file).unwrap();
        assert_eq!(segments(&file), *expected, "{sections:?}");
        assert!(file[64 << 10..] == before[64 << 10..], "bytes stay");
        if !sections.is_empty() {
            let kernel = Kernel::parse(&BootFile::Bytes(file)).unwrap();
            let kib: u64 = sections.iter().map(|(_, kib)| kib).sum();
            assert_eq!(kernel.end, LOAD_AT + ((kib + 64) << 10));
        }
    }
}

#[test]
fn a_bss_in_the_file_is_left_out() {
    let mut file = kernel(PF_R | PF_W, &[(W, 40)], 0);
    file[((64 + 9) << 10)..((64 + 40) << 10)].fill(0);
    prepare(&mut file).unwrap();
    assert_eq!(segments(&file), [(PF_R | PF_W, 12, 40)]);
}

#[test]
fn damaged_tables_do_no_harm() {
    let good = kernel(PF_R | PF_X, &[(X, 512), (0, 300)], 64);
    let table = good.len() - 2 * SECTION_HEADER_LEN;
    for at in (0..120).chain(table..good.len()) {
        for value in [0, 1, 0x7f, 0xff] {
            let mut file = good.clone();
            file[at] = value;
            // Whatever comes out, the loader judges it anew.
            if prepare(&mut file).is_ok() {
                let _ = Kernel::parse(&BootFile::Bytes(file));
            }
        }
    }
}
