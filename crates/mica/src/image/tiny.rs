//! The tiny guest: Debian's cloud kernel with an initramfs of busybox, for a quick look and for
//! tests.
//!
//! The initramfs is not compressed: the guest copies it faster than it could unpack it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use mica_machine::boot;

use super::BuildError;
use super::apt::{self, AptError, Package};
use super::cpio::Archive;
use super::manifest::{self, FileEntry, Kernel, Kind, Manifest, Role};
use super::modules::{self, Module};
use super::progress::Progress;
use super::store::{At, Image, Locked, Stage};
use super::tool::Tools;

const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

/// Raised when the image would come out otherwise from the same packages and texts.
const LAYOUT: u32 = 2;

/// Each word spares the guest work that no virtual machine of ours has a use for.
const COMMAND_LINE: &[&str] = &[
    "console=ttyS0",
    // Each line on a serial console costs an exit for each of its characters.
    "quiet",
    // A panic ends the guest after a second, in which pvpanic and the console have told of it.
    "panic=1",
    // There is one serial line; probing for three more costs exits.
    "8250.nr_uarts=1",
    // No mouse behind the keyboard controller, and no multiplexer for several.
    "i8042.noaux",
    "i8042.nomux",
    // Debian's kernel tests its ciphers against known answers at each boot.
    "cryptomgr.notests",
];

/// The drivers of the devices that a guest may have, and of the power button.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_scsi",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
    // By ACPI, it also drives the ISA device's port.
    "pvpanic_mmio",
];

/// Text files of the initramfs: path, permissions, content.
const TEXTS: &[(&str, u32, &str)] = &[
    ("init", 0o755, include_str!("tiny/init")),
    ("etc/profile", 0o644, include_str!("tiny/profile")),
    ("etc/network", 0o755, include_str!("tiny/network")),
    ("etc/finish", 0o755, include_str!("tiny/finish")),
    ("etc/udhcpc.sh", 0o755, include_str!("tiny/udhcpc")),
    (
        "etc/fstab",
        0o644,
        "proc /proc proc defaults 0 0\nsysfs /sys sysfs defaults 0 0\n\
         devtmpfs /dev devtmpfs defaults 0 0\ntmpfs /run tmpfs defaults 0 0\n",
    ),
    ("etc/passwd", 0o644, "root::0:0:root:/root:/bin/sh\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
    ("etc/hostname", 0o644, "tiny\n"),
    (
        "etc/hosts",
        0o644,
        "127.0.0.1 localhost tiny\n::1 localhost\n",
    ),
    (
        "etc/acpi/PWRF/00000080",
        0o755,
        "#!/bin/busybox sh\nexec /etc/finish poweroff\n",
    ),
];

const DIRECTORIES: &[&str] = &[
    "bin",
    "dev",
    "etc",
    "etc/acpi",
    "etc/acpi/PWRF",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
];

/// Builds the image, or returns the one there is if it would come out the same.
pub(crate) fn build(
    tools: &Tools,
    progress: &mut Progress,
    locked: &Locked,
    present: Option<Image>,
) -> Result<Image, BuildError> {
    progress.step("asking apt for the packages' versions");
    let packages = apt::candidates(tools, &[KERNEL_METAPACKAGE, BUSYBOX])?;
    let [metapackage, busybox] = packages.as_slice() else {
        unreachable!("one package for each name")
    };
    let recipe = recipe(&packages);
    if let Some(present) = present.filter(|image| image.manifest.recipe == recipe) {
        return Ok(present);
    }
    let kernel = kernel_package(tools, metapackage)?;

    progress.step(&format!("downloading Linux {} and busybox", kernel.version));
    let debs = apt::download(tools, &[&kernel, busybox])?;
    let stage = locked.stage()?;
    let unpacked = stage.path().join("packages");
    progress.step("unpacking");
    for deb in &debs {
        apt::unpack(tools, deb, &unpacked)?;
    }

    progress.step("packing the initramfs");
    let release = kernel
        .name
        .strip_prefix("linux-image-")
        .unwrap_or(&kernel.name)
        .to_owned();
    let shipped = unpacked.join(format!("boot/vmlinuz-{release}"));
    let kernel_file = fs::read(&shipped).at(&shipped)?;
    let vmlinux = boot::unpack_kernel(&kernel_file).map_err(BuildError::Kernel)?;
    fs::write(stage.file(Role::Vmlinux), vmlinux).at(&stage.file(Role::Vmlinux))?;
    fs::rename(&shipped, stage.file(Role::Kernel)).at(&shipped)?;
    let tree = unpacked.join("lib/modules").join(&release);
    let modules = modules::with_dependencies(&tree, MODULES)?;
    let busybox_path = unpacked.join("bin/busybox");
    let binary = fs::read(&busybox_path).at(&busybox_path)?;
    let initrd = stage.file(Role::Initrd);
    write_initramfs(&initrd, &release, &binary, &modules).at(&initrd)?;
    fs::remove_dir_all(&unpacked).at(&unpacked)?;
    tools.check()?;

    let files = describe(&stage)?;
    let packages =
        [&kernel, busybox].map(|package| (package.name.clone(), package.version.clone()));
    Ok(stage.commit(Manifest {
        version: manifest::VERSION,
        name: locked.name().to_owned(),
        kind: Kind::Tiny,
        created: manifest::now(),
        recipe,
        kernel: Kernel {
            release,
            command_line: Some(COMMAND_LINE.join(" ")),
        },
        files,
        packages: BTreeMap::from(packages),
    })?)
}

/// The packages by version, and what we put around them by checksum.
fn recipe(packages: &[Package]) -> Vec<String> {
    let mut ours = flate2::Crc::new();
    for (path, _, content) in TEXTS {
        ours.update(path.as_bytes());
        ours.update(content.as_bytes());
    }
    for word in COMMAND_LINE.iter().chain(MODULES) {
        ours.update(word.as_bytes());
    }
    let mut recipe = vec![
        format!("layout={LAYOUT}"),
        format!("crc32={:08x}", ours.sum()),
    ];
    recipe.extend(packages.iter().map(Package::pinned));
    recipe
}

/// The package with the kernel itself: the metapackage depends on it by its exact version.
fn kernel_package(tools: &Tools, metapackage: &Package) -> Result<Package, AptError> {
    let unexpected = || AptError::Unexpected {
        package: metapackage.name.clone(),
        what: "a dependency on a kernel of its version".to_owned(),
    };
    let name = metapackage
        .depends
        .split([',', ' '])
        .find(|word| word.starts_with("linux-image-"))
        .ok_or_else(unexpected)?;
    let mut packages = apt::candidates(tools, &[name])?;
    packages.pop().ok_or_else(unexpected)
}

fn describe(stage: &Stage) -> Result<BTreeMap<Role, FileEntry>, BuildError> {
    let mut files = BTreeMap::new();
    for role in [Role::Kernel, Role::Vmlinux, Role::Initrd] {
        let path: PathBuf = stage.file(role);
        files.insert(role, FileEntry::of_file(&path).at(&path)?);
    }
    Ok(files)
}

fn write_initramfs(
    path: &Path,
    release: &str,
    busybox: &[u8],
    modules: &[Module],
) -> io::Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(path)?));
    for directory in DIRECTORIES {
        let permissions = match *directory {
            "tmp" => 0o1777,
            "root" => 0o700,
            _ => 0o755,
        };
        archive.directory(directory, permissions)?;
    }
    // The first process finds its standard streams here.
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.file("bin/busybox", 0o755, busybox)?;
    archive.symlink("bin/sh", "busybox")?;
    for (path, permissions, content) in TEXTS {
        archive.file(path, *permissions, content.as_bytes())?;
    }
    let tree = format!("lib/modules/{release}");
    archive.directory(&tree, 0o755)?;
    for module in modules {
        let path = format!("{tree}/{}.ko", module.name);
        archive.file(&path, 0o644, &module.content)?;
    }
    let dependencies = modules::dependency_file(modules);
    archive.file(
        &format!("{tree}/modules.dep"),
        0o644,
        dependencies.as_bytes(),
    )?;
    let mut aliases = modules::alias_file(modules);
    // The power button's events reach programs through evdev.
    for button in ["LNXPWRBN", "PNP0C0C"] {
        aliases += &format!("alias acpi*:{button}:* evdev\n");
    }
    archive.file(&format!("{tree}/modules.alias"), 0o644, aliases.as_bytes())?;
    archive.finish()?.flush()
}
