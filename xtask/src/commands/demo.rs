//! `cargo xtask demo`: the README's promise, on any machine.

use std::process::Command;
use std::time::Duration;

use xtask::error::{self, Error, Result};
use xtask::lab::Lab;
use xtask::session::Echo;
use xtask::workspace;

/// What the guest is asked to do, and the prompt that says that it is done.
const COMMANDS: [&str; 4] = ["uname -sr", "nproc", "free -m", "poweroff"];
const PROMPT: &str = "tiny# ";

/// Builds Mica and the tiny image, boots it and shows it.
pub(crate) fn run() -> Result<()> {
    eprintln!("demo: building mica");
    error::run(
        Command::new(env!("CARGO"))
            .current_dir(workspace::root())
            .args(["build", "--quiet", "--release", "--package", "mica"]),
        "cargo",
    )?;
    let mica = workspace::binary("mica", "release");
    let home = workspace::target_directory().join("demo");
    eprintln!("demo: mica image build tiny");
    error::run(
        Command::new(&mica)
            .args(["image", "build", "tiny"])
            .env("MICA_HOME", &home),
        "mica",
    )?;

    eprintln!(
        "demo: mica run tiny\n\
         demo: inside the KVM lab, a Debian kernel on QEMU's software CPU: Mica's own software\n\
         demo: engine does not exist yet, and not every machine has KVM. Speed is not the point here."
    );
    let minute = Duration::from_secs(60);
    let mut session = Lab::new()
        .file(&mica, "/usr/bin/mica")
        .file(&home, "/demo")
        .echo(Echo::All)
        .start("MICA_HOME=/demo mica run tiny")?;
    for command in COMMANDS {
        session.expect(PROMPT, 3 * minute)?;
        session.send(&format!("{command}\n"))?;
    }
    let outcome = session.finish()?;
    if outcome.status != 0 {
        return Err(Error::Other(format!(
            "mica run ended with status {}",
            outcome.status
        )));
    }
    eprintln!("demo: the guest is off. On a machine with KVM: mica run tiny");
    Ok(())
}
