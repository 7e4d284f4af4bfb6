//! `mica image`: guest images built from Debian's packages.
//!
//! An image is a directory of plain files with a manifest ([`manifest`]) in the user's [`store`].
//! [`tiny`] builds a kernel with an initramfs, [`debian`] a bootable disk.

mod apt;
mod cpio;
mod debian;
mod gpt;
pub(crate) mod manifest;
mod modules;
mod progress;
pub(crate) mod store;
mod tiny;
mod tool;

use std::error::Error;
use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use crate::OutputFormat;
pub(crate) use manifest::Role;
use progress::Progress;
use store::Store;
pub(crate) use store::{Image, StoreError};
use tool::Tools;

/// What can be done with images.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Build an image, or bring it up to date.
    #[command(subcommand)]
    Build(Recipe),
    /// List the images.
    List,
    /// Show an image's manifest.
    Inspect {
        /// The image's name.
        name: String,
    },
    /// Remove an image.
    Remove {
        /// The image's name.
        name: String,
        /// Ask nothing.
        #[arg(short, long)]
        force: bool,
    },
}

/// The images that can be built.
#[derive(clap::Subcommand)]
pub(crate) enum Recipe {
    /// A kernel and a busybox initramfs with a shell on the serial line.
    Tiny {
        #[command(flatten)]
        common: Common,
    },
    /// A bootable disk with systemd and apt.
    Debian {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        options: debian::Options,
    },
}

/// What every build takes.
#[derive(clap::Args)]
pub(crate) struct Common {
    /// The image's name, if it is to be other than its kind.
    #[arg(long)]
    name: Option<String>,
    /// Build even if the image is up to date.
    #[arg(long)]
    rebuild: bool,
}

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Apt(#[from] apt::AptError),
    #[error(transparent)]
    Debian(#[from] debian::DebianError),
    #[error("the kernel's package holds no kernel that we can unpack: {0}")]
    Kernel(mica_machine::boot::BootError),
    #[error(transparent)]
    Module(#[from] modules::ModuleError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tool(#[from] tool::ToolError),
}

/// Runs one `mica image` command.
pub(crate) fn run(command: Command, output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    match command {
        Command::Build(recipe) => build(&recipe, output)?,
        Command::List => list(output)?,
        Command::Inspect { name } => inspect(&name, output)?,
        Command::Remove { name, force } => return remove(&name, force),
    }
    Ok(ExitCode::SUCCESS)
}

fn build(recipe: &Recipe, output: OutputFormat) -> Result<(), Box<dyn Error>> {
    let (kind, common) = match recipe {
        Recipe::Tiny { common } => (manifest::Kind::Tiny, common),
        Recipe::Debian { common, .. } => (manifest::Kind::Debian, common),
    };
    let name = common.name.as_deref().unwrap_or(kind.as_str());
    let started = Instant::now();
    let tools = Tools::new()?;
    let mut progress = Progress::new();
    let store = Store::open()?;
    let locked = store.lock(name, || {
        progress.step(&format!("waiting for another build of '{name}'"));
    })?;
    let present = store.find(name).ok().filter(|_| !common.rebuild);
    let created = present.as_ref().map(|image| image.manifest.created.clone());
    let image = match recipe {
        Recipe::Tiny { .. } => tiny::build(&tools, &mut progress, &locked, present)?,
        Recipe::Debian { options, .. } => {
            debian::build(&tools, &mut progress, &locked, options, present)?
        }
    };
    drop(progress);
    match output {
        OutputFormat::Json => print_json(&image.manifest)?,
        OutputFormat::Text if created.as_ref() == Some(&image.manifest.created) => {
            println!("{name}: up to date; 'mica run {name}' starts it");
        }
        OutputFormat::Text => println!(
            "{name}: Linux {}, {}, built in {:.1} s; 'mica run {name}' starts it",
            image.manifest.kernel.release,
            human_size(image.disk_usage()),
            started.elapsed().as_secs_f64()
        ),
    }
    Ok(())
}

/// Finds an image by its name, for `mica run`.
pub(crate) fn find(name: &str) -> Result<Image, StoreError> {
    Store::open()?.find(name)
}

fn list(output: OutputFormat) -> Result<(), Box<dyn Error>> {
    let images = Store::open()?.list()?;
    if output == OutputFormat::Json {
        let rows: Vec<_> = images
            .iter()
            .map(|(name, image)| match image {
                Ok(image) => serde_json::json!({
                    "name": name,
                    "kind": image.manifest.kind,
                    "disk_usage": image.disk_usage(),
                    "created": image.manifest.created,
                    "kernel": image.manifest.kernel.release,
                }),
                Err(error) => serde_json::json!({"name": name, "error": error.to_string()}),
            })
            .collect();
        return Ok(print_json(&rows)?);
    }
    if images.is_empty() {
        eprintln!("There are no images; 'mica image build tiny' makes one.");
        return Ok(());
    }
    println!(
        "{:<20} {:<8} {:>8}  {:<20}  KERNEL",
        "NAME", "KIND", "SIZE", "CREATED"
    );
    for (name, image) in images {
        match image {
            Ok(image) => println!(
                "{name:<20} {:<8} {:>8}  {:<20}  {}",
                image.manifest.kind.as_str(),
                human_size(image.disk_usage()),
                image.manifest.created,
                image.manifest.kernel.release
            ),
            Err(error) => println!("{name:<20} {error}"),
        }
    }
    Ok(())
}

fn inspect(name: &str, output: OutputFormat) -> Result<(), Box<dyn Error>> {
    let image = find(name)?;
    let manifest = &image.manifest;
    if output == OutputFormat::Json {
        return Ok(print_json(manifest)?);
    }
    println!(
        "{name}: {} image, built {}",
        manifest.kind.as_str(),
        manifest.created
    );
    println!("  directory  {}", image.directory().display());
    println!("  kernel     {}", manifest.kernel.release);
    if let Some(command_line) = &manifest.kernel.command_line {
        println!("  command    {command_line}");
    }
    for (role, entry) in &manifest.files {
        let checksum = entry
            .crc32
            .map(|crc32| format!("  crc32 {crc32:08x}"))
            .unwrap_or_default();
        println!(
            "  file       {}, {}{checksum}",
            role.file_name(),
            human_size(entry.size)
        );
    }
    for (package, version) in &manifest.packages {
        println!("  package    {package} {version}");
    }
    Ok(())
}

fn remove(name: &str, force: bool) -> Result<ExitCode, Box<dyn Error>> {
    let store = Store::open()?;
    let locked = store.lock(name, || eprintln!("waiting for a build of '{name}'"))?;
    if !force && io::stdin().is_terminal() && io::stderr().is_terminal() {
        eprint!("Remove the image '{name}'? [y/N] ");
        io::stderr().flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(ExitCode::FAILURE);
        }
    }
    locked.remove()?;
    Ok(ExitCode::SUCCESS)
}

fn print_json(value: &impl serde::Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)
}

/// A size in the unit that leaves at most four digits.
fn human_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let shift = (0..3).find(|unit| bytes >> (10 * unit) < 1024).unwrap_or(3);
    format!("{} {}", bytes >> (10 * shift), units[shift])
}
