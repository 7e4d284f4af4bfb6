//! Where images live: a directory with one directory for each image.
//!
//! ```text
//! $MICA_HOME/images/          MICA_HOME is $XDG_DATA_HOME/mica unless it is set
//!   tiny/manifest.json        an image: its manifest and the files it names
//!   tiny/kernel …
//!   .tiny.lock                held while the image is built or removed
//!   .tiny.new/                a build under way
//! ```
//!
//! An image appears whole, by a rename, or not at all. What an interrupted build left behind
//! belongs to nobody once its lock is free, and the next build sweeps it away.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags};

use super::manifest::{Manifest, Role, VERSION};

const MANIFEST: &str = "manifest.json";

/// Why the store cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("nowhere to keep images: set MICA_HOME or HOME")]
    NoHome,
    #[error(
        "'{0}' is no image name: use letters, digits, '.', '_' and '-', first a letter or digit"
    )]
    BadName(String),
    #[error("there is no image '{0}'; 'mica image list' shows those there are")]
    NotFound(String),
    #[error("image '{name}' is damaged: {reason}; build it again or remove it")]
    Damaged { name: String, reason: String },
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Attaches the path to an I/O error.
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T, StoreError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            path: path.to_owned(),
            source,
        })
    }
}

/// An image in the store.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) manifest: Manifest,
    directory: PathBuf,
}

impl Image {
    /// The path of the file with this role, if the image has one.
    pub(crate) fn file(&self, role: Role) -> Option<PathBuf> {
        self.manifest
            .files
            .contains_key(&role)
            .then(|| self.directory.join(role.file_name()))
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the image takes on the disk, in bytes: holes do not count.
    pub(crate) fn disk_usage(&self) -> u64 {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        entries
            .filter_map(|entry| entry.ok()?.metadata().ok())
            .map(|metadata| metadata.blocks() * 512)
            .sum()
    }

    /// Whether every file is there with the size that the manifest says.
    fn is_complete(&self) -> bool {
        self.manifest.files.iter().all(|(role, entry)| {
            self.directory
                .join(role.file_name())
                .metadata()
                .is_ok_and(|metadata| metadata.size() == entry.size)
        })
    }
}

/// A name in the store, with the image under it or what is wrong with it.
pub(crate) type Listed = (String, Result<Image, StoreError>);

/// The directory of all images.
pub(crate) struct Store {
    root: PathBuf,
}

impl Store {
    /// The user's store.
    pub(crate) fn open() -> Result<Self, StoreError> {
        let home = match non_empty("MICA_HOME") {
            Some(home) => home,
            None => xdg_directory("XDG_DATA_HOME", ".local/share")?,
        };
        Ok(Self {
            root: home.join("images"),
        })
    }

    /// Finds an image by its name.
    pub(crate) fn find(&self, name: &str) -> Result<Image, StoreError> {
        check_name(name)?;
        let directory = self.root.join(name);
        let path = directory.join(MANIFEST);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound(name.to_owned()));
            }
            other => other.at(&path)?,
        };
        let damaged = |reason: String| StoreError::Damaged {
            name: name.to_owned(),
            reason,
        };
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if manifest.version != VERSION {
            return Err(damaged(format!(
                "its manifest has version {}, this program knows {VERSION}",
                manifest.version
            )));
        }
        let image = Image {
            manifest,
            directory,
        };
        if !image.is_complete() {
            return Err(damaged("a file is missing or cut short".to_owned()));
        }
        Ok(image)
    }

    /// All images by name; a damaged one is an error in its place.
    pub(crate) fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.at(&self.root)?,
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort_unstable();
        Ok(names
            .into_iter()
            .map(|name| {
                let image = self.find(&name);
                (name, image)
            })
            .collect())
    }

    /// Locks an image's name for a build or a removal; waits for whoever holds it.
    pub(crate) fn lock(&self, name: &str, on_wait: impl FnOnce()) -> Result<Locked, StoreError> {
        check_name(name)?;
        let lock = lock_file(&self.root, &format!(".{name}.lock"), on_wait)?;
        Ok(Locked {
            name: name.to_owned(),
            root: self.root.clone(),
            _lock: lock,
        })
    }
}

/// Takes an exclusive lock on `directory/name`, which it creates.
pub(crate) fn lock_file(
    directory: &Path,
    name: &str,
    on_wait: impl FnOnce(),
) -> Result<File, StoreError> {
    fs::create_dir_all(directory).at(directory)?;
    let path = directory.join(name);
    let file = File::create(&path).at(&path)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        on_wait();
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .at(&path)?;
    }
    Ok(file)
}

/// The sole right to change the image of one name.
pub(crate) struct Locked {
    name: String,
    root: PathBuf,
    _lock: File,
}

impl Locked {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// An empty directory to build the image in.
    pub(crate) fn stage(&self) -> Result<Stage<'_>, StoreError> {
        let path = self.root.join(format!(".{}.new", self.name));
        remove_if_there(&path).at(&path)?;
        fs::create_dir(&path).at(&path)?;
        Ok(Stage { locked: self, path })
    }

    /// Removes the image. Guests that run from it keep their files until they end.
    pub(crate) fn remove(self) -> Result<(), StoreError> {
        let path = self.root.join(&self.name);
        // Out of sight first, so that nobody finds half an image.
        let doomed = self.root.join(format!(".{}.new", self.name));
        remove_if_there(&doomed).at(&doomed)?;
        match fs::rename(&path, &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound(self.name));
            }
            other => other.at(&path)?,
        }
        fs::remove_dir_all(&doomed).at(&doomed)
    }
}

/// A build under way; dropped without [`Stage::commit`], it leaves nothing.
pub(crate) struct Stage<'a> {
    locked: &'a Locked,
    path: PathBuf,
}

impl Stage<'_> {
    /// The name of the image to be.
    pub(crate) fn name(&self) -> &str {
        &self.locked.name
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, role: Role) -> PathBuf {
        self.path.join(role.file_name())
    }

    /// Makes the build the image of its name, in one step, in place of the one before.
    pub(crate) fn commit(self, manifest: Manifest) -> Result<Image, StoreError> {
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(io::Error::from)
            .at(&self.path)?;
        fs::write(self.path.join(MANIFEST), text + "\n").at(&self.path)?;
        let directory = self.locked.root.join(&self.locked.name);
        if directory.exists() {
            rustix::fs::renameat_with(CWD, &self.path, CWD, &directory, RenameFlags::EXCHANGE)
                .map_err(io::Error::from)
                .at(&directory)?;
            // What is under the stage's name now is the image before; the drop removes it.
        } else {
            fs::rename(&self.path, &directory).at(&directory)?;
        }
        Ok(Image {
            manifest,
            directory,
        })
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        // A failure leaves a hidden directory that the next build of this name removes.
        let _ = remove_if_there(&self.path);
    }
}

/// The cache of everything that can be had again.
pub(crate) fn cache_directory() -> Result<PathBuf, StoreError> {
    xdg_directory("XDG_CACHE_HOME", ".cache")
}

fn xdg_directory(variable: &str, below_home: &str) -> Result<PathBuf, StoreError> {
    let base = match non_empty(variable) {
        Some(base) => base,
        None => non_empty("HOME")
            .ok_or(StoreError::NoHome)?
            .join(below_home),
    };
    Ok(base.join("mica"))
}

fn non_empty(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn check_name(name: &str) -> Result<(), StoreError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let good = name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(plain);
    if good {
        Ok(())
    } else {
        Err(StoreError::BadName(name.to_owned()))
    }
}
