//! (stub) The `system` module's delivery of events, until it is merged.

use crate::error::Exception;
use crate::processor::{Environment, Processor};

impl Processor {
    pub(crate) fn deliver_exception(
        &mut self,
        env: &dyn Environment,
        exception: Exception,
    ) -> Result<(), ()> {
        let _ = (env, exception); // a triple fault
        Err(())
    }

    pub(crate) fn deliver_interrupt(
        &mut self,
        env: &dyn Environment,
        vector: u8,
    ) -> Result<(), ()> {
        let _ = (env, vector);
        Err(())
    }
}
