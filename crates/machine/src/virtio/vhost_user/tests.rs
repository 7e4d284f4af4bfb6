//! Both devices against real backends in processes of their own, and against bad ones.

mod backend;
mod block;
mod daemon;
mod driver;
mod hostile;
mod net;
mod peer;
mod scripted;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use super::BackendSource;

/// No step of a test waits longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes down what a device asks for.
struct Requests(Sender<String>);

impl BackendSource for Requests {
    fn request(&self, device: &str, reason: &str) {
        let _ = self.0.send(format!("{device}: {reason}"));
    }
}

fn requests() -> (Box<Requests>, Receiver<String>) {
    let (sender, receiver) = channel();
    (Box::new(Requests(sender)), receiver)
}

/// A device in an event loop that the test turns.
struct Looped<D> {
    device: Arc<Mutex<D>>,
    events: EventManager<Arc<Mutex<D>>>,
}

impl<D: MutEventSubscriber> Looped<D> {
    fn new(device: D) -> Self {
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        Self { device, events }
    }

    fn with<T>(&mut self, use_it: impl FnOnce(&mut D) -> T) -> T {
        use_it(&mut self.device.lock().unwrap())
    }

    /// Turns the event loop until `done`.
    fn turn_until(&mut self, what: &str, mut done: impl FnMut(&mut D) -> bool) {
        let start = Instant::now();
        while !done(&mut self.device.lock().unwrap()) {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            self.events.run_with_timeout(10).unwrap();
        }
    }
}
