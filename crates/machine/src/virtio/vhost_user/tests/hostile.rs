//! Backends that lie, stop half-way, or say nothing.

use super::scripted::reply;
use crate::virtio::vhost_user::fuzz::{fuzz_vhost_user_backend, fuzz_vhost_user_net_control};

/// All that a well-behaved backend says during a handshake.
fn good_handshake() -> Vec<u8> {
    let mut config = vec![0; 12 + 60];
    config[4] = 60;
    config[12] = 8;
    config[12 + 34] = 2;
    let features: u64 = 1 << 32 | 1 << 30 | 1 << 12 | 1 << 11;
    [
        reply(1, &features.to_le_bytes()),
        reply(15, &(1_u64 | 1 << 9).to_le_bytes()),
        reply(17, &2_u64.to_le_bytes()),
        reply(24, &config),
        reply(1, &features.to_le_bytes()),
        // Activation is confirmed, then both rings are stopped.
        reply(1, &features.to_le_bytes()),
        reply(11, &0_u64.to_le_bytes()),
        reply(11, &1_u64.to_le_bytes()),
    ]
    .concat()
}

#[test]
fn no_bytes_from_a_backend_do_harm() {
    let good = good_handshake();
    fuzz_vhost_user_backend(&good);
    fuzz_vhost_user_backend(&[good.clone(), good.clone()].concat());
    // A configuration change, acknowledged, and the beginning of another.
    fuzz_vhost_user_backend(&[2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    for len in 0..good.len() {
        fuzz_vhost_user_backend(&good[..len]);
    }
    let mut seed: u64 = 0x5eed;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..300 {
        let mut bytes = [good.clone(), good.clone()].concat();
        for _ in 0..1 + random() % 4 {
            let at = random() as usize % bytes.len();
            bytes[at] = random() as u8;
        }
        fuzz_vhost_user_backend(&bytes);
        let noise: Vec<u8> = (0..random() % 200).map(|_| random() as u8).collect();
        fuzz_vhost_user_backend(&noise);
        let few: Vec<u8> = noise.iter().map(|byte| byte % 8).collect();
        fuzz_vhost_user_net_control(&few);
    }
}
