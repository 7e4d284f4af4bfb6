//! The backends of a VM's devices: the ones this process serves, and sockets of other processes.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mica_machine::vmm::channel::Attachments;
use mica_machine::vmm::config::DiskConfig;
use mica_storage::store::{FileStore, FileStoreOptions};
use mica_storage::vhost_user::{Export, ExportHandle, ExportOptions};

use super::options::{DiskSpec, Options};
use super::source::Source;

/// Where a device's next connection comes from.
enum Backend {
    /// A store of this process; the export of the last connection.
    Store {
        store: Arc<FileStore>,
        serial: String,
        export: Option<ExportHandle>,
    },
    /// Another process listens here.
    Socket(PathBuf),
}

/// All backends of a VM, by the names of their devices.
#[derive(Default)]
pub(crate) struct Backends {
    by_device: BTreeMap<String, Backend>,
    queues: u16,
}

impl Backends {
    /// Opens the VM's disks, the one it boots from first, and attaches a connection to each.
    ///
    /// # Errors
    ///
    /// A disk cannot be opened, or nobody listens on its socket.
    pub(crate) fn open_disks(
        &mut self,
        source: &Source,
        options: &Options,
        attachments: &mut Attachments,
    ) -> Result<Vec<DiskConfig>, Box<dyn Error>> {
        self.queues = u16::try_from(options.cpus)?.max(1);
        let boot_disk = source.disk().map(|path| DiskSpec::File {
            path: path.to_owned(),
            read_only: false,
            direct: false,
        });
        let mut disks = Vec::new();
        for (number, spec) in boot_disk.iter().chain(&options.disks).enumerate() {
            let name = format!("disk{number}");
            let stream = match spec {
                DiskSpec::File {
                    path,
                    read_only,
                    direct,
                } => self.add_file(&name, path, *read_only, *direct)?,
                DiskSpec::VhostUser(socket) => self.add_socket(&name, socket)?,
            };
            disks.push(DiskConfig {
                backend: attachments.attach(stream),
                name,
            });
        }
        Ok(disks)
    }

    fn add_file(
        &mut self,
        device: &str,
        path: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<UnixStream, Box<dyn Error>> {
        let options = FileStoreOptions {
            read_only,
            direct,
            ..FileStoreOptions::default()
        };
        let store = Arc::new(FileStore::open(path, options)?);
        let backend = Backend::Store {
            store,
            serial: device.to_owned(),
            export: None,
        };
        self.by_device.insert(device.to_owned(), backend);
        Ok(self.connect(device)?)
    }

    /// Adds a device that another process serves, and connects to it.
    ///
    /// # Errors
    ///
    /// Nobody listens there.
    pub(crate) fn add_socket(
        &mut self,
        device: &str,
        socket: &Path,
    ) -> Result<UnixStream, Box<dyn Error>> {
        self.by_device
            .insert(device.to_owned(), Backend::Socket(socket.to_owned()));
        self.connect(device).map_err(|error| {
            format!(
                "{device}: no backend listens at {} ({error}); start it first, for example with \
                 'mica storage export FILE --vhost-user {0}'",
                socket.display()
            )
            .into()
        })
    }

    /// A new connection to the backend of `device`. The one before is over: a store is served to one
    /// connection at a time.
    ///
    /// # Errors
    ///
    /// Nobody listens (yet), or the system refuses.
    pub(crate) fn connect(&mut self, device: &str) -> io::Result<UnixStream> {
        match self.by_device.get_mut(device) {
            None => Err(io::ErrorKind::NotFound.into()),
            Some(Backend::Socket(path)) => UnixStream::connect(path),
            Some(Backend::Store {
                store,
                serial,
                export,
            }) => {
                if let Some(export) = export.take() {
                    export.stop();
                }
                let (ours, theirs) = UnixStream::pair()?;
                let options = ExportOptions {
                    queues: self.queues,
                    serial: serial.clone(),
                    require_sealed_memory: true,
                    ..ExportOptions::default()
                };
                *export = Some(Export::spawn(store.clone(), ours, options)?);
                Ok(theirs)
            }
        }
    }
}
