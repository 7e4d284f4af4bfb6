//! The kernel's own trace: when a program was executed and when a vCPU first entered its guest.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use xtask::error::{Error, Result};

const TRACING: &str = "/sys/kernel/tracing";
const EXEC: &str = "sched/sched_process_exec";
const ENTRY: &str = "kvm/kvm_entry";
/// Per CPU; a boot enters its guest some ten thousand times.
const BUFFER_KIB: &str = "16384";

/// Recording, until dropped.
pub(super) struct Trace(());

impl Trace {
    pub(super) fn start() -> Result<Trace> {
        set("tracing_on", "0")?;
        set("trace_clock", "mono")?;
        set("buffer_size_kb", BUFFER_KIB)?;
        // The first events are the ones that count.
        set("options/overwrite", "0")?;
        set("trace", "")?;
        for event in [EXEC, ENTRY] {
            set(&format!("events/{event}/enable"), "1")?;
        }
        set("tracing_on", "1")?;
        Ok(Trace(()))
    }

    /// Milliseconds from `pid`'s exec to its guest's first instruction.
    pub(super) fn first_instruction_ms(&self, pid: u32) -> Result<f64> {
        set("tracing_on", "0")?;
        let path = Path::new(TRACING).join("trace");
        let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        first_instruction_ms(&text, pid).ok_or_else(|| {
            Error::Other(format!("the trace has no guest entry after exec of {pid}"))
        })
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = set("tracing_on", "0");
        for event in [EXEC, ENTRY] {
            let _ = set(&format!("events/{event}/enable"), "0");
        }
    }
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, value).map_err(Error::file("write", &path))
}

/// A VMM may enter a guest of its own to probe KVM; the real one is the thread with most entries.
fn first_instruction_ms(trace: &str, pid: u32) -> Option<f64> {
    let mut executed = None;
    let mut entries: BTreeMap<u32, (f64, usize)> = BTreeMap::new();
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        if let Some((head, fields)) = line.split_once(": sched_process_exec: ") {
            if fields
                .split_whitespace()
                .any(|field| field == format!("pid={pid}"))
            {
                executed = Some(event(head)?.1);
            }
        } else if let Some((head, _)) = line.split_once(": kvm_entry: ") {
            let (thread, time) = event(head)?;
            entries.entry(thread).or_insert((time, 0)).1 += 1;
        }
    }
    let (first, _) = entries.values().max_by_key(|(_, count)| *count)?;
    Some((first - executed?) * 1e3)
}

/// `   CPU 0/KVM-125     [001] d..1.    12.345678` to thread and seconds.
fn event(head: &str) -> Option<(u32, f64)> {
    let (task, rest) = head.rsplit_once('[')?;
    let thread = task.trim_end().rsplit_once('-')?.1.parse().ok()?;
    let time = rest.split_whitespace().last()?.parse().ok()?;
    Some((thread, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_that_ran_is_found() {
        let trace = "\
# tracer: nop
            sh-90      [000] .....     1.000000: sched_process_exec: filename=/bin/x pid=90 old_pid=90
          mica-100     [001] .....     2.000000: sched_process_exec: filename=/usr/bin/mica pid=100 old_pid=100
         probe-102     [001] d..1.     2.100000: kvm_entry: vcpu 0, rip 0x1000
     CPU 0/KVM-103     [001] d..1.     2.250000: kvm_entry: vcpu 0, rip 0xfff0
     CPU 0/KVM-103     [000] d..1.     2.260000: kvm_entry: vcpu 0, rip 0xfff2
";
        let time = first_instruction_ms(trace, 100).unwrap();
        assert!((time - 250.0).abs() < 1e-6, "{time}");
        assert_eq!(first_instruction_ms(trace, 7), None);
    }
}
