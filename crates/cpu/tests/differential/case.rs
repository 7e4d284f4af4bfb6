//! One case: a short code with everything it starts from, and what it leaves.
//!
//! Both sides map the same few pages at the same linear addresses; everything around them faults.
//!
//! ```text
//!  CODE   2 pages  readable, executable; filled with INT3, which ends every case
//!         hole
//!  RODATA 1 page   readable
//!  DATA   2 pages  readable, writable; compared afterwards
//!         hole
//! ```

use mica_cpu::FxState;

pub(crate) const PAGE: u64 = 4096;
/// Where the whole of it starts; a gigabyte around it is a hole.
pub(crate) const BASE: u64 = 0x1000_0000;
pub(crate) const CODE: u64 = BASE + 0x1_1000;
pub(crate) const CODE_LEN: u64 = 2 * PAGE;
pub(crate) const RODATA: u64 = BASE + 0x2_1000;
pub(crate) const DATA: u64 = RODATA + PAGE;
pub(crate) const DATA_LEN: usize = 2 * PAGE as usize;
pub(crate) const FS_BASE: u64 = DATA + 0x120;
pub(crate) const GS_BASE: u64 = DATA + 0x840;
/// Longest code of a case.
pub(crate) const MAX_CODE: usize = 64;
pub(crate) const MAX_PATCHES: usize = 4;

/// A trap number of ours: it did not come to an end.
pub(crate) const STUCK: u64 = 0xff00;
/// INT3's vector: the code ran to its end.
pub(crate) const COMPLETED: u64 = 3;
pub(crate) const PAGE_FAULT: u64 = 14;

/// Bytes of the data pages that differ from the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Patch {
    /// From [`DATA`].
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) bytes: [u8; 32],
}

/// What a case starts from. Lives in memory that two processes share: plain numbers only.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Case {
    pub(crate) fx: FxState,
    pub(crate) registers: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    pub(crate) code: [u8; MAX_CODE],
    pub(crate) code_len: u32,
    pub(crate) patch_count: u32,
    pub(crate) patches: [Patch; MAX_PATCHES],
}

impl Case {
    pub(crate) fn code(&self) -> &[u8] {
        &self.code[..(self.code_len as usize).min(MAX_CODE)]
    }

    pub(crate) fn patches(&self) -> &[Patch] {
        &self.patches[..(self.patch_count as usize).min(MAX_PATCHES)]
    }

    /// Sets bytes of the data pages; what lies outside of them is ignored.
    pub(crate) fn patch(&mut self, address: u64, bytes: &[u8]) {
        let Some(offset) = address.checked_sub(DATA) else {
            return;
        };
        let index = self.patch_count as usize;
        if index == MAX_PATCHES || offset as usize + bytes.len() > DATA_LEN || bytes.len() > 32 {
            return;
        }
        let mut patch = Patch {
            offset: offset as u32,
            len: bytes.len() as u32,
            bytes: [0; 32],
        };
        patch.bytes[..bytes.len()].copy_from_slice(bytes);
        self.patches[index] = patch;
        self.patch_count += 1;
    }
}

impl Default for Case {
    fn default() -> Self {
        Self {
            fx: FxState::default(),
            registers: [0; 16],
            rflags: 0x202,
            rip: CODE,
            code: [0; MAX_CODE],
            code_len: 0,
            patch_count: 0,
            patches: [Patch::default(); MAX_PATCHES],
        }
    }
}

/// What a case leaves: the state in the exception that ended it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Outcome {
    pub(crate) fx: FxState,
    pub(crate) registers: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    /// The exception's vector, or one of the constants above.
    pub(crate) trap: u64,
    pub(crate) error: u64,
    /// A page fault's linear address.
    pub(crate) address: u64,
    pub(crate) memory: [u8; DATA_LEN],
}

impl Default for Outcome {
    fn default() -> Self {
        Self {
            fx: FxState::default(),
            registers: [0; 16],
            rflags: 0,
            rip: 0,
            trap: STUCK,
            error: 0,
            address: 0,
            memory: [0; DATA_LEN],
        }
    }
}

/// A case and what the manual leaves open in its outcome.
#[derive(Clone)]
pub(crate) struct Planned {
    pub(crate) name: String,
    pub(crate) case: Case,
    /// After so many bytes of code these flags (of iced's `RflagsBits`) are undefined.
    pub(crate) undefined: Vec<(u64, u32)>,
}

/// The bytes of the read-only page and the data pages before a case.
pub(crate) fn background() -> Vec<u8> {
    let mut random = crate::random::Random::new(0x6261_636b_6772_6f75);
    let mut bytes = Vec::new();
    while bytes.len() < PAGE as usize + DATA_LEN {
        match random.below(4) {
            0 => bytes.extend(random.integer().to_le_bytes()),
            1 => bytes
                .extend((random.float32() as u64 | (random.float32() as u64) << 32).to_le_bytes()),
            2 => bytes.extend(random.float64().to_le_bytes()),
            // Ten bytes of a long double with six of something else.
            _ => bytes.extend(random.float80()),
        }
    }
    bytes.truncate(PAGE as usize + DATA_LEN);
    bytes
}
