//! Boot entries inside a disk image, found on the host as Xen's pygrub does.
//!
//! ```text
//! disk ─ partition table ─ file systems ─┬ loader/entries/*.conf  (systemd-boot, Fedora)
//!        GPT, MBR, none    ext4, FAT     └ grub.cfg               (grub-mkconfig)
//! ```
//!
//! The default is the one that the disk's own boot loader would take: systemd-boot's if it is
//! installed (`loader/loader.conf`), else GRUB's, else the newest loader entry. Everything on the
//! disk is untrusted: sizes, counts, depths and chains are bounded, and what is malformed is an
//! error.

mod block;
mod bls;
mod error;
mod ext4;
mod fat;
pub mod fuzz;
mod grub;
mod partitions;
#[cfg(test)]
mod tests;
mod version;
mod volume;

use std::rc::Rc;

pub use self::block::BlockRead;
use self::block::Extent;
pub use self::error::DiskError;
use self::volume::{Node, Volumes};
use super::{MAX_INITRD, MAX_KERNEL};

/// The largest configuration file, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// A path on one of the disk's volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    volume: usize,
    path: String,
}

/// A boot entry before its files are read.
#[derive(Clone, Debug)]
struct Found {
    title: String,
    id: String,
    kernel: Place,
    initrds: Vec<Place>,
    command_line: String,
    source: String,
}

/// What a boot entry says, for people to choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryInfo {
    /// The title in the menu; those of a submenu have its title and `>` before.
    pub title: String,
    /// The identifier that the boot loader uses; may be empty.
    pub id: String,
    /// The kernel's path on its partition.
    pub kernel: String,
    /// The initrds' paths on their partitions.
    pub initrds: Vec<String>,
    /// The kernel's command line.
    pub command_line: String,
    /// The file and partition that the entry is from.
    pub source: String,
    /// The entry that [`Choice::Default`] takes.
    pub default: bool,
}

/// A boot entry with its files.
#[derive(Debug)]
pub struct BootEntry {
    /// As in [`EntryInfo::title`].
    pub title: String,
    /// The kernel file's bytes: bzImage or ELF.
    pub kernel: Vec<u8>,
    /// All initrds, one behind the other.
    pub initrd: Option<Vec<u8>>,
    /// The kernel's command line.
    pub command_line: String,
    /// The file and partition that the entry is from.
    pub source: String,
}

/// Which boot entry to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice<'a> {
    /// The disk's own default.
    Default,
    /// The entry of this index in what [`entries`] returns.
    Index(usize),
    /// The first entry with this title or identifier.
    Title(&'a str),
}

/// All Linux boot entries of a disk, those of the default's boot loader first.
///
/// # Errors
/// The disk cannot be read, is malformed, or has no entry.
pub fn entries(disk: &Rc<dyn BlockRead>) -> Result<Vec<EntryInfo>, DiskError> {
    let volumes = open(disk)?;
    let (found, default) = find(&volumes)?;
    let info = |(index, found): (usize, Found)| EntryInfo {
        title: found.title,
        id: found.id,
        kernel: found.kernel.path,
        initrds: found.initrds.into_iter().map(|place| place.path).collect(),
        command_line: found.command_line,
        source: found.source,
        default: index == default,
    };
    Ok(found.into_iter().enumerate().map(info).collect())
}

/// Reads the kernel and initrd of a boot entry.
///
/// # Errors
/// As for [`entries`]; there is no such entry; its files are missing or too large.
pub fn read(disk: &Rc<dyn BlockRead>, choice: Choice<'_>) -> Result<BootEntry, DiskError> {
    let volumes = open(disk)?;
    let (mut found, default) = find(&volumes)?;
    let index = match choice {
        Choice::Default => Some(default),
        Choice::Index(index) => Some(index).filter(|index| *index < found.len()),
        Choice::Title(title) => found
            .iter()
            .position(|found| found.title == title || found.id == title),
    };
    let Some(index) = index else {
        let titles: Vec<_> = found
            .iter()
            .map(|found| format!("'{}'", found.title))
            .collect();
        return Err(DiskError::NoSuchEntry {
            wanted: match choice {
                Choice::Index(index) => index.to_string(),
                Choice::Title(title) => title.to_owned(),
                Choice::Default => "default".to_owned(),
            },
            titles: titles.join(", "),
        });
    };
    let found = found.swap_remove(index);
    let mut kernel = Vec::new();
    append(&volumes, &found.kernel, MAX_KERNEL, &mut kernel)?;
    let mut initrd = Vec::new();
    for place in &found.initrds {
        // Archives behind each other start at multiples of four bytes.
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        append(&volumes, place, MAX_INITRD, &mut initrd)?;
    }
    Ok(BootEntry {
        title: found.title,
        kernel,
        initrd: (!found.initrds.is_empty()).then_some(initrd),
        command_line: found.command_line,
        source: found.source,
    })
}

/// Reads a file behind what `to` has, to at most `max` bytes together.
fn append(volumes: &Volumes, place: &Place, max: u64, to: &mut Vec<u8>) -> Result<(), DiskError> {
    let file = volumes
        .file(place.volume, &place.path)?
        .ok_or_else(|| DiskError::NotFound {
            path: place.path.clone(),
            volume: volumes.get(place.volume).name.clone(),
        })?;
    volumes.read(&file, max.saturating_sub(to.len() as u64), to)
}

fn open(disk: &Rc<dyn BlockRead>) -> Result<Volumes, DiskError> {
    let disk = Extent::whole(disk)?;
    // A file system without a table may have a boot sector that looks like one.
    let bare = Volumes::open(&disk, Vec::new());
    if bare.len() > 0 {
        return Ok(bare);
    }
    let partitions = partitions::partitions(&disk)?;
    Ok(Volumes::open(&disk, partitions))
}

/// All entries, and the index of the default. A boot loader whose configuration is malformed
/// counts only if no other has an entry.
fn find(volumes: &Volumes) -> Result<(Vec<Found>, usize), DiskError> {
    let mut all = Vec::new();
    let mut default = None;
    let mut first_error = None;
    let mut add = |menu: Result<(Vec<Found>, usize), DiskError>| match menu {
        Ok((found, index)) => {
            if !found.is_empty() {
                default = default.or(Some(all.len() + index));
            }
            all.extend(found);
        }
        Err(error) => {
            first_error.get_or_insert(error);
        }
    };
    let (installed, plain) = loader_directories(volumes);
    for (volume, path) in installed {
        add(bls::menu(volumes, volume, path));
    }
    match grub::configs(volumes) {
        Ok(configs) => configs
            .iter()
            .for_each(|config| add(grub::menu(volumes, config))),
        Err(error) => add(Err(error)),
    }
    for (volume, path) in plain {
        add(bls::menu(volumes, volume, path));
    }
    match (default, first_error) {
        (Some(default), _) => Ok((all, default)),
        (None, Some(error)) => Err(error),
        (None, None) => Err(DiskError::NoEntries {
            seen: volumes.seen(),
        }),
    }
}

type Directories = Vec<(usize, &'static str)>;

/// The directories of loader entries: those with systemd-boot's configuration, and the others.
fn loader_directories(volumes: &Volumes) -> (Directories, Directories) {
    (0..volumes.len())
        .flat_map(|volume| [(volume, "/loader"), (volume, "/boot/loader")])
        .filter(|(volume, path)| {
            let entries = volumes.node(*volume, &format!("{path}/entries"));
            matches!(entries, Ok(Some(Node::Directory)))
        })
        .partition(|(volume, path)| {
            let config = volumes.node(*volume, &format!("{path}/loader.conf"));
            matches!(config, Ok(Some(Node::File(_))))
        })
}
