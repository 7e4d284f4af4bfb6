//! `--record` and `--replay`: the file, and what it says of the machine.

use std::error::Error;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use mica_base::units::Bytes;
use mica_machine::recording::{Header, Reader};
use mica_machine::vmm::channel::Attachments;
use mica_machine::vmm::config::RecordingConfig;

use super::options::Options;

/// An open recording.
pub(crate) enum Recording {
    /// One that is made.
    Record(File),
    /// One that is replayed.
    Replay(File),
}

impl Recording {
    /// Opens what the options speak of. A replayed machine is the recorded one, so the options become those
    /// of its recording.
    ///
    /// # Errors
    ///
    /// The file cannot be made or read, or is no recording of this Mica.
    pub(crate) fn open(options: &mut Options) -> Result<Option<Self>, Box<dyn Error>> {
        if let Some(path) = &options.record {
            let file = File::create_new(path).map_err(|error| {
                let path = path.display();
                match error.kind() {
                    std::io::ErrorKind::AlreadyExists => {
                        format!("{path} exists; remove it or record to another file")
                    }
                    _ => format!("cannot record to {path}: {error}"),
                }
            })?;
            return Ok(Some(Self::Record(file)));
        }
        let Some(path) = options.replay.clone() else {
            return Ok(None);
        };
        let failed = |error: &dyn Error| format!("{}: {error}", path.display());
        let (file, header) = read_header(&path).map_err(|error| failed(error.as_ref()))?;
        options.cpus = header.vcpus;
        options.memory = Bytes(header.memory);
        options.cpu_profile = header.cpu_profile.parse().map_err(|error| failed(&error))?;
        options
            .name
            .get_or_insert(format!("{}-replay", header.name));
        Ok(Some(Self::Replay(file)))
    }

    /// What the VM process is told.
    pub(crate) fn config(self, attachments: &mut Attachments) -> RecordingConfig {
        match self {
            Self::Record(file) => RecordingConfig::Record(attachments.attach(file)),
            Self::Replay(file) => RecordingConfig::Replay(attachments.attach(file)),
        }
    }
}

/// The file, at its beginning, and its header.
fn read_header(path: &Path) -> Result<(File, Header), Box<dyn Error>> {
    let mut file = File::open(path)?;
    let header = Reader::new(Box::new(file.try_clone()?))?.header().clone();
    let own = env!("CARGO_PKG_VERSION");
    if header.program != own {
        return Err(format!(
            "it was recorded by Mica {}, whose processor may count otherwise than this one's ({own})",
            header.program
        )
        .into());
    }
    file.seek(SeekFrom::Start(0))?;
    Ok((file, header))
}
