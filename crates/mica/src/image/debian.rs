//! A Debian disk: GPT with an EFI system partition and an ext4 root, systemd, and a kernel of
//! Debian's own in `/boot`.
//!
//! mmdebstrap installs the packages into a tree, [`CUSTOMIZE`] makes a guest of the tree, mke2fs
//! makes a file system of it: no loop device, no mount on the host, and no root for a user whom
//! `/etc/subuid` gives a range of identifiers.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use mica_base::units::Bytes;
use uuid::Uuid;

use super::BuildError;
use super::gpt::{self, Partition, PartitionType};
use super::manifest::{self, FileEntry, Kernel, Kind, Manifest, Role};
use super::progress::Progress;
use super::store::{At, Image, Locked, Stage, StoreError, cache_directory, lock_file};
use super::tool::{ToolError, Tools, search_path};

const BOOTSTRAP: &str = include_str!("debian/bootstrap");
const CUSTOMIZE: &str = include_str!("debian/customize");

/// The system without what the user asks for.
const PACKAGES: &[&str] = &[
    // With the directories merged from the start, the package that would merge them, and perl with
    // it, stay out.
    "usr-is-merged",
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    // For systemd-logind, which powers off when the power button is pressed.
    "dbus",
    "linux-image-cloud-amd64",
    "e2fsprogs",
    "apt",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "login",
    "nano",
    "procps",
];

/// Files of packages that no guest reads; apt and dpkg work without them.
const EXCLUDED: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// See the tiny guest's for why.
const COMMAND_LINE: &str = "console=ttyS0 quiet 8250.nr_uarts=1 cryptomgr.notests";

const ESP_LEN: u64 = 64 << 20;
/// The least disk that holds the system with room to work.
const LEAST_SIZE: Bytes = Bytes::gib(1);

/// The programs that a build runs, each with the package that has it.
const PROGRAMS: &[(&str, &str)] = &[
    ("unshare", "util-linux"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mmd", "mtools"),
    ("mcopy", "mtools"),
    ("grub-mkimage", "grub-common"),
];

/// Where GRUB's modules for UEFI are.
const GRUB_MODULES: &str = "/usr/lib/grub/x86_64-efi";

/// What `mica image build debian` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The disk's size.
    #[arg(long, default_value = "4G")]
    size: Bytes,
    /// The release to install.
    #[arg(long, default_value = "bookworm")]
    suite: String,
    /// The archive to install from.
    #[arg(long, default_value = "http://deb.debian.org/debian")]
    mirror: String,
    /// A package to add, such as cloud-init or qemu-guest-agent; may be repeated.
    #[arg(long = "with", value_name = "PACKAGE")]
    with: Vec<String>,
}

/// Why a disk cannot be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebianError {
    #[error("a disk of {0} is too small; it takes {LEAST_SIZE} at least")]
    TooSmall(Bytes),
    #[error("the size {0} is no whole number of mebibytes")]
    OddSize(Bytes),
    #[error("'{0}' is no name of a package, release or archive")]
    BadWord(String),
    #[error("this host lacks {0}; install them with 'apt-get install {1}' as root")]
    Lacking(String, String),
    #[error(
        "{0}\nWithout root, the build needs a range of identifiers in /etc/subuid and /etc/subgid \
         (as root: 'usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER') and \
         newuidmap (package uidmap)"
    )]
    Namespace(ToolError),
    #[error("the packages installed hold no kernel")]
    NoKernel,
}

/// Builds the image, or returns the one there is if it has the same recipe. The archive's packages
/// of the day are in it; a newer day alone is no reason to build again.
pub(crate) fn build(
    tools: &Tools,
    progress: &mut Progress,
    locked: &Locked,
    options: &Options,
    present: Option<Image>,
) -> Result<Image, BuildError> {
    check(options)?;
    let packages = packages(options);
    let recipe = recipe(options, &packages);
    if let Some(present) = present.filter(|image| image.manifest.recipe == recipe) {
        return Ok(present);
    }
    check_programs()?;

    let stage = locked.stage()?;
    let disk_path = stage.file(Role::Disk);
    let disk = File::create_new(&disk_path).at(&disk_path)?;
    let (esp, root) = layout(options.size.0);
    disk.set_len(options.size.0).at(&disk_path)?;
    gpt::write(&disk, options.size.0, &[esp.clone(), root.clone()]).at(&disk_path)?;
    let root_uuid = Uuid::new_v4();

    progress.step(&format!("installing Debian {}", options.suite));
    bootstrap(
        tools, progress, &stage, options, &packages, &root, root_uuid,
    )?;
    progress.step("writing the EFI system partition");
    write_esp(tools, &stage, &disk, &esp, root_uuid)?;

    let (release, packages) = installed(stage.path())?;
    let entry = FileEntry::of_disk(&disk_path).at(&disk_path)?;
    Ok(stage.commit(Manifest {
        version: manifest::VERSION,
        name: locked.name().to_owned(),
        kind: Kind::Debian,
        created: manifest::now(),
        recipe,
        kernel: Kernel {
            release,
            command_line: None,
        },
        files: BTreeMap::from([(Role::Disk, entry)]),
        packages,
    })?)
}

fn check(options: &Options) -> Result<(), DebianError> {
    let plain = |word: &str, more: &str| {
        word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    let words = options.with.iter().chain([&options.suite]);
    let bad = words
        .filter(|word| !plain(word, "+.-"))
        .chain(Some(&options.mirror).filter(|mirror| !plain(mirror, ":/+.-_~%@")))
        .next();
    if let Some(word) = bad {
        return Err(DebianError::BadWord(word.clone()));
    }
    if options.size < LEAST_SIZE {
        return Err(DebianError::TooSmall(options.size));
    }
    if !options.size.0.is_multiple_of(gpt::ALIGNMENT) {
        return Err(DebianError::OddSize(options.size));
    }
    Ok(())
}

fn check_programs() -> Result<(), DebianError> {
    let there = |program: &str| {
        let path = search_path();
        env::split_paths(&path).any(|directory| directory.join(program).is_file())
    };
    let mut missing: Vec<(&str, &str)> = PROGRAMS
        .iter()
        .copied()
        .filter(|(program, _)| !there(program))
        .collect();
    if !Path::new(GRUB_MODULES).is_dir() {
        missing.push((GRUB_MODULES, "grub-efi-amd64-bin"));
    }
    if missing.is_empty() {
        return Ok(());
    }
    let programs: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Err(DebianError::Lacking(
        programs.join(", "),
        packages.join(" "),
    ))
}

fn packages(options: &Options) -> Vec<&str> {
    let mut packages = PACKAGES.to_vec();
    // By measurement (docs/decisions/005): the least that finds a root file system by its UUID.
    // Later releases no longer have it.
    packages.push(match options.suite.as_str() {
        "bookworm" => "tiny-initramfs",
        _ => "initramfs-tools",
    });
    for package in &options.with {
        packages.push(package);
        if package == "cloud-init" {
            // What a user's seed asks cloud-init for: growing the root, keys, privileges.
            packages.extend(["cloud-guest-utils", "fdisk", "openssh-server", "sudo"]);
        }
    }
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn recipe(options: &Options, packages: &[&str]) -> Vec<String> {
    let mut ours = flate2::Crc::new();
    for text in [BOOTSTRAP, CUSTOMIZE, COMMAND_LINE].iter().chain(EXCLUDED) {
        ours.update(text.as_bytes());
    }
    let mut recipe = vec![
        format!("crc32={:08x}", ours.sum()),
        format!("suite={}", options.suite),
        format!("mirror={}", options.mirror),
        format!("size={}", options.size),
    ];
    recipe.extend(packages.iter().map(|&package| package.to_owned()));
    recipe
}

/// The EFI system partition and, behind it, the root.
fn layout(size: u64) -> (Partition, Partition) {
    let room = gpt::usable(size);
    let root_start = room.start + ESP_LEN;
    let esp = Partition {
        kind: PartitionType::EfiSystem,
        name: "EFI",
        start: room.start,
        len: ESP_LEN,
    };
    let root = Partition {
        kind: PartitionType::LinuxRoot,
        name: "root",
        start: root_start,
        len: room.end - root_start,
    };
    (esp, root)
}

fn bootstrap(
    tools: &Tools,
    progress: &Progress,
    stage: &Stage,
    options: &Options,
    packages: &[&str],
    root: &Partition,
    root_uuid: Uuid,
) -> Result<(), BuildError> {
    let cache = cache_directory()?.join("packages").join(&options.suite);
    let _lock = lock_file(&cache, ".lock", || {
        progress.detail("waiting for another build");
    })?;
    let tree = stage.path().join("tree");
    fs::create_dir(&tree).at(&tree)?;
    let customize = stage.path().join("customize");
    fs::write(&customize, CUSTOMIZE).at(&customize)?;

    // mmdebstrap splits its hooks into words as it pleases: a name that needs no quotes.
    let debs = stage.path().join("debs");
    std::os::unix::fs::symlink(&cache, &debs).at(&debs)?;

    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child"]);
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        command.args(["--map-root-user", "--map-auto"]);
    }
    command
        .args(["sh", "-c", BOOTSTRAP, "bootstrap"])
        .args([&options.suite, &options.mirror])
        .args(mmdebstrap_arguments(packages))
        .current_dir(stage.path())
        .env("TREE", &tree)
        .env("OUTPUT", stage.path())
        .env("CUSTOMIZE", &customize)
        .env("DISK", stage.file(Role::Disk))
        .env("ROOT_OFFSET", root.start.to_string())
        .env("ROOT_KIB", (root.len >> 10).to_string())
        .env("ROOT_UUID", root_uuid.to_string())
        .env("COMMAND_LINE", COMMAND_LINE)
        .env("GUEST", stage.name());
    tools
        .run_reporting(&mut command, "util-linux", |line| {
            if let Some(step) = line.strip_prefix("I: ") {
                progress.detail(step);
            }
        })
        .map_err(|error| match error {
            ToolError::Failed { .. } if !is_root => DebianError::Namespace(error).into(),
            other => BuildError::Tool(other),
        })?;
    fs::remove_dir(&tree).at(&tree)?;
    fs::remove_file(&debs).at(&debs)?;
    fs::remove_file(&customize).at(&customize)?;
    Ok(())
}

fn mmdebstrap_arguments(packages: &[&str]) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "--mode=root",
        "--variant=essential",
        "--format=directory",
        "--architectures=amd64",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "--aptopt=APT::Install-Recommends \"false\"",
        // What was downloaded before comes from the cache, and goes there before the tree is cleaned.
        "--skip=download/empty",
        "--skip=essential/unlink",
        "--setup-hook=mkdir -p \"$1/var/cache/apt/archives\"",
        "--setup-hook=sync-in debs /var/cache/apt/archives/",
        "--customize-hook=sync-out /var/cache/apt/archives debs",
        // Before the kernel is configured, which makes the initial RAM disk.
        "--essential-hook=sh \"$CUSTOMIZE\" before \"$1\"",
        "--customize-hook=sh \"$CUSTOMIZE\" after \"$1\"",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend(EXCLUDED.iter().map(|path| format!("--dpkgopt={path}")));
    arguments.push(format!("--include={}", packages.join(",")));
    arguments
}

/// Puts GRUB where UEFI firmware looks for a removable disk's loader; it goes on to the
/// configuration on the root file system.
fn write_esp(
    tools: &Tools,
    stage: &Stage,
    disk: &File,
    esp: &Partition,
    root_uuid: Uuid,
) -> Result<(), BuildError> {
    let loader = stage.path().join("grub.efi");
    let first_steps = stage.path().join("grub.cfg");
    let script = format!(
        "search --no-floppy --fs-uuid --set=root {root_uuid}\n\
         set prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
    );
    fs::write(&first_steps, script).at(&first_steps)?;
    tools.run(
        Command::new("grub-mkimage")
            .args(["--format=x86_64-efi", "--prefix=/boot/grub", "--config"])
            .arg(&first_steps)
            .arg("--output")
            .arg(&loader)
            .args([
                "part_gpt",
                "ext2",
                "search",
                "normal",
                "configfile",
                "test",
                "echo",
            ])
            .args([
                "linux", "serial", "terminal", "boot", "reboot", "halt", "ls", "cat",
            ]),
        "grub-common",
    )?;
    let image = stage.path().join("esp");
    tools.run(
        Command::new("mkfs.vfat")
            .args(["-F", "32", "-n", "EFI", "-C"])
            .arg(&image)
            .arg((esp.len >> 10).to_string()),
        "dosfstools",
    )?;
    tools.run(
        Command::new("mmd")
            .arg("-i")
            .arg(&image)
            .args(["::/EFI", "::/EFI/BOOT"]),
        "mtools",
    )?;
    tools.run(
        Command::new("mcopy")
            .arg("-i")
            .arg(&image)
            .arg(&loader)
            .arg("::/EFI/BOOT/BOOTX64.EFI"),
        "mtools",
    )?;
    let content = fs::read(&image).at(&image)?;
    write_sparse(disk, &content, esp.start).at(&image)?;
    for path in [image, loader, first_steps] {
        fs::remove_file(&path).at(&path)?;
    }
    Ok(())
}

/// Writes `content` at `offset` of a file that reads as zeros there, holes where it is zeros too.
fn write_sparse(file: &File, content: &[u8], offset: u64) -> io::Result<()> {
    for (index, block) in content.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, offset + 4096 * index as u64)?;
        }
    }
    Ok(())
}

/// The kernel's release and the packages, as the bootstrap has noted them beside the disk.
fn installed(stage: &Path) -> Result<(String, BTreeMap<String, String>), BuildError> {
    let take = |name: &str| -> Result<String, StoreError> {
        let path = stage.join(name);
        let text = fs::read_to_string(&path).at(&path)?;
        fs::remove_file(&path).at(&path)?;
        Ok(text)
    };
    let link = take("release")?;
    let (_, release) = link
        .trim()
        .split_once("vmlinuz-")
        .ok_or(DebianError::NoKernel)?;
    let packages = take("versions")?
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .collect();
    Ok((release.to_owned(), packages))
}
