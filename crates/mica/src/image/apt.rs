//! Debian's packages through the host's own client, which finds, fetches and authenticates them.
//!
//! No step needs root. Packages stay in a cache of the user's, where `apt-get download` checks
//! them again before it takes them for what they claim to be.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::store::{At, StoreError, cache_directory, lock_file};
use super::tool::{ToolError, Tools};

/// Why the packages cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AptError {
    #[error(
        "images are made of Debian's packages through apt, and this host has no '{0}': build on \
         Debian, or in a Debian container, and copy the image's directory here"
    )]
    NoApt(String),
    #[error(
        "apt does not know what packages there are; run 'apt-get update' as root, then try again"
    )]
    NoLists,
    #[error(
        "apt on this host has no package '{0}'; its sources must name a Debian archive \
         (and 'apt-get update' must have run since)"
    )]
    Unknown(String),
    #[error("the package {package} lacks what an image is made of: {what}")]
    Unexpected { package: String, what: String },
    #[error(transparent)]
    Tool(ToolError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<ToolError> for AptError {
    fn from(error: ToolError) -> Self {
        match error {
            ToolError::Missing { program, .. } => Self::NoApt(program),
            other => Self::Tool(other),
        }
    }
}

/// A package as the archive describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    architecture: String,
    /// What it depends on, as the control file writes it.
    pub(crate) depends: String,
}

impl Package {
    /// As `apt-get` takes it: the name with the exact version.
    pub(crate) fn pinned(&self) -> String {
        format!("{}={}", self.name, self.version)
    }

    fn file_name(&self) -> String {
        format!(
            "{}_{}_{}.deb",
            self.name,
            self.version.replace(':', "%3a"),
            self.architecture
        )
    }
}

/// The versions that apt would install now, in the order of the names.
pub(crate) fn candidates(tools: &Tools, names: &[&str]) -> Result<Vec<Package>, AptError> {
    let printed = tools.run(
        Command::new("apt-cache")
            .args(["show", "--quiet=2", "--no-all-versions"])
            .args(names),
        "apt",
    );
    let printed = match printed {
        // It fails where it knows none of the names.
        Err(ToolError::Failed { .. }) => Vec::new(),
        other => other?,
    };
    let mut known: BTreeMap<String, Package> = parse_control(&String::from_utf8_lossy(&printed))
        .into_iter()
        .map(|package| (package.name.clone(), package))
        .collect();
    names
        .iter()
        .map(|name| {
            known.remove(*name).ok_or_else(|| {
                if lists_are_empty() {
                    AptError::NoLists
                } else {
                    AptError::Unknown((*name).to_owned())
                }
            })
        })
        .collect()
}

/// Fetches packages into the cache and returns the path of each one's file.
pub(crate) fn download(tools: &Tools, packages: &[&Package]) -> Result<Vec<PathBuf>, AptError> {
    let directory = cache_directory()?.join("packages");
    let _lock = lock_file(&directory, ".lock", || ())?;
    let pinned = packages.iter().map(|package| package.pinned());
    tools.run(
        Command::new("apt-get")
            .args(["download", "--quiet=2"])
            // As root, apt would fetch as a user of its own who cannot see our cache.
            .args(["--option", "APT::Sandbox::User="])
            .args(pinned)
            .current_dir(&directory),
        "apt",
    )?;
    packages
        .iter()
        .map(|package| {
            let path = directory.join(package.file_name());
            path.metadata().at(&path)?;
            Ok(path)
        })
        .collect()
}

/// Unpacks a package's files below `directory`, without its scripts and without ownership.
pub(crate) fn unpack(tools: &Tools, deb: &Path, directory: &Path) -> Result<(), AptError> {
    fs::create_dir_all(directory).at(directory)?;
    tools.run(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([deb, directory]),
        "dpkg",
    )?;
    Ok(())
}

fn lists_are_empty() -> bool {
    let lists = fs::read_dir("/var/lib/apt/lists").into_iter().flatten();
    !lists
        .filter_map(Result::ok)
        .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
}

/// Reads stanzas of the control-file format (Debian Policy, chapter 5).
fn parse_control(text: &str) -> Vec<Package> {
    text.split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| {
                stanza.lines().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    (key == name).then(|| value.trim().to_owned())
                })
            };
            Some(Package {
                name: field("Package")?,
                version: field("Version")?,
                architecture: field("Architecture")?,
                depends: field("Depends").unwrap_or_default(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_stanzas_become_packages() {
        let text = "Package: busybox-static\nVersion: 1:1.35.0-4\nArchitecture: amd64\n\
                    Description: x\n Version: not this one\n\n\
                    Package: linux\nArchitecture: amd64\nVersion: 6.1\nDepends: a (= 6.1), b\n\n\
                    Package: broken\n";
        let packages = parse_control(text);
        assert_eq!(packages.len(), 2);
        assert_eq!(packages[0].pinned(), "busybox-static=1:1.35.0-4");
        assert_eq!(
            packages[0].file_name(),
            "busybox-static_1%3a1.35.0-4_amd64.deb"
        );
        assert_eq!(packages[1].depends, "a (= 6.1), b");
    }
}
