//! All instructions of the profile, one by one.

use iced_x86::{Code, CpuidFeature, Instruction, OpKind, Register};

use super::{AT, Memory, processor, run};
use crate::error::Exception;
use crate::processor::{Executed, Processor};

/// Every instruction that these modules have to know.
fn profile() -> impl Iterator<Item = Code> {
    use CpuidFeature as F;
    let ours = |feature: &F| {
        matches!(
            feature,
            F::FPU | F::FPU287 | F::FPU387 | F::FXSR | F::MMX | F::SSE | F::SSE2
        ) || matches!(feature, F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2)
    };
    Code::values().filter(move |code| {
        code.op_code().encoding() == iced_x86::EncodingKind::Legacy
            && code.cpuid_features().iter().any(ours)
            && code.mnemonic() != iced_x86::Mnemonic::Crc32
    })
}

fn execute(cpu: &mut Processor, memory: &Memory, instruction: &Instruction) -> Option<Executed> {
    cpu.vector_instruction(memory, instruction)
        .or_else(|| cpu.x87_instruction(memory, instruction))
}

#[test]
fn no_instruction_of_the_profile_is_missing() {
    let mut missing = Vec::new();
    let mut count = 0;
    for code in profile() {
        for in_memory in [false, true] {
            let (mut cpu, memory) = (processor(), Memory::default());
            let done = execute(&mut cpu, &memory, &example(code, in_memory));
            count += 1;
            if !matches!(done, Some(Ok(_))) {
                missing.push((code, in_memory, done));
            }
        }
    }
    assert!(count > 1100, "only {count} instructions");
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn a_fault_of_the_operand_changes_nothing() {
    let mut count = 0;
    for code in profile() {
        let mut instruction = example(code, true);
        let implicit = instruction.op0_kind() == OpKind::MemorySegRDI;
        let prefetches = format!("{code:?}").starts_with("Prefetch");
        if prefetches || !(implicit || instruction.op_kinds().any(|kind| kind == OpKind::Memory)) {
            continue;
        }
        instruction.set_memory_base(if implicit {
            Register::None
        } else {
            Register::RDI
        });
        let (mut cpu, memory) = (processor(), Memory::default());
        cpu.state.set_register(7, 1 << 60); // not canonical
        run(&mut cpu, &memory, |a| {
            a.fldpi()?;
            a.fld1()
        })
        .unwrap();
        cpu.state.fx.xmm = std::array::from_fn(|index| [index as u8 + 1; 16]);
        let before = cpu.state.clone();
        let done = execute(&mut cpu, &memory, &instruction);
        assert_eq!(done, Some(Err(Exception::gp(0))), "{code:?}");
        assert_eq!(cpu.state, before, "{code:?}");
        count += 1;
    }
    assert!(count > 400, "only {count} instructions");
}

#[test]
fn forms_are_the_encoders() {
    use iced_x86::{Encoder, InstructionInfoFactory, OpAccess};
    let mut count = 0;
    for code in Code::values() {
        let (register, memory) = (
            crate::x87::forms::register_form(code),
            crate::x87::forms::memory_form(code),
        );
        let Some((escape, field)) = register.or(memory) else {
            continue;
        };
        count += 1;
        let instruction = example(code, false);
        let mut encoder = Encoder::new(64);
        encoder.encode(&instruction, 0).unwrap();
        let bytes = encoder.take_buffer();
        assert_eq!(bytes[0], escape, "{code:?}");
        if register.is_some() {
            let names_sti = code
                .op_code()
                .op_kinds()
                .contains(&iced_x86::OpCodeOperandKind::sti_opcode);
            let modrm = field + if names_sti { 2 } else { 0 };
            assert_eq!(bytes[1], modrm, "{code:?}");
            continue;
        }
        assert_eq!(bytes[1] >> 3 & 7, field, "{code:?}");
        let size = crate::x87::forms::operand_size(escape, field);
        assert_eq!(size, instruction.memory_size().size(), "{code:?}");
        let mut factory = InstructionInfoFactory::new();
        let writes = factory.info(&instruction).op0_access() == OpAccess::Write;
        assert_eq!(crate::x87::forms::stores(escape, field), writes, "{code:?}");
    }
    assert!(count > 120, "only {count}");
}

/// An instruction of that code with registers 1 and 2, and memory at AT, also where a register
/// could be if `in_memory`.
fn example(code: Code, in_memory: bool) -> Instruction {
    use iced_x86::{OpCodeOperandKind as K, Register as R};
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    for (index, &kind) in code.op_code().op_kinds().iter().enumerate() {
        let index = index as u32;
        let name = format!("{kind:?}");
        let register = match kind {
            K::st0 => R::ST0,
            K::sti_opcode => R::ST2,
            K::ax => R::AX,
            K::seg_rDI => {
                instruction.set_op_kind(index, OpKind::MemorySegRDI);
                continue;
            }
            K::imm8 => {
                instruction.set_op_kind(index, OpKind::Immediate8);
                continue;
            }
            _ if in_memory && name.ends_with("_or_mem") => R::None,
            _ if name.starts_with("xmm") => [R::XMM1, R::XMM2][index as usize & 1],
            _ if name.starts_with("mm") => [R::MM1, R::MM2][index as usize & 1],
            _ if name.starts_with("r32") => R::ECX,
            _ if name.starts_with("r64") => R::RCX,
            _ => R::None,
        };
        if register == R::None {
            assert!(name.contains("mem"), "{code:?}: {name}");
            instruction.set_op_kind(index, OpKind::Memory);
            instruction.set_memory_displacement64(AT as u64);
            instruction.set_memory_displ_size(8);
            continue;
        }
        instruction.set_op_kind(index, OpKind::Register);
        instruction.set_op_register(index, register);
    }
    instruction
}
