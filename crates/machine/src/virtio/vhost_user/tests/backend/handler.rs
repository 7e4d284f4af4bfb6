//! What the backend answers, and what it does with its rings.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures as Protocol,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::ring::{Region, Ring};
use super::{HALVED, Traits, Work};

/// What the backend has been told and has done.
#[derive(Clone, Default)]
pub(in super::super) struct Seen {
    pub(in super::super) features: u64,
    pub(in super::super) bases: Vec<(u32, u32)>,
    /// Sectors of the requests served, in order.
    pub(in super::super) sectors: Vec<u64>,
    /// Size of the dirty log.
    pub(in super::super) log: Option<u64>,
    /// By ring: the log address, where writes to the used ring are logged.
    pub(in super::super) logged: BTreeMap<u32, u64>,
    pub(in super::super) enabled: BTreeMap<u32, bool>,
    pub(in super::super) config_writes: Vec<(u32, Vec<u8>)>,
}

pub(super) struct Handler {
    pub(super) traits: Traits,
    pub(super) seen: Seen,
    memory: Option<GuestMemoryMmap>,
    rings: BTreeMap<u32, Ring>,
    region: Option<Region>,
    counter: u16,
    /// What is in flight, until there is enough of it to die with.
    fetched: Vec<u16>,
}

impl Handler {
    pub(super) fn new(traits: Traits) -> Self {
        Self {
            traits,
            seen: Seen::default(),
            memory: None,
            rings: BTreeMap::new(),
            region: None,
            counter: 0,
            fetched: Vec::new(),
        }
    }

    pub(super) fn kicks(&self) -> Vec<(u32, Arc<File>)> {
        let kick = |(index, ring): (&u32, &Ring)| Some((*index, ring.kick.clone()?));
        self.rings.iter().filter_map(kick).collect()
    }

    pub(super) fn kicked(&mut self, index: u32) -> std::io::Result<()> {
        match self.traits.work {
            Work::Block => self.serve_block(index),
            Work::BlockHalfThenDie => return self.serve_half(index),
            Work::Loopback => self.loop_back(index & !1),
        }
        Ok(())
    }

    fn fetch(&mut self, index: u32) -> Option<u16> {
        let ring = self.rings.get_mut(&index)?;
        let head = ring.fetch(self.memory.as_ref()?)?;
        self.counter += 1;
        if let Some(region) = &self.region {
            region.mark(head, true, self.counter);
        }
        Some(head)
    }

    fn serve_block(&mut self, index: u32) {
        while let Some(head) = self.fetch(index) {
            self.succeed(index, head);
        }
    }

    fn serve_half(&mut self, index: u32) -> std::io::Result<()> {
        while let Some(head) = self.fetch(index) {
            self.fetched.push(head);
        }
        if self.fetched.len() < HALVED {
            return Ok(());
        }
        let heads = std::mem::take(&mut self.fetched);
        for head in heads.iter().rev().step_by(2) {
            self.succeed(index, *head);
        }
        Err(std::io::Error::other("killed"))
    }

    /// Completes a block request: status 0 in its last byte.
    fn succeed(&mut self, index: u32, head: u16) {
        let (ring, memory) = (&self.rings[&index], self.memory.as_ref().unwrap());
        let chain = ring.chain(memory, head);
        let (header, ..) = chain[0];
        self.seen
            .sectors
            .push(memory.read_obj(GuestAddress(header.0 + 8)).unwrap());
        memory.write_obj(0_u8, chain[chain.len() - 1].0).unwrap();
        ring.complete(memory, head, 1);
        if let Some(region) = &self.region {
            region.mark(head, false, 0);
        }
    }

    fn loop_back(&mut self, pair: u32) {
        let memory = self.memory.clone().unwrap();
        let Some(mut receive) = self.rings.remove(&pair) else {
            return;
        };
        if let Some(send) = self.rings.get_mut(&(pair + 1)).filter(|_| receive.enabled) {
            while let Some(sent) = send.fetch(&memory) {
                let mut frame = Vec::new();
                for (address, len, _) in send.chain(&memory, sent) {
                    let mut part = vec![0; len as usize];
                    memory.read_slice(&mut part, address).unwrap();
                    frame.extend(part);
                }
                if let Some(head) = receive.fetch(&memory) {
                    let (address, ..) = receive.chain(&memory, head)[0];
                    memory.write_slice(&frame, address).unwrap();
                    receive.complete(&memory, head, frame.len() as u32);
                }
                send.complete(&memory, sent, 0);
            }
        }
        self.rings.insert(pair, receive);
    }

    fn ring(&mut self, index: u32) -> &mut Ring {
        self.rings.entry(index).or_default()
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.traits.features)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.traits.features != 0 {
            return Err(Error::InvalidParam);
        }
        self.seen.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions = regions.iter().zip(files).map(|(region, file)| {
            assert_eq!({ region.user_addr }, { region.guest_phys_addr });
            let file = FileOffset::new(file, region.mmap_offset);
            let address = GuestAddress(region.guest_phys_addr);
            (address, region.memory_size as usize, Some(file))
        });
        self.memory = Some(GuestMemoryMmap::from_ranges_with_files(regions).unwrap());
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index).size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let ring = self.ring(index);
        (ring.desc, ring.avail, ring.used) = (descriptor, available, used);
        if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
            self.seen.logged.insert(index, log);
        } else {
            self.seen.logged.remove(&index);
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index).next_avail = base as u16;
        self.seen.bases.push((index, base));
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index);
        ring.kick = None;
        let base = ring.next_avail;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into()).kick = fd.map(Arc::new);
        if let (Some(region), 0, Some(memory)) = (&self.region, index, &self.memory) {
            let ring = self.rings.get_mut(&0).unwrap();
            let heads = region.in_flight(ring.size);
            ring.next_avail = ring.used_index(memory).wrapping_add(heads.len() as u16);
            for head in heads {
                self.succeed(0, head);
            }
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into()).call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        Ok(self.traits.protocol)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        assert_eq!(features & !self.traits.protocol.bits(), 0);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.traits.queues)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index).enabled = enable;
        self.seen.enabled.insert(index, enable);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let range = offset as usize..(offset + size) as usize;
        self.traits
            .config
            .get(range)
            .map(<[u8]>::to_vec)
            .ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        self.seen.config_writes.push((offset, buf.to_vec()));
        Ok(())
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }

    fn get_inflight_fd(&mut self, ask: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap());
        let len = Region::len(ask.num_queues, ask.queue_size);
        file.set_len(len).unwrap();
        Ok((
            VhostUserInflight::new(len, 0, ask.num_queues, ask.queue_size),
            file,
        ))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        assert_eq!(
            region.mmap_size,
            Region::len(region.num_queues, region.queue_size)
        );
        let offset = region.mmap_offset;
        self.region = Some(Region { file, offset });
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidParam)
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidParam)
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidParam)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidParam)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }

    fn set_log_base(&mut self, log: &VhostUserLog, _: File) -> Result<()> {
        self.seen.log = Some(log.mmap_size);
        Ok(())
    }
}
