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
        private: false,
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
        private: false,
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

fn private(ram: Bytes, huge_pages: HugePages) -> GuestMemory {
    let options = MemoryOptions {
        huge_pages,
        private: true,
    };
    allocate(ram, &options).unwrap()
}

#[test]
fn private_memory_is_aligned_for_huge_pages_and_no_files() {
    for huge_pages in [HugePages::None, HugePages::Transparent] {
        let memory = private(Bytes(layout::LOW_RAM_END + (64 << 20)), huge_pages);
        assert_eq!(memory.num_regions(), 2);
        for region in memory.iter() {
            assert!(region.file_offset().is_none());
            assert_eq!(region.as_ptr() as usize % (2 << 20), 0);
        }
        memory
            .write_obj(7u8, GuestAddress(layout::HIGH_RAM_START))
            .unwrap();
        discard(&memory, GuestAddress(layout::HIGH_RAM_START), 4096).unwrap();
        let byte: u8 = memory
            .read_obj(GuestAddress(layout::HIGH_RAM_START))
            .unwrap();
        assert_eq!(byte, 0);
    }
}

#[test]
fn memory_is_unmapped_at_its_end() {
    let memory = private(Bytes::gib(1), HugePages::Transparent);
    let start = memory.iter().next().unwrap().as_ptr() as usize;
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let range = |line: &str| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some(number(from)?..number(to)?)
        };
        maps.lines()
            .filter_map(range)
            .any(|range| range.contains(&(start + (512 << 20))))
    };
    assert!(mapped());
    drop(memory);
    assert!(!mapped());
}

/// A file of `pages` pages, each full of its number plus one.
fn numbered(pages: u8) -> File {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all(&[page + 1; 4096]).unwrap();
    }
    file
}

#[test]
fn a_file_lies_over_private_memory_until_it_is_discarded() {
    let memory = private(Bytes::mib(4), HugePages::Transparent);
    let file = numbered(4);
    let at = |page: u64| GuestAddress(0x10_0000 + 4096 * page);
    let byte = |page| memory.read_obj::<u8>(at(page)).unwrap();
    // The last page is not whole.
    let mapped = overlay(&memory, at(0), &file, 4096, 3 * 4096 - 1).unwrap();
    assert_eq!(mapped, 2 * 4096);
    assert_eq!([byte(0), byte(1), byte(2)], [2, 3, 0]);

    // The guest writes to copies, whether or not they were made ahead.
    populate(&memory, at(0), 4096);
    memory.write_obj(9u8, at(0)).unwrap();
    memory.write_obj(9u8, at(1)).unwrap();
    assert_eq!([byte(0), byte(1)], [9, 9]);
    let mut kept = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut kept, 4096).unwrap();
    assert_eq!(kept, [2]);

    // What is discarded is zero, not the file's; its neighbours stay.
    discard(&memory, at(1), 4096).unwrap();
    assert_eq!([byte(0), byte(1)], [9, 0]);
    discard(&memory, GuestAddress(0), 4 << 20).unwrap();
    assert_eq!(byte(0), 0);
    memory.write_obj(5u8, at(1)).unwrap();
    discard(&memory, at(1), 4096).unwrap();
    assert_eq!(byte(1), 0);
}

#[test]
fn a_file_is_not_mapped_where_it_cannot_be() {
    let file = numbered(2);
    let page = GuestAddress(0x10_0000);
    let shared = plain(Bytes::mib(4));
    assert_eq!(overlay(&shared, page, &file, 0, 8192).unwrap(), 0);
    let private = private(Bytes::mib(4), HugePages::None);
    for (address, offset, len) in [
        (0x10_0800, 0, 8192),
        (0x10_0000, 512, 4096),
        (0x10_0000, 0, 4095),
        (0x3f_f000, 0, 8192),
        (0x40_0000, 0, 4096),
        (u64::MAX - 4095, 0, 4096),
    ] {
        let mapped = overlay(&private, GuestAddress(address), &file, offset, len).unwrap();
        assert_eq!(mapped, 0, "{address:#x}");
    }
    assert_eq!(private.read_obj::<u8>(page).unwrap(), 0);
}
