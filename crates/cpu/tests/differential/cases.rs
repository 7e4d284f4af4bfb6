//! Cases by name: what was once different, and what is worth a look every time.

use iced_x86::RflagsBits;

use crate::case::{Case, DATA, DATA_LEN, Planned, RODATA};

/// A case as data. Registers that are not named point into the data pages.
pub(crate) struct Named {
    pub(crate) name: &'static str,
    pub(crate) code: &'static [u8],
    /// Registers by number.
    pub(crate) registers: &'static [(usize, u64)],
    pub(crate) rflags: u64,
    /// Bytes of the data pages by address.
    pub(crate) memory: &'static [(u64, &'static [u8])],
    /// iced's flags that are undefined at the end.
    pub(crate) undefined: u32,
}

const fn named(
    name: &'static str,
    code: &'static [u8],
    registers: &'static [(usize, u64)],
) -> Named {
    Named {
        name,
        code,
        registers,
        rflags: 0x202,
        memory: &[],
        undefined: 0,
    }
}

const END: u64 = DATA + DATA_LEN as u64;

pub(crate) const NAMED: &[Named] = &[
    named(
        "add rax, rcx",
        &[0x48, 0x01, 0xc8],
        &[(0, 1 << 63), (1, u64::MAX)],
    ),
    named("div by zero", &[0xf7, 0xf1], &[(0, 5), (1, 0), (2, 0)]),
    named(
        "div whose quotient is too large",
        &[0xf7, 0xf1],
        &[(0, 5), (1, 1), (2, 1)],
    ),
    named("load behind the data", &[0x48, 0x8b, 0x01], &[(1, END)]),
    named(
        "load across the data's end",
        &[0x48, 0x8b, 0x01],
        &[(1, END - 3)],
    ),
    named(
        "store across the data's end",
        &[0x48, 0x89, 0x01],
        &[(1, END - 3)],
    ),
    named(
        "store to the read-only page",
        &[0x48, 0x89, 0x01],
        &[(1, RODATA + 8)],
    ),
    named(
        "store from the read-only page into the data",
        &[0x48, 0x89, 0x01],
        &[(1, DATA - 3)],
    ),
    named(
        "exchange across pages",
        &[0x48, 0x87, 0x01],
        &[(1, DATA + 4096 - 3)],
    ),
    named(
        "load from a non-canonical address",
        &[0x48, 0x8b, 0x01],
        &[(1, 1 << 47)],
    ),
    named(
        "the same by the stack",
        &[0x48, 0x8b, 0x04, 0x24],
        &[(4, 1 << 47)],
    ),
    named(
        "movaps that is not aligned",
        &[0x0f, 0x28, 0x01],
        &[(1, DATA + 8)],
    ),
    named(
        "rep movsb into a hole",
        &[0xf3, 0xa4],
        &[(1, 64), (6, DATA), (7, END - 9)],
    ),
    named(
        "rep stosq with nothing to do",
        &[0xf3, 0x48, 0xab],
        &[(1, 0)],
    ),
    named("ud2", &[0x0f, 0x0b], &[]),
    // Once zero-extended the destination.
    named(
        "cmpxchg r9d, ecx that is not equal",
        &[0x41, 0x0f, 0xb1, 0xc9],
        &[(0, 0x4240_178d_77c7_54f6), (9, 0xc0b6_70e3_5ab3_0000)],
    ),
    // Once had CR2 at the access's last byte.
    named(
        "movhpd across the data's end",
        &[0x66, 0x0f, 0x17, 0x01],
        &[(1, END - 3)],
    ),
    Named {
        undefined: RflagsBits::AF,
        ..named(
            "shift by more than the width",
            &[0x66, 0xd3, 0xe0],
            &[(0, 0xffff), (1, 0xff)],
        )
    },
    Named {
        rflags: 0xad7,
        ..named("pushfq, popfq", &[0x9c, 0x9d], &[])
    },
];

impl Named {
    pub(crate) fn planned(&self) -> Planned {
        let mut case = Case {
            registers: std::array::from_fn(|index| DATA + 0x800 + 0x40 * index as u64),
            ..Case::default()
        };
        for (register, value) in self.registers {
            case.registers[*register] = *value;
        }
        case.rflags = self.rflags;
        case.rip += 0x100;
        case.code[..self.code.len()].copy_from_slice(self.code);
        case.code_len = self.code.len() as u32;
        for (address, bytes) in self.memory {
            case.patch(*address, bytes);
        }
        Planned {
            name: self.name.into(),
            case,
            undefined: vec![(self.code.len() as u64, self.undefined)],
        }
    }
}
