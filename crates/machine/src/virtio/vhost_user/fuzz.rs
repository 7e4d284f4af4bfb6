//! Entry points for the fuzzer: what a backend says, and what a driver asks of the control queue.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use mica_base::units::Bytes;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::channel::Channel;
use super::control::Control;
use super::{BackendSource, Block, BlockOptions};
use crate::memory::{MemoryOptions, allocate};
use crate::virtio::{Activation, VirtioDevice, VirtioInterrupt};

/// More than a backend says in its life.
const MAX_INPUT: usize = 16 << 10;

struct Nobody(Arc<EventFd>);

impl BackendSource for Nobody {
    fn request(&self, _: &str, _: &str) {}
}

impl VirtioInterrupt for Nobody {
    fn used(&self, _: u16) {}

    fn config_changed(&self) {}

    fn used_eventfd(&self, _: u16) -> Arc<EventFd> {
        self.0.clone()
    }
}

/// A stream on which all of `bytes` waits and then no more comes, and the end that must stay open.
fn says(bytes: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().expect("invariant: sockets are at hand");
    theirs
        .write_all(bytes)
        .and_then(|()| theirs.shutdown(Shutdown::Write))
        .expect("invariant: the socket buffer is larger");
    (ours, theirs)
}

/// Takes `data` for all that a backend ever says, on both of its sockets: the device refuses it or
/// goes on, within its patience.
///
/// # Panics
///
/// When an invariant of the front-end is broken.
#[doc(hidden)]
pub fn fuzz_vhost_user_backend(data: &[u8]) {
    let data = &data[..data.len().min(MAX_INPUT)];
    let (first, second) = data.split_at(data.len() / 2);
    for (early, late) in [(data, data), (first, second)] {
        talk(early, late);
    }
    let (mut channel, mut theirs) = Channel::pair().expect("invariant: sockets are at hand");
    theirs
        .write_all(data)
        .expect("invariant: the socket buffer is larger");
    drop(theirs);
    // Each call serves up to 16 requests of 12 bytes or more.
    let served = (0..=MAX_INPUT / 12).any(|_| channel.serve().closed);
    assert!(served, "the channel does not end");
}

fn talk(early: &[u8], late: &[u8]) {
    let event = EventFd::new(EFD_NONBLOCK).expect("invariant: descriptors are at hand");
    let nobody = |event: &Arc<EventFd>| Nobody(event.clone());
    let event = Arc::new(event);
    let options = BlockOptions {
        name: "disk0".into(),
        max_queues: 4,
    };
    let (stream, _theirs) = says(early);
    let source = Box::new(nobody(&event));
    let patience = Duration::from_millis(20);
    let Ok(mut block) = Block::with_patience(options, stream, source, patience) else {
        return;
    };
    let queues = block.queue_sizes().len();
    assert!((1..=4).contains(&queues));
    let memory =
        allocate(Bytes::mib(2), &MemoryOptions::default()).expect("invariant: memory is at hand");
    let ring = |_| {
        let mut queue = Queue::new(64).expect("invariant: 64 is a power of two");
        queue.set_ready(true);
        Some(queue)
    };
    let activated = block.activate(Activation {
        memory,
        features: block.features(),
        queues: (0..queues).map(ring).collect(),
        events: block.queue_events(),
        interrupt: Arc::new(nobody(&event)),
    });
    assert!(activated.is_ok());
    block.write_config(32, &[0]);
    let (stream, _theirs) = says(late);
    block.reconnect(stream);
    assert_eq!(block.deactivate().len(), queues);
}

/// Takes pieces of `data` for control requests: they leave a state that the device can go on with.
///
/// # Panics
///
/// When an invariant is broken.
#[doc(hidden)]
pub fn fuzz_vhost_user_net_control(data: &[u8]) {
    let mut control = Control::new([2; 6]);
    for request in data.chunks(16).chain([data]) {
        control.request(request, u64::MAX, 4);
        assert!((1..=4).contains(&control.pairs));
        assert!(control.rx_modes < 1 << 6);
    }
}
