//! `mica image`: guest images built from Debian's packages.

use std::error::Error;
use std::process::ExitCode;

use crate::OutputFormat;

/// What can be done with images.
#[derive(clap::Subcommand)]
pub(crate) enum Command {}

/// Runs one `mica image` command.
pub(crate) fn run(command: Command, _output: OutputFormat) -> Result<ExitCode, Box<dyn Error>> {
    match command {}
}
