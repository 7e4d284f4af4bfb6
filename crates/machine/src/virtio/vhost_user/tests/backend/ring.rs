//! One ring and its part of the in-flight region, from the device's side.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A ring as the front-end has described it.
#[derive(Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) next_avail: u16,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) kick: Option<Arc<File>>,
    pub(super) call: Option<File>,
    pub(super) enabled: bool,
}

/// Address, length, and whether the device writes it.
pub(super) type Buffer = (GuestAddress, u32, bool);

impl Ring {
    pub(super) fn used_index(&self, memory: &GuestMemoryMmap) -> u16 {
        memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .unwrap()
    }

    /// Fetches the next available head.
    pub(super) fn fetch(&mut self, memory: &GuestMemoryMmap) -> Option<u16> {
        let index: u16 = memory
            .load(GuestAddress(self.avail + 2), Ordering::Acquire)
            .unwrap();
        if !self.enabled || index == self.next_avail {
            return None;
        }
        let entry = self.avail + 4 + u64::from(self.next_avail % self.size) * 2;
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(memory.read_obj(GuestAddress(entry)).unwrap())
    }

    /// The buffers of the chain at `head`.
    pub(super) fn chain(&self, memory: &GuestMemoryMmap, head: u16) -> Vec<Buffer> {
        let mut buffers = Vec::new();
        let mut index = head;
        loop {
            let at = self.desc + u64::from(index) * 16;
            let address: u64 = memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = memory.read_obj(GuestAddress(at + 8)).unwrap();
            let [flags, next]: [u16; 2] = memory.read_obj(GuestAddress(at + 12)).unwrap();
            buffers.push((GuestAddress(address), len, flags & 2 != 0));
            if flags & 1 == 0 {
                return buffers;
            }
            index = next;
        }
    }

    /// Returns the chain at `head` to the driver.
    pub(super) fn complete(&self, memory: &GuestMemoryMmap, head: u16, len: u32) {
        let index = self.used_index(memory);
        let entry = self.used + 4 + u64::from(index % self.size) * 8;
        memory
            .write_obj([u32::from(head), len], GuestAddress(entry))
            .unwrap();
        let used = GuestAddress(self.used + 2);
        memory
            .store(index.wrapping_add(1), used, Ordering::Release)
            .unwrap();
        if let Some(mut call) = self.call.as_ref() {
            std::io::Write::write_all(&mut call, &1_u64.to_ne_bytes()).unwrap();
        }
    }
}

/// The in-flight region of ring 0 (vhost-user, "Inflight I/O tracking", split virtqueues).
pub(super) struct Region {
    pub(super) file: File,
    pub(super) offset: u64,
}

const HEADER: u64 = 16;
const ENTRY: u64 = 16;

impl Region {
    pub(super) fn len(rings: u16, ring_size: u16) -> u64 {
        u64::from(rings) * (HEADER + ENTRY * u64::from(ring_size))
    }

    pub(super) fn mark(&self, head: u16, inflight: bool, counter: u16) {
        let at = self.offset + HEADER + ENTRY * u64::from(head);
        self.file.write_all_at(&[inflight.into()], at).unwrap();
        self.file
            .write_all_at(&u64::from(counter).to_le_bytes(), at + 8)
            .unwrap();
    }

    /// The heads in flight, in the order in which they were fetched.
    pub(super) fn in_flight(&self, ring_size: u16) -> Vec<u16> {
        let mut heads = Vec::new();
        for head in 0..ring_size {
            let mut entry = [0; ENTRY as usize];
            let at = self.offset + HEADER + ENTRY * u64::from(head);
            self.file.read_exact_at(&mut entry, at).unwrap();
            if entry[0] != 0 {
                heads.push((u64::from_le_bytes(entry[8..].try_into().unwrap()), head));
            }
        }
        heads.sort_unstable();
        heads.into_iter().map(|(_, head)| head).collect()
    }
}
