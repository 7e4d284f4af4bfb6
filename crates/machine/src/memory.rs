//! Guest memory: a memfd, mapped once here and once in every backend process.
//!
//! The type is vm-memory's, whose rules on aliasing hold everywhere: guest memory is read and
//! written by copies and volatile accesses only, because a vCPU, a device thread and a backend may
//! change it at any moment. A guest address is a [`vm_memory::GuestAddress`] and becomes a host
//! address only inside that crate, after its bounds check.

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// All RAM of a guest. Cloning it clones references, not memory.
///
/// Every write through it marks its pages in the region's bitmap, which is the VM process's own
/// share of the dirty log.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;
