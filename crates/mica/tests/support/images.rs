//! Guest images, built once for all tests of all runs.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its share; a failed unwrap is its failure

use std::path::{Path, PathBuf};
use std::process::Command;

/// The directory of the tiny image.
pub(crate) fn tiny() -> PathBuf {
    image("tiny", &["tiny"])
}

/// The same for Debian with a package that speaks vsock.
pub(crate) fn debian_with_socat() -> PathBuf {
    let name = "debian-socat";
    image(name, &["debian", "--name", name, "--with", "socat"])
}

/// The same for Debian with a package that tests disks.
pub(crate) fn debian_with_fio() -> PathBuf {
    let name = "debian-fio";
    image(name, &["debian", "--name", name, "--with", "fio"])
}

/// The same for Debian with programs that compute.
pub(crate) fn debian_with_work() -> PathBuf {
    let name = "debian-work";
    let packages = [
        "python3",
        "libpython3.11-testsuite",
        "openssl",
        "sqlite3",
        "xz-utils",
        "zstd",
        "gcc",
        "libc6-dev",
    ];
    let mut arguments = vec!["debian", "--name", name];
    arguments.extend(packages.iter().flat_map(|package| ["--with", package]));
    image(name, &arguments)
}

fn image(name: &str, arguments: &[&str]) -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("home");
    let output = Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["image", "build"])
        .args(arguments)
        .env("MICA_HOME", &home)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "mica image build {name}: {output:?}"
    );
    home.join("images").join(name)
}
