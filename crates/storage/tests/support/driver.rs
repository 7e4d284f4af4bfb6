//! A virtio-blk driver in a test: guest memory, rings, and the frontend's half of vhost-user. Memory,
//! rings and the in-flight region outlive a connection, as a virtual machine's do.
#![allow(dead_code, clippy::unwrap_used)] // each test uses its share; a failed unwrap is its failure

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Where guest memory starts: not at zero, so that a wrong translation shows.
const MEMORY_BASE: u64 = 0x10_0000;
const RING: u16 = 128;
/// Requests in flight on one queue; each has four descriptors of its own.
pub(crate) const SLOTS: u16 = RING / 4;
/// The most data of one request.
pub(crate) const DATA: usize = 0x1_0000;
const QUEUE_STRIDE: u64 = 0x40_0000;

/// How long anything may take before the test has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const OK: u8 = 0;
pub(crate) const IO_ERROR: u8 = 1;
pub(crate) const UNSUPPORTED: u8 = 2;

/// What to ask the device.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) kind: u32,
    pub(crate) sector: u64,
    /// Data for the device.
    pub(crate) out: Vec<u8>,
    /// How much data the device is to write.
    pub(crate) expect: usize,
    /// Where to cut the data in two descriptors, if it is more than that.
    pub(crate) cut: usize,
    pub(crate) indirect: bool,
}

impl Ask {
    pub(crate) fn new(kind: u32, sector: u64) -> Self {
        Self {
            kind,
            sector,
            out: Vec::new(),
            expect: 0,
            cut: usize::MAX,
            indirect: false,
        }
    }
}

/// A request that came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) slot: u16,
    pub(crate) status: u8,
    /// What the used ring says was written.
    pub(crate) len: u32,
    pub(crate) data: Vec<u8>,
}

pub(crate) struct Queue {
    base: u64,
    kick: EventFd,
    pub(crate) call: EventFd,
    avail: u16,
    used: u16,
    /// Expected data by slot in flight.
    pending: BTreeMap<u16, usize>,
}

/// The memory and queues of a guest.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) queues: Vec<Queue>,
    pub(crate) inflight: Option<(VhostUserInflight, File)>,
}

impl Guest {
    pub(crate) fn new(queues: u16) -> Self {
        let len = QUEUE_STRIDE * u64::from(queues);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
        file.set_len(len).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let range = (
            GuestAddress(MEMORY_BASE),
            len as usize,
            Some(FileOffset::new(file, 0)),
        );
        let queue = |index| Queue {
            base: MEMORY_BASE + QUEUE_STRIDE * u64::from(index),
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            avail: 0,
            used: 0,
            pending: BTreeMap::new(),
        };
        Self {
            memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
            queues: (0..queues).map(queue).collect(),
            inflight: None,
        }
    }

    /// Presents the guest to a backend, the first or a successor, with all that it offers but `without`.
    pub(crate) fn connect(&mut self, stream: UnixStream, without: u64) -> Frontend {
        let mut frontend = Frontend::from_stream(stream, self.queues.len() as u64);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap() & !without & !(1 << 26);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(frontend.get_queue_num().unwrap() >= self.queues.len() as u64);
        frontend.set_features(features).unwrap();
        if protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            let queues = self.queues.len() as u16;
            let (message, file) = self.inflight.get_or_insert_with(|| {
                let wish = VhostUserInflight::new(0, 0, queues, RING);
                frontend.get_inflight_fd(&wish).unwrap()
            });
            frontend.set_inflight_fd(message, file.as_raw_fd()).unwrap();
        }
        let region = self.memory.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
        for index in 0..self.queues.len() {
            self.start_queue(&mut frontend, index);
        }
        frontend
    }

    /// Where the test itself has a guest address: what the protocol calls a user address.
    fn user(&self, address: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(address)).unwrap() as u64
    }

    pub(crate) fn start_queue(&self, frontend: &mut Frontend, index: usize) {
        let queue = &self.queues[index];
        frontend.set_vring_num(index, RING).unwrap();
        let config = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: self.user(queue.descriptors()),
            used_ring_addr: self.user(queue.used_ring()),
            avail_ring_addr: self.user(queue.avail_ring()),
            log_addr: None,
        };
        // As QEMU does after a lost backend, which could not tell how far it was.
        let base: u16 = self.load(queue.used_ring() + 2);
        frontend.set_vring_addr(index, &config).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_call(index, &queue.call).unwrap();
        frontend.set_vring_kick(index, &queue.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    pub(crate) fn load(&self, address: u64) -> u16 {
        let value: u16 = self
            .memory
            .load(GuestAddress(address), Ordering::Acquire)
            .unwrap();
        u16::from_le(value)
    }

    pub(crate) fn store(&self, address: u64, value: u16) {
        let value = value.to_le();
        self.memory
            .store(value, GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    fn put(&self, table: u64, index: u16, address: u64, len: usize, flags: u32, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend((len as u32).to_le_bytes());
        bytes.extend((flags as u16).to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = table + 16 * u64::from(index);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes a request available. `None` if every slot is in flight.
    pub(crate) fn submit(&mut self, index: usize, ask: &Ask) -> Option<u16> {
        let queue = &self.queues[index];
        let slot = (0..SLOTS).find(|slot| !queue.pending.contains_key(slot))?;
        let (header, data) = (queue.header(slot), queue.data(slot));
        let mut bytes = ask.kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(ask.sector.to_le_bytes());
        bytes.push(0xff); // The status, which the device overwrites.
        self.memory
            .write_slice(&bytes, GuestAddress(header))
            .unwrap();
        self.memory
            .write_slice(&ask.out, GuestAddress(data))
            .unwrap();
        let (len, flag) = match ask.expect {
            0 => (ask.out.len(), 0),
            expect => (expect, VRING_DESC_F_WRITE),
        };
        let mut pieces = vec![(header, 16, 0)];
        if len > ask.cut {
            pieces.push((data, ask.cut, flag));
            pieces.push((data + ask.cut as u64, len - ask.cut, flag));
        } else if len > 0 {
            pieces.push((data, len, flag));
        }
        pieces.push((header + 16, 1, VRING_DESC_F_WRITE));
        let (table, first) = match ask.indirect {
            true => (queue.indirect(slot), 0),
            false => (queue.descriptors(), slot * 4),
        };
        for (at, (address, len, flags)) in pieces.iter().enumerate() {
            let more = at + 1 < pieces.len();
            let flags = flags | if more { VRING_DESC_F_NEXT } else { 0 };
            let at = first + at as u16;
            self.put(table, at, *address, *len, flags, at + 1);
        }
        if ask.indirect {
            let len = pieces.len() * 16;
            self.put(
                queue.descriptors(),
                slot * 4,
                table,
                len,
                VRING_DESC_F_INDIRECT,
                0,
            );
        }
        self.offer(index, slot * 4);
        self.queues[index].pending.insert(slot, ask.expect);
        Some(slot)
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, index: usize, head: u16) {
        let queue = &self.queues[index];
        let (ring, avail) = (queue.avail_ring(), queue.avail);
        self.store(ring + 4 + 2 * u64::from(avail % RING), head);
        self.store(ring + 2, avail.wrapping_add(1));
        self.queues[index].avail = avail.wrapping_add(1);
    }

    pub(crate) fn kick(&self, index: usize) {
        self.queues[index].kick.write(1).unwrap();
    }

    pub(crate) fn in_flight(&self, index: usize) -> usize {
        self.queues[index].pending.len()
    }

    /// What has come back on a queue.
    pub(crate) fn take(&mut self, index: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        loop {
            let queue = &self.queues[index];
            let ring = queue.used_ring();
            // Ask for an interrupt with the next one (virtio 1.2, clause 2.7.10), then look.
            self.store(queue.avail_ring() + 4 + 2 * u64::from(RING), queue.used);
            std::sync::atomic::fence(Ordering::SeqCst);
            if self.load(ring + 2) == queue.used {
                return answers;
            }
            let mut element = [0; 8];
            let at = ring + 4 + 8 * u64::from(queue.used % RING);
            self.memory
                .read_slice(&mut element, GuestAddress(at))
                .unwrap();
            let [i0, i1, i2, i3, len @ ..] = element;
            let head = u32::from_le_bytes([i0, i1, i2, i3]);
            let slot = u16::try_from(head / 4).unwrap();
            let queue = &mut self.queues[index];
            let expect = queue.pending.remove(&slot);
            let expect = expect.expect("a head comes back once, and only if it was offered");
            queue.used = queue.used.wrapping_add(1);
            let (header, data) = (queue.header(slot), queue.data(slot));
            let mut answer = Answer {
                slot,
                status: 0,
                len: u32::from_le_bytes(len),
                data: vec![0; expect],
            };
            answer.status = self.memory.read_obj(GuestAddress(header + 16)).unwrap();
            self.memory
                .read_slice(&mut answer.data, GuestAddress(data))
                .unwrap();
            answers.push(answer);
        }
    }

    /// Waits until something comes back on a queue.
    pub(crate) fn wait(&mut self, index: usize) -> Vec<Answer> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answers = self.take(index);
            if !answers.is_empty() {
                return answers;
            }
            assert!(Instant::now() < deadline, "queue {index} does not answer");
            self.wait_for_call(index);
        }
    }

    /// Waits for an interrupt.
    pub(crate) fn wait_for_call(&self, index: usize) {
        let call = &self.queues[index].call;
        let epoll = Epoll::new().unwrap();
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, call.as_raw_fd(), interest)
            .unwrap();
        let timeout_ms = PATIENCE.as_millis() as i32;
        // A signal is as good a reason as any to look again.
        let _ = epoll.wait(timeout_ms, &mut [EpollEvent::default()]);
        let _ = call.read();
    }

    /// One request from start to end.
    pub(crate) fn run(&mut self, index: usize, ask: &Ask) -> Answer {
        let slot = self.submit(index, ask).unwrap();
        self.kick(index);
        let mut answers = self.wait(index);
        assert_eq!(answers.len(), 1);
        let answer = answers.remove(0);
        assert_eq!(answer.slot, slot);
        answer
    }
}

impl Queue {
    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }

    pub(crate) fn avail_ring(&self) -> u64 {
        self.base + 0x1000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    pub(crate) fn header(&self, slot: u16) -> u64 {
        self.base + 0x4000 + 32 * u64::from(slot)
    }

    fn indirect(&self, slot: u16) -> u64 {
        self.base + 0x8000 + 64 * u64::from(slot)
    }

    /// On an odd address for some slots, as a driver may well have it.
    pub(crate) fn data(&self, slot: u16) -> u64 {
        self.base + 0x1_0000 + (DATA as u64 + 512) * u64::from(slot) + u64::from(slot % 3)
    }
}

/// The device's configuration space.
pub(crate) fn config(frontend: &mut Frontend) -> Vec<u8> {
    let flags = VhostUserConfigFlags::WRITABLE;
    frontend.get_config(0, 60, flags, &[0; 60]).unwrap().1
}

pub(crate) const NO_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
pub(crate) const NO_INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A small generator (xorshift64*), seeded so that a failure can be repeated.
pub(crate) struct Random(u64);

impl Random {
    /// Seeded from `MICA_SEED` or else the clock; prints the seed.
    pub(crate) fn new() -> Self {
        let seed = std::env::var("MICA_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            now.as_nanos() as u64
        });
        println!("MICA_SEED={seed}");
        Self(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
