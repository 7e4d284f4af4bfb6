//! An image's manifest, `manifest.json`; docs/formats/image-manifest.md describes each field.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The version of the format that this program writes and the only one that it reads.
pub(crate) const VERSION: u32 = 1;

/// What an image is and what it was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) version: u32,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// When the build ended: RFC 3339, in UTC.
    pub(crate) created: String,
    /// What determines the content. A build with an equal recipe would give an equal image.
    pub(crate) recipe: Vec<String>,
    pub(crate) kernel: Kernel,
    /// The image's files by what they are for.
    pub(crate) files: BTreeMap<Role, FileEntry>,
    /// Every Debian package in the image, with its version.
    pub(crate) packages: BTreeMap<String, String>,
}

/// The kinds of image that `mica image build` makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A kernel and an initramfs.
    Tiny,
    /// A bootable disk.
    Debian,
}

impl Kind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Debian => "debian",
        }
    }
}

/// The kernel that the image boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kernel {
    /// As `uname -r` tells it.
    pub(crate) release: String,
    /// The command line to boot it with, unless the user gives another. Absent where the image's
    /// own boot entries say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) command_line: Option<String>,
}

/// What a file of an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// The kernel as its package ships it.
    Kernel,
    /// The same kernel unpacked to its ELF file.
    Vmlinux,
    /// The initial RAM disk.
    Initrd,
    /// A raw disk that guests write to.
    Disk,
}

impl Role {
    /// The name of the file in the image's directory.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Vmlinux => "vmlinux",
            Self::Initrd => "initrd",
            Self::Disk => "disk.raw",
        }
    }
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    /// Its size in bytes, holes included.
    pub(crate) size: u64,
    /// The CRC-32 of its content; absent for a disk, which guests write to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) crc32: Option<u32>,
}

impl FileEntry {
    /// Describes a file that no guest writes to.
    pub(crate) fn of_file(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut crc = flate2::Crc::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            crc.update(&buffer[..read]);
        }
        Ok(Self {
            size: file.metadata()?.size(),
            crc32: Some(crc.sum()),
        })
    }

    /// Describes a disk.
    pub(crate) fn of_disk(path: &Path) -> io::Result<Self> {
        Ok(Self {
            size: path.metadata()?.size(),
            crc32: None,
        })
    }
}

/// The present time as RFC 3339 has it, to the second.
pub(crate) fn now() -> String {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    rfc3339(since_epoch.as_secs())
}

/// Seconds since 1970 as a date and time; the civil calendar by counting years from March, so that
/// the leap day is a year's last.
fn rfc3339(seconds: u64) -> String {
    const DAYS_TO_1970_FROM_MARCH_0000: u64 = 719_468;
    const DAYS_PER_ERA: u64 = 146_097;
    let days = seconds / 86_400 + DAYS_TO_1970_FROM_MARCH_0000;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let time = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        time / 3_600,
        time / 60 % 60,
        time % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_come_out_as_the_calendar_has_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }

    #[test]
    fn a_manifest_comes_back_as_it_went_out() {
        let manifest = Manifest {
            version: VERSION,
            name: "tiny".to_owned(),
            kind: Kind::Tiny,
            created: rfc3339(0),
            recipe: vec!["busybox-static=1".to_owned()],
            kernel: Kernel {
                release: "6.1.0".to_owned(),
                command_line: Some("quiet".to_owned()),
            },
            files: BTreeMap::from([(
                Role::Kernel,
                FileEntry {
                    size: 3,
                    crc32: Some(7),
                },
            )]),
            packages: BTreeMap::from([("busybox-static".to_owned(), "1".to_owned())]),
        };
        let text = serde_json::to_string(&manifest).unwrap();
        assert_eq!(serde_json::from_str::<Manifest>(&text).unwrap(), manifest);
    }
}
