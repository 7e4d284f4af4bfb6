//! The thread behind the chips: it waits for the timers' deadline and for the eventfds of MSI vectors.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, Weak, mpsc};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::Shared;
use super::msi::Vector;
use super::platform::Wake;
use crate::bus::lock;

const TIMER: u64 = 0;
const STOP: u64 = 1;
/// The first vector's token.
const FIRST_VECTOR: u64 = 2;
/// Events that are taken at once.
const BATCH: usize = 32;

/// What the thread waits for, and the thread.
pub(super) struct Signals {
    shared: Arc<Shared>,
    poll: Epoll,
    stop: EventFd,
    vectors: Mutex<Vectors>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Vectors {
    by_token: HashMap<u64, Weak<Vector>>,
    created: u64,
}

impl Signals {
    /// Starts the thread, which runs when this returns.
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Arc<Self>> {
        let signals = Arc::new(Self {
            poll: Epoll::new()?,
            stop: EventFd::new(EFD_NONBLOCK)?,
            shared,
            vectors: Mutex::default(),
            thread: Mutex::default(),
        });
        signals.add(signals.shared.waker.timer().as_raw_fd(), TIMER)?;
        signals.add(signals.stop.as_raw_fd(), STOP)?;
        let (started, wait) = mpsc::channel();
        let own = Arc::clone(&signals);
        let thread = std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                // The one who waits is there as long as `start` is.
                let _ = started.send(());
                own.serve();
            })?;
        let _ = wait.recv();
        *lock(&signals.thread) = Some(thread);
        Ok(signals)
    }

    fn add(&self, descriptor: RawFd, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, token);
        self.poll.ctl(ControlOperation::Add, descriptor, event)
    }

    /// A number for a new vector.
    pub(super) fn new_token(&self) -> u64 {
        let mut vectors = lock(&self.vectors);
        vectors.created += 1;
        FIRST_VECTOR + vectors.created
    }

    /// From now on a signal of the vector's eventfd is a message.
    pub(super) fn watch(
        &self,
        token: u64,
        eventfd: &EventFd,
        vector: &Weak<Vector>,
    ) -> io::Result<()> {
        lock(&self.vectors)
            .by_token
            .insert(token, Weak::clone(vector));
        self.add(eventfd.as_raw_fd(), token)
    }

    /// No longer; a signal stays in the eventfd.
    pub(super) fn forget(&self, token: u64, eventfd: &EventFd) -> io::Result<()> {
        lock(&self.vectors).by_token.remove(&token);
        let nothing = EpollEvent::default();
        self.poll
            .ctl(ControlOperation::Delete, eventfd.as_raw_fd(), nothing)
    }

    /// Delivers a message.
    pub(super) fn send(&self, address: u64, data: u32) {
        self.shared.send_msi(address, data);
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        let _ = self.stop.write(1);
        if let Some(thread) = lock(&self.thread).take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    fn serve(&self) {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let ready = match self.poll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    eprintln!("mica: the software engine's timers stop: {error}");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    TIMER => self.expire(),
                    STOP => return,
                    token => self.signalled(token),
                }
            }
        }
    }

    fn expire(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(self.shared.waker.timer(), &mut count);
        self.shared.platform.expire(self.shared.now_ns());
        self.shared.waker.rearm();
    }

    fn signalled(&self, token: u64) {
        let vector = lock(&self.vectors).by_token.get(&token).cloned();
        if let Some(vector) = vector.and_then(|vector| vector.upgrade()) {
            vector.take_signal();
        }
    }
}
