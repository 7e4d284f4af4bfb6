//! A store queue over a few threads and classic system calls, for systems that refuse io_uring (as the
//! default seccomp filters of containers do).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FallocateFlags, fallocate, fdatasync};

use super::calls;
use crate::store::{Completion, Job, Request, Step, StoreQueue, Target, refuse};

/// Threads of one queue: enough to overlap a few synchronous transfers.
const THREADS: usize = 4;

#[derive(Default)]
struct State {
    todo: VecDeque<Job>,
    done: Vec<Completion>,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    finished: OwnedFd,
    target: Target,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        // A counter at its maximum is readable already.
        let _ = rustix::io::write(&self.finished, &1u64.to_ne_bytes());
    }
}

/// A queue and its threads.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    pushed: Vec<Job>,
    workers: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(crate) fn new(target: Target) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            finished: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            target,
        });
        let mut queue = Self {
            shared,
            pushed: Vec::new(),
            workers: Vec::new(),
        };
        for _ in 0..THREADS {
            let shared = queue.shared.clone();
            let worker = std::thread::Builder::new()
                .name("store-io".into())
                .spawn(move || work(&shared))?;
            queue.workers.push(worker);
        }
        Ok(queue)
    }
}

fn work(shared: &Shared) {
    loop {
        let mut state = shared.state();
        let mut job = loop {
            if let Some(job) = state.todo.pop_front() {
                break job;
            }
            if state.closing {
                return;
            }
            state = shared
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let result = run(&mut job, &shared.target);
        shared.state().done.push(Completion {
            tag: job.tag,
            result,
        });
        shared.signal();
    }
}

fn run(job: &mut Job, target: &Target) -> io::Result<()> {
    loop {
        let result = execute(&job.step()?, target.file.as_fd());
        if let Some(end) = job.advance(result, &target.health) {
            return end;
        }
    }
}

fn execute(step: &Step<'_>, file: BorrowedFd<'_>) -> io::Result<u32> {
    match *step {
        // SAFETY: the step borrows the job, which owns the buffers that keep the memory mapped.
        Step::Read { offset, pieces } => unsafe { calls::read(file, pieces, offset) },
        Step::Write {
            offset,
            pieces,
            durable,
        } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { calls::write(file, pieces, offset, flags) }
        }
        Step::Sync => Ok(fdatasync(file).map(|()| 0)?),
        Step::Allocate { mode, offset, len } => {
            let mode = FallocateFlags::from_bits_retain(mode as u32);
            Ok(fallocate(file, mode, offset, len).map(|()| 0)?)
        }
    }
}

impl AsFd for Threads {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.finished.as_fd()
    }
}

impl StoreQueue for Threads {
    fn push(&mut self, request: Request) {
        let target = &self.shared.target;
        if let Some(refused) = refuse(&request, &target.geometry) {
            self.shared.state().done.push(refused);
            self.shared.signal();
            return;
        }
        let job = Job::new(request, target.memory_alignment, &target.health);
        self.pushed.push(job);
    }

    fn submit(&mut self) -> io::Result<()> {
        if !self.pushed.is_empty() {
            self.shared.state().todo.extend(self.pushed.drain(..));
            self.shared.work.notify_all();
        }
        Ok(())
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        let mut counter = [0; 8];
        match rustix::io::read(&self.shared.finished, &mut counter) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        completions.append(&mut self.shared.state().done);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.state().closing = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has no job any more.
            let _ = worker.join();
        }
    }
}
