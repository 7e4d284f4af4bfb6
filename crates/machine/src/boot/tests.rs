//! Kernels made by hand, compressed by the real tools, loaded into real guest memory.

use std::io::Write;
use std::process::{Command, Stdio};

use vm_memory::{Bytes, GuestAddress};

use super::bytes::{put, u32_at, u64_at};
use super::*;
use crate::memory::MemoryOptions;

pub(super) const KERNEL_AT: u64 = 0x100_0000;
const MIB: u64 = 1 << 20;

/// Bytes that compress a little, so that every kind of instruction of a decoder occurs.
pub(super) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let back = 1 + (state >> 8) as usize % 40_000;
        let run = 1 + (state >> 32) as usize % 400;
        if state & 3 == 0 || bytes.len() < back {
            bytes.extend_from_slice(&state.to_le_bytes()[..1 + run % 8]);
        } else {
            let from = bytes.len() - back;
            for index in from..from + run {
                bytes.push(bytes[index]);
            }
        }
    }
    bytes.truncate(len);
    bytes
}

/// An ELF kernel of one segment with `code` at [`KERNEL_AT`] and a page of BSS.
pub(super) fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    const NOTE: usize = 0x100;
    const CODE: usize = 0x200;
    let mut file = vec![0; CODE + code.len()];
    put(&mut file, CODE, code);
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 24, &(KERNEL_AT + 0x10).to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &(1 + u16::from(pvh)).to_le_bytes());
    let segment =
        |file: &mut [u8], at, kind: u32, offset: usize, address: u64, len: u64, extra: u64| {
            put(file, at, &kind.to_le_bytes());
            put(file, at + 8, &(offset as u64).to_le_bytes());
            put(file, at + 24, &address.to_le_bytes());
            put(file, at + 32, &len.to_le_bytes());
            put(file, at + 40, &(len + extra).to_le_bytes());
        };
    segment(&mut file, 64, 1, CODE, KERNEL_AT, code.len() as u64, 4096);
    if pvh {
        segment(&mut file, 120, 4, NOTE, 0, 20 + 20, 0);
        // A note of another owner first, then Xen's.
        put(&mut file, NOTE, &4u32.to_le_bytes());
        put(&mut file, NOTE + 4, &2u32.to_le_bytes());
        put(&mut file, NOTE + 8, &18u32.to_le_bytes());
        put(&mut file, NOTE + 12, b"GNU\0\xff\xff\xff\xff");
        put(&mut file, NOTE + 20, &4u32.to_le_bytes());
        put(&mut file, NOTE + 24, &4u32.to_le_bytes());
        put(&mut file, NOTE + 28, &18u32.to_le_bytes());
        put(&mut file, NOTE + 32, b"Xen\0");
        put(
            &mut file,
            NOTE + 36,
            &(KERNEL_AT as u32 + 0x20).to_le_bytes(),
        );
    }
    file.extend_from_slice(b"relocations");
    file
}

/// A bzImage around `payload`, which has its size trailer already.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP: usize = 2 * 512;
    const GAP: usize = 0x40;
    let mut file = vec![0; SETUP + GAP];
    file[0x1f1] = 1;
    put(&mut file, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut file, 0x200, &[0xeb, 0x6a]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x020fu16.to_le_bytes());
    file[0x211] = 1;
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x248, &(GAP as u32).to_le_bytes());
    put(&mut file, 0x24c, &(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(payload);
    file.extend_from_slice(b"what follows the payload");
    file
}

/// Runs a tool of Debian's `package` as a filter.
fn filter(package: &str, command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; install {package}", command[0]));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{command:?}");
    output.stdout
}

/// As the kernel's build compresses: package, command, whether a size trailer is added, and how
/// many bytes to compress.
type Packer = (&'static str, &'static [&'static str], bool, usize);

#[rustfmt::skip]
pub(super) const PACKERS: [Packer; 9] = [
    ("gzip", &["gzip", "-n", "-c", "-9"], false, 600_000),
    ("bzip2", &["bzip2", "-c", "-9"], true, 2_000_000),
    ("xz-utils", &["lzma", "-c", "-9"], true, 600_000),
    ("xz-utils", &["xz", "-c", "--check=crc32", "--x86", "--lzma2=dict=32MiB"], true, 600_000),
    ("lzop", &["lzop", "-9", "-c"], true, 600_000),
    ("lzop", &["lzop", "-1", "-c"], true, 600_000),
    ("lz4", &["lz4", "-l", "-9", "-c", "-", "-"], true, 9_000_000),
    ("zstd", &["zstd", "-22", "--ultra", "-c", "-q"], true, 600_000),
    ("zstd", &["zstd", "-1", "-c", "-q"], true, 600_000),
];

pub(super) fn pack((package, command, trailer, _): &Packer, kernel: &[u8]) -> Vec<u8> {
    let mut payload = filter(package, command, kernel);
    if *trailer {
        payload.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
    }
    payload
}

fn memory(ram: u64, fill: u8) -> GuestMemory {
    let ranges: Vec<_> = layout::ram_ranges(ram)
        .into_iter()
        .map(|range| {
            (
                GuestAddress(range.start),
                (range.end - range.start) as usize,
            )
        })
        .collect();
    let memory = GuestMemory::from_ranges(&ranges).unwrap();
    if fill != 0 {
        let page = vec![fill; ram as usize];
        memory.write_slice(&page, GuestAddress(0)).unwrap();
    }
    memory
}

fn request(kernel: impl Into<BootFile>, initrd: Option<Vec<u8>>, ram: u64) -> LoadRequest {
    LoadRequest {
        kernel: kernel.into(),
        initrd: initrd.map(BootFile::Bytes),
        command_line: "console=ttyS0 quiet".into(),
        rsdp: Some(0xe_0000),
        ram,
        zeroed: true,
        map: false,
    }
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn on_disk(bytes: &[u8]) -> BootFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.into()
}

#[test]
fn files_that_may_be_mapped_load_alike() {
    // The segment begins inside a page, so this kernel is read; the initrd is mapped.
    let code = noise(50_000, 11);
    let initrd = noise(20_000, 12);
    let ram = 32 * MIB;
    let options = MemoryOptions {
        private: true,
        ..MemoryOptions::default()
    };
    let memory = crate::memory::allocate(mica_base::units::Bytes(ram), &options).unwrap();
    let request = LoadRequest {
        initrd: Some(on_disk(&initrd)),
        map: true,
        ..request(on_disk(&elf(&code, true)), None, ram)
    };
    let loaded = load(&memory, request).unwrap();
    let at = (ram - initrd.len() as u64) / 4096 * 4096;
    assert_eq!(loaded.written, vec![at..at + 4 * 4096]);
    assert!(read(&memory, at, initrd.len()) == initrd);
    assert!(read(&memory, KERNEL_AT, code.len()) == code);
}

#[test]
fn every_compression_unpacks_to_what_was_packed() {
    for packer in &PACKERS {
        let kernel = elf(&noise(packer.3, 7), true);
        let image = bzimage(&pack(packer, &kernel));
        let unpacked = unpack_kernel(&image).unwrap_or_else(|error| panic!("{packer:?}: {error}"));
        assert!(unpacked == kernel, "{packer:?} differs");
    }
}

#[test]
fn a_wrong_size_or_a_cut_stream_is_an_error() {
    let kernel = elf(&noise(50_000, 3), true);
    for packer in &PACKERS {
        let good = pack(packer, &kernel);
        let (stream, _) = good.split_at(good.len() - 4);
        for claim in [0, kernel.len() - 1, kernel.len() + 1, 600 << 20] {
            let mut wrong = stream.to_vec();
            wrong.extend_from_slice(&(claim as u32).to_le_bytes());
            let error = unpack_kernel(&bzimage(&wrong)).expect_err(packer.1[0]);
            assert!(matches!(error, BootError::Decompress { .. }), "{error}");
        }
        let mut cut = stream[..stream.len() / 2].to_vec();
        cut.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
        unpack_kernel(&bzimage(&cut)).expect_err(packer.1[0]);
    }
}

#[test]
fn pvh_kernel_gets_start_information() {
    let code = noise(70_000, 1);
    let initrd = noise(10_000, 2);
    for kernel in [on_disk(&elf(&code, true)), elf(&code, true).into()] {
        let ram = 64 * MIB;
        let memory = memory(ram, 0);
        let entry = load(&memory, request(kernel, Some(initrd.clone()), ram))
            .unwrap()
            .entry;
        let Entry::Pvh { rip, start_info } = entry else {
            panic!("{entry:?}");
        };
        assert_eq!(rip, KERNEL_AT + 0x20);
        assert!(read(&memory, KERNEL_AT, code.len()) == code);
        let info = read(&memory, start_info, 56);
        assert_eq!(u32_at(&info, 0), 0x336e_c578);
        assert_eq!(u32_at(&info, 4), 1);
        assert_eq!(u32_at(&info, 12), 1);
        let command_line = read(&memory, u64_at(&info, 24), 20);
        assert_eq!(command_line, b"console=ttyS0 quiet\0");
        assert_eq!(u64_at(&info, 32), 0xe_0000);
        let module = read(&memory, u64_at(&info, 16), 32);
        let (at, len) = (u64_at(&module, 0), u64_at(&module, 8));
        assert_eq!((at % 4096, len), (0, initrd.len() as u64));
        assert_eq!(at, (ram - len) / 4096 * 4096);
        assert!(read(&memory, at, len as usize) == initrd);
        let count = u32_at(&info, 48) as usize;
        let map = read(&memory, u64_at(&info, 40), 24 * count);
        assert_eq!(count, memory_map::memory_map(ram).len());
        for (entry, (range, kind)) in map.chunks(24).zip(memory_map::memory_map(ram)) {
            let end = u64_at(entry, 0) + u64_at(entry, 8);
            assert_eq!(u64_at(entry, 0)..end, range);
            assert_eq!(u32_at(entry, 16), kind as u32);
        }
    }
}

#[test]
fn kernel_without_a_note_gets_a_zero_page() {
    let code = noise(5_000, 1);
    let bare = elf(&code, false);
    let mut payload = bare.clone();
    payload.extend_from_slice(&[0; 4]);
    for (kernel, limit) in [(bare, 0x7fff_ffff), (bzimage(&payload), 0x7fff_ffff)] {
        let ram = 64 * MIB;
        let memory = memory(ram, 0);
        let initrd = noise(4_096, 2);
        let entry = load(
            &memory,
            request(on_disk(&kernel), Some(initrd.clone()), ram),
        )
        .unwrap()
        .entry;
        let Entry::Linux64 {
            rip,
            boot_params,
            gdt,
            gdt_limit,
            code_selector,
            ..
        } = entry
        else {
            panic!("{entry:?}");
        };
        assert_eq!(rip, KERNEL_AT + 0x10);
        let page = read(&memory, boot_params, 4096);
        assert_eq!(u32_at(&page, 0x202).to_le_bytes(), *b"HdrS");
        assert_eq!(u32_at(&page, 0x206) & 0xffff, 0x20f);
        assert_eq!(page[0x210], 0xff);
        assert_eq!(u64_at(&page, 0x70), 0xe_0000);
        assert_eq!(u32_at(&page, 0x22c), limit);
        let at = u64::from(u32_at(&page, 0x218));
        assert!(read(&memory, at, initrd.len()) == initrd);
        assert_eq!(at + 4096, ram);
        assert_eq!(u32_at(&page, 0x21c), 4096);
        let command_line = read(&memory, u32_at(&page, 0x228).into(), 20);
        assert_eq!(command_line, b"console=ttyS0 quiet\0");
        assert_eq!(usize::from(page[0x1e8]), memory_map::memory_map(ram).len());
        assert_eq!(u64_at(&page, 0x2d0 + 8), 0xa_0000);
        let table = read(&memory, gdt, usize::from(gdt_limit) + 1);
        // Long-mode, present, executable code.
        let descriptor = u64_at(&table, code_selector.into());
        assert_eq!(descriptor >> 40 & 0x60_9a, 0x20_9a);
    }
}

#[test]
fn bss_is_zeroed_unless_memory_is_known_to_be_zero() {
    let code = noise(5_000, 1);
    let ram = 32 * MIB;
    for (zeroed, expected) in [(false, 0), (true, 0xaa)] {
        let memory = memory(ram, 0xaa);
        let request = LoadRequest {
            zeroed,
            ..request(elf(&code, true), None, ram)
        };
        load(&memory, request).unwrap();
        let bss = read(&memory, KERNEL_AT + code.len() as u64, 4096);
        assert!(bss.iter().all(|byte| *byte == expected));
        assert_eq!(
            read(&memory, KERNEL_AT + code.len() as u64 + 4096, 1),
            [0xaa]
        );
    }
}

#[test]
fn what_does_not_fit_is_named_with_the_memory_that_would_do() {
    let kernel = || elf(&noise(5_000, 1), true);
    let initrd = |mib: u64| Some(vec![0; (mib * MIB) as usize]);
    for (ram, initrd, expected) in [
        (16, None, Some(("kernel", 17))),
        (17, None, None),
        (16, initrd(4), Some(("kernel", 21))),
        (20, initrd(4), Some(("initrd", 21))),
        (21, initrd(4), None),
    ] {
        let ram = ram * MIB;
        let request = request(kernel(), initrd, ram);
        let refused = match load(&memory(ram, 0), request) {
            Ok(_) => None,
            Err(BootError::DoesNotFit { what, ram, .. }) => Some((what, ram / MIB)),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(refused, expected);
    }
}

#[test]
fn malformed_kernels_are_refused_for_the_right_reason() {
    let good = || elf(&noise(5_000, 1), true);
    let wrong = |at: usize, bytes: &[u8]| {
        let mut kernel = good();
        put(&mut kernel, at, bytes);
        kernel
    };
    let wrong_image = |at: usize, bytes: &[u8]| {
        let mut payload = good();
        payload.extend_from_slice(&[0; 4]);
        let mut image = bzimage(&payload);
        put(&mut image, at, bytes);
        image
    };
    let mut not_elf = bzimage(&pack(&PACKERS[0], b"something else entirely"));
    for (kernel, expected) in [
        (vec![], "neither"),
        (b"#!/bin/sh".to_vec(), "neither"),
        (good()[..60].to_vec(), "ends inside its header"),
        (wrong(4, &[1]), "not little-endian ELF64"),
        (wrong(18, &[3]), "not little-endian ELF64"),
        (wrong(32, &[0xff; 8]), "beyond the end"),
        (wrong(56, &[0xff; 2]), "no kernel's"),
        (wrong(64 + 8, &[0xff; 8]), "beyond the end"),
        (wrong(64 + 24, &[0xff; 8]), "wraps"),
        (wrong(64 + 24, &[0; 8]), "outside"),
        (wrong(64, &[0; 4]), "nothing to load"),
        (wrong(64 + 40, &[1, 0]), "larger in the file"),
        (wrong(0x100 + 36, &[0; 4]), "PVH entry"),
        (wrong_image(0x206, &[7, 2]), "protocol 2.07"),
        (wrong_image(0x211, &[0]), "zImage"),
        (wrong_image(0x24c, &[0xff; 4]), "payload lies beyond"),
        (wrong_image(0x440, b"????"), "no compression"),
        (wrong_image(0x201, &[0x20]), "too short"),
        (std::mem::take(&mut not_elf), "no ELF file"),
    ] {
        let ram = 32 * MIB;
        let error = load(&memory(ram, 0), request(kernel, None, ram)).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn command_line_is_bounded_and_free_of_nul() {
    let ram = 32 * MIB;
    for (text, fits) in [
        ("x".repeat(2047), true),
        ("x".repeat(2048), false),
        ("a\0b".into(), false),
    ] {
        let request = LoadRequest {
            command_line: text,
            ..request(elf(b"code of the kernel, 32 bytes long", true), None, ram)
        };
        assert_eq!(load(&memory(ram, 0), request).is_ok(), fits);
    }
}

/// Feeds `check` with `good`, then with hundreds of corruptions of it.
pub(super) fn corrupt(good: &[u8], seed: u64, rounds: usize, check: fn(&[u8])) {
    println!("seed {seed}");
    check(good);
    let mut state = seed | 1;
    let mut random = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % bound.max(1)
    };
    for _ in 0..rounds {
        let mut bytes = good.to_vec();
        for _ in 0..1 + random(8) {
            let region = [1024, usize::MAX][random(2)].min(bytes.len());
            let at = random(region);
            bytes[at] = random(256) as u8;
        }
        if random(8) == 0 {
            bytes.truncate(random(bytes.len()));
        }
        check(&bytes);
    }
}

#[test]
fn corrupt_kernels_never_panic() {
    let kernel = elf(&noise(3_000, 5), true);
    corrupt(&kernel, 11, 200, fuzz::fuzz_kernel);
    for packer in &PACKERS {
        corrupt(&bzimage(&pack(packer, &kernel)), 12, 60, fuzz::fuzz_kernel);
    }
}
