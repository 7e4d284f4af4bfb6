//! `cargo xtask tidy`: the rules of this repository that no compiler checks.
//!
//! Each submodule is one family of rules over the same [`Tree`]; a rule reports every breach it
//! finds, with the file and what to do.

mod arrows;
mod docs;
mod modules;
mod ratchet;
mod source;
mod unsafety;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result, output_of};
use source::Source;

/// One breach of a rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The file, relative to the root.
    path: String,
    /// Counted from one; zero is the whole file.
    line: usize,
    message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.message),
            line => write!(f, "{}:{line}: {}", self.path, self.message),
        }
    }
}

/// What the rules look at: the files that git knows or would add.
struct Tree {
    root: PathBuf,
    /// Relative paths, sorted.
    files: Vec<String>,
    /// The Rust files among them.
    sources: Vec<Source>,
    /// The answer of `cargo metadata`.
    metadata: serde_json::Value,
    findings: Vec<Finding>,
}

impl Tree {
    fn load(root: &Path) -> Result<Tree> {
        let listed = output_of(
            Command::new("git").current_dir(root).args([
                "ls-files",
                "--cached",
                "--others",
                "--exclude-standard",
            ]),
            "git",
        )?;
        let mut files: Vec<String> = listed
            .lines()
            .filter(|file| root.join(file).exists())
            .map(str::to_owned)
            .collect();
        files.sort();
        files.dedup();
        let mut sources = Vec::new();
        for file in files.iter().filter(|file| file.ends_with(".rs")) {
            let path = root.join(file);
            let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
            sources.push(Source::new(file, text));
        }
        let metadata = output_of(
            Command::new(env!("CARGO")).current_dir(root).args([
                "metadata",
                "--format-version",
                "1",
                "--locked",
            ]),
            "cargo",
        )?;
        let metadata = serde_json::from_str(&metadata)
            .map_err(|error| Error::Other(format!("cargo metadata: {error}")))?;
        Ok(Tree {
            root: root.to_owned(),
            files,
            sources,
            metadata,
            findings: Vec::new(),
        })
    }

    fn report(&mut self, path: &str, line: usize, message: impl Into<String>) {
        self.findings.push(Finding {
            path: path.into(),
            line,
            message: message.into(),
        });
    }

    fn read(&self, path: &str) -> Result<String> {
        let path = self.root.join(path);
        fs::read_to_string(&path).map_err(Error::file("read", &path))
    }
}

/// Checks the repository under `root`; with `shrink`, rewrites the ratchet to today's lengths where
/// they have become shorter.
///
/// # Errors
///
/// A file cannot be read or a tool is missing; breaches are the result.
pub fn check(root: &Path, shrink: bool) -> Result<Vec<Finding>> {
    let mut tree = Tree::load(root)?;
    arrows::check(&mut tree)?;
    unsafety::check(&mut tree);
    modules::check(&mut tree)?;
    ratchet::check(&mut tree, shrink)?;
    docs::check(&mut tree)?;
    tree.findings.sort();
    Ok(tree.findings)
}
