//! `cargo xtask ci`: what continuous integration runs; `cargo xtask tidy` and `test` are its parts.

use std::net::ToSocketAddrs;
use std::process::{Command, Stdio};

use xtask::error::{self, Error, Result};
use xtask::steps::{Done, Steps};
use xtask::{tidy, workspace};

use super::fuzz;

/// Options of `ci`.
#[derive(clap::Args)]
pub(crate) struct CiArguments {
    /// Leave out the tests: `make test` follows.
    #[arg(long)]
    checks: bool,
}

/// Options of `tidy`.
#[derive(clap::Args)]
pub(crate) struct TidyArguments {
    /// Write today's lengths to the ratchet where they are shorter.
    #[arg(long)]
    shrink: bool,
}

/// Options of `test`.
#[derive(clap::Args)]
pub(crate) struct TestArguments {
    /// Fuzz long, and run the benches.
    #[arg(long)]
    deep: bool,
}

/// Seconds of fuzzing for each target: enough to find what is shallow, and enough to find depth.
const FUZZ_SECONDS: u64 = 5;
const FUZZ_SECONDS_DEEP: u64 = 600;

/// Runs every check, then the tests.
pub(crate) fn ci(arguments: &CiArguments) -> Result<()> {
    let mut steps = Steps::default();
    steps.run("format", || cargo(&["fmt", "--all", "--check"]));
    steps.run("clippy", || {
        cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])
    });
    steps.run("tidy", || {
        tidy(&TidyArguments { shrink: false }).map(|()| Done::Passed)
    });
    steps.run("deny", deny);
    steps.run("documentation", || {
        // The readers are this repository's: links to private items are welcome.
        let mut command = cargo_command(&[
            "doc",
            "--quiet",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ]);
        passed(command.env(
            "RUSTDOCFLAGS",
            "-D warnings -A rustdoc::private_intra_doc_links",
        ))
    });
    if !arguments.checks {
        test_steps(&mut steps, &TestArguments { deep: false });
    }
    steps.finish()
}

/// Prints every breach of the repository's rules.
pub(crate) fn tidy(arguments: &TidyArguments) -> Result<()> {
    let findings = tidy::check(&workspace::root(), arguments.shrink)?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        count => Err(Error::Other(format!("{count} findings"))),
    }
}

/// Runs all tests, and each fuzz target for a while.
pub(crate) fn test(arguments: &TestArguments) -> Result<()> {
    let mut steps = Steps::default();
    test_steps(&mut steps, arguments);
    steps.finish()
}

fn test_steps(steps: &mut Steps, arguments: &TestArguments) {
    if works("nextest") {
        let ignored = if arguments.deep { "all" } else { "default" };
        steps.run("tests", || {
            cargo(&[
                "nextest",
                "run",
                "--workspace",
                "--no-tests",
                "pass",
                "--run-ignored",
                ignored,
            ])
        });
        steps.run("documentation's examples", || {
            cargo(&["test", "--quiet", "--workspace", "--doc"])
        });
    } else {
        let mut call = vec!["test", "--workspace"];
        if arguments.deep {
            call.extend(["--", "--include-ignored"]);
        }
        steps.run("tests", || cargo(&call));
    }
    let seconds = if arguments.deep {
        FUZZ_SECONDS_DEEP
    } else {
        FUZZ_SECONDS
    };
    steps.run("fuzzing", || fuzz::all(seconds).map(|()| Done::Passed));
    if arguments.deep {
        steps.run("benches", || super::bench::all().map(|()| Done::Passed));
    }
}

/// Licences, sources, bans and advisories, by `cargo deny`; continuous integration installs it.
fn deny() -> Result<Done> {
    if !works("deny") {
        if std::env::var_os("CI").is_none() {
            return Ok(Done::Skipped(
                "cargo-deny is not installed: `cargo install --locked cargo-deny`".into(),
            ));
        }
        eprintln!("installing cargo-deny");
        // Outside the workspace, whose settings are not for this; unoptimised, it builds in two
        // minutes on two cores and checks in a second.
        let mut install =
            cargo_command(&["install", "--locked", "--debug", "--quiet", "cargo-deny"]);
        error::run(install.current_dir("/"), "cargo")?;
    }
    cargo(&[
        "deny",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ])?;
    if "github.com:443".to_socket_addrs().is_err() {
        return Ok(Done::Skipped(
            "licences, sources and bans are fine; advisories are not checked, because their \
             database at github.com cannot be reached from here"
                .into(),
        ));
    }
    cargo(&["deny", "--log-level", "error", "check", "advisories"])
}

fn cargo_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace::root()).args(arguments);
    command
}

fn cargo(arguments: &[&str]) -> Result<Done> {
    passed(&mut cargo_command(arguments))
}

fn passed(command: &mut Command) -> Result<Done> {
    error::run(command, "cargo").map(|()| Done::Passed)
}

/// Whether this Cargo subcommand is installed.
fn works(subcommand: &str) -> bool {
    cargo_command(&[subcommand, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
