//! The control queue of a network device (virtio 1.2, clause 5.1.6.5): what its driver may ask.
//!
//! Served in this process, for vhost-user knows no control queue. Filtering by address and mode is
//! "best effort" in the specification: the mode is kept for whoever delivers the frames, and more
//! may be delivered than it asks for. VLAN filters and offload changes are not offered.

use minicbor::{Decode, Encode};
use virtio_bindings::bindings::virtio_net as net;

/// The longest request looked at: both address tables with a few hundred entries each.
pub(super) const MAX_REQUEST: usize = 4096;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;

/// What the driver has set by control requests.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct Control {
    /// The device's address.
    #[n(0)]
    pub(super) mac: [u8; 6],
    /// Receive modes that are on: bit N is command N of class `VIRTIO_NET_CTRL_RX`.
    #[n(1)]
    pub(super) rx_modes: u8,
    /// Queue pairs in use.
    #[n(2)]
    pub(super) pairs: u16,
    /// The driver is asked to announce itself, and has not acknowledged yet.
    #[n(3)]
    pub(super) announce: bool,
}

impl Control {
    /// The state after a reset. Promiscuous, until the driver says otherwise (clause 5.1.6.5.1).
    pub(super) fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            rx_modes: 1,
            pairs: 1,
            announce: false,
        }
    }

    /// Carries out a request under the negotiated `features`; `false` if it is refused.
    pub(super) fn request(&mut self, request: &[u8], features: u64, max_pairs: u16) -> bool {
        let has = |bit: u32| features & 1 << bit != 0;
        match *request {
            [CLASS_RX, mode @ 0..=1, on @ 0..=1] if has(net::VIRTIO_NET_F_CTRL_RX) => {
                self.set_mode(mode, on);
            }
            [CLASS_RX, mode @ 2..=5, on @ 0..=1] if has(net::VIRTIO_NET_F_CTRL_RX_EXTRA) => {
                self.set_mode(mode, on);
            }
            [CLASS_MAC, 0, ref tables @ ..] if has(net::VIRTIO_NET_F_CTRL_RX) => {
                return skip_table(tables).and_then(skip_table) == Some(&[]);
            }
            [CLASS_MAC, 1, ref mac @ ..] if has(net::VIRTIO_NET_F_CTRL_MAC_ADDR) => {
                let Ok(mac) = <[u8; 6]>::try_from(mac) else {
                    return false;
                };
                self.mac = mac;
            }
            [CLASS_ANNOUNCE, 0] if has(net::VIRTIO_NET_F_GUEST_ANNOUNCE) => self.announce = false,
            [CLASS_MQ, 0, low, high] if has(net::VIRTIO_NET_F_MQ) => {
                let pairs = u16::from_le_bytes([low, high]);
                if !(1..=max_pairs).contains(&pairs) {
                    return false;
                }
                self.pairs = pairs;
            }
            _ => return false,
        }
        true
    }

    fn set_mode(&mut self, mode: u8, on: u8) {
        self.rx_modes = (self.rx_modes & !(1 << mode)) | (on << mode);
    }
}

/// What follows an address table: a 32-bit count and that many addresses.
fn skip_table(bytes: &[u8]) -> Option<&[u8]> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(6)?;
    rest.get(len..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_change_what_they_name() {
        let start = Control::new([2; 6]);
        let with = |change: fn(&mut Control)| {
            let mut control = start.clone();
            change(&mut control);
            Some(control)
        };
        let all = u64::MAX;
        let cases: [(&[u8], u64, Option<Control>); 17] = [
            (&[0, 0, 0], all, with(|control| control.rx_modes = 0)),
            (&[0, 1, 1], all, with(|control| control.rx_modes = 3)),
            (&[0, 5, 1], all, with(|control| control.rx_modes = 33)),
            (&[0, 6, 1], all, None),
            (&[0, 0, 2], all, None),
            (&[0, 0, 1], 0, None),
            (
                &[1, 1, 6, 5, 4, 3, 2, 0],
                all,
                with(|control| control.mac = [6, 5, 4, 3, 2, 0]),
            ),
            (&[1, 1, 6, 5, 4], all, None),
            (
                &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6],
                all,
                with(|_| ()),
            ),
            (&[1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6], all, None),
            (&[1, 0, 255, 255, 255, 255, 0], all, None),
            (&[3, 0], all, with(|_| ())),
            (&[4, 0, 4, 0], all, with(|control| control.pairs = 4)),
            (&[4, 0, 0, 0], all, None),
            (&[4, 0, 5, 0], all, None),
            (&[2, 0, 1, 0], all, None),
            (&[], all, None),
        ];
        for (request, features, expected) in cases {
            let mut control = start.clone();
            let done = control.request(request, features, 4);
            assert_eq!(done.then_some(&control), expected.as_ref(), "{request:?}");
            assert!(done || control == start, "{request:?}");
        }
    }
}
