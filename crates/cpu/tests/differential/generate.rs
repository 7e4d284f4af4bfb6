//! Cases from a seed: one to three instructions of the catalogue with operands that suit them, and a
//! state around them that likes the edges.

mod choice;
mod operands;

use iced_x86::{Code, Encoder, FlowControl, Instruction, Mnemonic, OpCodeOperandKind, RflagsBits};

use crate::case::{CODE, CODE_LEN, Case, MAX_CODE, PAGE, Planned};
use crate::catalogue::Entry;
use crate::random::Random;
use operands::Builder;

pub(crate) const RSP: usize = 4;
const CONDITIONS: u32 = RflagsBits::C0 | RflagsBits::C1 | RflagsBits::C2 | RflagsBits::C3;

/// The generator of a run.
pub(crate) struct Generator {
    pub(crate) entries: Vec<Entry>,
    pub(crate) seed: u64,
}

impl Generator {
    /// Case `index` of the run: the same for the same seed, whatever came before.
    pub(crate) fn case(&self, index: u64) -> Planned {
        let mut random = Random::new(self.seed ^ index.wrapping_mul(0xd134_2543_de82_ef95));
        loop {
            if let Some(mut planned) = self.attempt(&mut random) {
                planned.name = format!("seed {:#x}, case {index}", self.seed);
                return planned;
            }
        }
    }

    /// Whether any of so many attempts gives a case.
    pub(crate) fn can_make(&self, attempts: u32) -> bool {
        let mut random = Random::new(self.seed);
        (0..attempts).any(|_| self.attempt(&mut random).is_some())
    }

    fn attempt(&self, random: &mut Random) -> Option<Planned> {
        let mut builder = Builder::new(random);
        builder.case.rip = entry_point(builder.random);
        let wanted = if builder.random.chance(70) {
            1
        } else {
            2 + builder.random.below(2)
        };
        let mut bytes = Vec::new();
        let mut undefined = Vec::new();
        let mut open = 0;
        for position in 0..wanted {
            let entry = &self.entries[builder.random.below(self.entries.len() as u64) as usize];
            let ip = builder.case.rip + bytes.len() as u64;
            let instruction = builder.instruction(entry, ip);
            let alone = needs_preparation(&instruction);
            if position > 0 && (alone || read(&instruction) & open != 0) {
                break;
            }
            let mut encoder = Encoder::new(64);
            if encoder.encode(&instruction, ip).is_err() {
                if position == 0 {
                    return None;
                }
                break;
            }
            let encoded = encoder.take_buffer();
            if bytes.len() + encoded.len() > MAX_CODE {
                break;
            }
            // Processors differ in whether these have a ModRM byte that must be fetched.
            let bare = matches!(instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1);
            if bare && ip + encoded.len() as u64 > CODE + CODE_LEN {
                return None;
            }
            if !builder.aim(&instruction, ip, encoded.len() as u64) {
                return None;
            }
            bytes.extend(encoded);
            open = after(open, &instruction);
            undefined.push((bytes.len() as u64, open));
            if alone || instruction.flow_control() != FlowControl::Next {
                break;
            }
        }
        let mut case = builder.finish();
        case.code[..bytes.len()].copy_from_slice(&bytes);
        case.code_len = bytes.len() as u32;
        (!loops(&case)).then(|| Planned {
            name: String::new(),
            case,
            undefined,
        })
    }
}

/// Where the code starts: mostly anywhere, sometimes across or up to a page's end.
fn entry_point(random: &mut Random) -> u64 {
    match random.below(20) {
        0 => CODE + PAGE - 1 - random.below(12),
        1 => CODE + CODE_LEN - 1 - random.below(12),
        _ => CODE + 0x400 + random.below(CODE_LEN - 0x800),
    }
}

/// Instructions whose memory or registers must hold something particular: only as the first one,
/// and alone.
fn needs_preparation(instruction: &Instruction) -> bool {
    use FlowControl as F;
    matches!(
        instruction.flow_control(),
        F::IndirectBranch | F::IndirectCall | F::Return
    ) || matches!(
        instruction.mnemonic(),
        Mnemonic::Popf | Mnemonic::Popfq | Mnemonic::Shld | Mnemonic::Shrd
    )
}

/// Flags that an instruction reads.
fn read(instruction: &Instruction) -> u32 {
    match instruction.mnemonic() {
        Mnemonic::Fnstsw | Mnemonic::Fstsw => CONDITIONS,
        _ => instruction.rflags_read(),
    }
}

/// Flags that are undefined after an instruction, if `open` were before.
fn after(open: u32, instruction: &Instruction) -> u32 {
    let undefined = instruction.rflags_undefined();
    // A count of zero, in CL or RCX, leaves all flags.
    let perhaps = instruction.has_rep_prefix()
        || instruction.has_repne_prefix()
        || instruction
            .op_code()
            .op_kinds()
            .iter()
            .any(|kind| matches!(kind, OpCodeOperandKind::cl | OpCodeOperandKind::imm8));
    let written = instruction.rflags_modified() & !undefined;
    let kept = if perhaps { open } else { open & !written };
    (kept | undefined) & !(RflagsBits::UIF | RflagsBits::IF)
}

/// Whether a branch can come back to the code.
fn loops(case: &Case) -> bool {
    let start = case.rip;
    let end = start + u64::from(case.code_len);
    let mut decoder = iced_x86::Decoder::with_ip(64, case.code(), start, 0);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.code() == Code::INVALID {
            return false;
        }
        let target = instruction.near_branch_target();
        if target != 0 && (start..end).contains(&target) {
            return true;
        }
    }
    false
}
