//! Where an ordinary user runs mica in tests.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its share; a failed unwrap is its failure

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::console::Vm;

/// A directory that an ordinary user can reach, with mica and a folder of images.
pub(crate) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = Self { directory };
        let everybody = Permissions::from_mode(0o755);
        fs::set_permissions(place.path(), everybody).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_mica"), place.mica()).unwrap();
        for own in ["run", "images"] {
            fs::create_dir(place.path().join(own)).unwrap();
            let anybody = Permissions::from_mode(0o777);
            fs::set_permissions(place.path().join(own), anybody).unwrap();
        }
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    fn mica(&self) -> PathBuf {
        self.path().join("mica")
    }

    /// Copies an image, a folder of files.
    pub(crate) fn add(&self, image: &Path) {
        let to = self.path().join("images").join(image.file_name().unwrap());
        fs::create_dir(&to).unwrap();
        for file in fs::read_dir(image).unwrap() {
            let from = file.unwrap().path();
            let copy = to.join(from.file_name().unwrap());
            fs::copy(&from, &copy).unwrap();
            fs::set_permissions(&copy, Permissions::from_mode(0o666)).unwrap();
        }
        fs::set_permissions(&to, Permissions::from_mode(0o777)).unwrap();
    }

    /// `mica` with these arguments, as nobody if the test runs as root.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = if rustix::process::geteuid().is_root() {
            let mut setpriv = Command::new("setpriv");
            setpriv.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
            setpriv.arg(self.mica());
            setpriv
        } else {
            Command::new(self.mica())
        };
        command
            .args(arguments.split_whitespace())
            .current_dir(self.path().join("run"))
            .env("MICA_HOME", self.path())
            .env("XDG_RUNTIME_DIR", self.path().join("run"));
        command
    }

    pub(crate) fn start(&self, arguments: &str) -> Vm {
        Vm::start(self.command(arguments))
    }
}
