//! `cargo xtask kvm-lab -- COMMAND`.

use std::io::{self, Read, Write};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use xtask::error::{self, Error, Result};
use xtask::lab::{Lab, quoted};
use xtask::session::Echo;
use xtask::workspace;

/// Options of `kvm-lab`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The lab's memory, in MiB or as 3G.
    #[arg(long, default_value = "3G", value_parser = memory_mib)]
    memory: u32,
    /// The lab's CPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// A file or folder to copy in.
    #[arg(long = "file", value_name = "SOURCE:DESTINATION", value_parser = file_pair)]
    files: Vec<(String, String)>,
    /// A raw disk image, seen as /dev/vdb and on; what is written to it is thrown away.
    #[arg(long = "disk", value_name = "IMAGE")]
    disks: Vec<String>,
    /// A further kernel module to load.
    #[arg(long = "module", value_name = "NAME")]
    modules: Vec<String>,
    /// Seconds after which the lab is given up.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Use the release build of mica.
    #[arg(long)]
    release: bool,
    /// Pass our standard input to the command; else it reads end of file.
    #[arg(short, long)]
    interactive: bool,
    /// One word is a shell command line; several are a program and its arguments.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Runs the command and exits with its status.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let profile = if arguments.release {
        "release"
    } else {
        "debug"
    };
    let mut build = Command::new(env!("CARGO"));
    build
        .current_dir(workspace::root())
        .args(["build", "--quiet", "--package", "mica"]);
    if arguments.release {
        build.arg("--release");
    }
    error::run(&mut build, "cargo")?;

    let mut lab = Lab::new()
        .memory_mib(arguments.memory)
        .cpus(arguments.cpus)
        .timeout(Duration::from_secs(arguments.timeout))
        .echo(Echo::All)
        .file(workspace::binary("mica", profile), "/usr/bin/mica");
    for (source, destination) in &arguments.files {
        lab = lab.file(source, destination);
    }
    for disk in &arguments.disks {
        lab = lab.disk(disk);
    }
    for module in &arguments.modules {
        lab = lab.module(module);
    }
    let command = match arguments.command.as_slice() {
        [line] => line.clone(),
        words => words
            .iter()
            .map(|word| quoted(word))
            .collect::<Vec<_>>()
            .join(" "),
    };
    let outcome = if arguments.interactive {
        let session = lab.start(&command)?;
        let input = session.input().map_err(Error::io("duplicate a socket"))?;
        thread::spawn(move || forward_input(input));
        session.finish()?
    } else {
        lab.run(&command)?
    };
    Ok(ExitCode::from(
        u8::try_from(outcome.status).unwrap_or(u8::MAX),
    ))
}

fn forward_input(mut to: impl Write) {
    let mut buffer = [0; 4096];
    while let Ok(count) = io::stdin().read(&mut buffer) {
        if count == 0 || to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

fn memory_mib(text: &str) -> std::result::Result<u32, String> {
    let (number, factor) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    number
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| format!("{text:?} is no size: write 512M or 3G"))
}

fn file_pair(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once(':') {
        Some((source, destination)) if destination.starts_with('/') => {
            Ok((source.into(), destination.into()))
        }
        _ => Err("write SOURCE:/ABSOLUTE/DESTINATION".into()),
    }
}
