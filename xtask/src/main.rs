//! `cargo xtask`: the repository's chores.
#![forbid(unsafe_code)]

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use commands::{bench, ci, demo, fuzz, kvm_lab};

/// The repository's chores.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that continuous integration runs.
    Ci(ci::CiArguments),
    /// Check the rules that no compiler checks.
    Tidy(ci::TidyArguments),
    /// Run all tests, and each fuzz target for a while.
    Test(ci::TestArguments),
    /// Fuzz what reads untrusted bytes.
    Fuzz(fuzz::Arguments),
    /// Measure Mica and its peer in turn.
    Bench(bench::Arguments),
    /// Run a command, usually mica, in a Debian kernel with a real KVM, on any machine.
    KvmLab(kvm_lab::Arguments),
    /// Build everything and watch a tiny guest boot.
    Demo,
    /// The part of a bench that runs inside the KVM lab.
    #[command(hide = true)]
    LabSide(bench::LabSide),
    /// The first process of `bench cpu`'s guest.
    #[command(hide = true)]
    BenchGuest,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Ci(arguments) => ci::ci(&arguments),
        Command::Tidy(arguments) => ci::tidy(&arguments),
        Command::Test(arguments) => ci::test(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::LabSide(arguments) => bench::lab_side(&arguments),
        Command::BenchGuest => bench::guest_side(),
        Command::Demo => demo::run(),
        Command::KvmLab(arguments) => {
            return kvm_lab::run(&arguments).unwrap_or_else(|error| fail(&error));
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &xtask::error::Error) -> ExitCode {
    eprintln!("xtask: {error}");
    ExitCode::FAILURE
}
