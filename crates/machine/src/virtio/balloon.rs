//! Memory balloon (virtio 1.2, clause 5.5): takes pages from the guest and gives them back to the
//! host, reports the guest's memory statistics, and discards the free pages that it reports.
//!
//! Whatever a guest names, only whole pages of its own RAM are discarded
//! ([`crate::memory::discard`] ignores the rest), so the worst it can do is lose its own data.
//! Free-page hints are not offered; free-page reporting replaces them.

use std::io::{self, Read};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use mica_base::units::{Bytes, PAGE_SIZE};
use minicbor::{Decode, Encode};
use virtio_queue::Queue;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, DeviceQueues, F_RING, F_VERSION_1, Served, read_config};
use super::{Activation, VirtioDevice};
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::memory::{self, GuestMemory};

const DEVICE_ID: u16 = 5;
const STATE_VERSION: u16 = 1;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Inflate, deflate, statistics, free-page hints, reporting.
const QUEUES: usize = 5;

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_REPORTING: u64 = 1 << 5;

const CONFIG_ACTUAL: u64 = 4;
const CONFIG_POISON: u64 = 12;

/// The most page numbers and ranges that are read from one request. A driver sends a few hundred;
/// what is beyond stays with the guest, which is always allowed.
const MAX_PER_REQUEST: usize = 1024;
/// Bytes of an entry in the statistics buffer: a tag of 16 bits, a value of 64.
const STAT_LEN: usize = 10;

/// What the guest says about its memory; `None` where it says nothing (clause 5.5.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// How many reports have come since the driver started.
    pub reports: u64,
    values: [Option<u64>; 10],
}

impl BalloonStats {
    /// Memory that no one uses at all, in bytes.
    #[must_use]
    pub fn free(&self) -> Option<u64> {
        self.values[4]
    }

    /// Memory that the guest sees, in bytes.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        self.values[5]
    }

    /// An estimate of what applications can have without swapping, in bytes.
    #[must_use]
    pub fn available(&self) -> Option<u64> {
        self.values[6]
    }

    /// All values by name, as the specification calls them.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        const NAMES: [&str; 10] = [
            "swap_in",
            "swap_out",
            "major_faults",
            "minor_faults",
            "free",
            "total",
            "available",
            "disk_caches",
            "hugetlb_allocations",
            "hugetlb_failures",
        ];
        let values = NAMES.into_iter().zip(self.values);
        values.filter_map(|(name, value)| Some((name, value?)))
    }
}

/// The device's configuration, which is also all of its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Config {
    /// How many pages the balloon should have.
    #[n(0)]
    target: u32,
    /// How many it has.
    #[n(1)]
    actual: u32,
    /// What the guest fills free pages with.
    #[n(2)]
    poison: u32,
}

/// The device.
pub struct Balloon {
    name: String,
    queues: DeviceQueues,
    config: Config,
    stats: BalloonStats,
    stats_wanted: bool,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left for the queues' events.
    pub fn new(name: &str) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            queues: DeviceQueues::new(QUEUES)?,
            config: Config::default(),
            stats: BalloonStats::default(),
            stats_wanted: false,
        })
    }

    /// Asks the guest to give up `target` of its memory in all, rounded down to pages.
    pub fn set_target(&mut self, target: Bytes) {
        let pages = u32::try_from(target.0 / PAGE_SIZE).unwrap_or(u32::MAX);
        if self.config.target != pages {
            self.config.target = pages;
            self.queues.config_changed();
        }
    }

    /// What the guest is asked to give up.
    #[must_use]
    pub fn target(&self) -> Bytes {
        Bytes(u64::from(self.config.target) * PAGE_SIZE)
    }

    /// What the guest says it has given up.
    #[must_use]
    pub fn actual(&self) -> Bytes {
        Bytes(u64::from(self.config.actual) * PAGE_SIZE)
    }

    /// The last report.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        self.stats
    }

    /// Asks the guest for a report; [`BalloonStats::reports`] counts up when it has come. False if
    /// the guest's driver makes none.
    pub fn request_stats(&mut self) -> bool {
        let Some(queue) = self.stats_queue() else {
            return false;
        };
        self.stats_wanted = true;
        self.serve_stats(queue);
        true
    }

    fn stats_queue(&self) -> Option<usize> {
        self.optional_queues(F_STATS).next()
    }

    fn reporting_queue(&self) -> Option<usize> {
        let mut queues = self.optional_queues(F_REPORTING);
        queues.nth(usize::from(self.queues.has(F_STATS)))
    }

    /// The enabled queues beyond the first two, if the driver has chosen `feature`. The
    /// specification numbers the queues for good, Linux counts only those whose feature is on; the
    /// order is the same, so the enabled ones tell which is which.
    fn optional_queues(&self, feature: u64) -> impl Iterator<Item = usize> {
        let chosen = self.queues.has(feature);
        let enabled = self.queues.enabled();
        enabled.filter(move |&queue| chosen && queue > DEFLATE)
    }

    fn serve_stats(&mut self, queue: usize) {
        let Self { stats, queues, .. } = self;
        let wanted = &mut self.stats_wanted;
        queues.serve(queue, |memory, chain| {
            // The driver's buffer stays with us until somebody wants a new report: giving it back
            // is the request.
            if std::mem::take(wanted) {
                return Served::Done(0);
            }
            read_stats(stats, memory, chain);
            Served::Later
        });
    }

    fn serve_reports(&mut self, queue: usize) {
        // A page comes back as zeros. A guest that checks its free pages for another pattern must
        // find that one, so its pages are left alone.
        let keep = self.queues.has(F_PAGE_POISON) && self.config.poison != 0;
        self.queues.serve(queue, |memory, chain| {
            if !keep {
                for range in chain.writable().take(MAX_PER_REQUEST) {
                    discard(memory, range.addr().0, range.len().into());
                }
            }
            Served::Done(0)
        });
    }
}

/// Gives pages back. If the kernel refuses, the host has less memory than it might; the guest does
/// not notice.
fn discard(memory: &GuestMemory, address: u64, len: u64) {
    let _ = memory::discard(memory, GuestAddress(address), len);
}

fn read_stats(stats: &mut BalloonStats, memory: &GuestMemory, chain: Chain<'_>) {
    let Ok(mut reader) = chain.reader(memory) else {
        return;
    };
    let mut values = [None; 10];
    let mut entry = [0; STAT_LEN];
    for _ in 0..MAX_PER_REQUEST {
        if reader.read_exact(&mut entry).is_err() {
            break;
        }
        let (tag, value) = entry.split_at(2);
        let tag = usize::from(u16::from_le_bytes([tag[0], tag[1]]));
        if let (Some(slot), Ok(value)) = (values.get_mut(tag), value.try_into()) {
            *slot = Some(u64::from_le_bytes(value));
        }
    }
    *stats = BalloonStats {
        reports: stats.reports + 1,
        values,
    };
}

/// Discards the pages whose 32-bit numbers the request lists, neighbours at once.
fn inflate(memory: &GuestMemory, chain: Chain<'_>) -> Served {
    let Ok(mut reader) = chain.reader(memory) else {
        return Served::Done(0);
    };
    let mut pages = Vec::new();
    let mut number = [0; 4];
    while pages.len() < MAX_PER_REQUEST && reader.read_exact(&mut number).is_ok() {
        pages.push(u32::from_le_bytes(number));
    }
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        discard(
            memory,
            u64::from(run[0]) * PAGE_SIZE,
            run.len() as u64 * PAGE_SIZE,
        );
    }
    Served::Done(0)
}

impl Device for Balloon {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&mut self) {
        self.config = Config {
            target: self.config.target,
            ..Config::default()
        };
        self.stats = BalloonStats::default();
        self.stats_wanted = false;
    }

    fn save(&self) -> SavedState {
        SavedState::new(STATE_VERSION, &self.config)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.config = state.read(STATE_VERSION)?;
        Ok(())
    }
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let Some(queue) = self.queues.acknowledge(events) else {
            return;
        };
        if queue == INFLATE {
            self.queues.serve(INFLATE, inflate);
        } else if queue == DEFLATE {
            // The pages come back when the guest touches them.
            self.queues.serve(DEFLATE, |_, _| Served::Done(0));
        } else if self.stats_queue() == Some(queue) {
            self.serve_stats(queue);
        } else if self.reporting_queue() == Some(queue) {
            self.serve_reports(queue);
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128; QUEUES]
    }

    fn queue_events(&self) -> Vec<Arc<EventFd>> {
        self.queues.events()
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_RING | F_STATS | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Config {
            target,
            actual,
            poison,
        } = self.config;
        let mut config = [0; 16];
        for (at, value) in [(0, target), (4, actual), (12, poison)] {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            CONFIG_ACTUAL => self.config.actual = value,
            CONFIG_POISON => self.config.poison = value,
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queues.activate(activation);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        self.queues.deactivate()
    }
}

#[cfg(test)]
mod tests;
