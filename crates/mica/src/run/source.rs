//! What a VM boots from: an image, a disk, or a kernel given by hand.

use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};

use mica_machine::vmm::channel::Attachments;
use mica_machine::vmm::config::BootConfig;

use super::ephemeral::EphemeralDisk;
use super::options::Options;
use crate::image::{self, Image, Role, StoreError};

/// What was found for the command line.
pub(crate) enum Source {
    /// A kernel with its initial RAM disk and command line.
    Kernel {
        name: String,
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
        /// They are an image's, which appears and vanishes as a whole and is never written to.
        unchanging: bool,
    },
    /// A disk that holds its own kernel; it is the VM's first disk too.
    Disk {
        name: String,
        disk: PathBuf,
        /// What `disk` is the path of, where it is a copy.
        copy: Option<EphemeralDisk>,
    },
    /// A recording, which is opened elsewhere.
    Recording,
}

impl Source {
    /// Finds what the command line speaks of.
    ///
    /// # Errors
    ///
    /// There is neither an image nor a file of that name, or its disk cannot be copied.
    pub(crate) fn resolve(options: &Options) -> Result<Self, Box<dyn Error>> {
        let mut source = Self::find(options)?;
        if options.ephemeral {
            match &mut source {
                Self::Disk { disk, copy, .. } => {
                    let made = EphemeralDisk::of(disk)?;
                    *disk = made.path();
                    *copy = Some(made);
                }
                Self::Kernel { .. } | Self::Recording => {
                    return Err("--ephemeral: there is no disk to copy".into());
                }
            }
        }
        Ok(source)
    }

    fn find(options: &Options) -> Result<Self, Box<dyn Error>> {
        if options.replay.is_some() {
            return Ok(Self::Recording);
        }
        if let Some(kernel) = &options.kernel {
            if options.image.is_some() {
                return Err("give an image or --kernel, not both".into());
            }
            return Ok(Self::Kernel {
                name: name_of(kernel),
                kernel: kernel.clone(),
                initrd: options.initrd.clone(),
                cmdline: String::from("console=ttyS0"),
                unchanging: false,
            });
        }
        let wanted = options
            .image
            .as_deref()
            .ok_or("give an image, a disk or --kernel")?;
        let path = Path::new(wanted);
        if !wanted.contains('/') {
            match image::find(wanted) {
                Ok(image) => return Self::from_image(wanted, &image),
                Err(StoreError::NotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !path.exists() {
            return Err(format!(
                "there is no image and no file called '{wanted}'; 'mica image build tiny' makes a \
                 small guest, 'mica image list' shows what there is"
            )
            .into());
        }
        Ok(Self::Disk {
            name: name_of(path),
            disk: path.to_owned(),
            copy: None,
        })
    }

    fn from_image(name: &str, image: &Image) -> Result<Self, Box<dyn Error>> {
        let name = name.to_owned();
        if let Some(disk) = image.file(Role::Disk) {
            return Ok(Self::Disk {
                name,
                disk,
                copy: None,
            });
        }
        // Unpacked once when the image was built, rather than at each start.
        let kernel = image
            .file(Role::Vmlinux)
            .or_else(|| image.file(Role::Kernel));
        let cmdline = image.manifest.kernel.command_line.clone();
        Ok(Self::Kernel {
            kernel: kernel.ok_or_else(|| format!("image '{name}' has neither disk nor kernel"))?,
            initrd: image.file(Role::Initrd),
            cmdline: cmdline.unwrap_or_default(),
            unchanging: true,
            name,
        })
    }

    /// The disk that is booted from, if it is one.
    pub(crate) fn disk(&self) -> Option<&Path> {
        match self {
            Self::Disk { disk, .. } => Some(disk),
            Self::Kernel { .. } | Self::Recording => None,
        }
    }

    /// What the VM is called unless told otherwise.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Kernel { name, .. } | Self::Disk { name, .. } => name.clone(),
            Self::Recording => "replay".to_owned(),
        }
    }

    /// Opens what is booted, for the VM process to read.
    ///
    /// # Errors
    ///
    /// A file cannot be opened.
    pub(crate) fn boot_config(
        &self,
        options: &Options,
        attachments: &mut Attachments,
    ) -> Result<BootConfig, Box<dyn Error>> {
        let mut open = |path: &Path| -> Result<_, Box<dyn Error>> {
            let file = File::open(path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            Ok(attachments.attach(file))
        };
        let append = options.append.clone().unwrap_or_default();
        match self {
            Self::Recording => Ok(BootConfig::Recording),
            Self::Kernel {
                kernel,
                initrd,
                cmdline,
                unchanging,
                ..
            } => {
                let cmdline = options.cmdline.as_ref().unwrap_or(cmdline);
                Ok(BootConfig::Kernel {
                    kernel: open(kernel)?,
                    initrd: initrd.as_deref().map(open).transpose()?,
                    cmdline: format!("{cmdline} {append}").trim_end().to_owned(),
                    unchanging: *unchanging,
                })
            }
            Self::Disk { disk, .. } => Ok(BootConfig::Disk {
                disk: open(disk)?,
                entry: options.boot_entry.clone(),
                cmdline: options.cmdline.clone(),
                append,
            }),
        }
    }
}

/// A VM's name after a file's.
fn name_of(path: &Path) -> String {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy())
        .unwrap_or_default();
    let name: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' || c == '_' {
                c
            } else {
                '-'
            }
        })
        .take(40)
        .collect();
    if name.is_empty() {
        "vm".to_owned()
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_files() {
        for (path, name) in [
            ("/boot/vmlinuz-6.1.0", "vmlinuz-6-1"),
            ("disk.img", "disk"),
            ("/dev/vdb", "vdb"),
            ("/x/ü.raw", "-"),
        ] {
            assert_eq!(name_of(Path::new(path)), name);
        }
    }
}
