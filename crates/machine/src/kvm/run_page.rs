//! The pages that a vCPU shares with the kernel: `struct kvm_run` and the data of port accesses.
//!
//! Other threads write one byte of it, `immediate_exit`, so no reference to the whole structure may
//! exist. Everything here goes through a raw pointer to exactly the field it means.

use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4 as Io,
    kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio, kvm_run__bindgen_ty_1__bindgen_ty_13 as Internal,
};
use kvm_ioctls::VcpuFd;

/// A vCPU's shared pages. Valid as long as the [`VcpuFd`] it was made from.
#[derive(Clone, Copy)]
pub(super) struct RunPage {
    run: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the pointer is to a shared mapping that has no thread affinity; what may be accessed from
// several threads is atomic, see the module's head.
unsafe impl Send for RunPage {}

impl RunPage {
    /// The pages of `fd`, `len` bytes of them as `KVM_GET_VCPU_MMAP_SIZE` has said.
    pub(super) fn new(fd: &mut VcpuFd, len: usize) -> Self {
        Self {
            run: NonNull::from(fd.get_kvm_run()),
            len,
        }
    }

    /// The byte that makes the next `KVM_RUN` return at once.
    ///
    /// # Safety
    ///
    /// The reference must not outlive the [`VcpuFd`].
    pub(super) unsafe fn immediate_exit<'a>(self) -> &'a AtomicU8 {
        // SAFETY: the byte is inside the mapping, is accessed as an atomic only (the kernel reads
        // it), and the caller answers for the lifetime.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }

    pub(super) fn exit_reason(&self) -> u32 {
        // SAFETY: a field of the mapping that the kernel writes only during KVM_RUN.
        unsafe { (&raw const (*self.run.as_ptr()).exit_reason).read() }
    }

    /// The port access of a `KVM_EXIT_IO`: port, whether the guest reads, and the units of data, each
    /// of the access's width; `None` if the kernel contradicts itself.
    pub(super) fn port_access(
        &mut self,
    ) -> Option<(u16, bool, std::slice::ChunksExactMut<'_, u8>)> {
        // SAFETY: every member of the union is plain data, so reading this one is sound whatever
        // the kernel wrote.
        let io: Io = unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1.io).read() };
        let start = usize::try_from(io.data_offset).ok()?;
        let len = (io.count as usize).checked_mul(io.size as usize)?;
        let in_bounds = start >= size_of::<kvm_run>() && start.checked_add(len)? <= self.len;
        if !in_bounds || !matches!(io.size, 1 | 2 | 4) {
            return None;
        }
        // SAFETY: inside the mapping and behind the structure, so nothing else refers to it; the
        // kernel touches it only during KVM_RUN, for which `self` is borrowed again.
        let data = unsafe {
            std::slice::from_raw_parts_mut(self.run.as_ptr().cast::<u8>().add(start), len)
        };
        let reads = u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN;
        Some((io.port, reads, data.chunks_exact_mut(io.size.into())))
    }

    /// The access of a `KVM_EXIT_MMIO`: address, whether the guest writes, and the data.
    pub(super) fn memory_access(&mut self) -> (u64, bool, &mut [u8]) {
        // SAFETY: plain data inside the mapping, apart from `immediate_exit`, and only this thread
        // and, during KVM_RUN, the kernel touch it.
        let mmio: &mut Mmio = unsafe { &mut (*self.run.as_ptr()).__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        (mmio.phys_addr, mmio.is_write != 0, &mut mmio.data[..len])
    }

    /// Answers a `KVM_EXIT_X86_RDMSR` or `..._WRMSR` with a fault; gives the register's index.
    pub(super) fn refuse_msr(&mut self) -> u32 {
        // SAFETY: as in `memory_access`.
        let msr = unsafe { &mut (*self.run.as_ptr()).__bindgen_anon_1.msr };
        msr.error = 1;
        msr.index
    }

    /// The suberror and data of a `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: as in `port_access`.
        let internal: Internal =
            unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1.internal).read() };
        let len = (internal.ndata as usize).min(internal.data.len());
        (internal.suberror, internal.data[..len].to_vec())
    }

    /// The processor's reason of a `KVM_EXIT_FAIL_ENTRY`.
    pub(super) fn fail_entry(&self) -> u64 {
        // SAFETY: as in `port_access`.
        unsafe {
            (&raw const (*self.run.as_ptr())
                .__bindgen_anon_1
                .fail_entry
                .hardware_entry_failure_reason)
                .read()
        }
    }

    /// The type of a `KVM_EXIT_SYSTEM_EVENT`.
    pub(super) fn system_event(&self) -> u32 {
        // SAFETY: as in `port_access`.
        unsafe { (&raw const (*self.run.as_ptr()).__bindgen_anon_1.system_event.type_).read() }
    }
}
