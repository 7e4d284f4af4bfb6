//! Entry points for the fuzzer: each drives one reader of untrusted bytes and asserts what must
//! hold whatever they are.

use vm_memory::{Bytes, GuestAddress};

use super::{BootFile, Entry, LoadRequest, load};
use crate::memory::GuestMemory;

/// RAM of the fuzzed guest in bytes.
const RAM: u64 = 16 << 20;

/// Loads `data` as a kernel: ELF, or bzImage with any compression.
///
/// # Panics
/// The loader returned an entry outside the guest's RAM.
#[doc(hidden)]
pub fn fuzz_kernel(data: &[u8]) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)])
        .expect("invariant: one small range can be mapped");
    let half = data.len() / 2;
    let request = LoadRequest {
        kernel: BootFile::Bytes(data.to_vec()),
        initrd: Some(BootFile::Bytes(data[half..].to_vec())),
        command_line: "console=ttyS0".into(),
        rsdp: Some(0xe_0000),
        ram: RAM,
        zeroed: false,
        map: false,
    };
    if let Ok(loaded) = load(&memory, request) {
        let entry = loaded.entry;
        let (Entry::Pvh { rip, .. } | Entry::Linux64 { rip, .. }) = entry;
        assert!((0x10_0000..RAM).contains(&rip), "{entry:x?}");
        let command_line: [u8; 14] = memory
            .read_obj(GuestAddress(super::low::COMMAND_LINE))
            .expect("invariant: the command line lies in RAM");
        assert_eq!(&command_line, b"console=ttyS0\0");
    }
}
