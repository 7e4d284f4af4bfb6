//! The network device on a backend that returns every frame.

use vm_memory::{Bytes, GuestAddress};

use super::backend::{Peer, Traits};
use super::driver::Driver;
use super::{Looped, requests};
use crate::device::Device;
use crate::virtio::VirtioDevice;
use crate::virtio::vhost_user::{Net, NetOptions};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const MQ: u64 = 1 << 22;

struct Setup {
    peer: Peer,
    device: Looped<Net>,
    driver: Driver,
}

fn net(stream: std::os::unix::net::UnixStream) -> Net {
    let (source, _) = requests();
    let options = NetOptions {
        name: "net0".into(),
        mac: MAC,
        mtu: Some(9000),
        max_queue_pairs: 8,
    };
    Net::new(options, stream, source).unwrap()
}

fn setup(without: u64) -> Setup {
    let (peer, stream) = Peer::start(Traits::net());
    let mut net = net(stream);
    let driver = Driver::new(&net, 64);
    net.activate(driver.activation(net.features() & !without))
        .unwrap();
    Setup {
        peer,
        device: Looped::new(net),
        driver,
    }
}

fn buffer(ring: usize, slot: u16) -> u64 {
    0x100_0000 + ((ring as u64) << 20) + u64::from(slot) * 0x1000
}

/// Sends a frame on a pair and takes it back.
fn round_trip(driver: &mut Driver, pair: usize, slot: u16) {
    let (rx, tx) = (pair * 2, pair * 2 + 1);
    let frame: Vec<u8> = (0..200).map(|byte| byte as u8 ^ slot as u8).collect();
    driver
        .memory
        .write_slice(&frame, GuestAddress(buffer(tx, slot)))
        .unwrap();
    driver.rings[rx].add(slot, &[(buffer(rx, slot), 2048, true)]);
    driver.rings[tx].add(slot, &[(buffer(tx, slot), 200, false)]);
    driver.rings[tx].kick();
    assert_eq!(driver.rings[rx].wait(1), [(slot, 200)]);
    assert_eq!(driver.rings[tx].wait(1), [(slot, 0)]);
    let mut back = vec![0; 200];
    driver
        .memory
        .read_slice(&mut back, GuestAddress(buffer(rx, slot)))
        .unwrap();
    assert_eq!(back, frame);
}

/// A control request; returns the status.
fn control(setup: &mut Setup, queue: usize, slot: u16, request: &[u8]) -> u8 {
    let at = buffer(queue, slot);
    setup
        .driver
        .memory
        .write_slice(request, GuestAddress(at))
        .unwrap();
    let ring = &mut setup.driver.rings[queue];
    ring.add(
        slot,
        &[(at, request.len() as u32, false), (at + 512, 1, true)],
    );
    ring.kick();
    let mut done = Vec::new();
    setup.device.turn_until("the control queue", |_| {
        done.extend(ring.completed());
        !done.is_empty()
    });
    assert_eq!(done, [(slot, 1)]);
    setup
        .driver
        .memory
        .read_obj(GuestAddress(at + 512))
        .unwrap()
}

fn config(net: &Net) -> [u8; 12] {
    let mut config = [0; 12];
    net.read_config(0, &mut config);
    config
}

#[test]
fn features_and_configuration_are_what_both_sides_bring() {
    let mut setup = setup(0);
    setup.device.with(|net| {
        // The backend's checksums and mergeable buffers; our MAC, MTU, status, control and MQ.
        let own = 1 << 3 | 1 << 5 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21 | MQ | 1 << 23;
        assert_eq!(net.features(), 1 << 32 | 1 << 15 | 0b11 | own);
        assert_eq!(config(net), [2, 0, 0, 0, 0, 7, 1, 0, 2, 0, 0x28, 0x23]);
        net.set_link(false);
        assert_eq!(config(net)[6], 0);
    });
    assert_eq!(
        setup.peer.seen().features,
        1 << 32 | 1 << 30 | 1 << 15 | 0b11
    );
}

#[test]
fn frames_pass_and_pairs_are_added_by_the_control_queue() {
    let mut setup = setup(0);
    round_trip(&mut setup.driver, 0, 0);
    let enabled = |setup: &Setup| setup.peer.seen().enabled.into_values().collect::<Vec<_>>();
    assert_eq!(enabled(&setup), [true, true, false, false]);
    assert_eq!(
        control(&mut setup, 4, 0, &[4, 0, 3, 0]),
        1,
        "more than there are"
    );
    assert_eq!(control(&mut setup, 4, 1, &[4, 0, 2, 0]), 0);
    assert_eq!(enabled(&setup), [true; 4]);
    round_trip(&mut setup.driver, 1, 0);
    let (peer, stream) = Peer::start(Traits::net());
    setup.device.with(|net| net.reconnect(stream));
    setup.peer = peer;
    assert_eq!(enabled(&setup), [true; 4], "the next backend");
    round_trip(&mut setup.driver, 1, 1);
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let mut setup = setup(MQ);
    round_trip(&mut setup.driver, 0, 0);
    assert_eq!(control(&mut setup, 2, 0, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    assert_eq!(setup.device.with(|net| net.mac()), [2, 9, 9, 9, 9, 9]);
    setup.device.with(Net::announce);
    assert_eq!(setup.device.with(|net| config(net)[6]), 3);
    assert_eq!(control(&mut setup, 2, 1, &[3, 0]), 0);
    assert_eq!(setup.device.with(|net| config(net)[6]), 1);
    assert_eq!(setup.peer.seen().enabled.len(), 2);
}

#[test]
fn a_saved_device_goes_on_elsewhere() {
    let mut setup = setup(0);
    assert_eq!(control(&mut setup, 4, 0, &[4, 0, 2, 0]), 0);
    round_trip(&mut setup.driver, 1, 0);
    let (features, queues, saved) = setup.device.with(|net| {
        net.pause().unwrap();
        let queues = net.deactivate();
        (net.features(), queues, net.save())
    });
    let (peer, stream) = Peer::start(Traits::net());
    let mut net = net(stream);
    net.restore(&saved).unwrap();
    assert_eq!(net.save(), saved);
    setup.driver.adopt(&net);
    let mut activation = setup.driver.activation(features);
    activation.queues = queues;
    net.activate(activation).unwrap();
    assert_eq!(net.save(), saved);
    assert!(peer.seen().bases.is_empty(), "the machine is still paused");
    net.resume().unwrap();
    setup.peer = peer;
    setup.device = Looped::new(net);
    round_trip(&mut setup.driver, 1, 1);
    assert_eq!(control(&mut setup, 4, 1, &[0, 0, 0]), 0);
}

#[test]
fn a_reset_device_is_as_new() {
    let mut setup = setup(0);
    control(&mut setup, 4, 0, &[1, 1, 2, 9, 9, 9, 9, 9]);
    control(&mut setup, 4, 1, &[4, 0, 2, 0]);
    setup.device.with(|net| {
        net.deactivate();
        net.reset();
        assert_eq!(net.mac(), MAC);
    });
    setup.driver = setup.device.with(|net| Driver::new(net, 32));
    let activation = setup.driver.activation(MQ | 1 << 32 | 1 << 17);
    setup.device.with(|net| net.activate(activation)).unwrap();
    assert_eq!(
        setup.peer.seen().enabled.into_values().collect::<Vec<_>>(),
        [true, true, false, false]
    );
    round_trip(&mut setup.driver, 0, 0);
}
