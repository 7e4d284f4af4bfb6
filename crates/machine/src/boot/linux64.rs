//! The Linux 64-bit boot protocol (the kernel's `Documentation/arch/x86/boot.rst`, "64-bit Boot
//! Protocol", and `zero-page.rst`).

use super::bytes::put;
use super::bzimage::SetupHeader;
use super::memory_map::memory_map;
use super::{Placed, low};

/// Size of the zero page in bytes.
pub(super) const ZERO_PAGE_LEN: usize = 4096;

/// The highest address of an initrd's last byte for a kernel whose header does not say: Linux's
/// own figure.
pub(super) const INITRD_MAX: u64 = 0x7fff_ffff;

// Fields of the zero page (`struct boot_params`).
const RSDP: usize = 0x070;
const E820_COUNT: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const INITRD_START: usize = 0x218;
const INITRD_LEN: usize = 0x21c;
const COMMAND_LINE: usize = 0x228;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const COMMAND_LINE_MAX: usize = 0x238;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_LEN: usize = 20;

/// A flat 64-bit code segment, `__BOOT_CS`.
pub(super) const CODE_SELECTOR: u16 = 0x10;
/// A flat data segment, `__BOOT_DS`.
pub(super) const DATA_SELECTOR: u16 = 0x18;
/// Null, unused, code, data, each as the processor reads them (Intel SDM vol. 3, 3.4.5).
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// The GDT's bytes for [`low::GDT`].
pub(super) fn gdt() -> Vec<u8> {
    GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The zero page for [`low::ZERO_PAGE`]. `setup` is the bzImage's own header, which a bare ELF
/// kernel lacks.
pub(super) fn zero_page(setup: Option<&SetupHeader>, placed: &Placed) -> Vec<u8> {
    let mut page = vec![0; ZERO_PAGE_LEN];
    if let Some(setup) = setup {
        put(&mut page, SetupHeader::OFFSET, setup.bytes());
    } else {
        put(&mut page, BOOT_FLAG, &0xaa55u16.to_le_bytes());
        put(&mut page, MAGIC, b"HdrS");
        put(&mut page, VERSION, &0x020fu16.to_le_bytes());
        put(
            &mut page,
            INITRD_ADDR_MAX,
            &(INITRD_MAX as u32).to_le_bytes(),
        );
        put(&mut page, KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
        let max = super::DEFAULT_COMMAND_LINE_MAX as u32;
        put(&mut page, COMMAND_LINE_MAX, &max.to_le_bytes());
    }
    // A loader without an assigned number.
    page[LOADER] = 0xff;
    put(&mut page, RSDP, &placed.rsdp.unwrap_or(0).to_le_bytes());
    // Everything below lies under 4 GiB by the placement's own bounds.
    put(
        &mut page,
        COMMAND_LINE,
        &(low::COMMAND_LINE as u32).to_le_bytes(),
    );
    if let Some(initrd) = &placed.initrd {
        put(
            &mut page,
            INITRD_START,
            &(initrd.start as u32).to_le_bytes(),
        );
        let len = initrd.end - initrd.start;
        put(&mut page, INITRD_LEN, &(len as u32).to_le_bytes());
    }
    let map = memory_map(placed.ram);
    page[E820_COUNT] = map.len() as u8;
    for (index, (range, kind)) in map.into_iter().enumerate() {
        let at = E820_TABLE + index * E820_ENTRY_LEN;
        put(&mut page, at, &range.start.to_le_bytes());
        put(&mut page, at + 8, &(range.end - range.start).to_le_bytes());
        put(&mut page, at + 16, &(kind as u32).to_le_bytes());
    }
    page
}

/// Page tables that map the first 4 GiB to themselves by 2 MiB pages, for [`low::PAGE_TABLES`]:
/// one PML4, one PDPT, four page directories. Pages of 1 GiB are left alone because not every
/// processor profile has them.
pub(super) fn page_tables() -> Vec<u8> {
    const TABLE: u64 = 4096;
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let mut bytes = Vec::with_capacity(low::PAGE_TABLES_LEN);
    let mut table = |entries: &mut dyn Iterator<Item = u64>| {
        let start = bytes.len();
        bytes.extend(entries.flat_map(u64::to_le_bytes));
        bytes.resize(start + TABLE as usize, 0);
    };
    let pdpt = low::PAGE_TABLES + TABLE;
    table(&mut std::iter::once(pdpt | PRESENT_WRITABLE));
    table(&mut (1..=4).map(|index| (pdpt + index * TABLE) | PRESENT_WRITABLE));
    for gib in 0..4u64 {
        table(&mut (0..512).map(|page| gib << 30 | page << 21 | LARGE | PRESENT_WRITABLE));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::bytes::u64_at;
    use super::*;

    /// Walks the tables as the processor does.
    fn translate(tables: &[u8], address: u64) -> Option<u64> {
        let entry = |table: u64, shift: u32| {
            let index = (address >> shift & 511) * 8;
            let entry = u64_at(tables, (table - low::PAGE_TABLES + index) as usize);
            (entry & 1 == 1).then_some(entry)
        };
        let pdpt = entry(low::PAGE_TABLES, 39)? & !0xfff;
        let directory = entry(pdpt, 30)? & !0xfff;
        let page = entry(directory, 21)?;
        assert_ne!(page & 1 << 7, 0);
        Some((page & !0x1f_ffff) | (address & 0x1f_ffff))
    }

    #[test]
    fn the_first_4_gib_map_to_themselves_and_no_more() {
        let tables = page_tables();
        assert_eq!(tables.len(), low::PAGE_TABLES_LEN);
        for address in [0, 0x1000, 0x20_0000, 0x7fff_ffff, 0xffff_f000, 0xffff_ffff] {
            assert_eq!(translate(&tables, address), Some(address));
        }
        for address in [1 << 32, 1 << 39, 1 << 40] {
            assert_eq!(translate(&tables, address), None);
        }
    }
}
