//! `bench cpu`: the processor in software against QEMU's TCG, one vCPU, the same guest.
//!
//! Both boot Mica's tiny kernel with an initramfs whose first process is this program. The figures are
//! milliseconds of the host between two lines on the guest's console.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use xtask::error::{self, Error, Result};
use xtask::lab::initramfs::Archive;
use xtask::workspace;

use super::peers::{Vmm, mica_and_guest, vmm};
use super::process::Running;
use super::workloads::{WORKLOADS, is_there};
use super::{Arguments, Row, Sample, summarise};

/// The program with TCG in it; its smallest machine is the same microvm.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const BOOT: &str = "boot to user space";
const MEAN: &str = "geometric mean of the others";
/// By TCG's time: the interpreter's floor, and what a boot may take.
const MEAN_TARGET: f64 = 8.0;
const BOOT_TARGET: f64 = 10.0;
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 rdinit=/bench -- bench-guest";
const MEMORY: &str = "192M";

pub(super) fn run(arguments: &Arguments) -> Result<Vec<Row>> {
    let scratch = tempfile::tempdir().map_err(Error::io("create a temporary directory"))?;
    let (mica, guest) = mica_and_guest(arguments)?;
    let initrd = scratch.path().join("initrd");
    write_initrd(&guest.join("initrd"), &build_payload()?, &initrd)?;
    let kernel = guest.join("vmlinux");
    is_there(&kernel)?;
    let mut vmms = vec![tcg(&kernel, &initrd)];
    if !arguments.peers_only {
        vmms.insert(0, soft(&mica, &kernel, &initrd));
    }
    let mut samples = Vec::new();
    for run in 0..arguments.runs {
        for vmm in &vmms {
            eprintln!("run {} of {}: {}", run + 1, arguments.runs, vmm.name);
            measure(vmm, &mut samples)?;
        }
        vmms.reverse();
    }
    let mut rows = summarise(&samples, "ms", |metric| {
        (metric == BOOT).then_some(BOOT_TARGET)
    });
    rows.extend(mean_row(&rows));
    Ok(rows)
}

/// This program again, built for speed; it is a static one.
fn build_payload() -> Result<PathBuf> {
    error::run(
        Command::new(env!("CARGO"))
            .current_dir(workspace::root())
            .args(["build", "--quiet", "--release", "--package", "xtask"]),
        "cargo",
    )?;
    Ok(workspace::binary("xtask", "release"))
}

/// The image's archive, and one with the payload behind it: the kernel unpacks both.
fn write_initrd(image: &Path, payload: &Path, to: &Path) -> Result<()> {
    let mut bytes = fs::read(image).map_err(Error::file("read", image))?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let program = fs::read(payload).map_err(Error::file("read", payload))?;
    let write = |to: &Path| -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(to)?);
        std::io::Write::write_all(&mut file, &bytes)?;
        let mut archive = Archive::new(file);
        archive.console()?;
        archive.device("dev/null", (1, 3))?;
        archive.file("bench", true, &program)?;
        archive.finish().map(drop)
    };
    write(to).map_err(Error::file("write", to))
}

fn soft(mica: &Path, kernel: &Path, initrd: &Path) -> Vmm {
    vmm(
        "mica soft",
        &[
            &mica.to_string_lossy(),
            "run",
            "--engine",
            "soft",
            "--kernel",
            &kernel.to_string_lossy(),
            "--initrd",
            &initrd.to_string_lossy(),
            "--cmdline",
            COMMAND_LINE,
            "--memory",
            MEMORY,
        ],
    )
}

/// QEMU's smallest machine with its translator, and a CPU of the same level.
fn tcg(kernel: &Path, initrd: &Path) -> Vmm {
    vmm(
        "qemu tcg",
        &[
            QEMU,
            "-M",
            "microvm,x-option-roms=off,isa-serial=on,rtc=off,acpi=on",
            "-accel",
            "tcg",
            "-cpu",
            "Nehalem",
            "-m",
            MEMORY,
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-no-reboot",
            "-serial",
            "stdio",
            "-kernel",
            &kernel.to_string_lossy(),
            "-initrd",
            &initrd.to_string_lossy(),
            "-append",
            COMMAND_LINE,
        ],
    )
}

fn measure(vmm: &Vmm, samples: &mut Vec<Sample>) -> Result<()> {
    let mut running = Running::start(vmm)?;
    let mut emit = |metric: &str, value: f64| {
        eprintln!("  {metric}: {value:.0} ms");
        samples.push(Sample {
            metric: metric.into(),
            subject: vmm.name.clone(),
            value,
        });
    };
    emit(BOOT, running.wait_for_user_space()?);
    for workload in WORKLOADS {
        let begin = running.wait_for(&format!("begin {}", workload.name))?;
        let end = running.wait_for(&format!("end {}", workload.name))?;
        emit(workload.name, end - begin);
    }
    Ok(())
}

/// The geometric mean of the workloads' ratios.
fn mean_row(rows: &[Row]) -> Option<Row> {
    let ratios: Vec<f64> = rows
        .iter()
        .filter(|row| row.metric != BOOT && row.ratio.is_some())
        .filter_map(|row| row.ratio)
        .collect();
    let count = ratios.len();
    if count == 0 {
        return None;
    }
    let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / count as f64).exp();
    Some(Row {
        metric: MEAN.into(),
        subject: "mica soft".into(),
        unit: "times",
        median: mean,
        smallest: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        largest: ratios.iter().copied().fold(0.0, f64::max),
        samples: count,
        ratio: Some(mean),
        target: Some(MEAN_TARGET),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_of_the_workloads() {
        let row = |metric: &str, subject: &str, ratio| Row {
            metric: metric.into(),
            subject: subject.into(),
            unit: "ms",
            median: 1.0,
            smallest: 1.0,
            largest: 1.0,
            samples: 1,
            ratio,
            target: None,
        };
        let rows = [
            row(BOOT, "mica soft", Some(100.0)),
            row("calls", "mica soft", Some(2.0)),
            row("calls", "qemu tcg", None),
            row("gzip", "mica soft", Some(8.0)),
        ];
        let mean = mean_row(&rows).unwrap();
        assert!((mean.median - 4.0).abs() < 1e-9);
        assert_eq!((mean.smallest, mean.largest), (2.0, 8.0));
    }
}
