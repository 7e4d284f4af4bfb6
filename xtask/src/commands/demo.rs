//! `cargo xtask demo`: the README's promise, on any machine.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use xtask::error::{self, Error, Result};
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

    eprintln!("demo: mica run tiny");
    let mut guest = Command::new(&mica)
        .args(["run", "tiny"])
        .env("MICA_HOME", &home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Error::io(format!("start {}", mica.display())))?;
    let shown = show(&mut guest);
    if shown.is_err() {
        let _ = guest.kill();
    }
    let status = guest
        .wait()
        .map_err(Error::io("wait for the end of mica run"))?;
    shown?;
    if !status.success() {
        return Err(Error::Other(format!("mica run ended with {status}")));
    }
    eprintln!(
        "demo: the guest is off. Your turn: MICA_HOME={} {} run tiny",
        home.display(),
        mica.display()
    );
    Ok(())
}

/// Types the commands, each at its prompt, and shows all that the guest prints.
fn show(guest: &mut Child) -> Result<()> {
    let (Some(mut input), Some(mut output)) = (guest.stdin.take(), guest.stdout.take()) else {
        return Err(Error::Other("a child without pipes".into()));
    };
    let mut commands = COMMANDS.iter();
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    loop {
        let count = output
            .read(&mut buffer)
            .map_err(Error::io("read the guest's console"))?;
        if count == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&buffer[..count]);
        print!("{text}");
        let _ = std::io::stdout().flush();
        seen.push_str(&text);
        if let Some(at) = seen.find(PROMPT) {
            seen.drain(..at + PROMPT.len());
            if let Some(command) = commands.next() {
                writeln!(input, "{command}").map_err(Error::io("type to the guest"))?;
            }
        }
    }
}
