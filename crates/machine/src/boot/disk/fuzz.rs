//! Entry points for the fuzzer, one for each format that a disk may hold.

use std::rc::Rc;

use super::block::{BlockRead, Extent};
use super::partitions::partitions;
use super::volume::{FileSystem, Node, Volumes};
use super::{DiskError, bls, ext4, fat, grub};

fn extent(data: &[u8]) -> Extent {
    let disk: Rc<dyn BlockRead> = Rc::new(data.to_vec());
    Extent::whole(&disk).expect("invariant: bytes in memory have a size")
}

/// Reads `data` as a disk's partition table.
///
/// # Panics
/// A partition reaches beyond the disk.
#[doc(hidden)]
pub fn fuzz_partitions(data: &[u8]) {
    let Ok(partitions) = partitions(&extent(data)) else {
        return;
    };
    for partition in partitions {
        let len = partition.extent.len();
        assert!(partition.number > 0 && len <= data.len() as u64);
        let mut last = [0];
        partition
            .extent
            .read(len - 1, &mut last)
            .expect("invariant: a partition lies within its disk");
    }
}

/// Reads `data` as a FAT file system.
///
/// # Panics
/// A file's bytes are not as many as its directory entry says.
#[doc(hidden)]
pub fn fuzz_fat(data: &[u8]) {
    if let Ok(Some(fs)) = fat::Fat::open(&extent(data)) {
        visit(&fs);
    }
}

/// Reads `data` as an ext4 file system.
///
/// # Panics
/// A file's bytes are not as many as its inode says.
#[doc(hidden)]
pub fn fuzz_ext4(data: &[u8]) {
    if let Ok(Some(fs)) = ext4::Ext4::open(&extent(data)) {
        visit(&fs);
    }
}

/// Reads what lies in the root directory and one level below.
fn visit(fs: &dyn FileSystem) {
    let mut rest = vec!["/".to_owned()];
    let mut budget = 64;
    while let Some(path) = rest.pop() {
        match fs.node(&path) {
            Ok(Some(Node::Directory)) if path.matches('/').count() < 3 => {
                let parent = path.trim_end_matches('/');
                for name in fs.list(&path).unwrap_or_default() {
                    if budget > 0 && name != "." && name != ".." {
                        budget -= 1;
                        rest.push(format!("{parent}/{name}"));
                    }
                }
            }
            Ok(Some(Node::File(len))) if len <= 1 << 20 => {
                let mut bytes = Vec::new();
                if fs.read(&path, len, &mut bytes).is_ok() {
                    assert_eq!(bytes.len() as u64, len, "{path}");
                }
            }
            Ok(Some(Node::Link)) => {
                let _ = fs.link(&path);
            }
            _ => {}
        }
    }
}

/// A file system whose files, all with the same content, are given by their directories.
struct Uniform {
    directory: &'static str,
    name: &'static str,
    content: Vec<u8>,
}

impl FileSystem for Uniform {
    fn uuid(&self) -> String {
        "9f0c".into()
    }

    fn label(&self) -> String {
        "root".into()
    }

    fn node(&self, path: &str) -> Result<Option<Node>, DiskError> {
        let file = format!("{}/{}", self.directory, self.name);
        Ok(match path {
            path if path == file => Some(Node::File(self.content.len() as u64)),
            path if file.starts_with(path) => Some(Node::Directory),
            _ => None,
        })
    }

    fn link(&self, _: &str) -> Result<String, DiskError> {
        Ok("/".into())
    }

    fn read(&self, _: &str, _: u64, to: &mut Vec<u8>) -> Result<(), DiskError> {
        to.extend_from_slice(&self.content);
        Ok(())
    }

    fn list(&self, path: &str) -> Result<Vec<String>, DiskError> {
        let inside = path == self.directory;
        Ok(inside.then(|| self.name.to_owned()).into_iter().collect())
    }
}

fn volume(directory: &'static str, name: &'static str, data: &[u8]) -> Volumes {
    Volumes::single(Box::new(Uniform {
        directory,
        name,
        content: data.to_vec(),
    }))
}

/// Runs `data` as grub.cfg, which may include itself.
///
/// # Panics
/// The default is none of the entries.
#[doc(hidden)]
pub fn fuzz_grub(data: &[u8]) {
    let volumes = volume("/boot/grub", "grub.cfg", data);
    let configs = grub::configs(&volumes).expect("invariant: this file system has no errors");
    if let Ok((found, default)) = grub::menu(&volumes, &configs[0]) {
        assert!(found.is_empty() || default < found.len());
    }
}

/// Reads `data` as a loader entry and as loader.conf.
///
/// # Panics
/// The default is none of the entries.
#[doc(hidden)]
pub fn fuzz_bls(data: &[u8]) {
    let volumes = volume("/loader/entries", "a+2-1.conf", data);
    let (found, _) =
        bls::menu(&volumes, 0, "/loader").expect("invariant: a loader entry is never malformed");
    assert!(found.len() <= 1);
    let entry = bls::Entry::parse("a-6.1.conf", "linux /a");
    assert_eq!(
        bls::default_index(&[entry], &String::from_utf8_lossy(data)),
        0
    );
}
