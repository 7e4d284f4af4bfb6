//! How a person is told of a difference.

use std::fmt::Write as _;

use iced_x86::{FastFormatter, Instruction};

use crate::case::{Case, DATA, Outcome, Planned};
use crate::compare::{NAMES, instructions};

/// A number's digits, from its little-endian bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold("0x".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The instructions of a case, each by its name in iced and its text.
pub(crate) fn disassembly(case: &Case) -> Vec<(String, String)> {
    let mut formatter = FastFormatter::new();
    let text = |instruction: &Instruction| {
        let mut text = String::new();
        formatter.format(instruction, &mut text);
        (format!("{:?}", instruction.code()), text)
    };
    instructions(case).iter().map(text).collect()
}

/// Everything about a case and its two outcomes.
pub(crate) fn report(planned: &Planned, host: &Outcome, engine: &Outcome, found: &str) -> String {
    let case = &planned.case;
    let mut text = format!("{}: {found}\n", planned.name);
    for (code, instruction) in disassembly(case) {
        let _ = writeln!(text, "    {instruction}    ({code})");
    }
    let _ = writeln!(text, "    bytes {:02x?}", case.code());
    for patch in case.patches() {
        let bytes = hex(&patch.bytes[..patch.len as usize]);
        let at = DATA + u64::from(patch.offset);
        let _ = writeln!(text, "    memory {at:#x} = {bytes}");
    }
    let titles = ["", "before", "host", "engine"].map(|title| format!("{title:>18}"));
    let _ = writeln!(
        text,
        "{}",
        titles.join(" ").trim_start_matches("          ")
    );
    for (name, values) in rows(case, host, engine) {
        let [before, host, engine] = values;
        let mark = if host == engine { "" } else { "  <" };
        let line = format!("{name:>8} {before:#18x} {host:#18x} {engine:#18x}{mark}");
        let _ = writeln!(text, "{line}");
    }
    let states = [&case.fx, &host.fx, &engine.fx];
    let all = disassembly(case);
    let vectors = all.iter().any(|(_, text)| text.contains("mm"));
    if vectors || all.iter().any(|(code, _)| code.starts_with('F')) {
        vector_rows(&mut text, "st", states.map(|fx| &fx.st[..]), 10);
    }
    if vectors {
        vector_rows(&mut text, "xmm", states.map(|fx| &fx.xmm[..]), 16);
    }
    text
}

/// Each number by name: before, on the host, on the engine.
fn rows(case: &Case, host: &Outcome, engine: &Outcome) -> Vec<(&'static str, [u64; 3])> {
    // RF is in the host's frame only.
    const RF: u64 = 1 << 16;
    let mut rows: Vec<(&str, [u64; 3])> = (0..16)
        .map(|index| {
            let of = [&case.registers, &host.registers, &engine.registers];
            (NAMES[index], of.map(|registers| registers[index]))
        })
        .collect();
    let flags = [case.rflags, host.rflags & !RF, engine.rflags & !RF];
    let fx = [&case.fx, &host.fx, &engine.fx];
    rows.extend([
        ("rflags", flags),
        ("rip", [case.rip, host.rip, engine.rip]),
        ("vector", [0, host.trap, engine.trap]),
        ("error", [0, host.error, engine.error]),
        ("address", [0, host.address, engine.address]),
        ("fcw", fx.map(|fx| fx.fcw.into())),
        ("fsw", fx.map(|fx| fx.fsw.into())),
        ("ftw", fx.map(|fx| fx.ftw.into())),
        ("mxcsr", fx.map(|fx| fx.mxcsr.into())),
    ]);
    rows
}

fn vector_rows(text: &mut String, name: &str, states: [&[[u8; 16]]; 3], len: usize) {
    for index in 0..states[0].len() {
        let [before, host, engine] = states.map(|all| hex(&all[index][..len]));
        let mark = if host == engine { "" } else { "  <" };
        let _ = writeln!(text, "{name:>6}{index:<2} {before} {host} {engine}{mark}");
    }
}
