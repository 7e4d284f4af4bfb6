//! `cargo xtask`: the repository's chores.
#![forbid(unsafe_code)]

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The repository's chores.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command, usually mica, in a Debian kernel with a real KVM, on any machine.
    KvmLab(commands::kvm_lab::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::KvmLab(arguments) => commands::kvm_lab::run(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
