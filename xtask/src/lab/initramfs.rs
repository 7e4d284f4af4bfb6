//! The initial file system, as an uncompressed cpio archive in the "newc" form that the kernel
//! reads (its Documentation/driver-api/early-userspace/buffer-format.rst). Uncompressed, because
//! unpacking would run on a software CPU.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes the archive; parents of what is added are created on the way.
pub struct Archive<W> {
    out: W,
    directories: BTreeSet<String>,
    entries: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Archive<W> {
        Archive {
            out,
            directories: BTreeSet::new(),
            entries: 0,
        }
    }

    /// Adds a folder with its parents.
    ///
    /// # Errors
    ///
    /// The archive cannot be written; so for all that add something.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        let mut name = String::new();
        for part in Path::new(path).components() {
            let Component::Normal(part) = part else {
                continue;
            };
            if !name.is_empty() {
                name.push('/');
            }
            name.push_str(&part.to_string_lossy());
            if self.directories.insert(name.clone()) {
                self.entry(&name, DIRECTORY, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file.
    ///
    /// # Errors
    ///
    /// See [`Archive::directory`].
    pub fn file(&mut self, path: &str, executable: bool, data: &[u8]) -> io::Result<()> {
        self.parent(path)?;
        let mode = if executable { EXECUTABLE } else { FILE };
        self.entry(path.trim_start_matches('/'), mode, (0, 0), data)
    }

    /// The kernel opens `/dev/console` for the first process before anything is mounted.
    ///
    /// # Errors
    ///
    /// See [`Archive::directory`].
    pub fn console(&mut self) -> io::Result<()> {
        self.device("dev/console", (5, 1))
    }

    /// Adds a character device by its major and minor number.
    ///
    /// # Errors
    ///
    /// See [`Archive::directory`].
    pub fn device(&mut self, path: &str, number: (u32, u32)) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, CHARACTER_DEVICE, number, &[])
    }

    /// Ends the archive.
    ///
    /// # Errors
    ///
    /// See [`Archive::directory`].
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parent(&mut self, path: &str) -> io::Result<()> {
        match Path::new(path).parent() {
            Some(parent) => self.directory(&parent.to_string_lossy()),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::other(format!("{name} is too large for an initramfs")))?;
        self.entries += 1;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let (inode, links, time) = (self.entries, 1, 0);
        write!(self.out, "070701")?;
        for field in [
            inode, mode, 0, 0, links, time, size, 0, 0, device.0, device.1, name_size, 0,
        ] {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        // The header has 110 bytes; name and data each end on a multiple of four.
        let name_end = 110 + name.len() + 1;
        self.out.write_all(&[0; 4][..1 + padding(name_end)])?;
        self.out.write_all(data)?;
        self.out.write_all(&[0; 4][..padding(data.len())])
    }
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// GNU cpio reads back what we wrote.
    #[test]
    fn cpio_lists_it() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/one", true, b"12345").unwrap();
        archive.file("a/two", false, b"").unwrap();
        archive.console().unwrap();
        let bytes = archive.finish().unwrap();
        let mut cpio = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let listed = String::from_utf8(output.stdout).unwrap();
        let entries: Vec<(&str, &str)> = listed
            .lines()
            .map(|line| (&line[..10], line.rsplit(' ').next().unwrap()))
            .collect();
        assert_eq!(
            entries,
            [
                ("drwxr-xr-x", "a"),
                ("drwxr-xr-x", "a/b"),
                ("-rwxr-xr-x", "a/b/one"),
                ("-rw-r--r--", "a/two"),
                ("drwxr-xr-x", "dev"),
                ("crw-------", "dev/console"),
            ]
        );
    }
}
