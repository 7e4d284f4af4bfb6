use std::fs::File;
use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{Buffer, TestMachine};

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl ConsoleSink for Screen {
    fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes);
    }
}

impl Screen {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn console(input: Option<OwnedFd>) -> (Arc<Mutex<Console>>, TestMachine, Screen) {
    let screen = Screen::default();
    let console = Console::new("console0", input, Box::new(screen.clone())).unwrap();
    let console = Arc::new(Mutex::new(console));
    let mut machine = TestMachine::new(console.clone());
    assert!(machine.start(F_VERSION_1 | F_SIZE | F_RING));
    (console, machine, screen)
}

/// Offers a receive buffer and returns its address.
fn offer(machine: &mut TestMachine, len: u32) -> u64 {
    let at = machine.buffer(0, 0);
    machine.add(RECEIVE, &[Buffer::writable(at, len)]);
    at
}

#[test]
fn output_reaches_the_sink_in_order() {
    let (_, mut machine, screen) = console(None);
    let at = machine.buffer(0, 0);
    machine.write(at, b"hello, world");
    machine.add(TRANSMIT, &[Buffer::readable(at, 5)]);
    machine.add(
        TRANSMIT,
        &[Buffer::readable(at + 5, 2), Buffer::readable(at + 7, 5)],
    );
    machine.kick(TRANSMIT);
    assert_eq!(screen.take(), b"hello, world");
    assert_eq!(machine.take_used(TRANSMIT).len(), 2);
}

#[test]
fn input_waits_for_buffers_and_is_never_dropped() {
    let (reader, writer) = std::io::pipe().unwrap();
    let (_, mut machine, _) = console(Some(reader.into()));
    (&writer).write_all(b"abcdef").unwrap();
    machine.run();
    assert!(machine.take_used(RECEIVE).is_empty());
    for expected in [b"abcd".as_slice(), b"ef"] {
        let at = offer(&mut machine, 4);
        machine.kick(RECEIVE);
        let used = machine.take_used(RECEIVE);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].1 as usize, expected.len());
        assert_eq!(machine.read(at, expected.len()), expected);
    }
    // A buffer first, then input: the edge alone is enough.
    offer(&mut machine, 4);
    machine.kick(RECEIVE);
    assert!(machine.take_used(RECEIVE).is_empty());
    (&writer).write_all(b"x").unwrap();
    machine.run();
    assert_eq!(machine.take_used(RECEIVE)[0].1, 1);
}

#[test]
fn the_console_works_with_its_input_at_end_of_file() {
    let null = File::open("/dev/null").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    for input in [None, Some(null.into()), Some(OwnedFd::from(reader))] {
        let (console, mut machine, screen) = console(input);
        offer(&mut machine, 4);
        machine.kick(RECEIVE);
        machine.run();
        assert!(machine.take_used(RECEIVE).is_empty());
        assert!(console.lock().unwrap().input.is_none());
        let at = machine.buffer(1, 0);
        machine.write(at, b"ok");
        machine.add(TRANSMIT, &[Buffer::readable(at, 2)]);
        machine.kick(TRANSMIT);
        assert_eq!(screen.take(), b"ok");
    }
}

#[test]
fn a_regular_file_is_read_to_its_end() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"root\n").unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let (_, mut machine, _) = console(Some(file.into()));
    let at = offer(&mut machine, 64);
    machine.kick(RECEIVE);
    assert_eq!(machine.take_used(RECEIVE)[0].1, 5);
    assert_eq!(machine.read(at, 5), b"root\n");
}

#[test]
fn a_resize_changes_the_configuration_and_interrupts() {
    let (console, machine, _) = console(None);
    let before = machine.config_generation();
    console.lock().unwrap().resize(132, 43);
    console.lock().unwrap().resize(132, 43);
    assert_eq!(machine.messages(), [0], "the configuration's vector, once");
    assert_ne!(machine.config_generation(), before);
    assert_eq!(machine.device_config(0, 8), [132, 0, 43, 0, 1, 0, 0, 0]);
    assert_eq!(machine.device_config(10, 4), [0; 4]);
}

#[test]
fn an_emergency_write_needs_no_driver() {
    let screen = Screen::default();
    let console = Console::new("console0", None, Box::new(screen.clone())).unwrap();
    let machine = TestMachine::new(Arc::new(Mutex::new(console)));
    machine.write_device_config(CONFIG_EMERG_WRITE, &(b'!' as u32).to_le_bytes());
    assert_eq!(screen.take(), b"!");
}

#[test]
fn size_and_queues_survive_migration() {
    let (console, mut machine, _) = console(None);
    console.lock().unwrap().resize(80, 25);
    offer(&mut machine, 16);
    machine.kick(RECEIVE);

    let (reader, writer) = std::io::pipe().unwrap();
    (&writer).write_all(b"late").unwrap();
    let copy = Console::new("console0", Some(reader.into()), Box::new(Screen::default())).unwrap();
    let mut machine = machine.migrate(Arc::new(Mutex::new(copy)));
    machine.run();
    assert_eq!(machine.take_used(RECEIVE), [(0, 4)]);
    assert_eq!(machine.device_config(0, 4), [80, 0, 25, 0]);
}
