//! Making a vCPU leave the guest from another thread.
//!
//! Two things together: the byte `immediate_exit`, which the kernel reads on the way into the guest,
//! and a signal, which takes the thread out of it. The signal's handler does nothing, so whether it
//! comes before, inside or after `KVM_RUN` makes no difference: the byte is set before it is sent.
//! The vCPU clears the byte before it takes the request, so a request that comes between the two
//! leaves the byte set, at worst for one more turn around the run loop.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock};

use super::lock;
use super::run_page::RunPage;
use crate::engine::{EngineError, Kick};

/// The kick of one vCPU, shared by the vCPU and those who kick it.
pub(super) struct KickHandle {
    /// A kick was asked for and has not been reported yet.
    requested: AtomicBool,
    /// The thread inside `Vcpu::run`, or zero.
    thread: AtomicI32,
    /// `None` once the vCPU is gone.
    page: Mutex<Option<RunPage>>,
}

impl KickHandle {
    pub(super) fn new(page: RunPage) -> Self {
        Self {
            requested: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            page: Mutex::new(Some(page)),
        }
    }

    /// The calling thread enters the run loop.
    pub(super) fn enter(&self, thread: i32) {
        self.thread.store(thread, Ordering::SeqCst);
    }

    /// And leaves it.
    pub(super) fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// Whether there was a kick since the last call. `page` is the vCPU's own.
    pub(super) fn take(&self, page: RunPage) -> bool {
        // SAFETY: called by the vCPU, which owns the descriptor; the reference ends here.
        unsafe { page.immediate_exit() }.store(0, Ordering::SeqCst);
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// The vCPU ceases to exist: later kicks do nothing.
    pub(super) fn disconnect(&self) {
        *lock(&self.page) = None;
    }
}

impl Kick for KickHandle {
    fn kick(&self) {
        if self.requested.swap(true, Ordering::SeqCst) {
            return;
        }
        let page = lock(&self.page);
        let Some(page) = *page else { return };
        // SAFETY: the vCPU closes its descriptor after `disconnect`, which waits for the lock that
        // we hold.
        unsafe { page.immediate_exit() }.store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: sends a signal whose handler does nothing to a thread of this process. If the
            // thread has left the run loop meanwhile, that has no effect; if it is gone, the call
            // fails, and nobody is left to be kicked.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

/// The signal of kicks: the first that the C library leaves to applications.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes the calling thread kickable, and gives its identifier.
pub(super) fn prepare_thread() -> Result<i32, EngineError> {
    static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
    HANDLER
        .get_or_init(install_handler)
        .map_err(|errno| EngineError::new("sigaction", io::Error::from_raw_os_error(errno)))?;
    // SAFETY: an all-zero signal set is a valid place for sigemptyset to write to; both pointers are
    // to locals.
    let failed = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    if failed != 0 {
        return Err(EngineError::new(
            "pthread_sigmask",
            io::Error::from_raw_os_error(failed),
        ));
    }
    Ok(rustix::thread::gettid().as_raw_nonzero().get())
}

fn install_handler() -> Result<(), i32> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the action is fully initialized, and its handler, which does nothing at all, is
    // async-signal-safe. SA_RESTART keeps other system calls of the thread from seeing the signal;
    // KVM_RUN returns on it regardless.
    let failed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(signal(), &raw const action, std::ptr::null_mut())
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EINVAL))
    }
}
