//! What is measured: the guest's files, and each VMM's command line for the same guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xtask::error::{self, Error, Result, output_of};
use xtask::lab::Lab;
use xtask::session::Echo;
use xtask::workspace;

use super::{Arguments, Sample};

/// The peer: QEMU's smallest machine.
const MICROVM: &str = "/usr/bin/qemu-system-x86_64-microvm";
const QEMU_DATA: &str = "/usr/share/qemu";
const QEMU_ROMS: [&str; 4] = [
    "bios-microvm.bin",
    "qboot.rom",
    "pvh.bin",
    "linuxboot_dma.bin",
];

/// Where the guest's files are inside the lab: an image of the Mica whose home this is.
const HOME: &str = "/bench";
const GUEST: &str = "/bench/images/guest";
const MANIFEST: &str = "manifest.json";
const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";

/// The guest's memory.
const MEMORY_MIB: u64 = 128;

/// What the lab side is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) runs: u32,
    pub(super) memory_bytes: u64,
    pub(super) vmms: Vec<Vmm>,
}

/// One way to start the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Vmm {
    pub(super) name: String,
    pub(super) argv: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

impl Vmm {
    pub(super) fn is_mica(&self) -> bool {
        self.name.starts_with("mica")
    }
}

/// Runs the lab side of `bench` and returns its samples.
pub(super) fn measure_in_lab(bench: &str, arguments: &Arguments) -> Result<Vec<Sample>> {
    let scratch = tempfile::tempdir().map_err(Error::io("create a temporary directory"))?;
    let (mica, guest) = mica_and_guest(arguments)?;
    let command_line = command_line(&guest)?;
    let mut vmms = microvms(&command_line);
    if !arguments.peers_only {
        let image = guest.join(MANIFEST).exists();
        vmms.insert(0, mica_run(image, &command_line));
    }
    let plan = Plan {
        runs: arguments.runs,
        memory_bytes: MEMORY_MIB << 20,
        vmms,
    };
    let plan_path = scratch.path().join("plan.json");
    let text = serde_json::to_vec_pretty(&plan)
        .map_err(|error| Error::Other(format!("write the plan: {error}")))?;
    fs::write(&plan_path, text).map_err(Error::file("write", &plan_path))?;

    let xtask = std::env::current_exe().map_err(Error::io("find this program"))?;
    let mut lab = Lab::new()
        .timeout(Duration::from_secs(1800))
        .echo(Echo::Errors)
        .file(mica, "/usr/bin/mica")
        .file(xtask, "/bench/xtask")
        .file(plan_path, "/bench/plan.json");
    for file in ["kernel", "vmlinux", "initrd", MANIFEST] {
        let path = guest.join(file);
        if file != MANIFEST || path.exists() {
            lab = lab.file(path, format!("{GUEST}/{file}"));
        }
    }
    lab = with_microvm(lab)?;
    let outcome = lab.run(&format!("/bench/xtask lab-side {bench} /bench/plan.json"))?;
    if outcome.status != 0 {
        return Err(Error::Other(format!(
            "the lab side failed:\n{}",
            outcome.output
        )));
    }
    outcome
        .stdout
        .lines()
        .map(|line| {
            serde_json::from_str(line)
                .map_err(|error| Error::Other(format!("no sample: {line:?}: {error}")))
        })
        .collect()
}

/// Mica, built for speed, and the folder of the guest that is asked for: the tiny image, if none is.
pub(super) fn mica_and_guest(arguments: &Arguments) -> Result<(PathBuf, PathBuf)> {
    let mica = build_mica()?;
    let guest = match &arguments.guest {
        Some(guest) => guest.clone(),
        None => build_guest(&mica)?,
    };
    Ok((mica, guest))
}

fn build_mica() -> Result<PathBuf> {
    error::run(
        Command::new(env!("CARGO"))
            .current_dir(workspace::root())
            .args(["build", "--quiet", "--release", "--package", "mica"]),
        "cargo",
    )?;
    Ok(workspace::binary("mica", "release"))
}

fn build_guest(mica: &Path) -> Result<PathBuf> {
    let home = workspace::target_directory().join("demo");
    error::run(
        Command::new(mica)
            .args(["image", "build", "tiny"])
            .env("MICA_HOME", &home),
        "mica",
    )?;
    Ok(home.join("images/tiny"))
}

/// The image's own, for every VMM alike.
fn command_line(guest: &Path) -> Result<String> {
    let path = guest.join(MANIFEST);
    if !path.exists() {
        return Ok(DEFAULT_COMMAND_LINE.into());
    }
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    let manifest: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|error| Error::Other(format!("{}: {error}", path.display())))?;
    Ok(manifest["kernel"]["command_line"]
        .as_str()
        .unwrap_or(DEFAULT_COMMAND_LINE)
        .to_owned())
}

/// As a user starts the image; a folder that is none, by its files. The engine is named so that
/// neither side spends time on choosing one.
fn mica_run(image: bool, command_line: &str) -> Vmm {
    let memory = format!("{MEMORY_MIB}M");
    let kernel = format!("{GUEST}/vmlinux");
    let initrd = format!("{GUEST}/initrd");
    let mut argv = vec![
        "/usr/bin/mica",
        "run",
        "--engine",
        "kvm",
        "--memory",
        &memory,
    ];
    if image {
        argv.push("guest");
    } else {
        argv.extend(["--kernel", &kernel, "--initrd", &initrd]);
        argv.extend(["--cmdline", command_line]);
    }
    Vmm {
        environment: vec![("MICA_HOME".to_owned(), HOME.to_owned())],
        ..vmm("mica", &argv)
    }
}

/// The microvm as QEMU's documentation (docs/system/i386/microvm.rst) sets it up for start-up time,
/// with every device left out that its guest can do without: with ACPI, also the legacy interrupt
/// controller and timer. Both forms of the kernel; the bench goes on with the fastest. The guest
/// has its console on the serial line, as Mica's has.
fn microvms(command_line: &str) -> Vec<Vmm> {
    let memory = format!("{MEMORY_MIB}M");
    let initrd = format!("{GUEST}/initrd");
    let mut vmms = Vec::new();
    for kernel in ["kernel", "vmlinux"] {
        for acpi in ["acpi=on,pic=off,pit=off", "acpi=off,pic=on,pit=on"] {
            let machine = format!("microvm,x-option-roms=off,isa-serial=on,rtc=off,{acpi}");
            let name = format!("microvm {kernel} {}", &acpi[..acpi.find(',').unwrap_or(0)]);
            vmms.push(vmm(
                &name,
                &[
                    MICROVM,
                    "-M",
                    &machine,
                    "-enable-kvm",
                    "-cpu",
                    "host",
                    "-m",
                    &memory,
                    "-nodefaults",
                    "-no-user-config",
                    "-nographic",
                    "-no-reboot",
                    "-serial",
                    "stdio",
                    "-kernel",
                    &format!("{GUEST}/{kernel}"),
                    "-initrd",
                    &initrd,
                    "-append",
                    command_line,
                ],
            ));
        }
    }
    vmms
}

pub(super) fn vmm(name: &str, argv: &[&str]) -> Vmm {
    Vmm {
        name: name.into(),
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        environment: Vec::new(),
    }
}

/// QEMU is a dynamic program: its libraries and firmware come along, at their own paths.
fn with_microvm(mut lab: Lab) -> Result<Lab> {
    if !Path::new(MICROVM).exists() {
        return Err(Error::Other(format!(
            "{MICROVM} is missing: install qemu-system-x86"
        )));
    }
    lab = lab.file(MICROVM, MICROVM);
    let libraries = output_of(Command::new("ldd").arg(MICROVM), "libc-bin")?;
    for path in libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        lab = lab.file(path, path);
    }
    for rom in QEMU_ROMS {
        let path = format!("{QEMU_DATA}/{rom}");
        lab = lab.file(&path, &path);
    }
    Ok(lab)
}
