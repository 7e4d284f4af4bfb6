//! The PVH protocol's start information (Xen's `include/public/arch-x86/hvm/start_info.h`,
//! version 1).

use super::bytes::put;
use super::memory_map::memory_map;
use super::{Placed, low};

const MAGIC: u32 = 0x336e_c578;
const HEADER_LEN: usize = 56;
const MODULE_LEN: usize = 32;
const MAP_ENTRY_LEN: usize = 24;

/// The start information, its module list and memory map behind it, for [`low::START_INFO`].
pub(super) fn start_info(placed: &Placed) -> Vec<u8> {
    let map = memory_map(placed.ram);
    let map_offset = HEADER_LEN + MODULE_LEN;
    let mut bytes = vec![0; map_offset + map.len() * MAP_ENTRY_LEN];
    put(&mut bytes, 0, &MAGIC.to_le_bytes());
    put(&mut bytes, 4, &1u32.to_le_bytes());
    put(&mut bytes, 24, &low::COMMAND_LINE.to_le_bytes());
    put(&mut bytes, 32, &placed.rsdp.unwrap_or(0).to_le_bytes());
    put(
        &mut bytes,
        40,
        &(low::START_INFO + map_offset as u64).to_le_bytes(),
    );
    put(&mut bytes, 48, &(map.len() as u32).to_le_bytes());
    if let Some(initrd) = &placed.initrd {
        put(&mut bytes, 12, &1u32.to_le_bytes());
        let modules = low::START_INFO + HEADER_LEN as u64;
        put(&mut bytes, 16, &modules.to_le_bytes());
        put(&mut bytes, HEADER_LEN, &initrd.start.to_le_bytes());
        let len = initrd.end - initrd.start;
        put(&mut bytes, HEADER_LEN + 8, &len.to_le_bytes());
    }
    for (index, (range, kind)) in map.into_iter().enumerate() {
        let at = map_offset + index * MAP_ENTRY_LEN;
        put(&mut bytes, at, &range.start.to_le_bytes());
        put(&mut bytes, at + 8, &(range.end - range.start).to_le_bytes());
        put(&mut bytes, at + 16, &(kind as u32).to_le_bytes());
    }
    bytes
}
