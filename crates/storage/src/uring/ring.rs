//! A store queue over an io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::store::{Completion, Job, Request, Step, StoreQueue, Target, refuse};

/// How many jobs of one queue may hold a bounce buffer.
const BOUNCES_MAX: usize = 8;

/// How often a submission is tried again while the kernel has no memory for it.
const RETRIES_MAX: u32 = 10_000;

/// One io_uring and the jobs it has.
pub(crate) struct Ring {
    ring: IoUring,
    target: Target,
    /// Jobs that the kernel has or will get, by their index in the completion's user data.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs whose next step waits for a place in the submission queue.
    ready: VecDeque<usize>,
    /// Jobs that wait for a bounce buffer.
    waiting: VecDeque<Job>,
    bounces: usize,
    /// Steps that the kernel has.
    in_flight: usize,
    done: Vec<Completion>,
}

impl Ring {
    /// Whether the system gives out rings and knows the operations.
    pub(crate) fn probe() -> io::Result<()> {
        let ring = IoUring::new(2)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        match needed.iter().all(|code| probe.is_supported(*code)) {
            true => Ok(()),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    pub(crate) fn new(target: Target, depth: u16) -> io::Result<Self> {
        let entries = u32::from(depth.clamp(1, 1024)).next_power_of_two();
        Ok(Self {
            ring: IoUring::new(entries)?,
            target,
            jobs: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            bounces: 0,
            in_flight: 0,
            done: Vec::new(),
        })
    }

    fn admit(&mut self, job: Job) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[index] = Some(job);
        self.ready.push_back(index);
    }

    fn finish(&mut self, index: usize, result: io::Result<()>) {
        let Some(job) = self.jobs[index].take() else {
            return;
        };
        self.free.push(index);
        self.done.push(Completion {
            tag: job.tag,
            result,
        });
        if job.needs_bounce() {
            self.bounces -= 1;
            if let Some(job) = self.waiting.pop_front() {
                self.bounces += 1;
                self.admit(job);
            }
        }
    }

    /// Moves ready steps into the submission queue, as many as fit.
    fn fill(&mut self) {
        let file = types::Fd(self.target.file.as_raw_fd());
        // The kernel must never have more steps than completions fit.
        let limit = self.ring.params().cq_entries() as usize;
        while self.in_flight < limit && !self.ring.submission().is_full() {
            let Some(index) = self.ready.pop_front() else {
                return;
            };
            let Some(job) = self.jobs[index].as_mut() else {
                continue;
            };
            let entry = match job.step() {
                Ok(step) => entry(&step, file).user_data(index as u64),
                Err(error) => {
                    self.finish(index, Err(error));
                    continue;
                }
            };
            // SAFETY: the entry points into the job, which stays in `jobs` until its completion, and
            // into the memory of its buffers, which the job owns. `drop` waits for all completions.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                self.in_flight += 1;
            }
        }
    }

    fn enter(&mut self, wait: usize) -> io::Result<()> {
        let mut patience = RETRIES_MAX;
        loop {
            let Err(error) = self.ring.submit_and_wait(wait) else {
                return Ok(());
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // The kernel wants completions reaped first; the caller does that next.
                Some(libc::EBUSY) => return Ok(()),
                // It is short of memory.
                Some(libc::EAGAIN) if patience > 0 => {
                    patience -= 1;
                    std::thread::yield_now();
                }
                _ => return Err(error),
            }
        }
    }

    fn take_completions(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            self.in_flight -= 1;
            self.complete(&entry);
        }
    }

    fn complete(&mut self, entry: &cqueue::Entry) {
        let index = entry.user_data() as usize;
        let Some(job) = self.jobs.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        let result = u32::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
        match job.advance(result, &self.target.health) {
            Some(end) => self.finish(index, end),
            None => self.ready.push_back(index),
        }
    }
}

fn entry(step: &Step<'_>, file: types::Fd) -> squeue::Entry {
    match *step {
        Step::Read { offset, pieces } => {
            opcode::Readv::new(file, pieces.as_ptr().cast(), pieces.len() as u32)
                .offset(offset)
                .build()
        }
        Step::Write {
            offset,
            pieces,
            durable,
        } => opcode::Writev::new(file, pieces.as_ptr().cast(), pieces.len() as u32)
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Step::Sync => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Step::Allocate { mode, offset, len } => opcode::Fallocate::new(file, len)
            .offset(offset)
            .mode(mode)
            .build(),
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl StoreQueue for Ring {
    fn push(&mut self, request: Request) {
        if let Some(refused) = refuse(&request, &self.target.geometry) {
            self.done.push(refused);
            return;
        }
        let job = Job::new(request, self.target.memory_alignment, &self.target.health);
        if job.needs_bounce() {
            if self.bounces == BOUNCES_MAX {
                self.waiting.push_back(job);
                return;
            }
            self.bounces += 1;
        }
        self.admit(job);
    }

    fn submit(&mut self) -> io::Result<()> {
        self.fill();
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        self.take_completions();
        // Steps that follow, and those that had no place before.
        while !self.ready.is_empty() {
            let before = self.in_flight;
            self.submit()?;
            self.take_completions();
            if self.in_flight >= before && !self.ready.is_empty() {
                break;
            }
        }
        completions.append(&mut self.done);
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.ready.clear();
        while self.in_flight > 0 {
            if self.enter(1).is_err() {
                // The kernel may still use the jobs' memory, so that must outlive the process's use.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            while let Some(_entry) = self.ring.completion().next() {
                self.in_flight -= 1;
            }
        }
    }
}
