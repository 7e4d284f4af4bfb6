//! Interrupts into the guest: lines, and message-signalled vectors with their routes.
//!
//! The kernel's routing table maps a global system interrupt number to what it causes. Numbers below
//! 24 are pins: of the 8259s and the I/O APIC below 16, of the I/O APIC from there on. Each MSI
//! vector takes one number above that; its route is the message that the guest has programmed.
//!
//! An unmasked vector's eventfd is bound to its number (irqfd), so a signal goes straight to the
//! target's local APIC. A masked one is not bound, so that signals stay in the eventfd until the
//! kernel finds them there at the next binding. That is MSI-X's pending bit.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use rustix::event::{PollFd, PollFlags};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::lock;
use super::vm::Vm;
use crate::engine::{EngineError, InterruptLine, MsiVector, invalid};

/// The I/O APIC's pins, and so the first number for an MSI vector.
const PINS: u32 = 24;
/// The pins that the 8259s have too.
const PIC_PINS: u32 = 16;
/// The kernel's limit on routes (`KVM_MAX_IRQ_ROUTES`): two for each shared pin, one for the others.
const MAX_MSI_VECTORS: usize = 4096 - (PINS + PIC_PINS) as usize;

/// Where an MSI goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

/// All interrupt inputs of a VM.
pub(super) struct Interrupts {
    vm: Arc<Vm>,
    /// How many drivers hold each pin high.
    pins: Arc<[Mutex<u32>; PINS as usize]>,
    /// The MSI vectors that exist, by number.
    messages: Mutex<BTreeMap<u32, Message>>,
}

impl Interrupts {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        Self {
            vm,
            pins: Arc::new(std::array::from_fn(|_| Mutex::new(0))),
            messages: Mutex::new(BTreeMap::new()),
        }
    }

    pub(super) fn line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        assert!(gsi < PINS, "the I/O APIC has no pin {gsi}");
        Arc::new(Line {
            vm: Arc::clone(&self.vm),
            pins: Arc::clone(&self.pins),
            gsi,
            level: AtomicBool::new(false),
        })
    }

    pub(super) fn msi_vector(self: &Arc<Self>) -> Result<Arc<dyn MsiVector>, EngineError> {
        let eventfd =
            EventFd::new(EFD_NONBLOCK).map_err(|error| EngineError::new("eventfd", error))?;
        let mut messages = lock(&self.messages);
        if messages.len() >= MAX_MSI_VECTORS {
            let reason = format!("all {MAX_MSI_VECTORS} are taken");
            return Err(EngineError::new("create MSI vector", invalid(reason)));
        }
        let gsi = (PINS..)
            .find(|gsi| !messages.contains_key(gsi))
            .expect("invariant: fewer are taken than there are numbers");
        messages.insert(gsi, Message::default());
        Ok(Arc::new(Vector {
            interrupts: Arc::clone(self),
            eventfd,
            gsi,
            state: Mutex::new(VectorState {
                masked: true,
                message: Message::default(),
            }),
        }))
    }

    /// Routes `gsi` to `message`.
    fn set_route(&self, gsi: u32, message: Message) -> Result<(), EngineError> {
        let mut messages = lock(&self.messages);
        if messages.get(&gsi) == Some(&message) {
            return Ok(());
        }
        messages.insert(gsi, message);
        let mut entries: Vec<_> = (0..PINS).flat_map(pin_routes).collect();
        // A vector without a message has no route yet: interrupt zero of CPU zero is nobody's wish.
        let programmed = messages
            .iter()
            .filter(|(_, message)| **message != Message::default());
        entries.extend(programmed.map(|(&gsi, &message)| msi_route(gsi, message)));
        let table = KvmIrqRouting::from_entries(&entries)
            .expect("invariant: MAX_MSI_VECTORS leaves room for the pins");
        self.vm
            .fd
            .set_gsi_routing(&table)
            .map_err(|error| EngineError::new("KVM_SET_GSI_ROUTING", error))
    }
}

/// The routes of a pin, as the kernel has them from the start.
fn pin_routes(pin: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    let chip = move |irqchip, chip_pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = chip_pin;
        entry
    };
    let pic = match pin {
        0..8 => Some(chip(KVM_IRQCHIP_PIC_MASTER, pin)),
        8..PIC_PINS => Some(chip(KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
        _ => None,
    };
    pic.into_iter().chain([chip(KVM_IRQCHIP_IOAPIC, pin)])
}

fn msi_route(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

/// One device's hold on a pin.
struct Line {
    vm: Arc<Vm>,
    pins: Arc<[Mutex<u32>; PINS as usize]>,
    gsi: u32,
    level: AtomicBool,
}

impl InterruptLine for Line {
    fn set(&self, level: bool) {
        let mut holders = lock(&self.pins[self.gsi as usize]);
        if self.level.swap(level, Ordering::Relaxed) == level {
            return;
        }
        let before = *holders;
        *holders = if level { before + 1 } else { before - 1 };
        if (before == 0) != (*holders == 0) {
            // Fails only for a pin that does not exist.
            let _ = self.vm.fd.set_irq_line(self.gsi, level);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set(false);
    }
}

struct Vector {
    interrupts: Arc<Interrupts>,
    eventfd: EventFd,
    gsi: u32,
    state: Mutex<VectorState>,
}

struct VectorState {
    masked: bool,
    message: Message,
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn route(&self, address: u64, data: u32) -> Result<(), EngineError> {
        let mut state = lock(&self.state);
        let message = Message { address, data };
        // A masked vector's message may still change in halves; the kernel hears of it at unmasking.
        if !state.masked {
            self.interrupts.set_route(self.gsi, message)?;
        }
        state.message = message;
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), EngineError> {
        let mut state = lock(&self.state);
        if state.masked == masked {
            return Ok(());
        }
        let fd = &self.interrupts.vm.fd;
        if masked {
            fd.unregister_irqfd(&self.eventfd, self.gsi)
        } else {
            self.interrupts.set_route(self.gsi, state.message)?;
            fd.register_irqfd(&self.eventfd, self.gsi)
        }
        .map_err(|error| EngineError::new("KVM_IRQFD", error))?;
        state.masked = masked;
        Ok(())
    }

    fn pending(&self) -> bool {
        // While it is unmasked the kernel takes every signal as it comes.
        lock(&self.state).masked && is_signalled(&self.eventfd)
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let _ = self.set_masked(true);
        lock(&self.interrupts.messages).remove(&self.gsi);
    }
}

/// Whether the eventfd's counter is above zero, without taking it.
fn is_signalled(eventfd: &EventFd) -> bool {
    // SAFETY: the descriptor is open as long as the eventfd, which is borrowed here.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = rustix::event::Timespec::default();
    rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
}
