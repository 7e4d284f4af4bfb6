//! `bench footprint`: what a VM costs beside its guest's memory.

use std::fs;
use std::thread;
use std::time::Duration;

use xtask::error::{Error, Result};

use super::peers::{Plan, measure_in_lab};
use super::process::Running;
use super::{Arguments, Row, Sample, summarise};

/// How long the guest is left alone before it counts as idle.
const IDLE: Duration = Duration::from_secs(3);

pub(super) fn run(arguments: &Arguments) -> Result<Vec<Row>> {
    Ok(summarise(
        &measure_in_lab("footprint", arguments)?,
        "MiB",
        |_| None,
    ))
}

pub(super) fn measure(plan: &Plan, emit: &mut impl FnMut(Sample)) -> Result<()> {
    for _ in 0..plan.runs {
        for vmm in &plan.vmms {
            let mut running = Running::start(vmm)?;
            running.wait_for_user_space()?;
            thread::sleep(IDLE);
            let mut emit_mib = |metric: &str, bytes: u64| {
                #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
                let value = bytes as f64 / f64::from(1 << 20);
                emit(Sample {
                    metric: metric.into(),
                    subject: vmm.name.clone(),
                    value,
                });
            };
            let mut all = 0;
            for pid in descendants(running.pid())? {
                let path = format!("/proc/{pid}/smaps");
                let text = fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
                let mappings = parse(&text);
                all += beyond(&mappings, plan.memory_bytes).private;
                if runs_vcpus(pid) {
                    let own = beyond(&mappings, plan.memory_bytes);
                    emit_mib("VM process, private", own.private);
                    emit_mib("VM process, anonymous", own.anonymous);
                }
            }
            emit_mib("all processes, private", all);
        }
    }
    Ok(())
}

/// A process and all that it started.
fn descendants(pid: u32) -> Result<Vec<u32>> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        let tasks = format!("/proc/{pid}/task");
        for task in fs::read_dir(&tasks).map_err(Error::io(format!("read {tasks}")))? {
            let children = task
                .map_err(Error::io("read a task"))?
                .path()
                .join("children");
            let text = fs::read_to_string(&children).unwrap_or_default();
            found.extend(
                text.split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    Ok(found)
}

fn runs_vcpus(pid: u32) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        fs::read_link(descriptor.path())
            .is_ok_and(|link| link.to_string_lossy().starts_with("anon_inode:kvm-vcpu"))
    })
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Pages that no other process maps, in bytes.
    private: u64,
    /// Of all pages, those without a file behind them.
    anonymous: u64,
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(field) = first.strip_suffix(':') {
            let Some(mapping) = mappings.last_mut() else {
                continue;
            };
            let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            match field {
                "Private_Clean" | "Private_Dirty" | "Private_Hugetlb" => {
                    mapping.private += kib << 10;
                }
                "Anonymous" => mapping.anonymous += kib << 10,
                _ => {}
            }
        } else if let Some((start, end)) = first.split_once('-') {
            let parse = |text| u64::from_str_radix(text, 16).unwrap_or(0);
            mappings.push(Mapping {
                start: parse(start),
                end: parse(end),
                ..Mapping::default()
            });
        }
    }
    mappings
}

/// The sums over all mappings that are not the guest's memory: the run of adjacent mappings that is
/// just as large.
fn beyond(mappings: &[Mapping], guest_bytes: u64) -> Mapping {
    let guest = (0..mappings.len()).find_map(|first| {
        let mut last = first;
        while mappings[last].end - mappings[first].start < guest_bytes
            && mappings
                .get(last + 1)
                .is_some_and(|next| next.start == mappings[last].end)
        {
            last += 1;
        }
        (mappings[last].end - mappings[first].start == guest_bytes).then_some(first..=last)
    });
    let mut sum = Mapping::default();
    for (index, mapping) in mappings.iter().enumerate() {
        if !guest.as_ref().is_some_and(|guest| guest.contains(&index)) {
            sum.private += mapping.private;
            sum.anonymous += mapping.anonymous;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "\
1000-3000 r--p 00000000 08:01 1  /usr/bin/x
Private_Clean:         4 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
10000-14000 rw-s 00000000 00:01 2  /memfd:guest (deleted)
Private_Dirty:        16 kB
Anonymous:             0 kB
14000-18000 rw-p 00000000 08:01 3  /vmlinux
Private_Dirty:        16 kB
Anonymous:            16 kB
20000-22000 rw-p 00000000 00:00 0  [heap]
Private_Dirty:         8 kB
Anonymous:             8 kB
";
        let mappings = parse(smaps);
        assert_eq!(mappings.len(), 4);
        let own = beyond(&mappings, 0x8000);
        assert_eq!((own.private, own.anonymous), (12 << 10, 8 << 10));
        // No such run: everything counts.
        assert_eq!(beyond(&mappings, 0x9000).private, 44 << 10);
    }
}
