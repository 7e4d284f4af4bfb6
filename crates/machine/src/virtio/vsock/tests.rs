use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};

use super::muxer::MAX_CONNECTIONS;
use super::packet::{HOST_CID, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::*;
use crate::testing::{Buffer, TestMachine};

const CID: u32 = 7;
const RX_BUFFER: u32 = 4096;
/// The guest's receive buffer, that is the credit it gives.
const GUEST_ALLOC: u32 = 10_000;

/// A guest with a driver, and the host's side of the device.
struct Setup {
    machine: TestMachine,
    device: Arc<Mutex<Vsock>>,
    directory: tempfile::TempDir,
    /// The host's ends of what the guest has connected to; ports from 1000 on are refused.
    accepted: Arc<Mutex<VecDeque<UnixStream>>>,
    next_buffer: u64,
}

/// A packet as the guest gets it.
#[derive(Debug, PartialEq, Eq)]
struct Packet {
    header: Header,
    payload: Vec<u8>,
}

fn device(directory: &tempfile::TempDir, accepted: &Arc<Mutex<VecDeque<UnixStream>>>) -> Vsock {
    let path = directory.path().join("vsock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    let accepted = accepted.clone();
    let connect = Box::new(move |port| {
        if port >= 1000 {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        accepted.lock().unwrap().push_back(theirs);
        Ok(ours)
    });
    Vsock::new("vsock0", CID, Some(listener), connect).unwrap()
}

impl Setup {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let accepted = Arc::default();
        let device = Arc::new(Mutex::new(device(&directory, &accepted)));
        let mut machine = TestMachine::new(device.clone());
        assert!(machine.start(F_VERSION_1 | F_RING));
        let mut setup = Self {
            machine,
            device,
            directory,
            accepted,
            next_buffer: 0,
        };
        setup.offer(32);
        setup
    }

    fn buffer(&mut self) -> u64 {
        self.next_buffer = (self.next_buffer + 1) % 40;
        self.machine.buffer(self.next_buffer, 0)
    }

    /// Gives the device buffers to receive into.
    fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let at = self.buffer();
            self.machine
                .add(RECEIVE, &[Buffer::writable(at, RX_BUFFER)]);
        }
        self.machine.kick(RECEIVE);
    }

    /// Sends a packet with that credit state and payload.
    fn send(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = header.to_guest(HOST_CID).to_vec();
        bytes[0..8].copy_from_slice(&u64::from(CID).to_le_bytes());
        bytes[16..20].copy_from_slice(&header.ports.guest.to_le_bytes());
        bytes[20..24].copy_from_slice(&header.ports.host.to_le_bytes());
        self.send_raw(&bytes, payload);
    }

    fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        // Beyond the receive buffers.
        let at = self.machine.buffer(41, 0);
        self.machine.write(at, header);
        self.machine.write(at + 0x8000, payload);
        let mut chain = vec![Buffer::readable(at, header.len() as u32)];
        if !payload.is_empty() {
            chain.push(Buffer::readable(at + 0x8000, payload.len() as u32));
        }
        self.machine.add(TRANSMIT, &chain);
        self.machine.kick(TRANSMIT);
        assert_eq!(self.machine.take_used(TRANSMIT).len(), 1);
    }

    fn op(&mut self, ports: Ports, op: Op) {
        self.send(header(ports, op), &[]);
    }

    /// Everything the guest has received since the last call; the buffers go back.
    fn receive(&mut self) -> Vec<Packet> {
        self.machine.run();
        let mut packets = Vec::new();
        let used = self.machine.take_used(RECEIVE);
        for (head, len) in &used {
            let at = self.machine.descriptor_address(RECEIVE, *head);
            let mut bytes = self.machine.read(at, *len as usize);
            let payload = bytes.split_off(HEADER_LEN);
            let mut raw: [u8; HEADER_LEN] = bytes.try_into().unwrap();
            // Turned round, so that the parser for the other direction reads it.
            raw[0..16].rotate_left(8);
            raw[16..24].rotate_left(4);
            let header = Header::from_guest(&raw, CID.into()).unwrap();
            assert_eq!(header.len as usize, payload.len());
            packets.push(Packet { header, payload });
        }
        self.offer(used.len());
        packets
    }

    fn ops(&mut self) -> Vec<Op> {
        self.receive().iter().map(|p| p.header.op).collect()
    }

    /// Connects from the guest and returns the host's end.
    fn connect(&mut self, ports: Ports) -> UnixStream {
        self.op(ports, Op::Request);
        assert_eq!(self.ops(), [Op::Response]);
        let stream = self.accepted.lock().unwrap().pop_front().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn host_connects(&self, greeting: &[u8]) -> UnixStream {
        let path = self.directory.path().join("vsock");
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(greeting).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn connections(&self) -> usize {
        self.device.lock().unwrap().muxer.len()
    }
}

const PORTS: Ports = Ports {
    host: 52,
    guest: 1234,
};

fn header(ports: Ports, op: Op) -> Header {
    Header {
        buf_alloc: GUEST_ALLOC,
        ..Header::new(ports, op)
    }
}

fn data(len: usize) -> Header {
    Header {
        len: len as u32,
        ..header(PORTS, Op::Data)
    }
}

fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(len) => bytes.extend(&chunk[..len]),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return bytes;
            }
        }
    }
}

#[test]
fn a_guest_connects_and_both_sides_talk() {
    let mut setup = Setup::new();
    let mut host = setup.connect(PORTS);
    setup.send(data(5), b"hello");
    assert_eq!(read_all(&host), b"hello");
    host.write_all(b"world").unwrap();
    let packets = setup.receive();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].payload, b"world");
    let got = packets[0].header;
    assert_eq!((got.op, got.ports), (Op::Data, PORTS));
    assert_eq!((got.buf_alloc, got.fwd_cnt), (BUFFER_LEN, 5));
}

#[test]
fn a_refused_connection_is_reset() {
    let mut setup = Setup::new();
    let ports = Ports {
        host: 1000,
        guest: 1,
    };
    setup.op(ports, Op::Request);
    assert_eq!(setup.ops(), [Op::Reset]);
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_host_program_connects_through_the_socket() {
    let mut setup = Setup::new();
    // In two pieces, and with data behind it that is the guest's.
    let mut host = setup.host_connects(b"CONN");
    assert!(setup.receive().is_empty());
    host.write_all(b"ECT 99\nfirst").unwrap();
    let packets = setup.receive();
    assert_eq!(packets.len(), 1);
    let request = packets[0].header;
    assert_eq!((request.op, request.ports.guest), (Op::Request, 99));
    assert!(read_all(&host).is_empty(), "no OK before the guest accepts");
    setup.op(request.ports, Op::Response);
    let ok = format!("OK {}\n", request.ports.host);
    assert_eq!(read_all(&host), ok.as_bytes());
    assert_eq!(setup.receive()[0].payload, b"first");

    let other = setup.host_connects(b"CONNECT 100\n");
    let refused = setup.receive()[0].header.ports;
    assert_ne!(refused.host, request.ports.host);
    setup.op(refused, Op::Reset);
    assert!(setup.ops().is_empty(), "a reset is not answered");
    assert_eq!((&other).read(&mut [0]).unwrap(), 0);
    assert_eq!(setup.connections(), 1);
}

#[test]
fn a_bad_greeting_closes_the_socket() {
    let mut setup = Setup::new();
    for greeting in [
        b"GET / HTTP/1.1\r\n".as_slice(),
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 00000000000000000000001\n",
        b"\n",
    ] {
        let host = setup.host_connects(greeting);
        assert!(setup.receive().is_empty(), "{greeting:?}");
        assert!(!matches!((&host).read(&mut [0]), Ok(1)), "{greeting:?}");
        assert_eq!(setup.connections(), 0, "{greeting:?}");
    }
    // Half a greeting, then gone.
    drop(setup.host_connects(b"CONNECT"));
    setup.machine.run();
    assert_eq!(setup.connections(), 0);
}

#[test]
fn the_guests_credit_holds_back_the_host() {
    let mut setup = Setup::new();
    let mut host = setup.connect(PORTS);
    let sent: Vec<u8> = (0..30_000_u32).map(|i| i as u8).collect();
    host.write_all(&sent).unwrap();
    let mut got: Vec<u8> = Vec::new();
    let packets = setup.receive();
    assert_eq!(packets.last().unwrap().header.op, Op::CreditRequest);
    packets.iter().for_each(|p| got.extend(&p.payload));
    assert_eq!(got.len(), GUEST_ALLOC as usize, "all the credit, no more");
    assert!(setup.receive().is_empty(), "credit is asked for once");
    while got.len() < sent.len() {
        let update = Header {
            fwd_cnt: got.len() as u32,
            ..header(PORTS, Op::CreditUpdate)
        };
        setup.send(update, &[]);
        let before = got.len();
        setup.receive().iter().for_each(|p| got.extend(&p.payload));
        assert!(got.len() > before);
    }
    assert_eq!(got, sent);
}

#[test]
fn our_credit_holds_back_the_guest_and_nothing_is_lost() {
    let mut setup = Setup::new();
    let host = setup.connect(PORTS);
    let chunk = vec![9; 16 << 10];
    let mut sent = 0;
    let mut known = 0;
    // A guest that keeps to its credit, while the host's program does not read.
    while sent - known + chunk.len() <= BUFFER_LEN as usize {
        setup.send(data(chunk.len()), &chunk);
        sent += chunk.len();
        for packet in setup.receive() {
            known = packet.header.fwd_cnt as usize;
        }
        assert!(sent < 8 << 20, "the host takes it all");
    }
    assert_eq!(setup.connections(), 1);
    let mut got = read_all(&host).len();
    setup.machine.run();
    got += read_all(&host).len();
    assert_eq!(got, sent);
    let update = setup.receive().pop().unwrap().header;
    assert_eq!(update.op, Op::CreditUpdate);
    assert_eq!(update.fwd_cnt as usize, sent);
}

#[test]
fn a_guest_beyond_its_credit_is_reset() {
    let mut setup = Setup::new();
    let _host = setup.connect(PORTS);
    let chunk = vec![9; 16 << 10];
    let mut ops = Vec::new();
    for _ in 0..1000 {
        setup.send(data(chunk.len()), &chunk);
        ops = setup.ops();
        if ops.contains(&Op::Reset) {
            break;
        }
    }
    assert!(ops.contains(&Op::Reset));
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_shutdown_of_one_half_leaves_the_other() {
    let mut setup = Setup::new();
    let mut host = setup.connect(PORTS);
    let mut shutdown = header(PORTS, Op::Shutdown);
    shutdown.flags = SHUTDOWN_SEND;
    setup.send(data(3), b"end");
    setup.send(shutdown, &[]);
    assert_eq!(read_all(&host), b"end");
    assert_eq!((&host).read(&mut [0]).unwrap(), 0, "end of file");
    host.write_all(b"still here").unwrap();
    assert_eq!(setup.receive()[0].payload, b"still here");
    shutdown.flags = SHUTDOWN_BOTH;
    setup.send(shutdown, &[]);
    assert_eq!(setup.ops(), [Op::Reset]);
    assert_eq!(setup.connections(), 0);
}

#[test]
fn the_end_of_the_hosts_program_reaches_the_guest_after_its_data() {
    let mut setup = Setup::new();
    let mut host = setup.connect(PORTS);
    host.write_all(b"last words").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = setup.receive();
    assert_eq!(packets[0].payload, b"last words");
    assert_eq!(packets[1].header.op, Op::Shutdown);
    assert_eq!(packets[1].header.flags, SHUTDOWN_SEND);
    drop(host);
    let packets = setup.receive();
    assert_eq!(packets[0].header.flags, SHUTDOWN_BOTH);
    setup.op(PORTS, Op::Reset);
    assert_eq!(setup.connections(), 0);
}

#[test]
fn packets_that_make_no_sense_are_dropped_or_reset() {
    let mut setup = Setup::new();
    let valid = {
        let mut bytes = header(PORTS, Op::Data).to_guest(HOST_CID);
        bytes[0..8].copy_from_slice(&u64::from(CID).to_le_bytes());
        bytes
    };
    // (offset, value, answer): source, destination, type, op, length.
    for (at, value, answer) in [
        (0, 8, vec![]),
        (8, 3, vec![]),
        (28, 2, vec![Op::Reset]),
        (30, 0, vec![Op::Reset]),
        (30, 77, vec![Op::Reset]),
        (24, 1, vec![Op::Reset]),
        (26, 0xff, vec![Op::Reset]),
        (30, 5, vec![Op::Reset]),
        (30, 3, vec![]),
    ] {
        let mut bytes = valid;
        bytes[at] = value;
        setup.send_raw(&bytes, &[]);
        assert_eq!(setup.ops(), answer, "{value} at {at}");
    }
    setup.send_raw(&valid[..40], &[]);
    assert!(setup.ops().is_empty());
}

#[test]
fn connections_are_bounded() {
    let mut setup = Setup::new();
    for guest in 0..MAX_CONNECTIONS as u32 {
        setup.op(Ports { host: 1, guest }, Op::Request);
        assert_eq!(setup.ops(), [Op::Response]);
    }
    let one_more = Ports {
        host: 1,
        guest: 9999,
    };
    setup.op(one_more, Op::Request);
    assert_eq!(setup.ops(), [Op::Reset]);
    let host = setup.host_connects(b"CONNECT 5\n");
    assert!(setup.receive().is_empty());
    setup.op(Ports { host: 1, guest: 0 }, Op::Reset);
    assert_eq!(setup.ops(), [Op::Request], "the waiting one gets the place");
    drop(host);
}

#[test]
fn answers_wait_for_the_drivers_buffers_and_packets_for_the_answers() {
    let mut setup = Setup::new();
    // Uses up the offered buffers and then fills the list of waiting resets.
    let mut heads = 0;
    for guest in 0..400 {
        let at = setup.machine.buffer(41, 0);
        let mut bytes = header(Ports { host: 1, guest }, Op::Data).to_guest(HOST_CID);
        bytes[0..8].copy_from_slice(&u64::from(CID).to_le_bytes());
        bytes[16..20].copy_from_slice(&guest.to_le_bytes());
        bytes[20..24].copy_from_slice(&1_u32.to_le_bytes());
        setup.machine.write(at, &bytes);
        setup.machine.add(TRANSMIT, &[Buffer::readable(at, 44)]);
        setup.machine.kick(TRANSMIT);
        let done = setup.machine.take_used(TRANSMIT).len();
        if done == 0 {
            break;
        }
        heads += done;
    }
    assert_eq!(heads, 32 + 256);
    let mut resets = 0;
    while resets < heads + 1 {
        let got = setup.ops();
        assert!(!got.is_empty());
        resets += got.len();
    }
    assert_eq!(setup.machine.take_used(TRANSMIT).len(), 1);
}

#[test]
fn a_driver_reset_ends_all_connections() {
    let mut setup = Setup::new();
    let host = setup.connect(PORTS);
    setup.machine.bar_write(20, &[0]);
    setup.machine.run();
    assert_eq!(setup.connections(), 0);
    assert_eq!((&host).read(&mut [0]).unwrap(), 0);
    assert!(setup.machine.start(F_VERSION_1));
    setup.offer(8);
    setup.connect(PORTS);
}

#[test]
fn after_migration_the_driver_is_told_of_its_lost_connections() {
    let mut setup = Setup::new();
    let host = setup.connect(PORTS);
    let at = setup.machine.buffer(41, 8);
    setup.machine.write(at, &[0xff; 8]);
    setup.machine.add(EVENT, &[Buffer::writable(at, 4)]);
    setup.machine.kick(EVENT);
    assert!(setup.machine.take_used(EVENT).is_empty());
    let copy = Arc::new(Mutex::new(device(&setup.directory, &setup.accepted)));
    setup.machine = setup.machine.migrate(copy.clone());
    drop(std::mem::replace(&mut setup.device, copy));
    assert_eq!(setup.machine.take_used(EVENT), [(0, 4)]);
    assert_eq!(setup.machine.read(at, 4), [0; 4]);
    assert_eq!(
        setup.machine.device_config(0, 8),
        u64::from(CID).to_le_bytes()
    );
    drop(host);
    setup.connect(PORTS);
}

#[test]
fn reserved_context_identifiers_are_refused() {
    for cid in [0, 1, 2, u32::MAX] {
        let connect = Box::new(|_| Err(ErrorKind::ConnectionRefused.into()));
        assert!(Vsock::new("vsock0", cid, None, connect).is_err());
    }
}
