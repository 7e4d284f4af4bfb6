use mica_base::units::Bytes as Size;

use super::*;
use crate::memory::{MemoryOptions, allocate};

const AT: u64 = 0x1000;

fn memory() -> GuestMemory {
    allocate(Size(1 << 20), &MemoryOptions::default()).unwrap()
}

fn time(memory: &GuestMemory) -> u64 {
    memory.read_obj(GuestAddress(AT)).unwrap()
}

fn version(memory: &GuestMemory) -> u32 {
    memory.read_obj(GuestAddress(AT + VERSION)).unwrap()
}

fn preempted(memory: &GuestMemory) -> u8 {
    memory.read_obj(GuestAddress(AT + PREEMPTED)).unwrap()
}

fn on(memory: &GuestMemory) -> StealTime {
    let mut steal = StealTime::new(Source::Thread);
    steal.write_msr(AT | ENABLED, memory).unwrap();
    steal
}

#[test]
fn lost_is_what_passed_and_the_thread_did_not_have() {
    let reading = |wall_ns, thread_ns| Reading { wall_ns, thread_ns };
    let start = reading(1_000, 50);
    assert_eq!(start.lost(reading(1_300, 250)), (100, reading(1_300, 250)));
    // The clocks differ a little: what is too much now is missing later.
    let (lost, next) = start.lost(reading(1_300, 360));
    assert_eq!((lost, next), (0, reading(1_300, 350)));
    assert_eq!(next.lost(reading(1_400, 460)).0, 0);
    assert_eq!(next.lost(reading(1_400, 440)).0, 10);
    // A clock that goes back loses nothing.
    assert_eq!(start.lost(reading(900, 40)).0, 0);
}

#[test]
fn what_is_lost_is_added_to_what_the_guest_has() {
    let memory = memory();
    memory.write_obj(7_u64, GuestAddress(AT)).unwrap();
    memory.write_obj(5_u32, GuestAddress(AT + VERSION)).unwrap();
    let steal = on(&memory);
    assert_eq!(
        (time(&memory), version(&memory)),
        (7, 6),
        "even from now on"
    );
    steal.add(10, &memory);
    assert_eq!((time(&memory), version(&memory)), (17, 8));
}

#[test]
fn the_wait_after_a_wake_up_is_lost() {
    let memory = memory();
    let mut steal = on(&memory);
    steal.leave(&memory);
    assert_eq!(preempted(&memory), IS_PREEMPTED);
    let asleep = steal.counted.wall_ns;
    // Roused, and got a processor when a time has passed that the thread did not use.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let before = time(&memory);
    assert!(!steal.arrive(asleep + 5_000_000, &memory));
    assert_eq!(preempted(&memory), 0);
    steal.running(&memory);
    let lost = time(&memory) - before;
    assert!(lost >= 14_000_000, "{lost}");
}

#[test]
fn a_sleep_is_not_lost() {
    let memory = memory();
    let mut steal = on(&memory);
    steal.leave(&memory);
    let before = (time(&memory), version(&memory));
    std::thread::sleep(std::time::Duration::from_millis(2));
    let roused = wall_ns();
    assert!(!steal.arrive(roused, &memory));
    assert_eq!((time(&memory), version(&memory)), before);
    assert_eq!(steal.counted.wall_ns, roused, "it counts from here");
    // Roused before it slept: it has counted until then.
    steal.leave(&memory);
    let asleep = steal.counted.wall_ns;
    assert!(!steal.arrive(roused, &memory));
    assert_eq!(steal.counted.wall_ns, asleep);
}

#[test]
fn a_flush_that_another_vcpu_asks_for_is_told_once() {
    let memory = memory();
    let mut steal = on(&memory);
    steal.leave(&memory);
    memory
        .write_obj(IS_PREEMPTED | FLUSH_TLB, GuestAddress(AT + PREEMPTED))
        .unwrap();
    assert!(steal.arrive(wall_ns(), &memory));
    assert_eq!(preempted(&memory), 0);
    assert!(!steal.arrive(wall_ns(), &memory));
}

#[test]
fn without_a_source_nothing_is_written_but_the_version() {
    let memory = memory();
    let mut steal = StealTime::new(Source::Nothing);
    steal.write_msr(AT | ENABLED, &memory).unwrap();
    assert_eq!(version(&memory), 2);
    steal.leave(&memory);
    assert_eq!(preempted(&memory), 0);
    assert!(!steal.arrive(0, &memory));
    steal.running(&memory);
    assert_eq!((time(&memory), version(&memory)), (0, 2));
    steal.reset();
    assert_eq!((steal.msr(), steal.source), (0, Source::Nothing));
}

#[test]
fn it_is_off_until_the_guest_wants_it() {
    let memory = memory();
    let mut steal = StealTime::new(Source::Thread);
    assert_eq!(steal.write_msr(AT | 3, &memory), Err(Refused));
    steal.write_msr(AT, &memory).unwrap();
    steal.leave(&memory);
    steal.add(9, &memory);
    assert_eq!((time(&memory), version(&memory)), (0, 0));
    assert_eq!(preempted(&memory), 0);
}

#[test]
fn bad_addresses_do_no_harm() {
    let memory = memory();
    for address in [u64::MAX << 6, (1 << 20) - 64, 1 << 20, 1 << 50] {
        let mut steal = StealTime::new(Source::Thread);
        steal.write_msr(address | ENABLED, &memory).unwrap();
        steal.leave(&memory);
        assert!(!steal.arrive(0, &memory));
        steal.add(1, &memory);
    }
}
