//! Message-signalled vectors: an eventfd that becomes a message when it is signalled.
//!
//! A masked vector's eventfd is not watched, so that signals stay in it. That is MSI-X's pending bit.

use std::io;
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::signals::Signals;
use crate::bus::lock;
use crate::engine::{EngineError, MsiVector};

/// One vector.
pub(super) struct Vector {
    own: Weak<Self>,
    signals: Arc<Signals>,
    token: u64,
    eventfd: EventFd,
    state: Mutex<State>,
}

struct State {
    masked: bool,
    address: u64,
    data: u32,
}

impl Vector {
    /// A masked one.
    pub(super) fn new(signals: Arc<Signals>) -> io::Result<Arc<Self>> {
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        let token = signals.new_token();
        Ok(Arc::new_cyclic(|own| Self {
            own: Weak::clone(own),
            signals,
            token,
            eventfd,
            state: Mutex::new(State {
                masked: true,
                address: 0,
                data: 0,
            }),
        }))
    }

    /// The eventfd is readable: sends the message, unless the vector was masked meanwhile.
    pub(super) fn take_signal(&self) {
        let message = {
            let state = lock(&self.state);
            if state.masked || self.eventfd.read().is_err() {
                return;
            }
            (state.address, state.data)
        };
        // A vector without a message is nobody's wish.
        if message != (0, 0) {
            self.signals.send(message.0, message.1);
        }
    }
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn route(&self, address: u64, data: u32) -> Result<(), EngineError> {
        let mut state = lock(&self.state);
        state.address = address;
        state.data = data;
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), EngineError> {
        let mut state = lock(&self.state);
        if state.masked == masked {
            return Ok(());
        }
        if masked {
            self.signals.forget(self.token, &self.eventfd)
        } else {
            self.signals.watch(self.token, &self.eventfd, &self.own)
        }
        .map_err(|error| EngineError::new("watch MSI vector", error))?;
        state.masked = masked;
        Ok(())
    }

    fn pending(&self) -> bool {
        let state = lock(&self.state);
        if !state.masked {
            return false; // every signal is taken as it comes
        }
        // Taken and put back: nobody else reads it while it is masked.
        match self.eventfd.read() {
            Ok(count) => self.eventfd.write(count).is_ok(),
            Err(_) => false,
        }
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let _ = self.set_masked(true);
    }
}
