//! Where things are in the repository.

use std::env;
use std::path::PathBuf;

/// The target triple that `.cargo/config.toml` fixes, for static binaries.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// Cargo's output directory.
#[must_use]
pub fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Where a built program lies; `profile` is `debug` or `release`.
#[must_use]
pub fn binary(name: &str, profile: &str) -> PathBuf {
    target_directory().join(TARGET).join(profile).join(name)
}
