//! What the frontend can do with a connection: log dirty pages, change memory, stop and start rings, turn
//! the write cache off, break a queue, hang up and come again.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/driver.rs"]
mod driver;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};

use driver::{Ask, Guest, NO_EVENT_IDX, OK, PATIENCE};
use mica_storage::store::{FileStore, FileStoreOptions};
use mica_storage::vhost_user::{Event, Export, ExportHandle, ExportOptions, SocketPath};
use rustix::fs::{MemfdFlags, SealFlags};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::GuestMemoryBackend;

struct Fixture {
    directory: TempDir,
    export: ExportHandle,
    events: mpsc::Receiver<Event>,
    _socket: SocketPath,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let store = FileStore::open(&path, FileStoreOptions::default()).unwrap();
        let (socket, listener) = SocketPath::bind(&directory.path().join("sock")).unwrap();
        let (sender, events) = mpsc::sync_channel(64);
        let options = ExportOptions {
            require_sealed_memory: true,
            observer: Some(Arc::new(move |event: &Event| {
                sender.send(event.clone()).unwrap();
            })),
            ..ExportOptions::default()
        };
        let export = Export::listen(Arc::new(store), listener, options).unwrap();
        Self {
            directory,
            export,
            events,
            _socket: socket,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("sock")).unwrap();
        assert_eq!(self.event(), Event::Connected);
        stream
    }

    fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).unwrap()
    }
}

fn read(sector: u64, len: usize) -> Ask {
    Ask {
        expect: len,
        ..Ask::new(VIRTIO_BLK_T_IN, sector)
    }
}

fn write(sector: u64, data: Vec<u8>) -> Ask {
    Ask {
        out: data,
        ..Ask::new(VIRTIO_BLK_T_OUT, sector)
    }
}

#[test]
fn one_client_follows_another() {
    let fixture = Fixture::new();
    for round in 0..3 {
        let stream = fixture.connect();
        let mut guest = Guest::new(2);
        let frontend = guest.connect(stream, 0);
        let answer = guest.run(1, &read(0, 512));
        assert_eq!(
            (answer.status, answer.data[0]),
            (OK, if round == 0 { 7 } else { 9 })
        );
        assert_eq!(guest.run(0, &write(0, vec![9; 512])).status, OK);
        drop(frontend);
        assert_eq!(fixture.event(), Event::Disconnected { reason: None });
    }
    let stats = fixture.export.stop();
    assert_eq!((stats.connections, stats.reads, stats.writes), (3, 3, 3));
}

#[test]
fn a_stop_ends_a_connection_that_says_nothing_or_half_a_message() {
    for part in [&[][..], &[1, 0, 0]] {
        let fixture = Fixture::new();
        let stream = fixture.connect();
        std::io::Write::write_all(&mut &stream, part).unwrap();
        fixture.export.stop();
    }
}

#[test]
fn rings_stop_and_start_and_memory_changes_under_them() {
    let fixture = Fixture::new();
    let mut guest = Guest::new(1);
    let mut frontend = guest.connect(fixture.connect(), NO_EVENT_IDX);
    let file = sealed(1 << 20);
    let more = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 40,
        memory_size: 1 << 20,
        userspace_addr: 1 << 45,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for round in 1..=3 {
        assert_eq!(guest.run(0, &read(0, 512)).status, OK);
        frontend.add_mem_region(&more).unwrap();
        assert_eq!(guest.run(0, &read(0, 512)).status, OK);
        // What is offered while a ring is disabled waits.
        frontend.set_vring_enable(0, false).unwrap();
        guest.submit(0, &read(0, 512)).unwrap();
        guest.kick(0);
        frontend.remove_mem_region(&more).unwrap();
        assert!(guest.take(0).is_empty());
        frontend.set_vring_enable(0, true).unwrap();
        assert_eq!(guest.wait(0).len(), 1);
        assert_eq!(frontend.get_vring_base(0).unwrap(), 3 * round);
        guest.start_queue(&mut frontend, 0);
    }
}

/// Shared memory as a frontend of ours makes it.
fn sealed(len: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("test", flags).unwrap());
    file.set_len(len).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

#[test]
fn what_the_device_writes_is_in_the_dirty_log() {
    const LOG_ALL: u64 = 1 << 26;
    let fixture = Fixture::new();
    let mut guest = Guest::new(1);
    let frontend = guest.connect(fixture.connect(), 0);
    let pages = guest.memory.last_addr().0 / 4096 + 1;
    let log = sealed(pages.div_ceil(8));
    let region = VhostUserDirtyLogRegion {
        mmap_size: pages.div_ceil(8),
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    frontend.set_log_base(0, Some(region)).unwrap();
    let dirty = || {
        let mut bytes = vec![0; pages.div_ceil(8) as usize];
        log.read_exact_at(&mut bytes, 0).unwrap();
        (0..pages)
            .filter(|page| bytes[*page as usize / 8] & 1 << (page % 8) != 0)
            .collect::<Vec<u64>>()
    };
    guest.run(0, &read(0, 512));
    assert!(
        dirty().is_empty(),
        "nothing is logged before that is asked for"
    );
    let features = frontend.get_features().unwrap();
    frontend.set_features(features | LOG_ALL).unwrap();
    guest.run(0, &read(0, 8192));
    let (queue, first) = (&guest.queues[0], guest.queues[0].data(0) / 4096);
    let page = |address: u64| address / 4096;
    let mut expected = vec![page(queue.used_ring()), page(queue.header(0))];
    expected.extend(first..=page(queue.data(0) + 8191));
    assert_eq!(dirty(), expected);
}

#[test]
fn with_the_write_cache_off_writes_are_durable_at_once() {
    let fixture = Fixture::new();
    let mut guest = Guest::new(1);
    let mut frontend = guest.connect(fixture.connect(), 0);
    assert_eq!(driver::config(&mut frontend)[32], 1);
    let flags = VhostUserConfigFlags::WRITABLE;
    frontend.set_config(32, flags, &[0]).unwrap();
    assert_eq!(driver::config(&mut frontend)[32], 0);
    // That the write is synchronous is the plan's test; here, that it works end to end.
    assert_eq!(guest.run(0, &write(3, vec![1; 1024])).status, OK);
    // The rest of the space cannot be written.
    frontend.set_config(0, flags, &[0xff; 32]).unwrap();
    assert_eq!(driver::config(&mut frontend)[..8], 2048u64.to_le_bytes());
}

#[test]
fn a_driver_that_breaks_its_queue_breaks_only_that() {
    let fixture = Fixture::new();
    let mut guest = Guest::new(2);
    let _frontend = guest.connect(fixture.connect(), 0);
    guest.offer(0, 0xffff);
    guest.kick(0);
    let Event::QueueBroken { queue: 0, reason } = fixture.event() else {
        panic!("queue 0 goes on");
    };
    assert!(reason.contains("65535"), "{reason}");
    assert_eq!(guest.run(1, &read(0, 512)).status, OK);
}

#[test]
fn memory_that_could_vanish_is_refused() {
    let fixture = Fixture::new();
    let frontend = vhost::vhost_user::Frontend::from_stream(fixture.connect(), 1);
    frontend.set_owner().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: 1 << 40,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).unwrap();
    let Event::Disconnected {
        reason: Some(reason),
    } = fixture.event()
    else {
        panic!("the export goes on");
    };
    assert!(reason.contains("sealed"), "{reason}");
}
