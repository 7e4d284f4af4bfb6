//! The hypercalls of KVM's guests (`Documentation/virt/kvm/x86/hypercalls.rst` in the kernel's source).

use mica_cpu::Hypercall;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::board::Board;
use super::message::Message;

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;

/// Why one is refused, as RAX has it negated.
mod error {
    pub(super) const PERMISSION: i64 = -1;
    pub(super) const FAULT: i64 = -14;
    pub(super) const INVALID: i64 = -22;
    pub(super) const NOT_SUPPORTED: i64 = -95;
    pub(super) const NO_SUCH_CALL: i64 = -1000;
}

/// `KVM_CLOCK_PAIRING_WALLCLOCK`, the only kind.
const WALL_CLOCK: u64 = 0;
/// The length of `struct kvm_clock_pairing`.
const PAIRING_LEN: usize = 64;
const NS_PER_SECOND: u64 = 1_000_000_000;

/// APIC IDs: bit n is `least` + n.
#[derive(Clone, Copy)]
struct Targets {
    ids: u128,
    least: u32,
}

impl Targets {
    fn contains(self, id: u32) -> bool {
        let place = id.checked_sub(self.least);
        place.is_some_and(|place| self.ids.checked_shr(place).unwrap_or(0) & 1 != 0)
    }
}

impl Board<'_> {
    /// Does what the guest asks for; what it finds in RAX.
    pub(super) fn answer(&self, call: &Hypercall) -> i64 {
        if call.cpl != 0 {
            return error::PERMISSION;
        }
        let [first, second, ..] = call.arguments;
        match call.number {
            // For local APICs that a processor without an interrupt flag of its own asks.
            VAPIC_POLL_IRQ => 0,
            KICK_CPU => {
                self.shared.platform.kick(second as u32);
                0
            }
            CLOCK_PAIRING => self.pair_clocks(first, second),
            SEND_IPI => self.send_ipis(call),
            SCHED_YIELD => {
                self.yield_to(first as u32);
                0
            }
            _ => error::NO_SUCH_CALL,
        }
    }

    /// Sends what an interrupt command register in the fourth argument says to the APIC IDs of two
    /// words that begin at the third; how many have taken it.
    fn send_ipis(&self, call: &Hypercall) -> i64 {
        const LOGICAL: u64 = 1 << 11;
        const SHORTHAND: u64 = 3 << 18;
        let [low, high, least, command] = call.arguments;
        if command & (LOGICAL | SHORTHAND) != 0 {
            return error::INVALID;
        }
        let width = if call.wide { 64 } else { 32 };
        let targets = Targets {
            ids: u128::from(high) << width | u128::from(low),
            least: least as u32,
        };
        let message = Message::from_icr(self.vcpu, command as u32, 0);
        let platform = &self.shared.platform;
        platform.deliver_to_each(|id| targets.contains(id), &message) as i64
    }

    /// Another vCPU wants to run: here it has a thread of its own, and the host's scheduler chooses.
    fn yield_to(&self, id: u32) {
        let target = self.shared.platform.find_by_id(id);
        if target.is_some_and(|vcpu| vcpu != self.vcpu) {
            std::thread::yield_now();
        }
    }

    /// Writes the wall clock and the time-stamp counter at one moment.
    fn pair_clocks(&self, address: u64, kind: u64) -> i64 {
        if kind != WALL_CLOCK {
            return error::NOT_SUPPORTED;
        }
        let address = GuestAddress(address);
        let memory = &self.shared.memory;
        if !memory.check_range(address, PAIRING_LEN) {
            return error::FAULT;
        }
        let instant = self.local.instant(self.shared);
        let tsc = instant.tsc.at(instant.now_ns);
        let words = [
            instant.realtime_ns / NS_PER_SECOND,
            instant.realtime_ns % NS_PER_SECOND,
            tsc,
        ];
        let mut pairing = [0; PAIRING_LEN];
        for (bytes, word) in pairing.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        match memory.write_slice(&pairing, address) {
            Ok(()) => 0,
            Err(_) => error::FAULT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_begin_at_the_least() {
        let targets = Targets {
            ids: 1 | 1 << 64 | 1 << 127,
            least: 3,
        };
        let ids: Vec<_> = (0..300).filter(|id| targets.contains(*id)).collect();
        assert_eq!(ids, [3, 67, 130]);
        let none = Targets {
            ids: u128::MAX,
            least: u32::MAX - 5,
        };
        assert!(!none.contains(0) && !none.contains(122) && none.contains(u32::MAX));
    }
}
