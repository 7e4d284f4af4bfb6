//! File systems, and paths that lead through them.
//!
//! Paths are resolved here, component by component, so that directories and symbolic links are
//! bounded before a file system is asked to walk them, and so that a path of the running system
//! (`/boot/vmlinuz`) is found when `/boot` is a partition of its own.

use super::block::Extent;
use super::partitions::Partition;
use super::{DiskError, ext4, fat};

/// Linux follows no more links than this in one path.
const MAX_LINKS: u32 = 40;
/// The most entries of a directory that are looked at.
pub(super) const MAX_DIR_ENTRIES: usize = 4096;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory,
    /// A regular file and its size in bytes.
    File(u64),
    Link,
}

/// A file system. Paths are absolute and normal, and all their components but the last are
/// directories that a call of `node` has seen before.
pub(super) trait FileSystem {
    /// Its UUID or serial number as `blkid` prints it.
    fn uuid(&self) -> String;
    /// Its label.
    fn label(&self) -> String;
    /// What `path` is, itself and not what it links to; nothing if it is missing.
    fn node(&self, path: &str) -> Result<Option<Node>, DiskError>;
    /// Where the link `path` leads.
    fn link(&self, path: &str) -> Result<String, DiskError>;
    /// Appends the file `path` of `len` bytes to `to`.
    fn read(&self, path: &str, len: u64, to: &mut Vec<u8>) -> Result<(), DiskError>;
    /// The names in the directory `path`, at most [`MAX_DIR_ENTRIES`].
    fn list(&self, path: &str) -> Result<Vec<String>, DiskError>;
}

/// A file system and where it lies on the disk.
pub(super) struct Volume {
    /// What GRUB calls it, such as `hd0,gpt2`.
    pub device: String,
    /// What we call it, such as `partition 2 (ext4)`.
    pub name: String,
    number: u32,
    fs: Box<dyn FileSystem>,
}

/// A file, after all links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileAt {
    pub volume: usize,
    pub path: String,
    len: u64,
}

/// All file systems of a disk that can be read.
pub(super) struct Volumes {
    volumes: Vec<Volume>,
    /// Why the others cannot.
    skipped: Vec<String>,
}

/// How far a path led.
enum Walk {
    Found(String, Node),
    /// The path with the links before the missing component replaced.
    Missing(String),
}

impl Volumes {
    /// Opens the file systems of `partitions`, or of the bare `disk` if there are none.
    pub(super) fn open(disk: &Extent, partitions: Vec<Partition>) -> Self {
        let mut all = Self {
            volumes: Vec::new(),
            skipped: Vec::new(),
        };
        if partitions.is_empty() {
            all.add("hd0".into(), "the bare disk", 0, disk);
        }
        for partition in partitions {
            let device = format!("hd0,{}{}", partition.scheme, partition.number);
            let name = format!("partition {}", partition.number);
            all.add(device, &name, partition.number, &partition.extent);
        }
        all
    }

    /// The one volume `fs`.
    pub(super) fn single(fs: Box<dyn FileSystem>) -> Self {
        Self {
            volumes: vec![Volume {
                device: "hd0".into(),
                name: "the bare disk".into(),
                number: 0,
                fs,
            }],
            skipped: Vec::new(),
        }
    }

    fn add(&mut self, device: String, name: &str, number: u32, extent: &Extent) {
        match open(extent) {
            Ok(Some((kind, fs))) => self.volumes.push(Volume {
                device,
                name: format!("{name} ({kind})"),
                number,
                fs,
            }),
            Ok(None) => self.skipped.push(format!("{name} (no ext4 or FAT)")),
            Err(error) => self.skipped.push(format!("{name} ({error})")),
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.volumes.len()
    }

    /// The volume of an index that came from here.
    pub(super) fn get(&self, index: usize) -> &Volume {
        &self.volumes[index]
    }

    /// All partitions that were looked at, for an error.
    pub(super) fn seen(&self) -> String {
        let names = self.volumes.iter().map(|volume| volume.name.clone());
        let all: Vec<_> = names.chain(self.skipped.iter().cloned()).collect();
        all.join(", ")
    }

    /// The first volume of which `matches` says so.
    pub(super) fn find(&self, matches: impl Fn(&dyn FileSystem) -> bool) -> Option<usize> {
        self.volumes.iter().position(|volume| matches(&*volume.fs))
    }

    /// The volume that GRUB's device name means. The disk's own number is not looked at: there is
    /// one disk.
    pub(super) fn by_device(&self, device: &str) -> Option<usize> {
        let number = match device.split_once(',') {
            Some((_, partition)) => partition
                .trim_start_matches(|c: char| !c.is_ascii_digit())
                .parse()
                .ok()?,
            None => 0,
        };
        self.volumes
            .iter()
            .position(|volume| volume.device == device || volume.number == number)
    }

    /// The file at `path` of a volume; nothing if there is none.
    pub(super) fn file(&self, volume: usize, path: &str) -> Result<Option<FileAt>, DiskError> {
        let missing = match self.walk(volume, path)? {
            Walk::Found(path, Node::File(len)) => return Ok(Some(FileAt { volume, path, len })),
            Walk::Found(..) => return Ok(None),
            Walk::Missing(path) => path,
        };
        // `/boot` of the running system may be a partition of its own.
        let Some(rest) = missing.strip_prefix("/boot/") else {
            return Ok(None);
        };
        for volume in 0..self.len() {
            if let Walk::Found(path, Node::File(len)) = self.walk(volume, rest)? {
                return Ok(Some(FileAt { volume, path, len }));
            }
        }
        Ok(None)
    }

    /// What `path` of a volume leads to.
    pub(super) fn node(&self, volume: usize, path: &str) -> Result<Option<Node>, DiskError> {
        Ok(match self.walk(volume, path)? {
            Walk::Found(_, node) => Some(node),
            Walk::Missing(_) => None,
        })
    }

    /// The names in a directory; none if it is missing.
    pub(super) fn list(&self, volume: usize, path: &str) -> Result<Vec<String>, DiskError> {
        match self.walk(volume, path)? {
            Walk::Found(path, Node::Directory) => self.get(volume).fs.list(&path),
            _ => Ok(Vec::new()),
        }
    }

    /// Appends a file of at most `max` bytes to `to`.
    pub(super) fn read(&self, file: &FileAt, max: u64, to: &mut Vec<u8>) -> Result<(), DiskError> {
        if file.len > max {
            return Err(DiskError::TooLarge {
                path: file.path.clone(),
                len: file.len,
                max,
            });
        }
        self.get(file.volume).fs.read(&file.path, file.len, to)
    }

    fn walk(&self, volume: usize, path: &str) -> Result<Walk, DiskError> {
        let fs = &*self.get(volume).fs;
        let mut links = 0;
        let mut rest: Vec<String> = components(path);
        let mut done: Vec<String> = Vec::new();
        let mut node = Node::Directory;
        while let Some(component) = rest.pop() {
            if component == ".." {
                done.pop();
                node = Node::Directory;
                continue;
            }
            done.push(component);
            let here = absolute(&done);
            // A file is no directory to look further in.
            let found = match node {
                Node::Directory => fs.node(&here)?,
                _ => None,
            };
            let Some(found) = found else {
                done.extend(rest.into_iter().rev());
                return Ok(Walk::Missing(absolute(&done)));
            };
            node = found;
            if found == Node::Link {
                links += 1;
                if links > MAX_LINKS {
                    return Err(DiskError::SymlinkLoop(path.into()));
                }
                let target = fs.link(&here)?;
                done.pop();
                if target.starts_with('/') {
                    done.clear();
                }
                rest.extend(components(&target));
                node = Node::Directory;
            }
        }
        Ok(Walk::Found(absolute(&done), node))
    }
}

/// The components of a path, last first.
fn components(path: &str) -> Vec<String> {
    path.rsplit('/')
        .filter(|component| !component.is_empty() && *component != ".")
        .map(str::to_owned)
        .collect()
}

fn absolute(components: &[String]) -> String {
    format!("/{}", components.join("/"))
}

type AnyFileSystem = Box<dyn FileSystem>;

/// The file system in `extent`, with its kind; nothing if it is of no known kind.
fn open(extent: &Extent) -> Result<Option<(&'static str, AnyFileSystem)>, DiskError> {
    if let Some(fs) = ext4::Ext4::open(extent)? {
        return Ok(Some(("ext4", Box::new(fs))));
    }
    if let Some(fs) = fat::Fat::open(extent)? {
        return Ok(Some(("FAT", Box::new(fs))));
    }
    Ok(None)
}
