//! Guest writes that signal an eventfd inside the kernel.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::lock;
use super::vm::Vm;
use crate::engine::{DoorbellAddress, EngineError, invalid};

/// The doorbells of a VM. The kernel identifies one by its address and its eventfd, so a reference
/// to the latter is kept.
pub(super) struct Doorbells {
    vm: Arc<Vm>,
    registered: Mutex<HashMap<DoorbellAddress, EventFd>>,
}

impl Doorbells {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        Self {
            vm,
            registered: Mutex::default(),
        }
    }

    pub(super) fn add(
        &self,
        address: DoorbellAddress,
        eventfd: &EventFd,
    ) -> Result<(), EngineError> {
        let mut registered = lock(&self.registered);
        let Entry::Vacant(entry) = registered.entry(address) else {
            let reason = format!("{address:?} has one already");
            return Err(EngineError::new("add doorbell", invalid(reason)));
        };
        let kept = eventfd
            .try_clone()
            .map_err(|error| EngineError::new("add doorbell", error))?;
        // Without a length and a value to match, the kernel need not even decode the instruction.
        self.vm
            .fd
            .register_ioevent(&kept, &to_kvm(address), NoDatamatch)
            .map_err(|error| EngineError::new(format!("KVM_IOEVENTFD at {address:?}"), error))?;
        entry.insert(kept);
        Ok(())
    }

    pub(super) fn remove(&self, address: DoorbellAddress) -> Result<(), EngineError> {
        let mut registered = lock(&self.registered);
        let Some(eventfd) = registered.remove(&address) else {
            let reason = format!("{address:?} has none");
            return Err(EngineError::new("remove doorbell", invalid(reason)));
        };
        self.vm
            .fd
            .unregister_ioevent(&eventfd, &to_kvm(address), NoDatamatch)
            .map_err(|error| EngineError::new(format!("KVM_IOEVENTFD at {address:?}"), error))
    }
}

fn to_kvm(address: DoorbellAddress) -> IoEventAddress {
    match address {
        DoorbellAddress::Port(port) => IoEventAddress::Pio(u64::from(port)),
        DoorbellAddress::Memory(address) => IoEventAddress::Mmio(address),
    }
}
