//! virtio over PCI, modern only (virtio 1.2, clause 4.1).
//!
//! A [`VirtioPci`] is the PCI function in front of one [`VirtioDevice`]. Everything is in one BAR:
//! common configuration, ISR, device configuration, doorbells and MSI-X. While the driver runs, a
//! doorbell is the engine's: a notification signals the queue's eventfd without an exit to us. One
//! that arrives by the bus all the same (memory decoding was changed, the engine has no doorbells)
//! signals the same eventfd.
//!
//! `VIRTIO_F_RING_RESET` is not offered: a device gives back all its queues or none.

mod common;
mod interrupt;
mod layout;
mod state;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::common::{Action, Common, Value, status};
use self::interrupt::{Interrupt, Relay};
use self::layout::{Capabilities, Region};
use super::{Activation, VirtioDevice, VirtioInterrupt};
use crate::bus::lock;
use crate::device::{Device, DeviceError, RestoreError, SavedState};
use crate::engine::{DoorbellAddress, EngineError, InterruptSource};
use crate::memory::GuestMemory;
use crate::pci::{ConfigSpace, Msix, PciFunction, Subscriber, Wiring, command};

/// A virtio device, shared by its transport and the event loop.
pub type SharedVirtioDevice = Arc<Mutex<dyn VirtioDevice>>;

/// Why a transport cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The engine has no interrupt vectors left.
    #[error("virtio transport: {0}")]
    Engine(#[from] EngineError),
    /// The host has no descriptors left.
    #[error("virtio transport: eventfd: {0}")]
    EventFd(#[from] std::io::Error),
    /// The device has more queues than the BAR has doorbells for.
    #[error("virtio transport: {0} queues are more than {max}", max = layout::MAX_QUEUES)]
    Queues(usize),
}

/// The PCI function that presents a virtio device.
pub struct VirtioPci {
    name: String,
    device: SharedVirtioDevice,
    memory: GuestMemory,
    engine: Arc<dyn InterruptSource>,
    config: ConfigSpace,
    capabilities: Capabilities,
    interrupt: Arc<Interrupt>,
    common: Common,
    events: Vec<Arc<EventFd>>,
    /// Whether the device has its queues.
    active: bool,
    /// The BAR's address under which the doorbells are registered, and for which queues they are.
    doorbells: Option<(u64, Vec<bool>)>,
    windows: Option<[Range<u64>; 2]>,
}

impl VirtioPci {
    /// Puts `device` behind a PCI function.
    ///
    /// # Errors
    ///
    /// See [`TransportError`].
    pub fn new(
        device: SharedVirtioDevice,
        memory: GuestMemory,
        engine: Arc<dyn InterruptSource>,
    ) -> Result<Self, TransportError> {
        let inner = lock(&device);
        let events = inner.queue_events();
        if events.len() > layout::MAX_QUEUES {
            return Err(TransportError::Queues(events.len()));
        }
        let msix = Msix::new(events.len() as u16 + 1, engine.as_ref())?;
        let (config, capabilities) = layout::config_space(&*inner, msix.count());
        let relay = EventFd::new(EFD_NONBLOCK)?;
        let interrupt = Arc::new(Interrupt::new(msix, events.len(), relay));
        let common = Common::new(inner.features(), inner.queue_sizes());
        let name = inner.name().to_owned();
        drop(inner);
        Ok(Self {
            name,
            device,
            memory,
            engine,
            config,
            capabilities,
            interrupt,
            common,
            events,
            active: false,
            doorbells: None,
            windows: None,
        })
    }

    fn msix_control(&self) -> u16 {
        self.config.u16_at(usize::from(self.capabilities.msix) + 2)
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = self.common.build_queues(&self.memory) else {
            return Err(DeviceError {
                device: self.name.clone(),
                reason: "the driver's queues are not in RAM, or not aligned".into(),
            });
        };
        lock(&self.device).activate(Activation {
            memory: self.memory.clone(),
            features: self.common.driver_features,
            queues,
            events: self.events.clone(),
            interrupt: self.interrupt.clone(),
        })?;
        self.active = true;
        Ok(())
    }

    fn deactivate(&mut self) {
        if std::mem::take(&mut self.active) {
            let queues = lock(&self.device).deactivate();
            self.common.note_indices(&queues);
        }
    }

    /// The driver's reset (clause 2.4); the PCI side stays as it is.
    fn reset_device(&mut self) {
        self.deactivate();
        lock(&self.device).reset();
        self.common.reset();
        self.interrupt.reset();
        self.update_doorbells();
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(offset, data) {
            Action::Nothing => {}
            Action::Reset => self.reset_device(),
            Action::SetVector(queue, vector) => self.interrupt.set_vector(queue, vector),
            Action::Activate => {
                if self.activate().is_err() {
                    self.common.status |= status::NEEDS_RESET;
                    self.interrupt.config_changed();
                }
                self.update_doorbells();
                // Linux makes buffers available, and notifies, before its drivers are ready.
                self.wake_queues();
            }
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let value = match self.common.read(offset, data.len()) {
            None => return data.fill(0),
            Some(Value::Bits(bits)) => bits,
            Some(Value::Vector(queue)) => self.interrupt.vector(queue).into(),
            Some(Value::Generation) => {
                // A device changes its configuration and the generation under its own lock.
                let _device = lock(&self.device);
                self.interrupt.generation().into()
            }
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn notify(&self, offset: u64) {
        let queue = usize::try_from(offset / layout::NOTIFY_STRIDE).ok();
        if let Some(event) = queue.and_then(|queue| self.events.get(queue)) {
            // Fails only if 2^64 notifications wait, of which one is enough.
            let _ = event.write(1);
        }
    }

    /// Makes the device look at every enabled queue once: what was notified while it was inactive
    /// has been forgotten.
    fn wake_queues(&self) {
        for (event, queue) in self.events.iter().zip(&self.common.queues) {
            if queue.enabled {
                let _ = event.write(1);
            }
        }
    }

    /// Where the doorbells should be now: nowhere unless the driver runs, the BAR is decoded, and it
    /// lies in a window of ours.
    fn wanted_doorbells(&self) -> Option<(u64, Vec<bool>)> {
        let base = self.config.decode().base(layout::BAR.index)?;
        let end = base.checked_add(layout::BAR.size)?;
        let windows = self.windows.as_ref()?;
        let inside = windows.iter().any(|w| w.start <= base && end <= w.end);
        let queues = self.common.queues.iter().map(|queue| queue.enabled);
        (self.common.live() && inside).then(|| (base, queues.collect()))
    }

    fn update_doorbells(&mut self) {
        let wanted = self.wanted_doorbells();
        if wanted == self.doorbells {
            return;
        }
        // A doorbell that the engine refuses is no failure: the notification takes the bus.
        for (address, event) in self.each_doorbell(self.doorbells.as_ref()) {
            let _ = self.engine.remove_doorbell(address, event);
        }
        for (address, event) in self.each_doorbell(wanted.as_ref()) {
            let _ = self.engine.add_doorbell(address, event);
        }
        self.doorbells = wanted;
    }

    fn each_doorbell<'a>(
        &'a self,
        place: Option<&'a (u64, Vec<bool>)>,
    ) -> impl Iterator<Item = (DoorbellAddress, &'a EventFd)> {
        place.into_iter().flat_map(|(base, enabled)| {
            let addresses = (base + layout::NOTIFY..).step_by(layout::NOTIFY_STRIDE as usize);
            addresses
                .zip(&self.events)
                .zip(enabled)
                .filter(|(_, enabled)| **enabled)
                .map(|((address, event), _)| (DoorbellAddress::Memory(address), event.as_ref()))
        })
    }

    /// Brings everything in step with the configuration space after a change of it.
    fn follow_config(&mut self) {
        self.interrupt.msix.set_control(self.msix_control());
        let disabled = self.config.command() & command::INTX_DISABLE != 0;
        self.interrupt.set_pin_disabled(disabled);
        self.update_doorbells();
    }

    /// The access that the access capability describes (clause 4.1.4.9): offset and length.
    fn described_access(&self) -> Option<(u64, usize)> {
        let at = usize::from(self.capabilities.access);
        let bar = self.config.u16_at(at + 4) & 0xff;
        let offset = self.config.u32_at(at + 8);
        let len = self.config.u32_at(at + 12) as usize;
        (usize::from(bar) == layout::BAR.index
            && matches!(len, 1 | 2 | 4)
            && (offset as usize).is_multiple_of(len))
        .then_some((offset.into(), len))
    }
}

impl Device for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        lock(&self.device).start()
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        lock(&self.device).pause()?;
        self.deactivate();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        if self.common.live() && !self.active {
            self.activate()?;
        }
        lock(&self.device).resume()?;
        self.update_doorbells();
        if self.active {
            self.wake_queues();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.interrupt.msix.reset();
        self.follow_config();
    }

    fn save(&self) -> SavedState {
        state::save(self)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state::restore(self, state)
    }
}

impl PciFunction for VirtioPci {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn connect(&mut self, wiring: Wiring) {
        self.interrupt.connect(wiring.intx);
        self.windows = Some(wiring.windows);
    }

    fn read_config(&mut self, offset: u8, data: &mut [u8]) {
        if offset == self.capabilities.access_data()
            && let Some((at, len)) = self.described_access()
            && len <= data.len()
        {
            data.fill(0);
            self.read_bar(layout::BAR.index, at, &mut data[..len]);
            return;
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
        if offset == self.capabilities.access_data()
            && let Some((at, len)) = self.described_access()
            && len <= data.len()
        {
            self.write_bar(layout::BAR.index, at, &data[..len]);
        }
        self.follow_config();
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        match layout::region(offset) {
            Some((Region::Common, offset)) => self.read_common(offset, data),
            Some((Region::Isr, 0)) => {
                data.fill(0);
                data[0] = self.interrupt.take_isr();
            }
            Some((Region::Device, offset)) => lock(&self.device).read_config(offset, data),
            Some((Region::MsixTable, offset)) => self.interrupt.msix.read_table(offset, data),
            Some((Region::MsixPending, offset)) => self.interrupt.msix.read_pending(offset, data),
            Some((Region::Isr | Region::Notify, _)) => data.fill(0),
            None => data.fill(0xff),
        }
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        match layout::region(offset) {
            Some((Region::Common, offset)) => self.write_common(offset, data),
            Some((Region::Device, offset)) => lock(&self.device).write_config(offset, data),
            Some((Region::Notify, offset)) => self.notify(offset),
            Some((Region::MsixTable, offset)) => self.interrupt.msix.write_table(offset, data),
            Some((Region::Isr | Region::MsixPending, _)) | None => {}
        }
    }

    fn subscribers(&self) -> Vec<Subscriber> {
        vec![
            self.device.clone() as Subscriber,
            Arc::new(Mutex::new(Relay(self.interrupt.clone()))),
        ]
    }
}

#[cfg(test)]
mod tests;
