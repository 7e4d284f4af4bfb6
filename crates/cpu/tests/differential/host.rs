//! Cases on the host's own processor.
//!
//! A forked child maps the pages of a case, then runs one case after the other without leaving its
//! signal handler for anything else: every case ends in an exception, whose signal's handler stores
//! the interrupted registers as the outcome, and writes the next case's registers over them, so that
//! the kernel's return from the signal starts it. There is no trampoline that a case could damage.
//!
//! The child is a prisoner: a seccomp filter kills it on any system call but returning from a signal,
//! waiting for the next batch and exiting; it has no descriptors; it dies with its parent.

#![allow(unsafe_code)] // a child process with registers and pages of our making

mod child;
pub(crate) mod memory;

use std::sync::atomic::{AtomicU32, Ordering};

use crate::case::{Case, Outcome};

/// Cases handed over at once.
pub(crate) const BATCH: usize = 128;

/// What parent and child share.
#[repr(C)]
struct Shared {
    /// [`IDLE`] or [`RUN`], and a futex.
    state: AtomicU32,
    count: AtomicU32,
    /// The case that runs: of interest when the child died.
    at: AtomicU32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

const IDLE: u32 = 0;
const RUN: u32 = 1;

/// The child and the way to it.
pub(crate) struct Host {
    shared: *mut Shared,
    child: libc::pid_t,
}

impl Host {
    /// Starts the child. `background`: the read-only page and the data pages.
    pub(crate) fn start(background: &[u8]) -> Self {
        let shared: *mut Shared = memory::map_shared(size_of::<Shared>()).cast();
        let ground = memory::map_shared(background.len());
        // SAFETY: both were just mapped, in these sizes.
        unsafe {
            std::ptr::copy_nonoverlapping(background.as_ptr(), ground, background.len());
            (*shared).state = AtomicU32::new(RUN);
        }
        // SAFETY: the child calls only the kernel and code that neither allocates nor locks.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: we are in the child, and this never returns.
            unsafe { child::run(shared, ground) }
        }
        assert!(child > 0, "fork failed");
        let mut host = Self { shared, child };
        host.wait().expect("the child starts");
        host
    }

    /// Runs up to [`BATCH`] cases. An error names the case that the child died or hung on.
    pub(crate) fn run(&mut self, cases: &[&Case]) -> Result<Vec<Outcome>, (usize, String)> {
        assert!(cases.len() <= BATCH);
        if cases.is_empty() {
            return Ok(Vec::new());
        }
        // SAFETY: the child does not touch cases and outcomes while the state is IDLE.
        unsafe {
            for (index, case) in cases.iter().enumerate() {
                (&raw mut (*self.shared).cases[index]).write(**case);
            }
            (*self.shared)
                .count
                .store(cases.len() as u32, Ordering::SeqCst);
        }
        self.state().store(RUN, Ordering::SeqCst);
        futex(self.state(), libc::FUTEX_WAKE, 1, None);
        self.wait().map_err(|why| {
            // SAFETY: the field is atomic.
            let at = unsafe { (*self.shared).at.load(Ordering::SeqCst) };
            (at as usize, why)
        })?;
        // SAFETY: the child is idle again.
        Ok((0..cases.len())
            .map(|index| unsafe { (&raw const (*self.shared).outcomes[index]).read() })
            .collect())
    }

    fn state(&self) -> &AtomicU32 {
        // SAFETY: mapped as long as the process lives, and atomic.
        unsafe { &(*self.shared).state }
    }

    /// Waits until the child is idle.
    fn wait(&mut self) -> Result<(), String> {
        for _ in 0..50 {
            if self.state().load(Ordering::SeqCst) == IDLE {
                return Ok(());
            }
            futex(self.state(), libc::FUTEX_WAIT, RUN, Some(100));
            let mut status = 0;
            // SAFETY: our own child.
            if unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) } == self.child {
                self.child = 0;
                return Err(format!("the host's child died, status {status:#x}"));
            }
        }
        Err("the host's child hangs".into())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.child > 0 {
            // SAFETY: our own child, not yet waited for.
            unsafe {
                libc::kill(self.child, libc::SIGKILL);
                libc::waitpid(self.child, std::ptr::null_mut(), 0);
            }
        }
    }
}

fn futex(word: &AtomicU32, operation: libc::c_int, value: u32, timeout_ms: Option<i64>) {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: timeout_ms.unwrap_or(0) * 1_000_000,
    };
    let timeout = if timeout_ms.is_some() {
        &raw const time
    } else {
        std::ptr::null()
    };
    // SAFETY: word and timeout live through the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, timeout) };
}
