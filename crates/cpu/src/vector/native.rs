//! The host's MMX and SSE units, working on a guest's operands.
//!
//! Each instruction without an immediate is one `asm!` block: operands into registers 0 and 1, the
//! instruction, result out of register 0. Instructions with an immediate are tables of eight-byte
//! slots, one for each of its 256 values, that a call reaches by index.
//!
//! What can raise a floating-point exception runs with a given MXCSR, all exceptions masked; the flags
//! come back in it, and the host's own MXCSR is in force again afterwards.

#![allow(unsafe_code)] // runs single instructions, and slots of machine code, on the host

use core::arch::{asm, naked_asm};

use iced_x86::Mnemonic;

/// An XMM register or 16-byte operand.
pub(crate) type Xmm = [u8; 16];

/// One integer or bitwise instruction in an `asm!` block, for each mnemonic.
macro_rules! integer {
    ($mnemonic:expr, $dst:expr, $src:expr; $($name:ident)*) => {
        match $mnemonic {
            $(Mnemonic::$name => {
                // SAFETY: reads and writes the two operands and two registers, all declared.
                unsafe {
                    asm!(
                        "movdqu xmm0, [{dst}]",
                        "movdqu xmm1, [{src}]",
                        concat!(stringify!($name), " xmm0, xmm1"),
                        "movdqu [{dst}], xmm0",
                        dst = in(reg) $dst.as_mut_ptr(),
                        src = in(reg) $src.as_ptr(),
                        out("xmm0") _,
                        out("xmm1") _,
                        options(nostack),
                    );
                }
            })*
            _ => return false,
        }
    };
}

/// `dst = dst op src` for SSE's integer, bitwise and shuffling instructions; `false` if it is none.
pub(super) fn integer(mnemonic: Mnemonic, dst: &mut Xmm, src: &Xmm) -> bool {
    integer! { mnemonic, dst, src;
        Movsldup Movddup Unpcklps Unpcklpd Unpckhps Unpckhpd Movshdup Andps Andpd Andnps Andnpd
        Orps Orpd Xorps Xorpd Punpcklbw Punpcklwd Punpckldq Packsswb Pcmpgtb Pcmpgtw Pcmpgtd
        Packuswb Punpckhbw Punpckhwd Punpckhdq Packssdw Punpcklqdq Punpckhqdq Pcmpeqb Pcmpeqw
        Pcmpeqd Psrlw Psrld Psrlq Paddq Pmullw Psubusb Psubusw Pminub Pand Paddusb Paddusw Pmaxub
        Pandn Pavgb Psraw Psrad Pavgw Pmulhuw Pmulhw Psubsb Psubsw Pminsw Por Paddsb Paddsw Pmaxsw
        Pxor Psllw Pslld Psllq Pmuludq Pmaddwd Psadbw Psubb Psubw Psubd Psubq Paddb Paddw Paddd
        Pshufb Phaddw Phaddd Phaddsw Pmaddubsw Phsubw Phsubd Phsubsw Psignb Psignw Psignd Pmulhrsw
        Pabsb Pabsw Pabsd Pmovsxbw Pmovsxbd Pmovsxbq Pmovsxwd Pmovsxwq Pmovsxdq Pmuldq Pcmpeqq
        Packusdw Pmovzxbw Pmovzxbd Pmovzxbq Pmovzxwd Pmovzxwq Pmovzxdq Pcmpgtq Pminsb Pminsd
        Pminuw Pminud Pmaxsb Pmaxsd Pmaxuw Pmaxud Pmulld Phminposuw
    }
    true
}

/// The same on MM registers, with EMMS behind it: Rust code expects an empty x87 stack.
macro_rules! mmx {
    ($mnemonic:expr, $dst:expr, $src:expr; $($name:ident)*) => {
        match $mnemonic {
            $(Mnemonic::$name => {
                // SAFETY: reads and writes the two operands; the x87 registers, which MMX uses, are
                // declared lost and left empty.
                unsafe {
                    asm!(
                        "movq mm0, [{dst}]",
                        "movq mm1, [{src}]",
                        concat!(stringify!($name), " mm0, mm1"),
                        "movq [{dst}], mm0",
                        "emms",
                        dst = in(reg) $dst.as_mut_ptr(),
                        src = in(reg) $src.as_ptr(),
                        out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                        out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                        out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
                        out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
                        options(nostack),
                    );
                }
            })*
            _ => return false,
        }
    };
}

/// `dst = dst op src` for MMX instructions and those that later extensions added to MM registers.
pub(super) fn mmx(mnemonic: Mnemonic, dst: &mut [u8; 8], src: &[u8; 8]) -> bool {
    mmx! { mnemonic, dst, src;
        Punpcklbw Punpcklwd Punpckldq Packsswb Pcmpgtb Pcmpgtw Pcmpgtd Packuswb Punpckhbw
        Punpckhwd Punpckhdq Packssdw Pcmpeqb Pcmpeqw Pcmpeqd Psrlw Psrld Psrlq Paddq Pmullw
        Psubusb Psubusw Pminub Pand Paddusb Paddusw Pmaxub Pandn Pavgb Psraw Psrad Pavgw Pmulhuw
        Pmulhw Psubsb Psubsw Pminsw Por Paddsb Paddsw Pmaxsw Pxor Psllw Pslld Psllq Pmuludq
        Pmaddwd Psadbw Psubb Psubw Psubd Psubq Paddb Paddw Paddd Pshufb Phaddw Phaddd Phaddsw
        Pmaddubsw Phsubw Phsubd Phsubsw Psignb Psignw Psignd Pmulhrsw Pabsb Pabsw Pabsd
    }
    true
}

/// One floating-point instruction under the MXCSR at `$csr`.
macro_rules! float {
    ($mnemonic:expr, $dst:expr, $src:expr, $csr:expr; $($name:ident)*) => {
        match $mnemonic {
            $(Mnemonic::$name => {
                let mut host = 0u32;
                // SAFETY: reads and writes the operands and two registers; the host's MXCSR is
                // restored; `masked` has made sure that no exception is raised.
                unsafe {
                    asm!(
                        "movdqu xmm0, [{dst}]",
                        "movdqu xmm1, [{src}]",
                        "stmxcsr [{host}]",
                        "ldmxcsr [{csr}]",
                        concat!(stringify!($name), " xmm0, xmm1"),
                        "stmxcsr [{csr}]",
                        "ldmxcsr [{host}]",
                        "movdqu [{dst}], xmm0",
                        dst = in(reg) $dst.as_mut_ptr(),
                        src = in(reg) $src.as_ptr(),
                        csr = in(reg) core::ptr::from_mut(&mut *$csr),
                        host = in(reg) core::ptr::from_mut(&mut host),
                        out("xmm0") _,
                        out("xmm1") _,
                        options(nostack),
                    );
                }
            })*
            _ => return false,
        }
    };
}

/// All exceptions masked, and no bit set that a host lacks.
fn masked(csr: &mut u32) {
    *csr = *csr & super::MXCSR_BITS | 0x1f80;
}

/// `dst = dst op src` for floating-point arithmetic and conversions between XMM registers.
pub(super) fn float(mnemonic: Mnemonic, dst: &mut Xmm, src: &Xmm, csr: &mut u32) -> bool {
    masked(csr);
    float! { mnemonic, dst, src, csr;
        Sqrtps Sqrtpd Sqrtss Sqrtsd Rsqrtps Rsqrtss Rcpps Rcpss Addps Addpd Addss Addsd Mulps
        Mulpd Mulss Mulsd Cvtps2pd Cvtpd2ps Cvtss2sd Cvtsd2ss Cvtdq2ps Cvtps2dq Cvttps2dq Subps
        Subpd Subss Subsd Minps Minpd Minss Minsd Divps Divpd Divss Divsd Maxps Maxpd Maxss Maxsd
        Haddpd Haddps Hsubpd Hsubps Addsubpd Addsubps Cvttpd2dq Cvtdq2pd Cvtpd2dq
    }
    true
}

/// One comparison that sets flags; MXCSR as in `float`.
macro_rules! compare {
    ($mnemonic:expr, $left:expr, $right:expr, $csr:expr; $($name:ident)*) => {
        match $mnemonic {
            $(Mnemonic::$name => {
                let mut host = 0u32;
                let ax: u64;
                // SAFETY: as in `float`; LAHF writes AH, which is declared.
                unsafe {
                    asm!(
                        "movdqu xmm0, [{left}]",
                        "movdqu xmm1, [{right}]",
                        "stmxcsr [{host}]",
                        "ldmxcsr [{csr}]",
                        concat!(stringify!($name), " xmm0, xmm1"),
                        "lahf",
                        "stmxcsr [{csr}]",
                        "ldmxcsr [{host}]",
                        left = in(reg) $left.as_ptr(),
                        right = in(reg) $right.as_ptr(),
                        csr = in(reg) core::ptr::from_mut(&mut *$csr),
                        host = in(reg) core::ptr::from_mut(&mut host),
                        out("rax") ax,
                        out("xmm0") _,
                        out("xmm1") _,
                        options(nostack),
                    );
                }
                Some((ax >> 8) as u8)
            })*
            _ => None,
        }
    };
}

/// The low byte of the flags after a comparison.
pub(super) fn compare(mnemonic: Mnemonic, left: &Xmm, right: &Xmm, csr: &mut u32) -> Option<u8> {
    masked(csr);
    compare! { mnemonic, left, right, csr; Comiss Comisd Ucomiss Ucomisd Ptest }
}

/// One conversion between RAX and XMM0; MXCSR as in `float`.
macro_rules! convert {
    ($text:literal, $xmm:expr, $value:expr, $csr:expr) => {{
        let mut host = 0u32;
        // SAFETY: as in `float`; RAX is declared.
        unsafe {
            asm!(
                "movdqu xmm0, [{xmm}]",
                "stmxcsr [{host}]",
                "ldmxcsr [{csr}]",
                $text,
                "stmxcsr [{csr}]",
                "ldmxcsr [{host}]",
                "movdqu [{xmm}], xmm0",
                xmm = in(reg) $xmm.as_mut_ptr(),
                csr = in(reg) core::ptr::from_mut(&mut *$csr),
                host = in(reg) core::ptr::from_mut(&mut host),
                inout("rax") *$value,
                out("xmm0") _,
                options(nostack),
            );
        }
    }};
}

/// Conversions between a general register (`wide`: of 64 bits) and an XMM register; `false` if it is none.
pub(super) fn convert(
    mnemonic: Mnemonic,
    wide: bool,
    xmm: &mut Xmm,
    value: &mut u64,
    csr: &mut u32,
) -> bool {
    masked(csr);
    match (mnemonic, wide) {
        (Mnemonic::Cvtsi2ss, false) => convert!("cvtsi2ss xmm0, eax", xmm, value, csr),
        (Mnemonic::Cvtsi2ss, true) => convert!("cvtsi2ss xmm0, rax", xmm, value, csr),
        (Mnemonic::Cvtsi2sd, false) => convert!("cvtsi2sd xmm0, eax", xmm, value, csr),
        (Mnemonic::Cvtsi2sd, true) => convert!("cvtsi2sd xmm0, rax", xmm, value, csr),
        (Mnemonic::Cvtss2si, false) => convert!("cvtss2si eax, xmm0", xmm, value, csr),
        (Mnemonic::Cvtss2si, true) => convert!("cvtss2si rax, xmm0", xmm, value, csr),
        (Mnemonic::Cvttss2si, false) => convert!("cvttss2si eax, xmm0", xmm, value, csr),
        (Mnemonic::Cvttss2si, true) => convert!("cvttss2si rax, xmm0", xmm, value, csr),
        (Mnemonic::Cvtsd2si, false) => convert!("cvtsd2si eax, xmm0", xmm, value, csr),
        (Mnemonic::Cvtsd2si, true) => convert!("cvtsd2si rax, xmm0", xmm, value, csr),
        (Mnemonic::Cvttsd2si, false) => convert!("cvttsd2si eax, xmm0", xmm, value, csr),
        (Mnemonic::Cvttsd2si, true) => convert!("cvttsd2si rax, xmm0", xmm, value, csr),
        _ => return false,
    }
    true
}

/// Tables of 256 slots of eight bytes: the instruction on XMM0 and XMM1 with that immediate, RET.
macro_rules! slots {
    ($($name:ident $bytes:literal)*) => {
        $(
            #[unsafe(naked)]
            unsafe extern "sysv64" fn $name() {
                naked_asm!(
                    ".set mica_vector_imm, 0",
                    ".rept 256",
                    concat!(".byte ", $bytes, ", 0xc1, mica_vector_imm, 0xc3"),
                    ".balign 8, 0xcc",
                    ".set mica_vector_imm, mica_vector_imm + 1",
                    ".endr",
                )
            }
        )*
    };
}

slots! {
    pshufd "0x66, 0x0f, 0x70"
    pshufhw "0xf3, 0x0f, 0x70"
    pshuflw "0xf2, 0x0f, 0x70"
    shufps "0x0f, 0xc6"
    shufpd "0x66, 0x0f, 0xc6"
    cmpps "0x0f, 0xc2"
    cmppd "0x66, 0x0f, 0xc2"
    cmpss "0xf3, 0x0f, 0xc2"
    cmpsd "0xf2, 0x0f, 0xc2"
    roundps "0x66, 0x0f, 0x3a, 0x08"
    roundpd "0x66, 0x0f, 0x3a, 0x09"
    roundss "0x66, 0x0f, 0x3a, 0x0a"
    roundsd "0x66, 0x0f, 0x3a, 0x0b"
    blendps "0x66, 0x0f, 0x3a, 0x0c"
    blendpd "0x66, 0x0f, 0x3a, 0x0d"
    pblendw "0x66, 0x0f, 0x3a, 0x0e"
    palignr "0x66, 0x0f, 0x3a, 0x0f"
    insertps "0x66, 0x0f, 0x3a, 0x21"
    dpps "0x66, 0x0f, 0x3a, 0x40"
    dppd "0x66, 0x0f, 0x3a, 0x41"
    mpsadbw "0x66, 0x0f, 0x3a, 0x42"
    pcmpestrm "0x66, 0x0f, 0x3a, 0x60"
    pcmpestri "0x66, 0x0f, 0x3a, 0x61"
    pcmpestrm64 "0x66, 0x48, 0x0f, 0x3a, 0x60"
    pcmpestri64 "0x66, 0x48, 0x0f, 0x3a, 0x61"
    pcmpistrm "0x66, 0x0f, 0x3a, 0x62"
    pcmpistri "0x66, 0x0f, 0x3a, 0x63"
}

/// What an instruction with an immediate reads and writes beside XMM0 and XMM1.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Beside {
    /// The first string's length (PCMPESTRx).
    pub(super) rax: u64,
    /// The second string's length.
    pub(super) rdx: u64,
    /// The index found.
    pub(super) rcx: u64,
    /// The low twelve bits of the flags.
    pub(super) flags: u64,
}

fn table(mnemonic: Mnemonic) -> Option<*const ()> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Pshufd => pshufd as *const (),
        M::Pshufhw => pshufhw as *const (),
        M::Pshuflw => pshuflw as *const (),
        M::Shufps => shufps as *const (),
        M::Shufpd => shufpd as *const (),
        M::Cmpps => cmpps as *const (),
        M::Cmppd => cmppd as *const (),
        M::Cmpss => cmpss as *const (),
        M::Cmpsd => cmpsd as *const (),
        M::Roundps => roundps as *const (),
        M::Roundpd => roundpd as *const (),
        M::Roundss => roundss as *const (),
        M::Roundsd => roundsd as *const (),
        M::Blendps => blendps as *const (),
        M::Blendpd => blendpd as *const (),
        M::Pblendw => pblendw as *const (),
        M::Palignr => palignr as *const (),
        M::Insertps => insertps as *const (),
        M::Dpps => dpps as *const (),
        M::Dppd => dppd as *const (),
        M::Mpsadbw => mpsadbw as *const (),
        M::Pcmpestrm => pcmpestrm as *const (),
        M::Pcmpestri => pcmpestri as *const (),
        M::Pcmpestrm64 => pcmpestrm64 as *const (),
        M::Pcmpestri64 => pcmpestri64 as *const (),
        M::Pcmpistrm => pcmpistrm as *const (),
        M::Pcmpistri => pcmpistri as *const (),
        _ => return None,
    })
}

/// Whether [`immediate`] knows an instruction.
pub(super) fn has_immediate(mnemonic: Mnemonic) -> bool {
    table(mnemonic).is_some()
}

/// A slot's machine code.
#[cfg(test)]
pub(super) fn slot_bytes(mnemonic: Mnemonic, value: u8) -> Option<[u8; 8]> {
    let slot = table(mnemonic)? as usize + usize::from(value) * 8;
    // SAFETY: the slot is inside its table, which nobody writes.
    Some(unsafe { (slot as *const [u8; 8]).read() })
}

/// Instructions with an immediate: XMM0 is `dst`, XMM1 `src`, the result in XMM0.
pub(super) fn immediate(
    mnemonic: Mnemonic,
    value: u8,
    dst: &mut Xmm,
    src: &Xmm,
    csr: &mut u32,
    beside: &mut Beside,
) -> bool {
    let Some(table) = table(mnemonic) else {
        return false;
    };
    masked(csr);
    let slot = table as usize + usize::from(value) * 8;
    let mut host = 0u32;
    // SAFETY: the slot is inside its table and uses XMM0, XMM1, RAX, RCX, RDX and flags only, all of
    // which are declared; MXCSR as in `float`. (Without `nostack` there is room for the call.)
    unsafe {
        asm!(
            "movdqu xmm0, [rdi]",
            "movdqu xmm1, [rsi]",
            "stmxcsr [r9]",
            "ldmxcsr [r8]",
            "call r10",
            "pushfq",
            "pop r11",
            "stmxcsr [r8]",
            "ldmxcsr [r9]",
            "movdqu [rdi], xmm0",
            in("rdi") dst.as_mut_ptr(),
            in("rsi") src.as_ptr(),
            in("r8") core::ptr::from_mut(csr),
            in("r9") core::ptr::from_mut(&mut host),
            in("r10") slot,
            inout("rax") beside.rax,
            inout("rdx") beside.rdx,
            inout("rcx") beside.rcx,
            out("r11") beside.flags,
            out("xmm0") _,
            out("xmm1") _,
        );
    }
    beside.flags &= 0xfff;
    true
}
