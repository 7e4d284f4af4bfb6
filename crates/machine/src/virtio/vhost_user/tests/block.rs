//! The block device on QEMU's storage daemon.

use std::os::unix::fs::FileExt;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::daemon::{Daemon, Disk};
use super::driver::{Driver, DriverRing};
use super::{Looped, PATIENCE, requests};
use crate::device::Device;
use crate::virtio::VirtioDevice;
use crate::virtio::vhost_user::{Block, BlockOptions};

const SECTOR: usize = 512;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

const DISK_SIZE: u64 = 8 << 20;

/// Where the buffers of a ring's slot are: header, status, and data a page further on.
pub(super) fn buffers(ring: usize, slot: u16) -> u64 {
    0x100_0000 + ((ring as u64) << 20) + u64::from(slot) * 0x4000
}

fn submit(ring: &mut DriverRing, at: u64, slot: u16, kind: u32, sector: u64, len: u32) {
    let header = [u64::from(kind), sector];
    ring.memory.write_obj(header, GuestAddress(at)).unwrap();
    ring.memory
        .write_obj(0xff_u8, GuestAddress(at + 16))
        .unwrap();
    let (header, status) = ((at, 16, false), (at + 16, 1, true));
    match kind {
        FLUSH => ring.add(slot, &[header, status]),
        _ => ring.add(slot, &[header, (at + 0x1000, len, kind == READ), status]),
    }
}

fn status(ring: &DriverRing, at: u64) -> u8 {
    ring.memory.read_obj(GuestAddress(at + 16)).unwrap()
}

fn pattern(slot: u16) -> Vec<u8> {
    (0..SECTOR)
        .map(|index| (index as u16).wrapping_mul(31).wrapping_add(slot * 7) as u8)
        .collect()
}

/// Puts a write of `pattern(slot)` to sector `slot` into the ring.
pub(super) fn submit_write(driver: &mut Driver, queue: usize, slot: u16) {
    let at = buffers(queue, slot);
    let ring = &mut driver.rings[queue];
    ring.memory
        .write_slice(&pattern(slot), GuestAddress(at + 0x1000))
        .unwrap();
    submit(ring, at, slot, WRITE, u64::from(slot), SECTOR as u32);
}

/// Every slot once, each with success.
fn check_completed(driver: &Driver, queue: usize, mut done: Vec<(u16, u32)>, slots: u16) {
    done.sort_unstable();
    let slots_done: Vec<u16> = done.iter().map(|(slot, _)| *slot).collect();
    assert_eq!(slots_done, (0..slots).collect::<Vec<_>>());
    for slot in 0..slots {
        assert_eq!(
            status(&driver.rings[queue], buffers(queue, slot)),
            0,
            "slot {slot}"
        );
    }
}

fn check_disk(disk: &Disk, slots: u16) {
    let file = std::fs::File::open(disk.file()).unwrap();
    for slot in 0..slots {
        let mut sector = [0; SECTOR];
        file.read_exact_at(&mut sector, u64::from(slot) * SECTOR as u64)
            .unwrap();
        assert!(sector[..] == pattern(slot), "sector {slot}");
    }
}

/// A device on a daemon, its driver, and what the device asks for.
struct Setup {
    disk: Disk,
    daemon: Daemon,
    device: Looped<Block>,
    driver: Driver,
    requests: std::sync::mpsc::Receiver<String>,
}

fn setup(queues: u16) -> Setup {
    let disk = Disk::new(DISK_SIZE, queues);
    let daemon = disk.serve();
    let (source, requests) = requests();
    let options = BlockOptions {
        name: "disk0".into(),
        max_queues: 8,
    };
    let mut block = Block::new(options, disk.connect(), source).unwrap();
    let driver = Driver::new(&block, 128);
    block.activate(driver.activation(block.features())).unwrap();
    Setup {
        disk,
        daemon,
        device: Looped::new(block),
        driver,
        requests,
    }
}

fn capacity(block: &Block) -> u64 {
    let mut sectors = [0; 8];
    block.read_config(0, &mut sectors);
    u64::from_le_bytes(sectors)
}

#[test]
fn a_daemon_serves_reads_writes_and_flushes_on_each_queue() {
    let mut setup = setup(2);
    let driver = &mut setup.driver;
    assert_eq!(driver.rings.len(), 2);
    setup.device.with(|block| {
        assert_eq!(capacity(block), DISK_SIZE / 512);
        let mut end = [1; 4];
        block.read_config(58, &mut end);
        assert_eq!(end, [0; 4], "beyond the configuration");
    });
    for queue in 0..2 {
        let at = |slot| buffers(queue, slot);
        submit_write(driver, queue, 0);
        driver.rings[queue].kick();
        assert_eq!(driver.rings[queue].wait(1), [(0, 1)]);
        let ring = &mut driver.rings[queue];
        submit(ring, at(1), 1, FLUSH, 0, 0);
        submit(ring, at(2), 2, READ, 0, SECTOR as u32);
        ring.kick();
        assert_eq!(ring.wait(2).len(), 2);
        for slot in 0..3 {
            assert_eq!(status(ring, at(slot)), 0, "slot {slot}");
        }
        let mut data = vec![0; SECTOR];
        ring.memory
            .read_slice(&mut data, GuestAddress(at(2) + 0x1000))
            .unwrap();
        assert_eq!(data, pattern(0));
    }
    check_disk(&setup.disk, 1);
}

#[test]
fn requests_of_a_killed_daemon_are_completed_by_the_next() {
    let mut setup = setup(1);
    setup.daemon.freeze();
    for slot in 0..20 {
        submit_write(&mut setup.driver, 0, slot);
    }
    setup.driver.rings[0].kick();
    setup.daemon.kill();
    setup
        .device
        .turn_until("the loss", |block| !block.is_connected());
    let request = setup.requests.recv_timeout(PATIENCE).unwrap();
    assert_eq!(request, "disk0: the backend hung up");
    for slot in 20..30 {
        submit_write(&mut setup.driver, 0, slot);
    }
    setup.driver.rings[0].kick();
    let _daemon = setup.disk.serve();
    let stream = setup.disk.connect();
    setup.device.with(|block| block.reconnect(stream));
    let done = setup.driver.rings[0].wait(30);
    check_completed(&setup.driver, 0, done, 30);
    check_disk(&setup.disk, 30);
}

#[test]
fn daemons_may_be_killed_at_any_moment() {
    let mut setup = setup(1);
    for slot in 0..30 {
        submit_write(&mut setup.driver, 0, slot);
        setup.driver.rings[0].kick();
        if slot % 6 == 3 {
            // With one request at a time the used index tells all, wherever the kill strikes.
            setup.daemon.kill();
            setup
                .device
                .turn_until("the loss", |block| !block.is_connected());
            setup.daemon = setup.disk.serve();
            let stream = setup.disk.connect();
            setup.device.with(|block| block.reconnect(stream));
        }
        assert_eq!(setup.driver.rings[0].wait(1), [(slot, 1)]);
    }
    assert_eq!(setup.requests.try_iter().count(), 5);
    check_disk(&setup.disk, 30);
}

#[test]
fn a_pause_drains_and_a_restored_device_goes_on() {
    let mut setup = setup(2);
    for slot in 0..10 {
        submit_write(&mut setup.driver, 1, slot);
    }
    setup.driver.rings[1].kick();
    setup.device.with(|block| block.pause()).unwrap();
    // What the daemon has not fetched by now waits in the ring.
    let before = setup.driver.rings[1].completed();
    let saved = setup.device.with(|block| {
        let queues = block.deactivate();
        let used = setup.driver.rings[1].used_index();
        assert_eq!(queues[1].as_ref().map(QueueT::next_used), Some(used));
        block.save()
    });
    for slot in 10..20 {
        submit_write(&mut setup.driver, 1, slot);
    }
    setup.daemon.kill();

    let _daemon = setup.disk.serve();
    let (source, _requests) = requests();
    let options = BlockOptions {
        name: "disk0".into(),
        max_queues: 2,
    };
    let mut block = Block::new(options, setup.disk.connect(), source).unwrap();
    block.restore(&saved).unwrap();
    assert_eq!(block.save(), saved);
    // The new device has eventfds of its own.
    setup.driver.adopt(&block);
    block
        .activate(setup.driver.activation(block.features()))
        .unwrap();
    assert!(
        setup.driver.rings[1].completed().is_empty(),
        "the machine is still paused"
    );
    block.resume().unwrap();
    let mut done = setup.driver.rings[1].wait(20 - before.len());
    done.extend(before);
    check_completed(&setup.driver, 1, done, 20);
    check_disk(&setup.disk, 20);
}

#[test]
fn a_driver_may_reset_the_device_and_start_again() {
    let mut setup = setup(1);
    submit_write(&mut setup.driver, 0, 0);
    setup.driver.rings[0].kick();
    setup.driver.rings[0].wait(1);
    setup.device.with(|block| {
        let cache_mode = |block: &Block| {
            let mut wce = [0];
            block.read_config(32, &mut wce);
            wce[0]
        };
        let default = cache_mode(block);
        block.write_config(32, &[1 - default]);
        assert_eq!(cache_mode(block), 1 - default);
        block.deactivate();
        block.reset();
        assert_eq!(cache_mode(block), default);
        setup.driver = Driver::new(block, 64);
        block
            .activate(setup.driver.activation(block.features()))
            .unwrap();
    });
    for slot in 0..5 {
        submit_write(&mut setup.driver, 0, slot);
    }
    setup.driver.rings[0].kick();
    let done = setup.driver.rings[0].wait(5);
    check_completed(&setup.driver, 0, done, 5);
    assert!(
        setup.requests.try_recv().is_err(),
        "the backend was lost on the way"
    );
}
