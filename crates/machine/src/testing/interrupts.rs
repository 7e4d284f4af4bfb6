//! An [`InterruptSource`] that records lines, messages and doorbells.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::lock;
use crate::engine::{DoorbellAddress, EngineError, InterruptLine, InterruptSource, MsiVector};

/// Interrupt lines by number, vectors in the order of their making, and doorbells by address.
#[derive(Default, Clone)]
pub(crate) struct TestInterrupts {
    lines: Arc<Mutex<BTreeMap<u32, Arc<Line>>>>,
    vectors: Arc<Mutex<Vec<Arc<Vector>>>>,
    doorbells: Arc<Mutex<BTreeMap<u64, EventFd>>>,
}

#[derive(Default)]
struct Line(AtomicBool);

impl InterruptLine for Line {
    fn set(&self, level: bool) {
        self.0.store(level, Ordering::SeqCst);
    }
}

struct Vector {
    event: EventFd,
    state: Mutex<VectorState>,
}

struct VectorState {
    route: Option<(u64, u32)>,
    masked: bool,
    /// Signals read from the eventfd and not delivered.
    waiting: bool,
}

impl Vector {
    fn poll(&self) -> bool {
        let mut state = lock(&self.state);
        state.waiting |= self.event.read().is_ok();
        state.waiting
    }
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, address: u64, data: u32) -> Result<(), EngineError> {
        lock(&self.state).route = Some((address, data));
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), EngineError> {
        lock(&self.state).masked = masked;
        Ok(())
    }

    fn pending(&self) -> bool {
        self.poll() && lock(&self.state).masked
    }
}

fn refused(operation: &str) -> EngineError {
    EngineError {
        operation: operation.into(),
        source: std::io::ErrorKind::AlreadyExists.into(),
    }
}

impl InterruptSource for TestInterrupts {
    fn line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        lock(&self.lines).entry(gsi).or_default().clone()
    }

    fn msi_vector(&self) -> Result<Arc<dyn MsiVector>, EngineError> {
        let vector = Arc::new(Vector {
            event: EventFd::new(EFD_NONBLOCK).map_err(|source| EngineError {
                operation: "eventfd".into(),
                source,
            })?,
            state: Mutex::new(VectorState {
                route: None,
                masked: true,
                waiting: false,
            }),
        });
        lock(&self.vectors).push(vector.clone());
        Ok(vector)
    }

    fn add_doorbell(&self, address: DoorbellAddress, eventfd: &EventFd) -> Result<(), EngineError> {
        let DoorbellAddress::Memory(address) = address else {
            return Err(refused("port doorbell"));
        };
        let mut doorbells = lock(&self.doorbells);
        if doorbells.contains_key(&address) {
            return Err(refused("doorbell"));
        }
        let eventfd = eventfd.try_clone().map_err(|source| EngineError {
            operation: "dup".into(),
            source,
        })?;
        doorbells.insert(address, eventfd);
        Ok(())
    }

    fn remove_doorbell(
        &self,
        address: DoorbellAddress,
        _eventfd: &EventFd,
    ) -> Result<(), EngineError> {
        match address {
            DoorbellAddress::Memory(at) if lock(&self.doorbells).remove(&at).is_some() => Ok(()),
            _ => Err(refused("no doorbell")),
        }
    }
}

impl TestInterrupts {
    /// The addresses that have a doorbell, ascending.
    pub(crate) fn doorbells(&self) -> Vec<u64> {
        lock(&self.doorbells).keys().copied().collect()
    }

    /// Signals the doorbell at `address`; false if there is none.
    pub(crate) fn ring(&self, address: u64) -> bool {
        lock(&self.doorbells)
            .get(&address)
            .is_some_and(|event| event.write(1).is_ok())
    }
}

#[cfg(test)]
impl TestInterrupts {
    /// The level of a line.
    pub(crate) fn level(&self, gsi: u32) -> bool {
        lock(&self.lines)
            .get(&gsi)
            .is_some_and(|line| line.0.load(Ordering::SeqCst))
    }

    /// The messages delivered since the last call, one for each unmasked vector that was signalled.
    pub(crate) fn take_messages(&self) -> Vec<(u64, u32)> {
        let mut messages = Vec::new();
        for vector in lock(&self.vectors).iter() {
            vector.poll();
            let mut state = lock(&vector.state);
            if !state.masked && std::mem::take(&mut state.waiting) {
                messages.extend(state.route);
            }
        }
        messages
    }
}
