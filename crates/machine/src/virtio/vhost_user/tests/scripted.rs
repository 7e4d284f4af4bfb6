//! A backend made of bytes, for what the `vhost` crate's half cannot say.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::driver::Driver;
use super::{Looped, PATIENCE, requests};
use crate::virtio::VirtioDevice;
use crate::virtio::vhost_user::{Block, BlockOptions};

/// A reply with that body.
pub(super) fn reply(request: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, 0b101, body.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// Answers until the front-end hangs up. The capacity grows by a sector each time it is read; the
/// front-end's channel goes to `channels`.
fn serve(mut stream: UnixStream, channels: &Sender<UnixStream>) -> std::io::Result<()> {
    let mut capacity = 0;
    loop {
        let mut header = [0; 12];
        let (len, file) = stream.recv_with_fd(&mut header)?;
        stream.read_exact(&mut header[len..])?;
        let mut body = vec![0; usize::from(header[8])];
        stream.read_exact(&mut body)?;
        let answer = match header[0] {
            1 => (1_u64 << 32 | 1 << 30).to_le_bytes().to_vec(),
            // BACKEND_REQ and CONFIG; acknowledgements it does not know.
            15 => (1_u64 << 5 | 1 << 9).to_le_bytes().to_vec(),
            21 => {
                let fd = OwnedFd::from(file.expect("the channel's descriptor"));
                channels.send(fd.into()).unwrap();
                continue;
            }
            24 => {
                capacity += 1;
                body[12] = capacity;
                body
            }
            _ => continue,
        };
        stream.write_all(&reply(header[0].into(), &answer))?;
    }
}

#[test]
fn a_changed_configuration_reaches_the_driver() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, channels) = channel();
    let backend = std::thread::spawn(move || serve(theirs, &sender));
    let (source, _requests) = requests();
    let options = BlockOptions {
        name: "disk0".into(),
        max_queues: 1,
    };
    let mut block = Block::new(options, ours, source).unwrap();
    let driver = Driver::new(&block, 64);
    block.activate(driver.activation(block.features())).unwrap();
    let mut device = Looped::new(block);
    let mut channel = channels.recv_timeout(PATIENCE).unwrap();
    let capacity = |block: &mut Block| {
        let mut capacity = [0];
        block.read_config(0, &mut capacity);
        capacity[0]
    };
    assert_eq!(device.with(capacity), 1);
    for changes in 1..4 {
        // CONFIG_CHANGE_MSG, to be acknowledged.
        channel
            .write_all(&[2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])
            .unwrap();
        device.turn_until("the change", |block| capacity(block) == 1 + changes);
        let mut acknowledgement = [0; 20];
        channel.read_exact(&mut acknowledgement).unwrap();
        assert_eq!(acknowledgement, reply(2, &[0; 8])[..]);
        let announced = driver.interrupts.config_changes.load(Ordering::Relaxed);
        assert_eq!(announced, usize::from(changes));
    }
    drop(device);
    assert!(
        backend.join().unwrap().is_err(),
        "the front-end has hung up"
    );
}
