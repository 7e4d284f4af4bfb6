//! From a configuration and its descriptors to a machine that only has to be booted.
//!
//! ```text
//!  slot 1   entropy          slot 4   vsock
//!  slot 2   balloon          slot 5…  disks, then network interfaces
//!  slot 3   virtio console
//! ```
//!
//! A device keeps its slot whether or not its neighbours exist, so that adding one does not rename
//! the guest's others.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use mica_base::clock::{Clock, HostClock};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

mod recording;

use super::channel::{Attachments, Channel, FdIndex, Received};
use super::config::{BootConfig, EngineConfig, VmConfig};
use super::console::{SocketConsole, socket_console, socket_output};
use super::machine::{BootSource, Machine, SharedDevice};
use super::notice::{Mailbox, Notice};
use super::recording::ReplayBus;
use super::vcpus::Vcpus;
use crate::acpi::AcpiConfig;
use crate::bus::{Buses, RangeTaken};
use crate::device::DeviceError;
use crate::engine::{BusAccess, Engine, EngineError, InterruptSource};
use crate::kvm::{KvmConfig, KvmEngine};
use crate::layout::{gsi, port};
use crate::legacy::{self, I8042, Power, PvPanic, Rtc, Serial};
use crate::memory::{self, GuestMemory, MemoryError, MemoryOptions};
use crate::pci::{PciError, PciRoot, Subscriber};
use crate::recording::ReplayError;
use crate::soft::turns::Turns;
use crate::soft::{SoftConfig, SoftEngine};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::console::Console;
use crate::virtio::entropy::Entropy;
use crate::virtio::transport::{SharedVirtioDevice, TransportError, VirtioPci};
use crate::virtio::vhost_user::{
    BackendError, BackendSource, Block, BlockOptions, Net, NetOptions,
};
use crate::virtio::vsock::Vsock;

/// Fixed slots of the devices that a machine has at most one of.
mod slot {
    pub(super) const ENTROPY: u8 = 1;
    pub(super) const BALLOON: u8 = 2;
    pub(super) const CONSOLE: u8 = 3;
    pub(super) const VSOCK: u8 = 4;
    /// The first disk's; others follow.
    pub(super) const FIRST_DISK: u8 = 5;
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub(super) enum AssembleError {
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{device}: {source}")]
    Device { device: String, source: io::Error },
    #[error("{device}: {source}")]
    Backend {
        device: String,
        source: BackendError,
    },
    #[error(transparent)]
    Legacy(#[from] DeviceError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error(transparent)]
    Bus(#[from] RangeTaken),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error(transparent)]
    System(#[from] io::Error),
}

/// A built machine, and what the event loop drives.
pub(super) struct Assembled {
    pub(super) machine: Machine,
    pub(super) buses: Arc<Buses>,
    pub(super) subscribers: Vec<Subscriber>,
    pub(super) handles: Handles,
}

/// The devices that the supervisor and the control socket act on.
pub(super) struct Handles {
    pub(super) power: Arc<Mutex<Power>>,
    pub(super) serial: Option<Arc<Mutex<SocketConsole>>>,
    pub(super) console: Option<Arc<Mutex<Console>>>,
    pub(super) balloon: Option<Arc<Mutex<Balloon>>>,
    pub(super) vsock: Option<Arc<Mutex<Vsock>>>,
    pub(super) backends: BTreeMap<String, BackendDevice>,
}

/// A device with its data path in another process.
#[derive(Clone)]
pub(super) enum BackendDevice {
    Block(Arc<Mutex<Block>>),
    Net(Arc<Mutex<Net>>),
}

/// The machine while it is being put together.
struct Assembler {
    engine: Arc<dyn Engine>,
    interrupts: Arc<dyn InterruptSource>,
    memory: GuestMemory,
    mailbox: Arc<Mailbox>,
    clock: Arc<dyn Clock>,
    buses: Buses,
    pci: PciRoot,
    devices: Vec<SharedDevice>,
    subscribers: Vec<Subscriber>,
    vcpus: u32,
    turns: Option<Arc<Turns>>,
    /// In place of all others.
    replay_bus: Option<ReplayBus>,
}

/// Builds the machine that `config` describes from the descriptors that came with it.
pub(super) fn assemble(
    config: &VmConfig,
    fds: &mut Received,
    mailbox: &Arc<Mailbox>,
) -> Result<Assembled, AssembleError> {
    let memory = memory::allocate(config.memory, &memory_options(config))?;
    let turns = recording::turns(config, fds, &memory)?;
    let replays = turns.as_ref().is_some_and(|turns| turns.replays());
    let (engine, interrupts) = engine(config, fds, &memory, turns.clone())?;
    let mut assembler = Assembler {
        interrupts,
        pci: PciRoot::new(config.memory.0, engine.as_ref()),
        engine,
        memory,
        mailbox: Arc::clone(mailbox),
        clock: Arc::new(HostClock::new()),
        buses: Buses::default(),
        devices: Vec::new(),
        subscribers: Vec::new(),
        vcpus: config.vcpus,
        turns,
        replay_bus: None,
    };
    let power = assembler.add_legacy(config)?;
    let serial = assembler.add_serial(config, fds)?;
    let mut handles = Handles {
        power,
        serial,
        console: None,
        balloon: None,
        vsock: None,
        backends: BTreeMap::new(),
    };
    // A replay needs no devices: the recording has what came from them.
    if !replays {
        assembler.add_virtio(config, fds, &mut handles)?;
        assembler.add_backends(config, fds, &mut handles)?;
    }
    assembler.finish(config, fds, handles)
}

/// The engine that the configuration asks for.
fn engine(
    config: &VmConfig,
    fds: &mut Received,
    memory: &GuestMemory,
    turns: Option<Arc<Turns>>,
) -> Result<Both, AssembleError> {
    let (vcpus, profile) = (config.vcpus, config.cpu_profile);
    let memory = memory.clone();
    Ok(match &config.engine {
        EngineConfig::Kvm { device } => {
            let config = KvmConfig {
                memory,
                vcpus,
                profile,
            };
            both(Arc::new(KvmEngine::new(fds.take(*device)?, config)?))
        }
        EngineConfig::Soft => {
            let config = SoftConfig {
                memory,
                vcpus,
                profile,
                turns,
            };
            both(Arc::new(SoftEngine::new(config)?))
        }
    })
}

fn memory_options(config: &VmConfig) -> MemoryOptions {
    // Backends map it too, and a recording's sum skips what its file has holes for.
    let shared = !config.disks.is_empty() || !config.networks.is_empty();
    MemoryOptions {
        huge_pages: config.huge_pages,
        private: !shared && config.recording.is_none(),
    }
}

/// An engine as the machine sees it, and as devices do.
type Both = (Arc<dyn Engine>, Arc<dyn InterruptSource>);

fn both<E: Engine + 'static>(engine: Arc<E>) -> Both {
    (engine.clone(), engine)
}

fn device<'a>(name: &'a str) -> impl Fn(io::Error) -> AssembleError + 'a {
    move |source| AssembleError::Device {
        device: name.to_owned(),
        source,
    }
}

impl Assembler {
    fn add_legacy(&mut self, config: &VmConfig) -> Result<Arc<Mutex<Power>>, AssembleError> {
        let sink = Arc::clone(&self.mailbox);
        let line = |gsi| self.interrupts.line(gsi);
        let power = Power::new(Arc::clone(&self.clock), line(gsi::SCI), sink.clone());
        let power = Arc::new(Mutex::new(power));
        if config.keyboard {
            let i8042 = I8042::new(line(gsi::KEYBOARD), line(gsi::MOUSE), sink.clone(), false);
            let i8042 = Arc::new(Mutex::new(i8042));
            legacy::attach(&mut self.buses.ports, &i8042)?;
            self.devices.push(i8042);
        }
        let rtc = Rtc::new(Arc::clone(&self.clock), line(gsi::RTC), config.memory.0)?;
        let rtc = Arc::new(Mutex::new(rtc));
        let pvpanic = Arc::new(Mutex::new(PvPanic::new(sink)));
        let ports = &mut self.buses.ports;
        legacy::attach(ports, &power)?;
        legacy::attach(ports, &rtc)?;
        legacy::attach(ports, &pvpanic)?;
        self.subscribers.push(rtc.clone());
        let all: [SharedDevice; 3] = [power.clone(), rtc, pvpanic];
        self.devices.extend(all);
        Ok(power)
    }

    /// The first serial line is always there: kernels print to it before they can ask.
    fn add_serial(
        &mut self,
        config: &VmConfig,
        fds: &mut Received,
    ) -> Result<Option<Arc<Mutex<SocketConsole>>>, AssembleError> {
        let line = self.interrupts.line(gsi::SERIAL0);
        let Some(index) = config.serial else {
            let serial = Serial::new("serial0", port::SERIAL0, line, Box::new(Nowhere));
            self.add_serial_device(serial)?;
            return Ok(None);
        };
        let stream = UnixStream::from(fds.take(index)?);
        let wanted = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sink, mut console) = socket_console(stream, Arc::clone(&wanted))?;
        let mut serial = Serial::new("serial0", port::SERIAL0, line, Box::new(sink));
        serial.on_input_wanted(Box::new(move || drop(wanted.write(1))));
        let serial = self.add_serial_device(serial)?;
        console.connect(Box::new(move |bytes| lock(&serial).push_input(bytes)));
        let console = Arc::new(Mutex::new(console));
        self.subscribers.push(console.clone());
        Ok(Some(console))
    }

    fn add_serial_device(&mut self, serial: Serial) -> Result<Arc<Mutex<Serial>>, AssembleError> {
        let serial = Arc::new(Mutex::new(serial));
        if self.turns.as_ref().is_some_and(|turns| turns.replays()) {
            let serial = serial.clone();
            self.replay_bus = Some(ReplayBus { serial });
        }
        legacy::attach(&mut self.buses.ports, &serial)?;
        self.devices.push(serial.clone());
        Ok(serial)
    }

    fn add_virtio(
        &mut self,
        config: &VmConfig,
        fds: &mut Received,
        handles: &mut Handles,
    ) -> Result<(), AssembleError> {
        let entropy = Entropy::new("entropy0").map_err(device("entropy0"))?;
        self.plug(slot::ENTROPY, entropy)?;
        if config.balloon {
            let balloon = Balloon::new("balloon0").map_err(device("balloon0"))?;
            handles.balloon = Some(self.plug(slot::BALLOON, balloon)?);
        }
        if let Some(index) = config.virtio_console {
            let stream = UnixStream::from(fds.take(index)?);
            let input = stream.try_clone()?.into();
            let (sink, output) = socket_output(stream)?;
            let console = Console::new("console0", Some(input), Box::new(sink))
                .map_err(device("console0"))?;
            handles.console = Some(self.plug(slot::CONSOLE, console)?);
            self.subscribers.push(Arc::new(Mutex::new(output)));
        }
        if let Some(vsock) = &config.vsock {
            let listener = UnixListener::from(fds.take(vsock.listener)?);
            let dialer = Channel::from_fd(fds.take(vsock.dialer)?);
            let connect = Box::new(move |port| dial(&dialer, port));
            let vsock = Vsock::new("vsock0", vsock.cid, Some(listener), connect)
                .map_err(device("vsock0"))?;
            handles.vsock = Some(self.plug(slot::VSOCK, vsock)?);
        }
        Ok(())
    }

    fn add_backends(
        &mut self,
        config: &VmConfig,
        fds: &mut Received,
        handles: &mut Handles,
    ) -> Result<(), AssembleError> {
        let mut slots = slot::FIRST_DISK..;
        let mut next_slot = || slots.next().unwrap_or(u8::MAX);
        for disk in &config.disks {
            let stream = UnixStream::from(fds.take(disk.backend)?);
            let options = BlockOptions {
                name: disk.name.clone(),
                max_queues: self.vcpus as u16,
            };
            let block = Block::new(options, stream, self.backend_source()).map_err(|source| {
                AssembleError::Backend {
                    device: disk.name.clone(),
                    source,
                }
            })?;
            let block = BackendDevice::Block(self.plug(next_slot(), block)?);
            handles.backends.insert(disk.name.clone(), block);
        }
        for network in &config.networks {
            let stream = UnixStream::from(fds.take(network.backend)?);
            let options = NetOptions {
                name: network.name.clone(),
                mac: network.mac,
                mtu: None,
                max_queue_pairs: self.vcpus as u16,
            };
            let net = Net::new(options, stream, self.backend_source()).map_err(|source| {
                AssembleError::Backend {
                    device: network.name.clone(),
                    source,
                }
            })?;
            let net = BackendDevice::Net(self.plug(next_slot(), net)?);
            handles.backends.insert(network.name.clone(), net);
        }
        Ok(())
    }

    fn backend_source(&self) -> Box<dyn BackendSource> {
        Box::new(Mail(Arc::clone(&self.mailbox)))
    }

    fn plug<D: VirtioDevice + 'static>(
        &mut self,
        slot: u8,
        device: D,
    ) -> Result<Arc<Mutex<D>>, AssembleError> {
        let device = Arc::new(Mutex::new(device));
        let shared: SharedVirtioDevice = device.clone();
        let function = VirtioPci::new(shared, self.memory.clone(), Arc::clone(&self.interrupts))?;
        self.pci.add(slot, function)?;
        Ok(device)
    }

    fn finish(
        mut self,
        config: &VmConfig,
        fds: &mut Received,
        handles: Handles,
    ) -> Result<Assembled, AssembleError> {
        self.devices.extend(self.pci.devices());
        self.subscribers.extend(self.pci.subscribers());
        self.take_turns(&handles)?;
        self.pci.attach(&mut self.buses)?;
        let buses = Arc::new(self.buses);
        let bus: Arc<dyn BusAccess> = match self.replay_bus {
            Some(bus) => Arc::new(bus),
            None => buses.clone(),
        };
        let vcpus: Result<Vec<_>, _> = (0..self.vcpus)
            .map(|index| self.engine.create_vcpu(index))
            .collect();
        let mailbox = Arc::clone(&self.mailbox);
        let on_end = Box::new(move |end| mailbox.post(Notice::VcpuEnd(end)));
        let vcpus = Vcpus::new(vcpus?, bus, on_end)?;
        let acpi = AcpiConfig {
            vcpus: config.vcpus,
            ram: config.memory.0,
            serial: true,
            keyboard: config.keyboard,
            mouse: false,
            rtc: true,
            pm_timer: true,
            pvpanic: true,
        };
        let machine = Machine {
            engine: self.engine,
            memory: self.memory,
            vcpus,
            devices: self.devices,
            boot: boot_source(&config.boot, fds)?,
            acpi,
            running: false,
            devices_paused: false,
            turns: self.turns,
            written: Vec::new(),
        };
        Ok(Assembled {
            machine,
            buses,
            subscribers: self.subscribers,
            handles,
        })
    }
}

fn boot_source(config: &BootConfig, fds: &mut Received) -> io::Result<Option<BootSource>> {
    let mut file = |index| fds.take(index).map(File::from);
    Ok(Some(match config {
        BootConfig::Recording => return Ok(None),
        BootConfig::Kernel {
            kernel,
            initrd,
            cmdline,
            unchanging,
        } => BootSource::Kernel {
            kernel: file(*kernel)?,
            initrd: initrd.map(&mut file).transpose()?,
            cmdline: cmdline.clone(),
            map: *unchanging,
        },
        BootConfig::Disk {
            disk,
            entry,
            cmdline,
            append,
        } => BootSource::Disk {
            disk: Rc::new(file(*disk)?),
            entry: entry.clone(),
            cmdline: cmdline.clone(),
            append: append.clone(),
        },
    }))
}

/// Passes devices' wishes on to the supervisor.
struct Mail(Arc<Mailbox>);

impl BackendSource for Mail {
    fn request(&self, device: &str, reason: &str) {
        self.0.post(Notice::NeedBackend {
            device: device.to_owned(),
            reason: reason.to_owned(),
        });
    }
}

/// Asks the supervisor to connect to what listens for the guest's connections to `port`.
fn dial(dialer: &Channel, port: u32) -> io::Result<UnixStream> {
    dialer.send(&port, Attachments::default())?;
    loop {
        let answer = dialer.receive::<(u32, Option<FdIndex>)>()?;
        let ((answered, socket), mut fds) = answer.ok_or(io::ErrorKind::BrokenPipe)?;
        // An answer that came too late for the last question is still in the channel.
        if answered == port {
            let index = socket.ok_or(io::ErrorKind::ConnectionRefused)?;
            return fds.take(index).map(UnixStream::from);
        }
    }
}

/// Where an unconnected serial line leads.
struct Nowhere;

impl crate::console::ConsoleSink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

use crate::bus::lock;
