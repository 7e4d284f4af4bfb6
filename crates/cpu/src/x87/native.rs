//! The host's x87 unit, working on a guest's registers.
//!
//! Every x87 instruction is here once, as the two bytes of its encoding and a return, in tables of
//! four-byte slots. A call loads the guest's image with FXRSTOR, calls the slot, and takes the image
//! back with FXSAVE. The guest's own control word is in force meanwhile: an exception that it does
//! not mask stays pending in the image's status word, since neither FXSAVE nor FNINIT waits for it,
//! so the host never sees one.

#![allow(unsafe_code)] // runs machine code of its own, on the host's registers

use core::arch::{asm, naked_asm};

use crate::state::FxState;

/// Slots of register forms: escape D8 to DF by the low six bits of ModRM C0 to FF.
#[unsafe(naked)]
unsafe extern "sysv64" fn register_forms() {
    naked_asm!(
        ".set mica_x87_escape, 0xd8",
        ".rept 8",
        ".set mica_x87_modrm, 0xc0",
        ".rept 64",
        ".byte mica_x87_escape, mica_x87_modrm, 0xc3, 0xcc",
        ".set mica_x87_modrm, mica_x87_modrm + 1",
        ".endr",
        ".set mica_x87_escape, mica_x87_escape + 1",
        ".endr",
    )
}

/// Slots of memory forms with the operand at RSI: escape D8 to DF by ModRM's reg field.
#[unsafe(naked)]
unsafe extern "sysv64" fn memory_forms() {
    naked_asm!(
        ".set mica_x87_escape, 0xd8",
        ".rept 8",
        ".set mica_x87_modrm, 0x06",
        ".rept 8",
        ".byte mica_x87_escape, mica_x87_modrm, 0xc3, 0xcc",
        ".set mica_x87_modrm, mica_x87_modrm + 8",
        ".endr",
        ".set mica_x87_escape, mica_x87_escape + 1",
        ".endr",
    )
}

/// Bytes of a slot.
const SLOT: usize = 4;

/// The largest memory operand of an arithmetic form (ten bytes), rounded up.
pub(super) type Operand = [u8; 16];

/// Executes the register form `escape`, `modrm`. Takes and gives the low byte of the flags, which
/// FCMOVcc reads and FCOMI writes. Not for control instructions (FNINIT, FNSTSW AX …).
pub(super) fn register_form(image: &mut FxState, escape: u8, modrm: u8, flags: u8) -> u8 {
    let index = usize::from(escape & 7) << 6 | usize::from(modrm & 63);
    let slot = register_forms as *const () as usize + index * SLOT;
    // SAFETY: the slot is inside its table, and a register form touches registers only.
    unsafe { call(image, &mut [0; 16], slot, flags) }
}

/// Executes the memory form `escape` /`reg` on `operand`. Not for FLDENV, FNSTENV, FRSTOR and FNSAVE,
/// whose operands are larger.
pub(super) fn memory_form(image: &mut FxState, escape: u8, reg: u8, operand: &mut Operand) {
    let (escape, reg) = (escape & 7, reg & 7);
    // D9 and DD /4 and /6 are the environment's: never give them a buffer of 16 bytes.
    if matches!((escape, reg), (1 | 5, 4 | 6)) {
        return;
    }
    let index = usize::from(escape) << 3 | usize::from(reg);
    let slot = memory_forms as *const () as usize + index * SLOT;
    // SAFETY: the slot is inside its table, and the forms left access at most ten bytes at RSI.
    unsafe { call(image, operand, slot, 0) };
}

/// Calls a slot with the image in the host's registers.
///
/// # Safety
///
/// `slot` is the address of a slot that accesses x87 registers and at most [`Operand`].
unsafe fn call(image: &mut FxState, operand: &mut Operand, slot: usize, flags: u8) -> u8 {
    // FXRSTOR faults on bits of MXCSR that do not exist; nothing here depends on it.
    let mxcsr = core::mem::replace(&mut image.mxcsr, 0x1f80);
    let mut host = [0u32; 2];
    let mut ax = u64::from(flags) << 8;
    // SAFETY: the slot is the caller's; the image is 512 aligned bytes; the host's control registers
    // are saved and restored, its x87 stack is left empty, and all vector registers are declared lost.
    unsafe {
        asm!(
            "stmxcsr [{host}]",
            "fnstcw [{host} + 4]",
            "fxrstor64 [rdi]",
            "sahf",
            "call rdx",
            "lahf",
            "fxsave64 [rdi]",
            "fninit",
            "fldcw [{host} + 4]",
            "ldmxcsr [{host}]",
            host = in(reg) host.as_mut_ptr(),
            inout("rax") ax,
            inout("rdi") core::ptr::from_mut(image) => _,
            inout("rsi") operand.as_mut_ptr() => _,
            inout("rdx") slot => _,
            clobber_abi("sysv64"),
        );
    }
    image.mxcsr = mxcsr;
    (ax >> 8) as u8
}
