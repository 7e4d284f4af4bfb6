//! The socket behind a guest's console, in the VM process.
//!
//! Output is written at once as far as the socket takes it; what it does not take waits in a backlog
//! that the event loop writes as the reader catches up. A guest that prints faster than its reader
//! reads, for longer than [`MAX_BACKLOG`] lasts, loses its oldest unread output: it must neither
//! stall (a stalled vCPU could not be paused) nor grow our memory. Input is taken from the socket
//! only as fast as the device takes it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::console::ConsoleSink;

/// Output that waits for a slow reader, at most, in bytes.
pub const MAX_BACKLOG: usize = 1 << 20;

/// Gives input to a device and says how much of it the device took.
pub type PushInput = Box<dyn FnMut(&[u8]) -> usize + Send>;

/// Input read at a time, in bytes.
const INPUT_CHUNK: usize = 256;

struct Output {
    stream: Option<UnixStream>,
    backlog: VecDeque<u8>,
    lost: u64,
}

/// The side of the console that a device writes to.
pub struct SocketSink {
    output: Arc<Mutex<Output>>,
    backlogged: Arc<EventFd>,
}

/// The side that the event loop drives.
pub struct SocketConsole {
    stream: UnixStream,
    output: Arc<Mutex<Output>>,
    backlogged: Arc<EventFd>,
    /// Signalled by the device when it takes input again.
    wanted: Arc<EventFd>,
    push_input: PushInput,
    pending: VecDeque<u8>,
    input_open: bool,
    watched: EventSet,
}

fn lock(output: &Mutex<Output>) -> MutexGuard<'_, Output> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Output {
    /// Writes as much of the backlog as the reader takes. `false` while some is left.
    fn flush(&mut self) -> bool {
        while !self.backlog.is_empty() {
            let Some(stream) = &mut self.stream else {
                self.backlog.clear();
                break;
            };
            match stream.write(self.backlog.as_slices().0) {
                Ok(written) => drop(self.backlog.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The reader is gone for good.
                Err(_) => self.stream = None,
            }
        }
        true
    }
}

impl ConsoleSink for SocketSink {
    fn write(&mut self, bytes: &[u8]) {
        let mut output = lock(&self.output);
        if output.stream.is_none() {
            return;
        }
        let was_flowing = output.backlog.is_empty();
        output.backlog.extend(bytes);
        let excess = output.backlog.len().saturating_sub(MAX_BACKLOG);
        output.backlog.drain(..excess);
        output.lost += excess as u64;
        if was_flowing && !output.flush() {
            // The counter of an eventfd that nobody has read yet cannot overflow by ones.
            let _ = self.backlogged.write(1);
        }
    }
}

/// Makes both sides of a console over a connected socket; the device is made from the sink and then
/// given to [`SocketConsole::connect`]. `wanted` is what the device signals when it takes input again.
///
/// # Errors
///
/// The system has no more descriptors.
pub fn socket_console(
    stream: UnixStream,
    wanted: Arc<EventFd>,
) -> io::Result<(SocketSink, SocketConsole)> {
    stream.set_nonblocking(true)?;
    let output = Arc::new(Mutex::new(Output {
        stream: Some(stream.try_clone()?),
        backlog: VecDeque::new(),
        lost: 0,
    }));
    let backlogged = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let sink = SocketSink {
        output: Arc::clone(&output),
        backlogged: Arc::clone(&backlogged),
    };
    let console = SocketConsole {
        stream,
        output,
        backlogged,
        wanted,
        push_input: Box::new(<[u8]>::len),
        pending: VecDeque::new(),
        input_open: true,
        watched: EventSet::IN,
    };
    Ok((sink, console))
}

/// Makes the output side of a console whose device reads its input by itself.
///
/// # Errors
///
/// The system has no more descriptors.
pub fn socket_output(stream: UnixStream) -> io::Result<(SocketSink, SocketConsole)> {
    let (sink, mut console) = socket_console(stream, Arc::new(EventFd::new(EFD_NONBLOCK)?))?;
    console.input_open = false;
    console.watched = EventSet::empty();
    Ok((sink, console))
}

impl SocketConsole {
    /// Says where input goes.
    pub fn connect(&mut self, push_input: PushInput) {
        self.push_input = push_input;
    }

    /// Output that was lost because its reader was too slow, in bytes.
    #[must_use]
    pub fn lost_output(&self) -> u64 {
        lock(&self.output).lost
    }

    /// Writes what is left, for a last time; called when the machine has stopped.
    pub fn finish(&self) {
        lock(&self.output).flush();
    }

    fn give_input(&mut self) {
        while !self.pending.is_empty() {
            let taken = (self.push_input)(self.pending.as_slices().0);
            if taken == 0 {
                return;
            }
            self.pending.drain(..taken);
        }
    }

    fn read_input(&mut self) {
        let mut bytes = [0; INPUT_CHUNK];
        match self.stream.read(&mut bytes) {
            // The writer is gone; the guest sees silence.
            Ok(0) => self.input_open = false,
            Ok(read) => {
                self.pending.extend(&bytes[..read]);
                self.give_input();
            }
            Err(_) => {}
        }
    }

    /// Watches for what can be dealt with now.
    fn rewatch(&mut self, ops: &mut EventOps<'_>) {
        let mut wanted = EventSet::empty();
        if self.pending.is_empty() && self.input_open {
            wanted |= EventSet::IN;
        }
        if !lock(&self.output).flush() {
            wanted |= EventSet::OUT;
        }
        if wanted == self.watched {
            return;
        }
        // A socket whose other end is closed reports that for ever, so it is taken out altogether.
        let event = |set| Events::new(&self.stream, set);
        let result = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, false) => ops.add(event(wanted)),
            (false, true) => ops.remove(event(self.watched)),
            _ => ops.modify(event(wanted)),
        };
        if result.is_ok() {
            self.watched = wanted;
        }
    }
}

impl MutEventSubscriber for SocketConsole {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let stream = self
            .input_open
            .then(|| Events::new(&self.stream, EventSet::IN));
        let events = [
            Events::new(self.backlogged.as_ref(), EventSet::IN),
            Events::new(self.wanted.as_ref(), EventSet::IN),
        ];
        for event in events.into_iter().chain(stream) {
            ops.add(event)
                .expect("the loop is new and these descriptors are open");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let readable = EventSet::IN | EventSet::HANG_UP | EventSet::ERROR;
        if events.fd() == self.backlogged.as_raw_fd() {
            let _ = self.backlogged.read();
        } else if events.fd() == self.wanted.as_raw_fd() {
            let _ = self.wanted.read();
            self.give_input();
        } else if events.event_set().intersects(readable) {
            self.read_input();
        }
        self.rewatch(ops);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use event_manager::{EventManager, SubscriberOps};

    use super::*;

    #[test]
    fn output_reaches_a_slow_reader_in_order() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let wanted = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (mut sink, console) = socket_console(near, wanted).unwrap();
        let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        manager.add_subscriber(Box::new(console));
        // More than a socket buffers, less than the backlog holds.
        let sent: Vec<u8> = (0..900_000u32).map(|i| (i % 251) as u8).collect();
        for chunk in sent.chunks(1000) {
            sink.write(chunk);
        }
        let mut received: Vec<u8> = Vec::new();
        let mut bytes = vec![0; 64 << 10];
        far.set_nonblocking(true).unwrap();
        while received.len() < sent.len() {
            manager.run_with_timeout(0).unwrap();
            match far.read(&mut bytes) {
                Ok(read) => received.extend(&bytes[..read]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert!(received == sent, "the bytes differ");
    }

    #[test]
    fn a_reader_that_never_reads_costs_bounded_memory() {
        let (near, _far) = UnixStream::pair().unwrap();
        let wanted = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (mut sink, console) = socket_console(near, wanted).unwrap();
        for _ in 0..400 {
            sink.write(&[b'x'; 10_000]);
        }
        assert!(lock(&sink.output).backlog.len() <= MAX_BACKLOG);
        assert!(console.lost_output() > 0);
    }

    #[test]
    fn input_waits_for_the_device() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let wanted = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (_sink, mut console) = socket_console(near, Arc::clone(&wanted)).unwrap();
        let room = Arc::new(AtomicUsize::new(3));
        let taken = Arc::new(Mutex::new(Vec::new()));
        let (device_room, device_taken) = (Arc::clone(&room), Arc::clone(&taken));
        console.connect(Box::new(move |bytes| {
            let count = bytes.len().min(device_room.load(Ordering::SeqCst));
            device_room.fetch_sub(count, Ordering::SeqCst);
            device_taken
                .lock()
                .unwrap()
                .extend_from_slice(&bytes[..count]);
            count
        }));
        let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        manager.add_subscriber(Box::new(console));
        far.write_all(b"hello").unwrap();
        manager.run_with_timeout(0).unwrap();
        assert_eq!(taken.lock().unwrap().as_slice(), b"hel");
        far.write_all(b" you").unwrap();
        manager.run_with_timeout(0).unwrap();
        assert_eq!(taken.lock().unwrap().as_slice(), b"hel");
        room.store(100, Ordering::SeqCst);
        wanted.write(1).unwrap();
        manager.run_with_timeout(0).unwrap();
        manager.run_with_timeout(0).unwrap();
        assert_eq!(taken.lock().unwrap().as_slice(), b"hello you");
        // The end of input is the end of nothing else: the loop does not spin on it.
        drop(far);
        manager.run_with_timeout(0).unwrap();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
    }
}
