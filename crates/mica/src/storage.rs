//! `mica storage`: the storage array by hand.

use std::error::Error;
use std::process::ExitCode;

use crate::OutputFormat;

/// What can be done with storage.
#[derive(clap::Subcommand)]
pub(crate) enum Command {}

/// Runs one `mica storage` command.
pub(crate) fn run(command: Command, _output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    match command {}
}
