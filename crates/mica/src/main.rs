//! The `mica` program: dispatch only. Each command lives in a module of its own.
#![forbid(unsafe_code)]

mod image;
mod run;
mod runtime;
mod storage;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A virtual data center in one program.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Arguments {
    /// How results are printed.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    output: OutputFormat,

    #[command(subcommand)]
    command: Command,
}

/// How a command prints its results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum OutputFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON value, or one a line where a command reports events.
    Json,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Options>),
    /// Look after running VMs.
    #[command(subcommand)]
    Vm(vm::Command),
    /// Build and look after guest images.
    #[command(subcommand)]
    Image(image::Command),
    /// Serve and inspect storage.
    #[command(subcommand)]
    Storage(storage::Command),
}

fn main() -> ExitCode {
    // What `mica run` starts does not spend its first milliseconds on a command line.
    if run::is_vm_process() {
        return run::vm_process();
    }
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Run(options) => run::run(*options, arguments.output),
        Command::Vm(command) => vm::run(command, arguments.output),
        Command::Image(command) => image::run(command, arguments.output),
        Command::Storage(command) => storage::run(command, arguments.output),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            report(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

/// Prints an error with all its causes, each once.
fn report(error: &(dyn std::error::Error + 'static)) {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    eprintln!("mica: {text}");
}
