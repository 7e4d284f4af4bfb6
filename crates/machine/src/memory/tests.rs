use std::os::unix::fs::MetadataExt;

use vm_memory::Bytes as _;

use super::*;

fn file_of(memory: &GuestMemory) -> &File {
    memory.iter().next().unwrap().file_offset().unwrap().file()
}

/// Bytes of host memory behind the guest.
fn resident(memory: &GuestMemory) -> u64 {
    file_of(memory).metadata().unwrap().blocks() * 512
}

fn plain(ram: Bytes) -> GuestMemory {
    allocate(ram, &MemoryOptions::default()).unwrap()
}

#[test]
fn regions_lie_around_the_hole_and_behind_each_other_in_one_file() {
    let memory = plain(Bytes(layout::LOW_RAM_END + (64 << 20)));
    let regions: Vec<_> = memory
        .iter()
        .map(|region| {
            let offset = region.file_offset().unwrap();
            (region.start_addr().0, region.len(), offset.start())
        })
        .collect();
    assert_eq!(
        regions,
        [
            (0, layout::LOW_RAM_END, 0),
            (layout::HIGH_RAM_START, 64 << 20, layout::LOW_RAM_END),
        ]
    );
    assert_eq!(resident(&memory), 0, "nothing is allocated ahead");
}

#[test]
fn the_file_keeps_its_size() {
    let memory = plain(Bytes::mib(4));
    let file = file_of(&memory);
    assert!(file.set_len(4096).is_err());
    assert!(file.set_len(8 << 20).is_err());
    assert_eq!(file.metadata().unwrap().len(), 4 << 20);
}

#[test]
fn impossible_sizes_are_refused_with_what_is_possible() {
    for ram in [0, 4095, layout::MAX_RAM + PAGE_SIZE] {
        let error = allocate(Bytes(ram), &MemoryOptions::default()).unwrap_err();
        assert!(error.to_string().contains("multiple of 4K"), "{error}");
    }
}

#[test]
fn huge_pages_work_or_the_error_says_how_to_get_them() {
    let options = MemoryOptions {
        huge_pages: HugePages::Size2M,
    };
    // More than any test host reserves.
    let error = allocate(Bytes::gib(512), &options).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("262144 free huge pages of 2M") || text.contains("with 2M pages"),
        "{text}"
    );
    let options = MemoryOptions {
        huge_pages: HugePages::Transparent,
    };
    allocate(Bytes::mib(4), &options).unwrap();
}

#[test]
fn discarded_pages_read_as_zeros_and_leave_the_host() {
    let memory = plain(Bytes(layout::LOW_RAM_END + (1 << 20)));
    let at = |address| GuestAddress(address);
    for page in 0..4 {
        memory.write_slice(&[7; 4096], at(0x1000 * page)).unwrap();
    }
    memory.write_obj(7u8, at(layout::HIGH_RAM_START)).unwrap();
    assert_eq!(resident(&memory), 5 * 4096);

    // Partial pages stay. (Reading a page allocates it, so the count comes first.)
    discard(&memory, at(0x800), 0x2000).unwrap();
    assert_eq!(resident(&memory), 4 * 4096);
    // A range over the hole and beyond the end takes what is RAM.
    discard(&memory, at(layout::LOW_RAM_END - 4096), u64::MAX).unwrap();
    assert_eq!(resident(&memory), 3 * 4096);
    for (address, value) in [
        (0xfff, 7),
        (0x1000, 0),
        (0x1fff, 0),
        (0x2000, 7),
        (layout::HIGH_RAM_START, 0),
    ] {
        assert_eq!(memory.read_obj::<u8>(at(address)).unwrap(), value);
    }
}
