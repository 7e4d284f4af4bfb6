//! `mica storage`: the storage array by hand.

mod export;

use std::error::Error;
use std::process::ExitCode;

use crate::OutputFormat;

/// What can be done with storage.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Serve a disk image or block device to a virtual machine.
    Export(export::Arguments),
}

/// Runs one `mica storage` command.
pub(crate) fn run(command: Command, output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    match command {
        Command::Export(arguments) => export::run(&arguments, output),
    }
}
