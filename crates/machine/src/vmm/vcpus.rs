//! The vCPU threads and how the rest of the machine stops and starts them.
//!
//! ```text
//!             run()              vCPU exits for good (triple fault, engine failure)
//!  ┌────────┐ ────▶ ┌─────────┐ ────────────────────────────────▶ ┌───────┐
//!  │ parked │       │ running │                                    │ ended │
//!  └────────┘ ◀──── └─────────┘   pause(), then run() again ◀───── └───────┘
//!             pause()
//! ```
//!
//! Every thread holds its vCPU's lock while it runs and gives it back while it is parked, so whoever
//! has paused the machine can lock each vCPU and read or set its state.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::engine::{BusAccess, EngineError, Exit, Kick, Vcpu};

/// A vCPU thread's stack. In one of the usual two MiB the host's kernel would see room for a huge
/// page, and clear it all at the first call.
const STACK_BYTES: usize = 512 << 10;

/// What all vCPUs shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Park,
    Run,
    Quit,
}

/// The part of the set that its threads see.
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Set while the goal is not to run; read by a vCPU after each kick without taking the lock.
    hold: AtomicBool,
    bus: Arc<dyn BusAccess>,
    on_end: Box<dyn Fn(VcpuEnd) + Send + Sync>,
}

struct Progress {
    goal: Goal,
    /// Counts calls of [`Vcpus::run`]: a vCPU that ended in one run may start in the next.
    run: u64,
    /// In this run, the others stay parked.
    only: Option<usize>,
    /// Threads that do not touch their vCPU.
    parked: usize,
}

/// A vCPU that cannot go on.
#[derive(Debug)]
pub struct VcpuEnd {
    /// Which.
    pub index: usize,
    /// Why.
    pub cause: EndCause,
}

/// Why a vCPU cannot go on.
#[derive(Debug)]
pub enum EndCause {
    /// Its guest faulted thrice.
    TripleFault,
    /// A debugger's breakpoint or step.
    Debug,
    /// A replayed recording has something for the machine as a whole.
    Recorded,
    /// The engine says why.
    Failed(String),
}

/// A vCPU as its thread and the machine share it.
type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// All vCPUs of a machine with their threads; parked at first.
pub struct Vcpus {
    shared: Arc<Shared>,
    vcpus: Vec<SharedVcpu>,
    kicks: Vec<Arc<dyn Kick>>,
    threads: Vec<JoinHandle<()>>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked with the lock has ended the VM by its panic hook's report; what it
    // guarded is only counted and parked from here on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vcpus {
    /// Starts a parked thread for each vCPU. `on_end` is called on a vCPU's thread when it cannot go
    /// on.
    ///
    /// # Errors
    ///
    /// The system has no more threads.
    pub fn new(
        vcpus: Vec<Box<dyn Vcpu>>,
        bus: Arc<dyn BusAccess>,
        on_end: Box<dyn Fn(VcpuEnd) + Send + Sync>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            progress: Mutex::new(Progress {
                goal: Goal::Park,
                run: 0,
                only: None,
                parked: 0,
            }),
            changed: Condvar::new(),
            hold: AtomicBool::new(true),
            bus,
            on_end,
        });
        let kicks = vcpus.iter().map(|vcpu| vcpu.kick_handle()).collect();
        let vcpus: Vec<SharedVcpu> = vcpus
            .into_iter()
            .map(|vcpu| Arc::new(Mutex::new(vcpu)))
            .collect();
        let mut set = Self {
            shared,
            vcpus,
            kicks,
            threads: Vec::new(),
        };
        for (index, vcpu) in set.vcpus.iter().enumerate() {
            let (shared, vcpu) = (Arc::clone(&set.shared), Arc::clone(vcpu));
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || shared.drive(index, &vcpu))?;
            set.threads.push(thread);
        }
        // A thread that starts makes system calls that the jail forbids later.
        set.wait_until_parked();
        Ok(set)
    }

    /// Lets all vCPUs run.
    pub fn run(&self) {
        self.run_some(None);
    }

    /// Lets all vCPUs run, or `only` one.
    pub fn run_some(&self, only: Option<usize>) {
        let mut progress = lock(&self.shared.progress);
        progress.goal = Goal::Run;
        progress.only = only;
        progress.run += 1;
        self.shared.hold.store(false, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    /// Parks all vCPUs and returns when they are parked.
    pub fn pause(&self) {
        self.hold(Goal::Park);
        self.wait_until_parked();
    }

    fn wait_until_parked(&self) {
        let mut progress = lock(&self.shared.progress);
        while progress.parked < self.vcpus.len() {
            progress = self
                .shared
                .changed
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn hold(&self, goal: Goal) {
        lock(&self.shared.progress).goal = goal;
        self.shared.hold.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        for kick in &self.kicks {
            kick.kick();
        }
    }

    /// Calls `action` with each parked vCPU in turn.
    ///
    /// The set must be paused: a running vCPU would keep the caller waiting until it is.
    ///
    /// # Errors
    ///
    /// The first error that `action` returns; the vCPUs behind it are not visited.
    pub fn for_each(
        &self,
        mut action: impl FnMut(usize, &mut dyn Vcpu) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            action(index, lock(vcpu).as_mut())?;
        }
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether there are none, which a machine never has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.hold(Goal::Quit);
        for thread in self.threads.drain(..) {
            // A panic in a vCPU's thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The life of a vCPU's thread.
    fn drive(&self, index: usize, vcpu: &SharedVcpu) {
        let mut ended_in = None;
        while let Some(run) = self.wait_to_run(index, ended_in) {
            let cause = match self.run_until_held(lock(vcpu).as_mut()) {
                Ok(Some(cause)) => cause,
                Ok(None) => continue,
                Err(error) => EndCause::Failed(error.to_string()),
            };
            ended_in = Some(run);
            (self.on_end)(VcpuEnd { index, cause });
        }
    }

    /// Parks until the goal is to run in another run than `ended_in`. `None`: the thread shall quit.
    fn wait_to_run(&self, index: usize, ended_in: Option<u64>) -> Option<u64> {
        let mut progress = lock(&self.progress);
        progress.parked += 1;
        self.changed.notify_all();
        loop {
            match progress.goal {
                Goal::Quit => return None,
                Goal::Run
                    if ended_in != Some(progress.run)
                        && progress.only.is_none_or(|only| only == index) =>
                {
                    break;
                }
                Goal::Run | Goal::Park => {}
            }
            progress = self
                .changed
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
        progress.parked -= 1;
        Some(progress.run)
    }

    fn run_until_held(&self, vcpu: &mut dyn Vcpu) -> Result<Option<EndCause>, EngineError> {
        loop {
            match vcpu.run(self.bus.as_ref())? {
                Exit::Kicked if self.hold.load(Ordering::SeqCst) => return Ok(None),
                Exit::Kicked => {}
                Exit::TripleFault => return Ok(Some(EndCause::TripleFault)),
                Exit::Debug => return Ok(Some(EndCause::Debug)),
                Exit::Recorded => return Ok(Some(EndCause::Recorded)),
                Exit::Fatal(reason) => return Ok(Some(EndCause::Failed(reason))),
            }
        }
    }
}
