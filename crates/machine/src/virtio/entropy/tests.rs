use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{Buffer, TestMachine};

fn machine() -> TestMachine {
    let device = Entropy::new("rng0").unwrap();
    let mut machine = TestMachine::new(Arc::new(Mutex::new(device)));
    assert!(machine.start(F_VERSION_1));
    machine
}

#[test]
fn buffers_are_filled_to_their_end_and_no_further() {
    let mut machine = machine();
    let (a, b) = (machine.buffer(0, 64), machine.buffer(1, 100));
    machine.add(0, &[Buffer::writable(a, 64), Buffer::writable(b, 99)]);
    machine.kick(0);
    assert_eq!(machine.take_used(0), [(0, 163)]);
    assert_ne!(machine.read(a, 64), [0; 64]);
    let tail = machine.read(b, 100);
    assert_ne!(tail[..99], [0; 99]);
    assert_eq!(tail[99], 0);
    assert_eq!(machine.messages(), [1], "the queue's vector");
}

#[test]
fn a_huge_request_gets_a_bounded_answer() {
    let mut machine = machine();
    let at = machine.buffer(0, 1);
    machine.add(0, &[Buffer::writable(at, 1 << 20)]);
    machine.kick(0);
    assert_eq!(machine.take_used(0), [(0, MAX_PER_REQUEST as u32)]);
}

#[test]
fn a_request_outside_ram_or_without_room_is_given_back_empty() {
    let mut machine = machine();
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(u64::MAX - 10, 64)]);
    machine.add(0, &[Buffer::readable(at, 8)]);
    machine.kick(0);
    assert_eq!(machine.take_used(0), [(0, 0), (1, 0)]);
}

#[test]
fn requests_go_on_after_save_and_restore() {
    let mut machine = machine();
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(at, 8)]);
    machine.kick(0);
    assert_eq!(machine.take_used(0).len(), 1);
    let copy = Entropy::new("rng0").unwrap();
    let mut machine = machine.migrate(Arc::new(Mutex::new(copy)));
    let head = machine.add(0, &[Buffer::writable(at, 8)]);
    machine.kick(0);
    assert_eq!(machine.take_used(0), [(head, 8)]);
}
