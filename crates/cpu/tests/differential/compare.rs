//! What differs between two outcomes, of what the manual defines and processors agree on.

use iced_x86::{Decoder, Instruction, RflagsBits};
use mica_cpu::FxState;

use crate::case::{COMPLETED, Case, DATA, Outcome, PAGE_FAULT, Planned};
use crate::report::hex;

pub(crate) const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Behind the last page that Linux gives to programs.
const USER_END: u64 = 0x7fff_ffff_f000;

/// iced's flags and RFLAGS's bits.
const FLAGS: [(u32, u64); 7] = [
    (RflagsBits::CF, 1 << 0),
    (RflagsBits::PF, 1 << 2),
    (RflagsBits::AF, 1 << 4),
    (RflagsBits::ZF, 1 << 6),
    (RflagsBits::SF, 1 << 7),
    (RflagsBits::DF, 1 << 10),
    (RflagsBits::OF, 1 << 11),
];

/// iced's flags and the x87 status word's condition bits.
const CONDITIONS: [(u32, u16); 4] = [
    (RflagsBits::C0, 1 << 8),
    (RflagsBits::C1, 1 << 9),
    (RflagsBits::C2, 1 << 10),
    (RflagsBits::C3, 1 << 14),
];

/// The first difference in words, if there is one. It starts with what differs.
pub(crate) fn difference(planned: &Planned, host: &Outcome, engine: &Outcome) -> Option<String> {
    let case = &planned.case;
    if uses_doubtful_flags(case, host) || is_beyond_the_profile(case, host, engine) {
        return None;
    }
    let undefined = undefined(planned, host) | compared_unordered(planned, host);
    let transition = host.trap != COMPLETED && uses_mmx(case);
    let pair = |what: &str, host: u64, engine: u64| {
        (host != engine).then(|| format!("{what}: host {host:#x}, engine {engine:#x}"))
    };
    let exception = || {
        let same = equivalent(case, host.trap, engine.trap);
        let trap = if same { host.trap } else { engine.trap };
        pair("exception", host.trap, trap).or_else(|| pair("rip", host.rip, engine.rip))
    };
    let registers = || {
        (0..16).find_map(|index| pair(NAMES[index], host.registers[index], engine.registers[index]))
    };
    let flags = || {
        let mask = FLAGS
            .iter()
            .filter(|(flag, _)| undefined & flag == 0)
            .fold(0, |mask, (_, bit)| mask | bit);
        pair("rflags", host.rflags & mask, engine.rflags & mask)
    };
    let address = address_mask(case);
    let fault = || match host.trap {
        _ if host.trap != engine.trap => None,
        PAGE_FAULT => {
            pair("address", host.address & address, engine.address & address).or_else(|| {
                // Linux says of addresses that no user has that they are present.
                let mask = if host.address < USER_END { 0x1f } else { 0x1e };
                pair("error code", host.error & mask, engine.error & mask)
            })
        }
        COMPLETED => None,
        _ => pair("error code", host.error, engine.error),
    };
    let memory = || {
        let at = (0..host.memory.len()).find(|&at| host.memory[at] != engine.memory[at])?;
        let what = format!("memory at {:#x}", DATA + at as u64);
        pair(&what, word(host, at), word(engine, at))
    };
    exception()
        .or_else(registers)
        .or_else(flags)
        .or_else(fault)
        .or_else(memory)
        .or_else(|| {
            let control = control_mask(case, host);
            floating(&host.fx, &engine.fx, undefined, transition, control)
        })
        .map(|found| format!("{found} (code at {:#x})", case.rip))
}

fn word(outcome: &Outcome, at: usize) -> u64 {
    outcome.memory[at..]
        .iter()
        .take(8)
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// The flags that are undefined when this outcome is reached.
fn undefined(planned: &Planned, host: &Outcome) -> u32 {
    let len = planned.undefined.last().map_or(0, |(end, _)| *end);
    let reached = match host.rip.wrapping_sub(planned.case.rip) {
        offset if offset < len && host.trap != COMPLETED => offset,
        _ => len,
    };
    planned
        .undefined
        .iter()
        .take_while(|(end, _)| *end <= reached)
        .last()
        .map_or(0, |(_, flags)| *flags)
}

/// Processors differ in whether FCOMI and its kin set flags beside an invalid operation or a denormal
/// that is not masked.
fn compared_unordered(planned: &Planned, host: &Outcome) -> u32 {
    let raised = host.fx.fsw & !host.fx.fcw & 3 != 0;
    if raised && instructions(&planned.case).iter().any(sets_flags_by_x87) {
        FLAGS.iter().fold(0, |all, (flag, _)| all | flag) & !RflagsBits::DF
    } else {
        0
    }
}

fn sets_flags_by_x87(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip
    )
}

/// Whether a later instruction of the case may have used such flags.
fn uses_doubtful_flags(case: &Case, host: &Outcome) -> bool {
    let raised = host.fx.fsw & !host.fx.fcw & 3 != 0;
    let instructions = instructions(case);
    let earlier = instructions.len().saturating_sub(1);
    raised && instructions[..earlier].iter().any(sets_flags_by_x87)
}

/// What only the host's model decides: whether MASKMOVQ faults for bytes that its mask leaves out, and
/// whether MXCSR has bits above the sixteen of the profile (AMD's MM).
fn is_beyond_the_profile(case: &Case, host: &Outcome, engine: &Outcome) -> bool {
    use iced_x86::Mnemonic as M;
    let masked =
        |instruction: &Instruction| matches!(instruction.mnemonic(), M::Maskmovq | M::Maskmovdqu);
    let faults = host.trap == PAGE_FAULT || engine.trap == PAGE_FAULT;
    host.fx.mxcsr >> 16 != 0 || faults && instructions(case).iter().any(masked)
}

/// The bits of MXCSR that are compared. Beside an overflow or underflow that is not masked, PE says
/// whether the result of unbounded range is exact; the engine sets it in any case (decision 007). A dot
/// product that faults may have done more or fewer of its products and sums.
fn control_mask(case: &Case, host: &Outcome) -> u32 {
    use iced_x86::Mnemonic as M;
    const RANGE: u32 = 3 << 3;
    const PRECISION: u32 = 1 << 5;
    const EXCEPTIONS: u32 = 0x3f;
    const SIMD: u64 = 19;
    let mxcsr = host.fx.mxcsr;
    let dot = |instruction: &Instruction| matches!(instruction.mnemonic(), M::Dpps | M::Dppd);
    if host.trap == SIMD && instructions(case).iter().any(dot) {
        !EXCEPTIONS
    } else if mxcsr & !(mxcsr >> 7) & RANGE != 0 {
        !PRECISION
    } else {
        u32::MAX
    }
}

/// Which of an address that is neither canonical nor aligned, and of two operands that fault, is seen
/// first differs among processors.
fn equivalent(case: &Case, host: u64, engine: u64) -> bool {
    let fault = |vector| matches!(vector, 12..=14);
    let either = instructions(case).iter().any(|instruction| {
        let size = instruction.memory_size();
        let vector = size.size() == 16
            || (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_xmm());
        let environment = size == iced_x86::MemorySize::FpuEnv14;
        // A target that no RIP can have, and a stack that cannot take the return address.
        let call = instruction.is_call_near_indirect();
        is_cmps(instruction)
            || environment
            || call
            || vector && host != PAGE_FAULT && engine != PAGE_FAULT
    });
    host == engine || either && fault(host) && fault(engine)
}

/// The part of a page fault's address that all processors agree on.
fn address_mask(case: &Case) -> u64 {
    let instructions = instructions(case);
    let any = |test: fn(&Instruction) -> bool| instructions.iter().any(test);
    if any(is_cmps) {
        0
    } else if any(|instruction| {
        let size = instruction.memory_size();
        size.size() > 16 || size == iced_x86::MemorySize::FpuEnv14
    }) {
        // In which order they read an x87 environment.
        !0xfff
    } else {
        u64::MAX
    }
}

fn is_cmps(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    instruction.is_string_instruction()
        && matches!(
            instruction.mnemonic(),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
        )
}

/// Processors differ in whether an MMX instruction that faults has already reset the x87 stack.
fn uses_mmx(case: &Case) -> bool {
    instructions(case).iter().any(|instruction| {
        (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_mm())
    })
}

/// `transition`: the stack's top and tags are not compared; `control`: these bits of MXCSR are.
fn floating(
    host: &FxState,
    engine: &FxState,
    undefined: u32,
    transition: bool,
    control: u32,
) -> Option<String> {
    const TOP: u16 = 7 << 11;
    let pair = |what: &str, host: u32, engine: u32| {
        (host != engine).then(|| format!("{what}: host {host:#x}, engine {engine:#x}"))
    };
    let status = CONDITIONS
        .iter()
        .filter(|(flag, _)| undefined & flag != 0)
        .fold(
            if transition { !TOP } else { u16::MAX },
            |mask, (_, bit)| mask & !bit,
        );
    let tags = if transition { 0 } else { u8::MAX };
    let long = |what: &str, len: usize, host: &[[u8; 16]], engine: &[[u8; 16]]| {
        (0..host.len()).find_map(|index| {
            let (host, engine) = (&host[index][..len], &engine[index][..len]);
            (host != engine)
                .then(|| format!("{what}{index}: host {}, engine {}", hex(host), hex(engine)))
        })
    };
    pair("fcw", host.fcw.into(), engine.fcw.into())
        .or_else(|| {
            pair(
                "fsw",
                (host.fsw & status).into(),
                (engine.fsw & status).into(),
            )
        })
        .or_else(|| pair("ftw", (host.ftw & tags).into(), (engine.ftw & tags).into()))
        .or_else(|| {
            let mask = control;
            pair("mxcsr", host.mxcsr & mask, engine.mxcsr & mask)
        })
        .or_else(|| {
            if transition {
                long("r", 10, &physical(host), &physical(engine))
            } else {
                long("st", 10, &host.st, &engine.st)
            }
        })
        .or_else(|| long("xmm", 16, &host.xmm, &engine.xmm))
}

/// The x87 registers in their own order.
fn physical(fx: &FxState) -> [[u8; 16]; 8] {
    let top = usize::from(fx.fsw >> 11 & 7);
    std::array::from_fn(|index| fx.st[(index + 8 - top) % 8])
}

pub(crate) fn instructions(case: &Case) -> Vec<Instruction> {
    Decoder::with_ip(64, case.code(), case.rip, 0)
        .iter()
        .collect()
}
