//! The lab's kernel, its modules and busybox: Debian's packages, fetched and verified by the host's
//! own package client, unpacked once under `target/lab`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result, output_of};
use crate::workspace;

const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";

/// Debian's kernel and busybox, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    root: PathBuf,
    release: String,
}

impl Kernel {
    /// Unpacks the newest kernel that the package client knows, unless one was unpacked before.
    ///
    /// # Errors
    ///
    /// The host has no `apt-get`, or the packages cannot be fetched.
    pub fn fetch() -> Result<Kernel> {
        let lab = workspace::target_directory().join("lab");
        let root = lab.join("root");
        if !root.exists() {
            fs::create_dir_all(&lab).map_err(Error::file("create", &lab))?;
            eprintln!("lab: fetching Debian's {KERNEL} and {BUSYBOX}");
            let unpacked = tempfile::tempdir_in(&lab).map_err(Error::file("write to", &lab))?;
            for package in [image_package()?.as_str(), BUSYBOX] {
                fetch(package, unpacked.path())?;
            }
            match fs::rename(unpacked.keep(), &root) {
                Ok(()) => {}
                // Another process was faster.
                Err(_) if root.exists() => {}
                Err(source) => return Err(Error::file("create", &root)(source)),
            }
        }
        let modules = root.join("lib/modules");
        let release = fs::read_dir(&modules)
            .map_err(Error::file("read", &modules))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .max()
            .ok_or_else(|| {
                Error::Other(format!("{} holds no kernel: remove it", root.display()))
            })?;
        Ok(Kernel { root, release })
    }

    /// The bzImage.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Busybox, statically linked.
    #[must_use]
    pub fn busybox(&self) -> PathBuf {
        self.root.join("bin/busybox")
    }

    /// The files of these modules and of what they need, in the order of loading.
    ///
    /// # Errors
    ///
    /// The kernel has no such module.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        list_modules(
            &self
                .root
                .join("lib/modules")
                .join(&self.release)
                .join("kernel"),
            &mut files,
        )?;
        let mut ordered = Vec::new();
        for name in names {
            self.add_module(name, &files, &mut ordered)?;
        }
        Ok(ordered)
    }

    fn add_module(&self, name: &str, files: &[PathBuf], ordered: &mut Vec<PathBuf>) -> Result<()> {
        let wanted = module_name(name);
        let file = files
            .iter()
            .find(|file| {
                file.file_stem()
                    .is_some_and(|stem| module_name(&stem.to_string_lossy()) == wanted)
            })
            .ok_or_else(|| Error::Other(format!("kernel {} has no module {name}", self.release)))?;
        if ordered.contains(file) {
            return Ok(());
        }
        for needed in dependencies(&fs::read(file).map_err(Error::file("read", file))?) {
            self.add_module(&needed, files, ordered)?;
        }
        ordered.push(file.clone());
        Ok(())
    }
}

/// The package of the newest kernel, which the metapackage depends on.
fn image_package() -> Result<String> {
    let shown = output_of(Command::new("apt-cache").args(["show", KERNEL]), "apt")?;
    shown
        .lines()
        .filter_map(|line| line.strip_prefix("Depends: "))
        .flat_map(|depends| depends.split(", "))
        .filter_map(|depend| depend.split(' ').next())
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| {
            Error::Other(format!(
                "the package client knows no {KERNEL}: run `apt-get update`"
            ))
        })
}

fn fetch(package: &str, to: &Path) -> Result<()> {
    let download = tempfile::tempdir().map_err(Error::io("create a temporary directory"))?;
    output_of(
        Command::new("apt-get")
            .arg("download")
            .arg(package)
            .current_dir(&download),
        "apt",
    )?;
    let entries = fs::read_dir(&download).map_err(Error::file("read", download.path()))?;
    for entry in entries {
        let file = entry.map_err(Error::file("read", download.path()))?.path();
        output_of(
            Command::new("dpkg-deb").arg("-x").arg(&file).arg(to),
            "dpkg",
        )?;
    }
    Ok(())
}

fn list_modules(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::file("read", directory))? {
        let path = entry.map_err(Error::file("read", directory))?.path();
        if path.is_dir() {
            list_modules(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "ko") {
            files.push(path);
        }
    }
    Ok(())
}

/// A module's name has underscores, its file's often hyphens.
fn module_name(name: &str) -> String {
    name.replace('-', "_")
}

/// The `depends=` entry of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[start + KEY.len()..];
    let end = value
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_modinfo() {
        let cases: [(&[u8], &[&str]); 4] = [
            (
                b"\x7fELF\0license=GPL\0depends=kvm,irqbypass\0name=x\0",
                &["kvm", "irqbypass"],
            ),
            (b"\x7fELF\0depends=\0name=x\0", &[]),
            (b"\x7fELF\0name=x\0", &[]),
            (b"\0depends=cut", &["cut"]),
        ];
        for (module, expected) in cases {
            assert_eq!(dependencies(module), expected, "{}", module.escape_ascii());
        }
    }
}
