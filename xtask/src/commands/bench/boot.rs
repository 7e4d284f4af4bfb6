//! `bench boot`: how long until the guest runs, and until its first process speaks.

use xtask::error::{Error, Result};

use super::peers::{Plan, Vmm, measure_in_lab};
use super::process::Running;
use super::trace::Trace;
use super::{Arguments, Row, Sample, summarise};

const FIRST_INSTRUCTION: &str = "first instruction";
const USER_SPACE: &str = "user space";

/// The best VMM that we know of, by the microvm's times.
fn target(metric: &str) -> Option<f64> {
    match metric {
        FIRST_INSTRUCTION => Some(0.7),
        USER_SPACE => Some(0.5),
        _ => None,
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<Vec<Row>> {
    Ok(summarise(&measure_in_lab("boot", arguments)?, "ms", target))
}

pub(super) fn measure(plan: &Plan, emit: &mut impl FnMut(Sample)) -> Result<()> {
    let mut chosen = warm_up(&plan.vmms)?;
    for _ in 0..plan.runs {
        for vmm in &chosen {
            // Tracing costs time at every entry, so each figure has a boot of its own.
            let figures = [
                (USER_SPACE, user_space_ms(vmm)?),
                (FIRST_INSTRUCTION, first_instruction_ms(vmm)?),
            ];
            for (metric, value) in figures {
                eprintln!("{}: {metric} after {value:.0} ms", vmm.name);
                emit(Sample {
                    metric: metric.into(),
                    subject: vmm.name.clone(),
                    value,
                });
            }
        }
        chosen.reverse();
    }
    Ok(())
}

/// Boots each once, which fills the page cache, and keeps Mica and its fastest peer.
fn warm_up(vmms: &[Vmm]) -> Result<Vec<&Vmm>> {
    let mut peer: Option<(f64, &Vmm)> = None;
    let mut chosen = Vec::new();
    for vmm in vmms {
        let time = match user_space_ms(vmm) {
            Err(error) if !vmm.is_mica() => {
                eprintln!("{}: left out: {error}", vmm.name);
                continue;
            }
            time => time?,
        };
        eprintln!("warm-up: {}: user space after {time:.0} ms", vmm.name);
        if vmm.is_mica() {
            chosen.push(vmm);
        } else if peer.is_none_or(|(best, _)| time < best) {
            peer = Some((time, vmm));
        }
    }
    let (_, peer) = peer.ok_or_else(|| Error::Other("no peer boots".into()))?;
    chosen.push(peer);
    Ok(chosen)
}

fn user_space_ms(vmm: &Vmm) -> Result<f64> {
    Running::start(vmm)?.wait_for_user_space()
}

fn first_instruction_ms(vmm: &Vmm) -> Result<f64> {
    let trace = Trace::start()?;
    let mut running = Running::start(vmm)?;
    running.wait_for_user_space()?;
    trace.first_instruction_ms(running.pid())
}
