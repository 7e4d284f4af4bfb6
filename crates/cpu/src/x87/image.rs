//! The x87 state's forms in memory: environments (FNSTENV), saved states (FNSAVE) and FXSAVE's image.

use crate::state::{FxState, Mode, State};
use crate::vector::MXCSR_BITS;

/// Bits of the status word.
pub(super) mod status {
    /// The six exceptions: invalid, denormal, zero-divide, overflow, underflow, precision.
    pub(crate) const EXCEPTIONS: u16 = 0x3f;
    /// Exceptions, stack fault, error summary and busy: what FNCLEX clears.
    pub(super) const CLEARED: u16 = 0x80ff;
    /// Error summary and busy.
    pub(super) const SUMMARY: u16 = 0x8080;
}

/// How an environment is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// 28 bytes, else 14.
    pub(super) wide: bool,
    /// Pointers as in real and virtual-8086 mode: linear, with the opcode between their halves.
    pub(super) real: bool,
}

impl Layout {
    /// Bytes of an environment.
    pub(super) const fn size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

impl FxState {
    /// TOP: the physical register that is ST(0).
    pub(crate) const fn top(&self) -> usize {
        (self.fsw >> 11 & 7) as usize
    }

    /// Makes physical register 0 ST(0), and moves the registers accordingly.
    pub(crate) fn rotate_to_zero(&mut self) {
        let top = self.top();
        self.st.rotate_right(top);
        self.fsw &= !0x3800;
    }

    /// Exceptions that are flagged and not masked.
    pub(crate) const fn pending(&self) -> u16 {
        self.fsw & !self.fcw & status::EXCEPTIONS
    }

    /// Sets the error summary by the flags and masks.
    pub(super) fn summarize(&mut self) {
        self.fsw &= !status::SUMMARY;
        if self.pending() != 0 {
            self.fsw |= status::SUMMARY;
        }
    }

    /// Sets the control word, as FLDCW.
    pub(super) fn set_control(&mut self, value: u16) {
        self.fcw = value & 0x1f3f | 0x40;
        self.summarize();
    }

    /// FNINIT: registers keep their bytes.
    pub(super) fn initialize(&mut self) {
        self.rotate_to_zero();
        (self.fcw, self.fsw, self.ftw) = (0x37f, 0, 0);
        (self.fop, self.fip, self.fdp) = (0, 0, 0);
    }

    /// FNCLEX.
    pub(super) fn clear_exceptions(&mut self) {
        self.fsw &= !status::CLEARED;
    }

    /// The tag word with two bits for each register: valid, zero, special, empty.
    fn full_tags(&self) -> u16 {
        (0..8).fold(0, |tags, physical| {
            let tag = if self.ftw >> physical & 1 == 0 {
                3
            } else {
                let bytes = &self.st[(physical + 8 - self.top()) & 7];
                let (mantissa, rest) = bytes.split_at(8);
                let zero = mantissa.iter().all(|&byte| byte == 0);
                match u16::from_le_bytes([rest[0], rest[1]]) & 0x7fff {
                    0 if zero => 1,
                    0 | 0x7fff => 2,
                    _ if mantissa[7] & 0x80 == 0 => 2,
                    _ => 0,
                }
            };
            tags | tag << (2 * physical)
        })
    }

    /// The environment in the first `layout.size()` bytes. Selectors are zero.
    pub(super) fn environment(&self, layout: Layout) -> [u8; 28] {
        let (ip, dp, opcode) = (
            self.fip as u32,
            self.fdp as u32,
            u32::from(self.fop) & 0x7ff,
        );
        let words = [self.fcw, self.fsw, self.full_tags()];
        let mut bytes = [0; 28];
        if layout.wide {
            let pointers = if layout.real {
                let (ip_high, dp_high) = (ip >> 16 << 12, dp >> 16 << 12);
                [ip & 0xffff, ip_high | opcode, dp & 0xffff, dp_high]
            } else {
                [ip, opcode << 16, dp, 0xffff_0000]
            };
            let words = words.map(|word| 0xffff_0000 | u32::from(word));
            for (at, word) in bytes.chunks_exact_mut(4).zip(words.iter().chain(&pointers)) {
                at.copy_from_slice(&word.to_le_bytes());
            }
        } else {
            let pointers = if layout.real {
                let high = |pointer: u32| (pointer >> 16 << 12) as u16;
                [ip as u16, high(ip) | opcode as u16, dp as u16, high(dp)]
            } else {
                [ip as u16, 0, dp as u16, 0]
            };
            for (at, word) in bytes.chunks_exact_mut(2).zip(words.iter().chain(&pointers)) {
                at.copy_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }

    /// Loads an environment. The registers stay where they are physically.
    pub(super) fn set_environment(&mut self, layout: Layout, bytes: &[u8; 28]) {
        let field = |index: usize| -> u32 {
            if layout.wide {
                let at = index * 4;
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            } else {
                u16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]).into()
            }
        };
        self.rotate_to_zero();
        self.fsw = field(1) as u16;
        let top = self.top();
        self.st.rotate_left(top);
        let tags = field(2);
        self.ftw = (0..8).fold(0, |ftw, physical| {
            ftw | u8::from(tags >> (2 * physical) & 3 != 3) << physical
        });
        let (ip, dp) = (field(3), field(5));
        if layout.real {
            self.fip = (ip & 0xffff | field(4) >> 12 << 16).into();
            self.fdp = (dp & 0xffff | field(6) >> 12 << 16).into();
            self.fop = (field(4) & 0x7ff) as u16;
        } else {
            (self.fip, self.fdp) = (ip.into(), dp.into());
            self.fop = (field(4) >> 16 & 0x7ff) as u16;
        }
        self.set_control(field(0) as u16);
    }

    /// The 512 bytes of FXSAVE. Only the first [`image_size`] are the processor's to write.
    pub(super) fn to_bytes(self) -> [u8; 512] {
        let mut bytes = [0; 512];
        bytes[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        bytes[4] = self.ftw;
        bytes[6..8].copy_from_slice(&self.fop.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.fip.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_BITS.to_le_bytes());
        let registers = self.st.iter().chain(&self.xmm);
        for (at, register) in bytes[32..416].chunks_exact_mut(16).zip(registers) {
            at.copy_from_slice(register);
        }
        bytes
    }

    /// Takes `size` bytes of FXSAVE's image; MXCSR was checked.
    pub(super) fn set_bytes(&mut self, bytes: &[u8; 512], size: usize) {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let double = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let quad = |at: usize| u64::from(double(at)) | u64::from(double(at + 4)) << 32;
        self.fsw = word(2);
        self.ftw = bytes[4];
        self.fop = word(6) & 0x7ff;
        self.fip = quad(8);
        self.fdp = quad(16);
        self.mxcsr = double(24);
        let registers = self.st.iter_mut().chain(&mut self.xmm);
        for (register, at) in registers.zip(bytes[32..size].chunks_exact(16)) {
            register.copy_from_slice(at);
        }
        for register in &mut self.st {
            register[10..].fill(0);
        }
        self.set_control(word(0));
    }
}

/// How many bytes of the image are written and read: XMM8 to XMM15 exist in 64-bit mode only.
pub(super) fn image_size(state: &State) -> usize {
    if state.mode() == Mode::Bits64 {
        416
    } else {
        288
    }
}
