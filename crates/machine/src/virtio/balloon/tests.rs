use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{Buffer, RAM, TestMachine};

const ALL: u64 = F_VERSION_1 | F_STATS | F_REPORTING;
const STATS: usize = 2;
/// As Linux counts: the queue of free-page hints is not there.
const REPORTING: usize = 3;

fn machine(features: u64) -> (Arc<Mutex<Balloon>>, TestMachine) {
    let balloon = Arc::new(Mutex::new(Balloon::new("balloon0").unwrap()));
    let mut machine = TestMachine::new(balloon.clone());
    machine.choose_queues(if features & F_STATS != 0 {
        &[0, 1, 2, 3]
    } else {
        &[0, 1]
    });
    assert!(machine.start(features));
    (balloon, machine)
}

/// Whether the page at `address` still has what the test wrote to it.
fn kept(machine: &TestMachine, address: u64) -> bool {
    machine.read(address, 4096) != [0; 4096]
}

#[test]
fn inflated_pages_are_discarded_and_no_others() {
    let (_, mut machine) = machine(ALL);
    let list = machine.buffer(0, 0);
    let pages: Vec<u64> = (1..=5).map(|index| machine.buffer(index, 0)).collect();
    for &page in &pages {
        machine.write(page, &[7; 2 * 4096]);
    }
    let mut numbers = Vec::new();
    // Neighbours in reverse, one alone, one twice, and some that are not RAM.
    for number in [
        pages[0] / 4096 + 1,
        pages[0] / 4096,
        pages[2] / 4096,
        pages[2] / 4096,
        RAM / 4096,
        u64::from(u32::MAX),
    ] {
        numbers.extend((number as u32).to_le_bytes());
    }
    machine.write(list, &numbers);
    machine.add(INFLATE, &[Buffer::readable(list, numbers.len() as u32)]);
    machine.kick(INFLATE);
    assert_eq!(machine.take_used(INFLATE), [(0, 0)]);
    for (address, expected) in [
        (pages[0], false),
        (pages[0] + 4096, false),
        (pages[1], true),
        (pages[2], false),
        (pages[2] + 4096, true),
        (pages[3], true),
    ] {
        assert_eq!(kept(&machine, address), expected, "{address:#x}");
    }
    machine.add(DEFLATE, &[Buffer::readable(list, 8)]);
    machine.kick(DEFLATE);
    assert_eq!(machine.take_used(DEFLATE).len(), 1);
}

#[test]
fn the_target_reaches_the_driver_and_its_answer_us() {
    let (balloon, machine) = machine(ALL);
    balloon.lock().unwrap().set_target(Bytes::mib(2));
    assert_eq!(machine.messages(), [0]);
    assert_eq!(machine.device_config(0, 4), 512_u32.to_le_bytes());
    machine.write_device_config(CONFIG_ACTUAL, &500_u32.to_le_bytes());
    let balloon = balloon.lock().unwrap();
    assert_eq!(balloon.target(), Bytes::mib(2));
    assert_eq!(balloon.actual(), Bytes(500 * 4096));
}

#[test]
fn statistics_come_on_request() {
    let (balloon, mut machine) = machine(ALL);
    let at = machine.buffer(0, 0);
    let report = |machine: &mut TestMachine, free: u64| {
        let mut bytes = Vec::new();
        for (tag, value) in [(4_u16, free), (5, 1 << 22), (999, 1)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        machine.write(at, &bytes);
        machine.add(STATS, &[Buffer::readable(at, bytes.len() as u32)]);
        machine.kick(STATS);
    };
    report(&mut machine, 100);
    assert!(
        machine.take_used(STATS).is_empty(),
        "kept until it is wanted"
    );
    assert_eq!(balloon.lock().unwrap().stats().free(), Some(100));
    assert!(balloon.lock().unwrap().request_stats());
    assert_eq!(machine.take_used(STATS).len(), 1);
    assert_eq!(machine.messages(), [STATS as u32 + 1]);
    report(&mut machine, 50);
    let stats = balloon.lock().unwrap().stats();
    assert_eq!((stats.reports, stats.free()), (2, Some(50)));
    let all: Vec<_> = stats.iter().collect();
    assert_eq!(all, [("free", 50), ("total", 1 << 22)]);
}

#[test]
fn reported_pages_are_discarded_unless_they_are_poisoned() {
    for (features, poison, survives) in [
        (ALL, 0, false),
        (ALL, 0xaaaa_aaaa_u32, false),
        (ALL | F_PAGE_POISON, 0, false),
        (ALL | F_PAGE_POISON, 0xaaaa_aaaa, true),
    ] {
        let (_, mut machine) = machine(features);
        machine.write_device_config(CONFIG_POISON, &poison.to_le_bytes());
        let (a, b) = (machine.buffer(0, 0), machine.buffer(1, 0));
        for at in [a, b] {
            machine.write(at, &[7; 3 * 4096]);
        }
        machine.add(
            REPORTING,
            &[Buffer::writable(a, 8192), Buffer::writable(b, 4096)],
        );
        machine.add(REPORTING, &[Buffer::writable(RAM - 4096, u32::MAX)]);
        machine.kick(REPORTING);
        assert_eq!(machine.take_used(REPORTING).len(), 2);
        for at in [a, a + 4096, b] {
            assert_eq!(kept(&machine, at), survives);
        }
        assert!(kept(&machine, a + 8192));
    }
}

#[test]
fn the_reporting_queue_is_found_however_the_driver_counts() {
    // (features, queues the driver enables, the reporting one)
    for (features, enabled, queue) in [
        (ALL, vec![0, 1, 2, 3], 3),
        (ALL, vec![0, 1, 2, 4], 4),
        (F_VERSION_1 | F_REPORTING, vec![0, 1, 2], 2),
        (F_VERSION_1 | F_REPORTING, vec![0, 1, 4], 4),
    ] {
        let balloon = Arc::new(Mutex::new(Balloon::new("balloon0").unwrap()));
        let mut machine = TestMachine::new(balloon.clone());
        machine.choose_queues(&enabled);
        assert!(machine.start(features));
        assert_eq!(balloon.lock().unwrap().reporting_queue(), Some(queue));
    }
}

#[test]
fn a_driver_without_statistics_is_not_asked() {
    let (balloon, _machine) = machine(F_VERSION_1);
    assert!(!balloon.lock().unwrap().request_stats());
}

#[test]
fn target_and_size_survive_migration_but_the_size_not_a_reset() {
    let (balloon, machine) = machine(ALL);
    balloon.lock().unwrap().set_target(Bytes::mib(1));
    machine.write_device_config(CONFIG_ACTUAL, &7_u32.to_le_bytes());
    let copy = Arc::new(Mutex::new(Balloon::new("balloon0").unwrap()));
    let machine = machine.migrate(copy.clone());
    assert_eq!(copy.lock().unwrap().actual(), Bytes(7 * 4096));
    machine.bar_write(20, &[0]);
    let copy = copy.lock().unwrap();
    assert_eq!((copy.actual(), copy.target()), (Bytes(0), Bytes::mib(1)));
}
