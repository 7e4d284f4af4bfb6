//! A ring driven by arbitrary bytes, for the fuzz targets.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::ExportOptions;
use super::device::Device;
use super::event::Stop;
use super::inflight::{self, Inflight, Recovered};
use super::memory::{DirtyLog, Memory, RegionKey, Regions};
use super::stats::Stats;
use super::worker::{Parts, Worker};
use crate::store::{FileStore, FileStoreOptions, Store};

const MEMORY: u64 = 0x1_0000;
const RING: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const CAPACITY: u64 = 0x8000;

/// A small disk in memory, the same for all runs: what it holds does not matter.
pub(crate) fn disk() -> Arc<FileStore> {
    static DISK: OnceLock<(File, Arc<FileStore>)> = OnceLock::new();
    let make = || {
        let file = File::from(memfd_create("fuzz-disk", MemfdFlags::CLOEXEC).ok()?);
        file.set_len(CAPACITY).ok()?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let options = FileStoreOptions {
            threads_only: true,
            ..FileStoreOptions::default()
        };
        let store = FileStore::open(Path::new(&path), options).ok()?;
        Some((file, Arc::new(store)))
    };
    let disk = DISK.get_or_init(|| make().expect("invariant: Linux has memfd and /proc"));
    disk.1.clone()
}

/// Lays `data` over a guest's memory, rings included, and lets a worker serve what it finds there, until
/// it has looked at the whole available ring. Then the worker must have kept its promises; what it has
/// counted is returned.
pub(crate) fn chains(data: &[u8]) -> Stats {
    let Some((&shape, data)) = data.split_first() else {
        return Stats::default();
    };
    let inflight = shape & 1 != 0;
    let (message, region) =
        inflight::create(1, RING).expect("invariant: memory for a region of one page");
    let mut memory = data;
    if inflight {
        let (entries, rest) = data.split_at(data.len().min(16 + 16 * usize::from(RING)));
        memory = rest;
        region
            .write_all_at(entries, 0)
            .expect("invariant: the region is that large");
    }
    run(shape, memory, inflight.then_some((message, region)))
}

fn run(shape: u8, contents: &[u8], region: Option<(VhostUserInflight, File)>) -> Stats {
    let log = Arc::new(DirtyLog::default());
    let memory = guest(contents, &log);
    let mut queue = Queue::new(RING).expect("invariant: a power of two");
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_event_idx(shape & 2 != 0);
    queue.set_ready(true);
    let used = queue.used_idx(&*memory, Ordering::Acquire);
    queue.set_next_used(used.expect("invariant: the ring is in memory").0);
    let mut resubmit = Vec::new();
    let mut tracker = region.and_then(|(message, file)| {
        let region = Inflight::map(&message, file).ok()?;
        region.queue(0, RING)
    });
    if let Some(tracker) = &mut tracker
        && let Recovered::InFlight(heads) = tracker.recover(queue.next_used())
    {
        assert!(heads.len() <= usize::from(RING));
        queue.set_next_avail(queue.next_used().wrapping_add(heads.len() as u16));
        resubmit = heads;
    }
    let stop = Stop::new().expect("invariant: a descriptor is left");
    stop.request();
    let store: Arc<dyn Store> = disk();
    let device = Arc::new(Device::new(store, ExportOptions::default()));
    let worker = Worker::new(Parts {
        index: 0,
        device: device.clone(),
        memory,
        log,
        queue,
        tracker,
        doorbell: None,
        call: Arc::default(),
        error: Arc::default(),
        stop: Arc::new(stop),
        acked: device.features(),
    })
    .expect("invariant: threads are to be had");
    worker.run(&resubmit);
    let stats = device.counters.snapshot();
    assert_eq!(stats.in_flight, 0, "{stats:?}");
    assert!(stats.resubmitted <= u64::from(RING), "{stats:?}");
    stats
}

/// A guest's memory with `contents` from the descriptor table on, so that short inputs reach it.
fn guest(contents: &[u8], log: &Arc<DirtyLog>) -> Arc<Memory> {
    let file = memfd_create("fuzz-memory", MemfdFlags::CLOEXEC);
    let file = File::from(file.expect("invariant: Linux has memfd"));
    file.set_len(MEMORY)
        .expect("invariant: memory for a small guest");
    let key = RegionKey {
        guest: 0,
        len: MEMORY,
        user: 0,
    };
    let mut regions = Regions::default();
    regions
        .add(key, file, 0, log)
        .expect("invariant: the file is that large");
    let memory = Arc::new(regions.memory().expect("invariant: one region"));
    let len = contents.len().min((MEMORY - DESCRIPTORS) as usize);
    memory
        .write_slice(&contents[..len], GuestAddress(DESCRIPTORS))
        .expect("invariant: it fits");
    memory
}
