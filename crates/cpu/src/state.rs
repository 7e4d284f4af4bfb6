//! The processor's registers.

/// How many slots [`State::file`] has: [`slot`] names them.
pub(crate) const SLOTS: usize = 32;

/// Slots of the register file that micro-operations address. The general registers are 0 to 15 in
/// the encoding's order (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 …).
pub(crate) mod slot {
    /// Values between the micro-operations of one instruction; dead at its end.
    pub(crate) const TEMP0: u8 = 16;
    pub(crate) const TEMP1: u8 = 17;
    pub(crate) const TEMP2: u8 = 18;
    pub(crate) const TEMP3: u8 = 19;
    /// RIP of the first instruction of the block that is executed.
    pub(crate) const START: u8 = 20;
    /// Always zero: the base or index of an address that has none.
    pub(crate) const ZERO: u8 = 24;
    /// Bases of ES, CS, SS, DS, FS and GS, in the encoding's order of segment registers.
    pub(crate) const SEGMENT_BASE: u8 = 25;
}

/// A segment register by its number in instruction encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the registers'
pub enum SegmentName {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register with its hidden part. The base of the six code and data segments is kept
/// here and, for address computation, in the register file; only [`State::set_segment`] writes both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The visible part.
    pub selector: u16,
    /// Linear address of its first byte.
    pub base: u64,
    /// Its last offset, in bytes whatever the granularity.
    pub limit: u32,
    /// Type in bits 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16
    /// (SDM volume 3, table 25-2).
    pub attributes: u32,
}

impl Segment {
    pub(crate) const LONG: u32 = 1 << 13;
    pub(crate) const DEFAULT_BIG: u32 = 1 << 14;
    pub(crate) const PRESENT: u32 = 1 << 7;
    pub(crate) const UNUSABLE: u32 = 1 << 16;
    /// The field of the descriptor privilege level.
    pub(crate) const DPL: u32 = 3 << 5;

    /// The descriptor privilege level.
    #[must_use]
    pub(crate) const fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u16,
}

/// x87, MMX and SSE registers: the 512 bytes of FXSAVE with 64-bit operand size (SDM volume 1,
/// table 10-2), which the host's own FXSAVE and FXRSTOR read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct FxState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word, TOP in bits 11-13.
    pub fsw: u16,
    /// Abridged tag word: a bit is set for each physical register in use.
    pub ftw: u8,
    /// Reserved.
    pub reserved: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Which bits of MXCSR exist.
    pub mxcsr_mask: u32,
    /// ST(0) to ST(7), that is in the order of the stack; ten bytes each.
    pub st: [[u8; 16]; 8],
    /// XMM0 to XMM15.
    pub xmm: [[u8; 16]; 16],
    /// Unused.
    pub rest: [[u8; 16]; 6],
}

impl FxState {
    /// The 512 bytes of FXSAVE.
    #[must_use]
    pub fn to_image(&self) -> [u8; 512] {
        let mut image = [0; 512];
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        image[6..8].copy_from_slice(&self.fop.to_le_bytes());
        image[8..16].copy_from_slice(&self.fip.to_le_bytes());
        image[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&self.mxcsr_mask.to_le_bytes());
        let registers = self.st.iter().chain(&self.xmm).chain(&self.rest);
        for (bytes, register) in image[32..].chunks_exact_mut(16).zip(registers) {
            bytes.copy_from_slice(register);
        }
        image
    }

    /// From the 512 bytes that FXRSTOR takes.
    #[must_use]
    pub fn from_image(image: &[u8; 512]) -> Self {
        let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let double = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let quad = |at: usize| u64::from(double(at)) | u64::from(double(at + 4)) << 32;
        let mut state = Self {
            fcw: word(0),
            fsw: word(2),
            ftw: image[4],
            fop: word(6),
            fip: quad(8),
            fdp: quad(16),
            mxcsr: double(24),
            ..Self::default()
        };
        // Reserved bits would fault in the host's own instruction.
        state.mxcsr &= state.mxcsr_mask;
        let registers = state.st.iter_mut().chain(&mut state.xmm);
        for (register, bytes) in registers.zip(image[32..].chunks_exact(16)) {
            register.copy_from_slice(bytes);
        }
        state
    }
}

impl Default for FxState {
    /// As after FNINIT and reset of MXCSR.
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            mxcsr_mask: 0xffff,
            st: [[0; 16]; 8],
            xmm: [[0; 16]; 16],
            rest: [[0; 16]; 6],
        }
    }
}

/// How instructions are decoded: the size of addresses and operands unless prefixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Real, virtual-8086, or a 16-bit code segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl Mode {
    /// 16, 32 or 64.
    #[must_use]
    pub(crate) const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// Flags of RFLAGS.
pub(crate) mod rflags {
    pub(crate) const CF: u64 = 1 << 0;
    pub(crate) const FIXED: u64 = 1 << 1;
    pub(crate) const PF: u64 = 1 << 2;
    pub(crate) const AF: u64 = 1 << 4;
    pub(crate) const ZF: u64 = 1 << 6;
    pub(crate) const SF: u64 = 1 << 7;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const OF: u64 = 1 << 11;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const ID: u64 = 1 << 21;
    /// The six that arithmetic sets.
    pub(crate) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Everything in the processor's core. RFLAGS is whole only through `State::rflags`: its six status
/// bits are computed when somebody reads them (module `flags`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// General registers, temporaries and segment bases by slot.
    pub(crate) file: [u64; SLOTS],
    /// The next instruction's offset in CS.
    pub rip: u64,
    /// RFLAGS without its status bits, unless `lazy` says that they are here.
    pub(crate) flags: u64,
    /// What the status bits are computed from.
    pub(crate) lazy: crate::flags::Lazy,
    /// ES, CS, SS, DS, FS, GS.
    pub(crate) segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// The last page fault's address.
    pub cr2: u64,
    /// Page-table root and PCID.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
    /// DR0 to DR3, then DR6 and DR7.
    pub dr: [u64; 6],
    /// x87 and SSE.
    pub fx: FxState,
    /// STAR, LSTAR, CSTAR, SFMASK.
    pub star: u64,
    /// Target of SYSCALL in 64-bit mode.
    pub lstar: u64,
    /// Target of SYSCALL in compatibility mode.
    pub cstar: u64,
    /// Flags that SYSCALL clears.
    pub sfmask: u64,
    /// What SWAPGS exchanges GS.base with.
    pub kernel_gs_base: u64,
    /// SYSENTER's CS, ESP and EIP.
    pub sysenter: [u64; 3],
    /// Read by RDTSCP.
    pub tsc_aux: u64,
    /// Page attribute table.
    pub pat: u64,
    /// The instruction before has inhibited interrupts for one instruction: STI, MOV SS, POP SS.
    pub shadow: bool,
    /// NMIs wait until IRET.
    pub nmi_blocked: bool,
    /// HLT was executed.
    pub halted: bool,
}

impl State {
    /// General register `index` (0 to 15, in the encoding's order).
    #[must_use]
    pub fn register(&self, index: usize) -> u64 {
        self.file[index & 15]
    }

    /// Sets general register `index`.
    pub fn set_register(&mut self, index: usize, value: u64) {
        self.file[index & 15] = value;
    }

    /// A segment register.
    #[must_use]
    pub fn segment(&self, name: SegmentName) -> &Segment {
        &self.segments[name as usize]
    }

    /// Loads a segment register with its hidden part, unchecked.
    pub fn set_segment(&mut self, name: SegmentName, segment: Segment) {
        self.file[slot::SEGMENT_BASE as usize + name as usize] = segment.base;
        self.segments[name as usize] = segment;
    }

    /// The current privilege level: SS's DPL; 3 in virtual-8086 mode, 0 in real mode.
    #[must_use]
    pub fn cpl(&self) -> u8 {
        if self.cr0 & 1 == 0 {
            0
        } else if self.flags & rflags::VM != 0 {
            3
        } else {
            self.segments[SegmentName::Ss as usize].dpl()
        }
    }

    /// Whether EFER.LMA is set.
    #[must_use]
    pub(crate) const fn long_mode(&self) -> bool {
        self.efer & 1 << 10 != 0
    }

    /// Whether SSE instructions may be executed: CR0.EM and CR0.TS are clear, CR4.OSFXSR is set.
    #[must_use]
    pub(crate) const fn vectors_enabled(&self) -> bool {
        self.cr0 & (1 << 2 | 1 << 3) == 0 && self.cr4 & 1 << 9 != 0
    }

    /// How instructions are decoded now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        let cs = &self.segments[SegmentName::Cs as usize];
        if self.long_mode() && cs.attributes & Segment::LONG != 0 {
            Mode::Bits64
        } else if cs.attributes & Segment::DEFAULT_BIG != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        }
    }
}

impl Default for State {
    /// After power-on or RESET (SDM volume 3, table 10-1).
    fn default() -> Self {
        let data = Segment {
            limit: 0xffff,
            attributes: 0x93,
            ..Segment::default()
        };
        let mut state = Self {
            file: [0; SLOTS],
            rip: 0xfff0,
            flags: rflags::FIXED,
            lazy: crate::flags::Lazy::default(),
            segments: [data; 6],
            tr: Segment {
                attributes: 0x8b,
                ..data
            },
            ldt: Segment {
                attributes: 0x82,
                ..data
            },
            gdt: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idt: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            fx: FxState::default(),
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter: [0; 3],
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            shadow: false,
            nmi_blocked: false,
            halted: false,
        };
        let code = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            attributes: 0x9b,
            ..data
        };
        state.set_segment(SegmentName::Cs, code);
        state
    }
}
