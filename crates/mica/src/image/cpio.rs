//! A writer of the "newc" cpio format, the one that the kernel unpacks into its root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Device nodes and ownership by root are entries like any other, so that an archive needs no
//! privilege to make. Everything is owned by root and dated 1970: equal inputs give equal archives.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
pub(crate) struct Archive<W> {
    out: W,
    next_inode: u32,
}

struct Entry<'a> {
    path: &'a str,
    mode: u32,
    device: (u32, u32),
    content: &'a [u8],
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    pub(crate) fn directory(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(&Entry {
            path,
            mode: DIRECTORY | permissions,
            device: (0, 0),
            content: &[],
        })
    }

    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(&Entry {
            path,
            mode: REGULAR | permissions,
            device: (0, 0),
            content,
        })
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(&Entry {
            path,
            mode: SYMLINK | 0o777,
            device: (0, 0),
            content: target.as_bytes(),
        })
    }

    /// A character device with its major and minor number.
    pub(crate) fn character_device(
        &mut self,
        path: &str,
        permissions: u32,
        device: (u32, u32),
    ) -> io::Result<()> {
        self.entry(&Entry {
            path,
            mode: CHARACTER | permissions,
            device,
            content: &[],
        })
    }

    /// Writes the trailer and gives the output back.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry(&Entry {
            path: "TRAILER!!!",
            mode: 0,
            device: (0, 0),
            content: &[],
        })?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, entry.path.to_owned());
        let size = u32::try_from(entry.content.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(entry.path.len() + 1).map_err(|_| too_large())?;
        let links = 1 + u32::from(entry.mode & 0o170_000 == DIRECTORY);
        let header = [
            self.next_inode,
            entry.mode,
            0, // user
            0, // group
            links,
            0, // modification time
            size,
            0, // device of the file system
            0,
            entry.device.0,
            entry.device.1,
            name_size,
            0, // checksum, unused in this variant
        ];
        self.next_inode += 1;
        self.out.write_all(b"070701")?;
        for field in header {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(entry.path.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(6 + 8 * header.len() + entry.path.len() + 1)?;
        self.out.write_all(entry.content)?;
        self.pad(entry.content.len())
    }

    /// Fills up to the next multiple of four behind `written` bytes.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out
            .write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_itself_lists_what_was_written() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin", 0o755).unwrap();
        archive.file("bin/a", 0o644, b"odd").unwrap();
        archive.file("bin/empty", 0o600, b"").unwrap();
        archive.symlink("bin/b", "a").unwrap();
        archive.character_device("console", 0o600, (5, 1)).unwrap();
        let bytes = archive.finish().unwrap();

        let mut cpio = Command::new("cpio")
            .args(["-tv", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<String> = listing
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            lines,
            [
                "drwxr-xr-x 2 0 0 0 Jan 1 1970 bin",
                "-rw-r--r-- 1 0 0 3 Jan 1 1970 bin/a",
                "-rw------- 1 0 0 0 Jan 1 1970 bin/empty",
                "lrwxrwxrwx 1 0 0 1 Jan 1 1970 bin/b -> a",
                "crw------- 1 0 0 5, 1 Jan 1 1970 console",
            ]
        );
    }
}
