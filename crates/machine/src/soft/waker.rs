//! How the chips reach the threads that execute vCPUs, and the timer that reaches the chips.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::platform::{Platform, Wake};
use super::steal::RousedAt;
use super::turns::Turns;
use crate::bus::lock;

const NS_PER_SECOND: u64 = 1_000_000_000;

/// One vCPU's thread, seen from the others.
#[derive(Default)]
struct Sleeper {
    /// The processor's flag that makes it look up.
    attention: OnceLock<Arc<AtomicBool>>,
    /// Something has happened since the thread looked last.
    signalled: Mutex<bool>,
    changed: Condvar,
    /// When that began.
    roused_at: RousedAt,
}

/// All vCPUs of a machine, and the timer for the chips' next deadline.
pub(super) struct Waker {
    sleepers: Vec<Sleeper>,
    timer: OwnedFd,
    /// Held while the timer is set, so that the latest deadline counts.
    arming: Mutex<()>,
    platform: OnceLock<Weak<Platform>>,
    /// Where vCPUs take turns, time is theirs to tell.
    turns: Option<Arc<Turns>>,
}

impl Waker {
    pub(super) fn new(vcpus: usize, turns: Option<Arc<Turns>>) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            sleepers: (0..vcpus).map(|_| Sleeper::default()).collect(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            arming: Mutex::new(()),
            platform: OnceLock::new(),
            turns,
        })
    }

    /// Names the chips whose deadline the timer follows.
    pub(super) fn attach(&self, platform: &Arc<Platform>) {
        let _ = self.platform.set(Arc::downgrade(platform));
    }

    /// Names the flag of a vCPU's processor.
    pub(super) fn set_attention(&self, vcpu: usize, attention: Arc<AtomicBool>) {
        let _ = self.sleepers[vcpu].attention.set(attention);
    }

    /// Readable when the chips' deadline has come.
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Makes the vCPU's thread look up, whether it executes or sleeps.
    pub(super) fn rouse(&self, vcpu: usize) {
        let sleeper = &self.sleepers[vcpu];
        if let Some(attention) = sleeper.attention.get() {
            attention.store(true, Ordering::SeqCst);
        }
        let mut signalled = lock(&sleeper.signalled);
        if !*signalled {
            *signalled = true;
            sleeper.roused_at.note();
        }
        drop(signalled);
        sleeper.changed.notify_one();
    }

    /// The flag of a vCPU's processor.
    pub(super) fn attention(&self, vcpu: usize) -> Arc<AtomicBool> {
        self.sleepers[vcpu]
            .attention
            .get()
            .map(Arc::clone)
            .unwrap_or_default()
    }

    /// Whether the vCPU was roused since the last time.
    pub(super) fn take_signal(&self, vcpu: usize) -> bool {
        std::mem::take(&mut *lock(&self.sleepers[vcpu].signalled))
    }

    /// Sleeps until the vCPU is roused, or returns at once if it was since the last time; when that
    /// was ([`super::steal::wall_ns`]).
    pub(super) fn sleep(&self, vcpu: usize) -> u64 {
        let sleeper = &self.sleepers[vcpu];
        let mut signalled = lock(&sleeper.signalled);
        while !*signalled {
            signalled = sleeper
                .changed
                .wait(signalled)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *signalled = false;
        sleeper.roused_at.get()
    }
}

impl Wake for Arc<Waker> {
    fn wake(&self, vcpu: usize) {
        self.rouse(vcpu);
    }

    fn rearm(&self) {
        if let Some(turns) = &self.turns {
            return turns.look_up();
        }
        let Some(platform) = self.platform.get().and_then(Weak::upgrade) else {
            return;
        };
        let _held = lock(&self.arming);
        // A time of zero would stop the timer.
        let at = platform.next_deadline().map_or(0, |at| at.max(1));
        let setting = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: (at / NS_PER_SECOND).cast_signed(),
                tv_nsec: (at % NS_PER_SECOND).cast_signed(),
            },
        };
        // Fails only for times that a clock cannot have, which are never.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &setting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soft::tsc::Tsc;
    use std::thread;

    #[test]
    fn a_wake_before_the_sleep_is_not_lost() {
        let waker = Waker::new(1, None).unwrap();
        waker.rouse(0);
        waker.sleep(0);
    }

    #[test]
    fn a_sleeper_is_woken() {
        let waker = Arc::new(Waker::new(2, None).unwrap());
        let other = Arc::clone(&waker);
        let thread = thread::spawn(move || other.sleep(1));
        waker.rouse(1);
        thread.join().unwrap();
    }

    #[test]
    fn attention_is_raised() {
        let waker = Waker::new(1, None).unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        waker.set_attention(0, Arc::clone(&flag));
        waker.rouse(0);
        assert!(flag.load(Ordering::SeqCst));
    }

    #[test]
    fn the_timer_follows_the_chips() {
        let waker = Arc::new(Waker::new(1, None).unwrap());
        let platform = Arc::new(Platform::new(1, Tsc::new(0, 0, 0), 0, Arc::clone(&waker)));
        waker.attach(&platform);
        // Counter 0, mode 2, a count of 2.
        for (port, value) in [(0x43, 0x34), (0x40, 2), (0x40, 0)] {
            platform.write_port(port, value, 0);
        }
        let left = rustix::time::timerfd_gettime(waker.timer()).unwrap();
        let fired = rustix::io::read(waker.timer(), &mut [0; 8]).is_ok();
        assert!(fired || left.it_value != Timespec::default());
    }
}
