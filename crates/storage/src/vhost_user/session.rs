//! One connection: the requests of the vhost-user protocol and the state they build up.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::device::{CONFIG_BYTES, Device, WRITEBACK_AT};
use super::event::Doorbell;
use super::inflight::{self, Inflight};
use super::memory::{DirtyLog, Memory, RegionKey, Regions, is_sealed, map_shared};
use super::vring::{Context, QUEUE_SIZE_MAX, RingAddresses, Vring};

/// How many memory regions a frontend may share: as many as libvhost-user allows.
const MEMORY_SLOTS_MAX: usize = 509;

const NOT_OFFERED: Error = Error::InvalidOperation("the device does not offer this");

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

/// The state of one connection. Dropping it stops all rings.
pub(crate) struct Session {
    device: Arc<Device>,
    // Before the memory, so that threads end while it is there.
    rings: Vec<Vring>,
    regions: Regions,
    memory: Option<Arc<Memory>>,
    log: Arc<DirtyLog>,
    inflight: Option<Inflight>,
    acked: u64,
    acked_protocol: u64,
}

impl Session {
    pub(crate) fn new(device: Arc<Device>) -> Self {
        Self {
            rings: (0..device.options.queues).map(Vring::new).collect(),
            device,
            regions: Regions::default(),
            memory: None,
            log: Arc::default(),
            inflight: None,
            acked: 0,
            acked_protocol: 0,
        }
    }

    fn ring(&mut self, index: impl TryInto<usize>) -> Result<&mut Vring> {
        let index = index.try_into().map_err(|_| Error::InvalidParam)?;
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Starts and stops rings as their state demands.
    fn settle(&mut self) -> Result<()> {
        let context = Context {
            device: &self.device,
            regions: &self.regions,
            memory: self.memory.as_ref(),
            log: &self.log,
            inflight: self.inflight.as_ref(),
            acked: self.acked,
        };
        for ring in &mut self.rings {
            ring.settle(&context).map_err(failed)?;
        }
        Ok(())
    }

    /// Exchanges something that running rings depend on, while they rest.
    fn exchange(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.rings.iter_mut().for_each(Vring::halt);
        change(self)?;
        self.settle()
    }

    fn set_regions(&mut self, regions: Regions) -> Result<()> {
        let memory = Arc::new(regions.memory().map_err(Error::ReqHandlerError)?);
        self.exchange(|session| {
            session.memory = Some(memory);
            session.regions = regions;
            Ok(())
        })
    }

    fn check_sealed(&self, file: &File) -> Result<()> {
        match self.device.options.require_sealed_memory && !is_sealed(file) {
            true => Err(failed("shared memory is not sealed against shrinking")),
            false => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.rings = (0..self.device.options.queues).map(Vring::new).collect();
        self.inflight = None;
        self.acked = 0;
        self.log.set_active(false);
        self.device.writeback.store(true, Ordering::SeqCst);
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated; the specification has it stop the rings at most.
        self.rings.iter_mut().for_each(|ring| {
            ring.halt();
            ring.started = false;
        });
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.device.features() != 0 {
            return Err(Error::InvalidParam);
        }
        let log = VhostUserVirtioFeatures::LOG_ALL.bits();
        self.log.set_active(features & log != 0);
        if features & !log == self.acked & !log {
            // A migration starts or ends while the rings run.
            self.acked = features;
            return Ok(());
        }
        self.exchange(|session| {
            session.acked = features;
            // Without the protocol features there is no enable message (vhost-user specification,
            // "Ring states").
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                session
                    .rings
                    .iter_mut()
                    .for_each(|ring| ring.enabled = true);
            }
            Ok(())
        })
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut table = Regions::default();
        for (region, file) in regions.iter().zip(files) {
            self.check_sealed(&file)?;
            let key = RegionKey {
                guest: region.guest_phys_addr,
                len: region.memory_size,
                user: region.user_addr,
            };
            table
                .add(key, file, region.mmap_offset, &self.log)
                .map_err(Error::ReqHandlerError)?;
        }
        self.set_regions(table)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.check_sealed(&file)?;
        if self.regions.len() >= MEMORY_SLOTS_MAX {
            return Err(Error::InvalidParam);
        }
        let mut table = self.regions.clone();
        table
            .add(single_key(region), file, region.mmap_offset, &self.log)
            .map_err(Error::ReqHandlerError)?;
        self.set_regions(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut table = self.regions.clone();
        match table.remove(single_key(region)) {
            true => self.set_regions(table),
            false => Err(Error::InvalidParam),
        }
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let ring = self.ring(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if ring.is_running() || !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        ring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        // The log flag and address change nothing: while logging is on, writes to the used ring are
        // logged like all others, at the address they have in guest memory.
        let addresses = RingAddresses {
            descriptors,
            used,
            available,
        };
        let ring = self.ring(index)?;
        if ring.addresses == Some(addresses) {
            return Ok(());
        }
        ring.halt();
        ring.addresses = Some(addresses);
        self.settle()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if ring.is_running() {
            return Err(Error::InvalidOperation("the ring is running"));
        }
        ring.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.halt();
        ring.started = false;
        ring.doorbell = None;
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(index)?;
        ring.halt();
        ring.doorbell = file
            .map(Doorbell::new)
            .transpose()
            .map_err(Error::ReqHandlerError)?;
        ring.started = true;
        self.settle()
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(index)?;
        ring.call.set(file).map_err(Error::ReqHandlerError)?;
        if ring.is_running() {
            // What was raised on the descriptor before may have been lost with it.
            ring.call.raise();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(index)?;
        ring.error.set(file).map_err(Error::ReqHandlerError)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Device::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !Device::protocol_features().bits() != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.options.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        self.settle()
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The protocol's messages bound both; beyond the device's fields there are zeroes.
        let (offset, size) = (offset as usize, size as usize);
        let config = self.device.config();
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)?;
        let mut bytes = vec![0; size];
        let known = end.min(CONFIG_BYTES);
        if offset < known {
            bytes[..known - offset].copy_from_slice(&config[offset..known]);
        }
        Ok(bytes)
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        // Of what the driver writes, only the write cache's mode can change.
        let writeback = WRITEBACK_AT
            .checked_sub(offset as usize)
            .and_then(|at| bytes.get(at));
        if let Some(mode) = writeback {
            self.device.writeback.store(*mode != 0, Ordering::SeqCst);
        }
        Ok(())
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        self.check_inflight(inflight)?;
        inflight::create(inflight.num_queues, inflight.queue_size).map_err(Error::ReqHandlerError)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        self.check_inflight(inflight)?;
        self.check_sealed(&file)?;
        let region = Inflight::map(inflight, file).map_err(Error::ReqHandlerError)?;
        self.exchange(|session| {
            session.inflight = Some(region);
            Ok(())
        })
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.check_sealed(&file)?;
        let map =
            map_shared(file, log.mmap_offset, log.mmap_size, ()).map_err(Error::ReqHandlerError)?;
        self.log.set_map(Some(map));
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }
}

impl Session {
    fn check_inflight(&self, inflight: &VhostUserInflight) -> Result<()> {
        let fits = inflight.num_queues <= self.device.options.queues
            && inflight.queue_size <= QUEUE_SIZE_MAX;
        match fits {
            true => Ok(()),
            false => Err(Error::InvalidParam),
        }
    }
}

fn single_key(region: &VhostUserSingleMemoryRegion) -> RegionKey {
    RegionKey {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
    }
}
