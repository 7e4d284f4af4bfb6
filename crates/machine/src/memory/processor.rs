//! Guest memory as the processor in software takes it.

use mica_cpu::{Ram, RamRange};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::GuestMemory;

/// The same RAM for [`mica_cpu::Processor`]s. It keeps the mappings alive.
#[must_use]
pub fn processor_ram(memory: &GuestMemory) -> Ram {
    let ranges = memory.iter().map(|region| {
        let (start, len, host) = (
            region.start_addr().raw_value(),
            region.len(),
            region.as_ptr(),
        );
        // SAFETY: a clone of the memory holds its mappings, all of which are readable and writable for
        // as long as they exist; they are reached through volatile and atomic accesses only.
        unsafe { RamRange::owned_by(memory.clone(), start, len, host) }
    });
    Ram::new(ranges.collect())
}
