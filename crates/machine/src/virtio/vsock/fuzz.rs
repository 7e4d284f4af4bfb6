//! The muxer under arbitrary packets and an arbitrary host.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::muxer::{MAX_CONNECTIONS, Muxer};
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, Ports};
use crate::bus::lock;
use crate::testing::Input;

const CID: u64 = 3;

/// Host ends of the guest's connections, with the descriptor of ours.
type Peers = Arc<Mutex<VecDeque<(i32, UnixStream)>>>;

/// Packets of the guest, actions of the host's programs and buffers of the driver, in any order.
///
/// The number of connections is bounded, a packet fits the room it is given, and packets to the
/// guest come to an end when the host says nothing more.
#[doc(hidden)]
pub fn fuzz_vsock(data: &[u8]) {
    let peers = Peers::default();
    let mut muxer = muxer(&peers);
    let mut input = Input(data);
    while !input.is_empty() {
        match input.u8() % 8 {
            0..=3 => {
                let (header, payload) = packet(&mut input);
                if muxer.accepts_packets() {
                    muxer.take(Header::from_guest(&header, CID), &payload);
                }
            }
            4 => receive(&mut muxer, usize::from(input.u16())),
            5 => host_writes(&peers, &mut input),
            6 => host_reads(&peers),
            _ => {
                lock(&peers).pop_front();
            }
        }
        poll(&mut muxer, &peers);
        assert!(muxer.len() <= MAX_CONNECTIONS);
        drop(muxer.take_dead());
        muxer.take_fresh();
    }
    lock(&peers).clear();
    receive(&mut muxer, 4096);
}

fn muxer(peers: &Peers) -> Muxer {
    let peers = peers.clone();
    let connect = Box::new(move |port| {
        if port >= 8 {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        lock(&peers).push_back((ours.as_raw_fd(), theirs));
        Ok(ours)
    });
    Muxer::new(None, connect).expect("invariant: no listener, nothing to fail")
}

/// A packet whose ends are right most of the time.
fn packet(input: &mut Input<'_>) -> ([u8; HEADER_LEN], Vec<u8>) {
    let ports = Ports {
        host: u32::from(input.u8() % 10),
        guest: u32::from(input.u8() & 3),
    };
    let payload_len = usize::from(input.u8()) << (input.u8() & 7);
    let mut header = Header::new(ports, Op::Data).to_guest(CID);
    header[0..8].copy_from_slice(&CID.to_le_bytes());
    header[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
    header[16..20].copy_from_slice(&ports.guest.to_le_bytes());
    header[20..24].copy_from_slice(&ports.host.to_le_bytes());
    header[30] = input.u8() & 7;
    header[32] = input.u8() & 3;
    header[36..40].copy_from_slice(&(input.u32() & 0x3_ffff).to_le_bytes());
    header[40..44].copy_from_slice(&input.u32().to_le_bytes());
    if input.u8() > 0xf0 {
        let at = usize::from(input.u8()) % HEADER_LEN;
        header[at] = input.u8();
    }
    (header, vec![7; payload_len])
}

/// Takes packets until there is none, but no more than a driver has buffers.
fn receive(muxer: &mut Muxer, room: usize) {
    let mut payload = vec![0; room];
    for _ in 0..1024 {
        let Some(header) = muxer.next_packet(&mut payload) else {
            return;
        };
        assert!(header.len as usize <= room);
    }
}

fn host_writes(peers: &Peers, input: &mut Input<'_>) {
    let len = usize::from(input.u16());
    for (_, stream) in lock(peers).iter_mut() {
        // A full or closed socket takes nothing.
        let _ = stream.write(&vec![9; len]);
    }
}

fn host_reads(peers: &Peers) {
    let mut bytes = vec![0; 1 << 16];
    for (_, stream) in lock(peers).iter_mut() {
        let _ = stream.read(&mut bytes);
    }
}

/// What the event loop would say: anything may have become ready.
fn poll(muxer: &mut Muxer, peers: &Peers) {
    let fds: Vec<i32> = lock(peers).iter().map(|(fd, _)| *fd).collect();
    for fd in fds {
        muxer.ready(fd, true, true, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::check_random;

    #[test]
    fn the_muxer_stands_arbitrary_packets() {
        check_random(fuzz_vsock, 500, 1500);
    }

    #[test]
    fn a_connection_lives_and_ends() {
        // Request, credit, data both ways, shutdown, reset.
        let packet =
            |op: u8, len: u8, flags: u8| [0, 1, 1, len, 0, op, flags, 0, 4, 0, 0, 0, 0, 0, 0, 0];
        let mut data = Vec::new();
        for (op, len, flags) in [(1, 0, 0), (6, 0, 0), (5, 100, 0)] {
            data.extend(packet(op, len, flags));
        }
        data.extend([5, 0, 1, 4, 0, 1, 6]);
        data.extend(packet(4, 0, 3));
        data.extend(packet(3, 0, 0));
        fuzz_vsock(&data);
    }
}
