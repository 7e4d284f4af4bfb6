//! The block device on a backend with everything: in-flight tracking, dirty log, silence.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::backend::{Peer, Traits, Work};
use super::block::{buffers, submit_write};
use super::driver::Driver;
use super::{Looped, PATIENCE, requests};
use crate::device::Device;
use crate::virtio::VirtioDevice;
use crate::virtio::vhost_user::{BackendError, Block, BlockOptions};

fn options() -> BlockOptions {
    BlockOptions {
        name: "disk0".into(),
        max_queues: 4,
    }
}

struct Setup {
    peer: Peer,
    device: Looped<Block>,
    driver: Driver,
    requests: std::sync::mpsc::Receiver<String>,
}

fn setup(traits: Traits) -> Setup {
    let (peer, stream) = Peer::start(traits);
    let (source, requests) = requests();
    let mut block = Block::new(options(), stream, source).unwrap();
    let driver = Driver::new(&block, 64);
    block.activate(driver.activation(block.features())).unwrap();
    Setup {
        peer,
        device: Looped::new(block),
        driver,
        requests,
    }
}

fn reconnect(device: &mut Looped<Block>, traits: Traits) -> Peer {
    let (peer, stream) = Peer::start(traits);
    device.with(|block| block.reconnect(stream));
    peer
}

fn log_fd() -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("log", flags).unwrap();
    rustix::fs::ftruncate(&fd, 4096).unwrap();
    fd
}

/// A backend that dies with every other request of sixteen done, the last first.
fn half_dead() -> Setup {
    let mut setup = setup(Traits {
        work: Work::BlockHalfThenDie,
        ..Traits::block()
    });
    for slot in 0..16 {
        submit_write(&mut setup.driver, 0, slot);
    }
    setup.driver.rings[0].kick();
    setup
        .device
        .turn_until("the loss", |block| !block.is_connected());
    let done = setup.driver.rings[0].wait(8);
    assert_eq!(
        done.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(),
        [15, 13, 11, 9, 7, 5, 3, 1]
    );
    setup
}

#[test]
fn requests_completed_out_of_order_are_neither_lost_nor_repeated() {
    let mut setup = half_dead();
    for slot in 16..20 {
        submit_write(&mut setup.driver, 0, slot);
    }
    let peer = reconnect(&mut setup.device, Traits::block());
    let mut done: Vec<u16> = setup.driver.rings[0]
        .wait(12)
        .iter()
        .map(|done| done.0)
        .collect();
    done.sort_unstable();
    assert_eq!(done, [0, 2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19]);
    assert_eq!(
        peer.seen().sectors,
        [0, 2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19]
    );
    assert_eq!(peer.seen().bases, [(0, 8)], "the used index");
}

#[test]
fn requests_in_flight_survive_in_the_saved_state() {
    let mut setup = half_dead();
    let saved = setup.device.with(|block| {
        block.pause().unwrap();
        block.deactivate();
        block.save()
    });
    let (peer, stream) = Peer::start(Traits::block());
    let (source, _requests) = requests();
    let mut block = Block::new(options(), stream, source).unwrap();
    block.restore(&saved).unwrap();
    assert_eq!(block.save(), saved);
    setup.driver.adopt(&block);
    block
        .activate(setup.driver.activation(block.features()))
        .unwrap();
    assert_eq!(block.save(), saved);
    block.resume().unwrap();
    assert_eq!(setup.driver.rings[0].wait(8).len(), 8);
    assert_eq!(peer.seen().sectors, [0, 2, 4, 6, 8, 10, 12, 14]);

    let mut traits = Traits::block();
    traits.protocol -= Protocol::INFLIGHT_SHMFD;
    let (_peer, stream) = Peer::start(traits);
    let (source, _requests) = requests();
    let mut block = Block::new(options(), stream, source).unwrap();
    let before = block.save();
    assert!(block.restore(&saved).is_err());
    assert_eq!(block.save(), before);
}

#[test]
fn a_backend_that_offers_less_is_refused_and_asked_for_again() {
    type Lessen = fn(&mut Traits);
    let lesser: [(Lessen, &str); 4] = [
        (|traits| traits.features &= !(1 << 9), "features 0x200"),
        (|traits| traits.config[34] = 0, "0 queues of 1"),
        (
            |traits| traits.protocol -= Protocol::INFLIGHT_SHMFD,
            "in flight",
        ),
        (
            |traits| traits.protocol -= Protocol::CONFIG,
            "PROTOCOL_F_CONFIG",
        ),
    ];
    let mut setup = half_dead();
    setup.requests.recv_timeout(PATIENCE).unwrap();
    for (lessen, reason) in lesser {
        let mut traits = Traits::block();
        lessen(&mut traits);
        let _peer = reconnect(&mut setup.device, traits);
        let request = setup.requests.recv_timeout(PATIENCE).unwrap();
        assert!(request.contains(reason), "{request}");
        assert!(!setup.device.with(|block| block.is_connected()));
    }
    let _peer = reconnect(&mut setup.device, Traits::block());
    assert_eq!(setup.driver.rings[0].wait(8).len(), 8);
}

#[test]
fn a_device_activated_without_a_backend_waits_for_one() {
    let (peer, stream) = Peer::start(Traits::block());
    let (source, requests) = requests();
    let mut block = Block::new(options(), stream, source).unwrap();
    let mut driver = Driver::new(&block, 64);
    peer.kill();
    block.activate(driver.activation(block.features())).unwrap();
    assert!(!block.is_connected());
    assert!(
        requests
            .recv_timeout(PATIENCE)
            .unwrap()
            .starts_with("disk0: ")
    );
    submit_write(&mut driver, 0, 0);
    driver.rings[0].kick();
    let (_peer, stream) = Peer::start(Traits::block());
    block.reconnect(stream);
    assert_eq!(driver.rings[0].wait(1), [(0, 1)]);
    assert_ne!(buffers(0, 0), 0);
}

#[test]
fn the_dirty_log_follows_the_device_to_its_next_backend() {
    let mut setup = setup(Traits::block());
    let logs = |peer: &Peer| {
        let seen = peer.seen();
        (
            seen.features & 1 << 26 != 0,
            seen.log,
            seen.logged.into_iter().collect::<Vec<_>>(),
        )
    };
    assert_eq!(logs(&setup.peer), (false, None, vec![]));
    setup
        .device
        .with(|block| block.start_log(log_fd(), 4096))
        .unwrap();
    let logging = (true, Some(4096), vec![(0, (1 << 16) + 0x8000)]);
    assert_eq!(logs(&setup.peer), logging);
    let Setup {
        peer, mut device, ..
    } = setup;
    peer.kill();
    let peer = reconnect(&mut device, Traits::block());
    assert_eq!(logs(&peer), logging);
    device.with(Block::stop_log);
    assert_eq!(logs(&peer), (false, Some(4096), vec![]));
    let mut traits = Traits::block();
    traits.protocol -= Protocol::LOG_SHMFD;
    let _peer = reconnect(&mut device, traits);
    assert!(
        device
            .with(|block| block.start_log(log_fd(), 4096))
            .is_err()
    );
    assert!(device.with(|block| block.is_connected()));
}

#[test]
fn the_cache_mode_goes_to_the_next_backend_too() {
    let mut setup = setup(Traits::block());
    setup.device.with(|block| block.write_config(32, &[1]));
    setup.device.with(|block| block.write_config(34, &[9]));
    assert_eq!(setup.peer.seen().config_writes, [(32, vec![1])]);
    let peer = reconnect(&mut setup.device, Traits::block());
    assert_eq!(peer.seen().config_writes, [(32, vec![1])]);
}

#[test]
fn silence_is_not_waited_out() {
    // Says nothing at all, or stops in the middle of a header.
    for said in [&[][..], &[1, 0, 0, 0, 5][..]] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut theirs, said).unwrap();
        let (source, _requests) = requests();
        let start = Instant::now();
        let error = Block::with_patience(options(), ours, source, Duration::from_millis(50));
        assert!(matches!(error.err(), Some(BackendError::Timeout(_))));
        assert!(start.elapsed() < PATIENCE);
        let mut request = [0; 12];
        theirs.read_exact(&mut request).unwrap();
        assert_eq!(request[0], 1, "GET_FEATURES");
    }
}
