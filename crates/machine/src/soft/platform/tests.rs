mod paravirtual;

use std::sync::Arc;

use super::*;
use crate::engine::state::{PicState, PitChannelState, PlatformState};

/// A machine that notes whom it wakes.
struct Bench {
    platform: Platform,
    woken: Arc<Mutex<Vec<usize>>>,
}

fn bench(vcpus: usize) -> Bench {
    let woken = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&woken);
    let tsc = Tsc::new(1_000_000, 0, 0);
    let wake = move |vcpu| list.lock().unwrap().push(vcpu);
    let bench = Bench {
        platform: Platform::new(vcpus, tsc, 0, wake),
        woken,
    };
    for vcpu in 0..vcpus {
        bench.apic(vcpu, 0xf0, 0x1ff);
    }
    bench
}

impl Bench {
    fn apic(&self, vcpu: usize, offset: u64, value: u32) {
        self.platform
            .write_local_apic(vcpu, offset, &value.to_le_bytes(), 0);
    }

    fn redirect(&self, pin: u8, low: u32, high: u32) {
        for (register, value) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
            self.platform
                .write_io_apic(0, &u32::from(register).to_le_bytes());
            self.platform.write_io_apic(0x10, &value.to_le_bytes());
        }
    }

    fn ports(&self, writes: &[(u16, u8)]) {
        for (port, value) in writes {
            assert!(Platform::owns_port(*port));
            self.platform.write_port(*port, *value, 0);
        }
    }

    fn initialize_pics(&self) {
        self.ports(&[(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)]);
        self.ports(&[(0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1), (0xa1, 0)]);
    }

    fn woken(&self) -> Vec<usize> {
        std::mem::take(&mut self.woken.lock().unwrap())
    }
}

#[test]
fn a_line_reaches_the_first_processor_by_the_8259s() {
    let bench = bench(2);
    bench.initialize_pics();
    bench.platform.set_line(4, true);
    assert_eq!(bench.woken(), [0]);
    assert!(bench.platform.is_pending(0) && !bench.platform.is_pending(1));
    assert!(bench.platform.has_interrupt(0));
    assert_eq!(bench.platform.acknowledge(1), None);
    assert_eq!(bench.platform.acknowledge(0), Some(0x34));
    assert!(!bench.platform.is_pending(0));
    // With LINT0 masked they reach nobody.
    bench.apic(0, 0x350, 0x1_0700);
    bench.ports(&[(0x20, 0x20)]);
    bench.platform.set_line(3, true);
    assert!(!bench.platform.is_pending(0));
    assert_eq!(bench.platform.acknowledge(0), None);
    bench.apic(0, 0x350, 0x700);
    assert_eq!(bench.platform.acknowledge(0), Some(0x33));
}

#[test]
fn a_level_goes_round_by_the_io_apic() {
    let bench = bench(2);
    bench.redirect(17, 0x8045, 1 << 24);
    bench.platform.set_line(17, true);
    assert_eq!(bench.woken(), [1]);
    assert_eq!(bench.platform.acknowledge(1), Some(0x45));
    bench.apic(1, 0xb0, 0);
    assert_eq!(bench.woken(), [1], "the line is still high");
    bench.platform.set_line(17, false);
    assert_eq!(bench.platform.acknowledge(1), Some(0x45));
    bench.apic(1, 0xb0, 0);
    assert!(!bench.platform.is_pending(1));
    assert_eq!(bench.platform.acknowledge(1), None);
}

#[test]
fn messages_find_their_processors() {
    let bench = bench(4);
    assert!(bench.platform.send_msi(0xfee0_2000, 0x51));
    assert!(!bench.platform.send_msi(0xfee0_9000, 0x51), "no such ID");
    assert!(!bench.platform.send_msi(0x1000, 0x51), "no such address");
    assert_eq!(bench.woken(), [2]);
    assert!(bench.platform.send_msi(0xfeef_f000, 0x61));
    assert_eq!(bench.woken(), [0, 1, 2, 3]);
    // Lowest priority, logical: one of 1 and 3, by vector.
    for vcpu in [1, 3] {
        bench.apic(vcpu, 0xd0, 1 << (24 + vcpu));
    }
    assert!(bench.platform.send_msi(0xfee0_f00c, 0x170));
    assert!(bench.platform.send_msi(0xfee0_f00c, 0x171));
    assert_eq!(bench.woken(), [1, 3]);
    // IPIs: to itself, to all, to the others.
    for (low, woken) in [
        (0x4_4080, &[1][..]),
        (0x8_4080, &[0, 1, 2, 3][..]),
        (0xc_4080, &[0, 2, 3][..]),
    ] {
        bench.apic(1, 0x300, low);
        assert_eq!(bench.woken(), woken, "ICR {low:#x}");
    }
}

#[test]
fn processors_are_started() {
    let bench = bench(2);
    bench.apic(0, 0x310, 1 << 24);
    bench.apic(0, 0x300, 0x4500);
    assert_eq!(bench.woken(), [1]);
    assert!(bench.platform.is_pending(1));
    assert!(bench.platform.take_events(1).init);
    bench.platform.init_local_apic(1);
    bench.apic(0, 0x300, 0x4608);
    assert_eq!(bench.woken(), [1]);
    assert_eq!(bench.platform.take_events(1).start_up, Some(8));
    assert!(!bench.platform.is_pending(1));
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let bench = bench(1);
    bench.platform.set_cr8(0, 5);
    bench.platform.send_msi(0xfee0_0000, 0x51);
    assert!(!bench.platform.is_pending(0));
    assert!(bench.woken().is_empty());
    assert_eq!(bench.platform.cr8(0), 5);
    bench.platform.set_cr8(0, 4);
    assert!(bench.platform.is_pending(0));
    assert_eq!(bench.platform.acknowledge(0), Some(0x51));
}

#[test]
fn timers_of_all_chips() {
    let bench = bench(2);
    assert_eq!(bench.platform.next_deadline(), None);
    bench.initialize_pics();
    // Counter 0, mode 2, 1193: about a millisecond.
    bench.ports(&[(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)]);
    bench.apic(1, 0x320, 0x40);
    bench.apic(1, 0x3e0, 0xb);
    bench.apic(1, 0x380, 500_000);
    assert_eq!(bench.platform.next_deadline(), Some(500_000));
    bench.platform.expire(500_000);
    assert_eq!(bench.woken(), [1]);
    assert_eq!(bench.platform.acknowledge(1), Some(0x40));
    let deadline = bench.platform.next_deadline().unwrap();
    assert_eq!(deadline, 999_849, "1193 pulses");
    bench.platform.expire(deadline);
    assert_eq!(bench.woken(), [0]);
    assert_eq!(bench.platform.acknowledge(0), Some(0x30));
    assert!(bench.platform.next_deadline().unwrap() > deadline);
    // By the I/O APIC, pin 0; and LINT0 as an NMI watchdog.
    bench.ports(&[(0x21, 0xff)]);
    bench.redirect(0, 0x33, 0);
    bench.apic(1, 0x350, 0x400);
    bench.platform.expire(2_000_000);
    assert_eq!(bench.platform.acknowledge(0), Some(0x33));
    assert!(bench.platform.take_events(1).nmi);
    bench.platform.reset(0);
    assert_eq!(bench.platform.next_deadline(), None);
}

#[test]
fn msrs() {
    let bench = bench(2);
    let platform = &bench.platform;
    assert!(Platform::owns_msr(0x1b) && Platform::owns_msr(0x83f) && !Platform::owns_msr(0x10));
    assert_eq!(platform.read_msr(0, MSR_APIC_BASE, 0), Ok(0xfee0_0900));
    assert_eq!(platform.local_apic_address(0), Some(0xfee0_0000));
    platform
        .write_msr(1, MSR_APIC_BASE, 0xfee0_0c00, 0)
        .unwrap();
    assert_eq!(platform.local_apic_address(1), None);
    assert_eq!(platform.read_msr(1, 0x802, 0), Ok(1));
    platform.write_msr(1, 0x83f, 0x77, 0).unwrap();
    assert_eq!(platform.acknowledge(1), Some(0x77));
    platform.write_msr(1, 0x832, 0x4_0050, 0).unwrap();
    platform.write_msr(1, MSR_TSC_DEADLINE, 9_000, 0).unwrap();
    assert_eq!(platform.read_msr(1, MSR_TSC_DEADLINE, 0), Ok(9_000));
    assert_eq!(platform.next_deadline(), Some(9_000));
    platform.set_tsc(1, Tsc::new(1_000_000, 4_000, 0), 0);
    assert_eq!(platform.next_deadline(), Some(5_000));
    assert_eq!(platform.write_msr(0, 0x802, 1, 0), Err(Refused));
}

/// A state with a distinct value in every field that any chip can have.
fn busy_state() -> PlatformState {
    let pic = |elcr| PicState {
        last_irr: 0x41,
        irr: 0x82,
        imr: 0x7d,
        isr: 0x10,
        priority_add: 3,
        irq_base: 0x68,
        read_isr: true,
        poll: true,
        special_mask: true,
        init_state: 2,
        auto_eoi: true,
        rotate_on_auto_eoi: true,
        special_fully_nested_mode: true,
        four_byte_init: true,
        elcr,
    };
    let channel = PitChannelState {
        count: 0x1234,
        latched_count: 0x567,
        count_latched: 3,
        status_latched: true,
        status: 0x9a,
        read_state: 4,
        write_state: 4,
        write_latch: 0xbc,
        access: 3,
        mode: 2,
        bcd: true,
        gate: true,
    };
    let mut state = bench(1).platform.save(0, None);
    state.pic_master = pic(0x20);
    state.pic_slave = pic(0x0c);
    state.io_apic.register_select = 0x33;
    state.io_apic.id = 7;
    state.io_apic.irr = 0xff_ffff;
    for (pin, entry) in state.io_apic.redirection.iter_mut().enumerate() {
        *entry = 0x0500_0000_0000_c841 + pin as u64;
    }
    state.pit.channels = [channel; 3];
    state.pit.hpet_legacy = true;
    state.pit.speaker_on = true;
    state.clock.guest_ns = 123_456;
    state.clock.realtime_ns = Some(789);
    state
}

#[test]
fn the_state_round_trips_bit_for_bit() {
    let other = bench(3);
    for state in [busy_state(), bench(1).platform.save(0, Some(1))] {
        other.platform.restore(&state, 55);
        let saved = other.platform.save(55, state.clock.realtime_ns);
        assert_eq!(saved, state);
        assert_eq!(other.platform.clock().at(65), state.clock.guest_ns + 10);
    }
}

#[test]
fn a_local_apic_s_state_round_trips() {
    let bench = bench(2);
    bench.apic(1, 0x320, 0x2_0040);
    bench.apic(1, 0x380, 1_000_000);
    bench.platform.send_msi(0xfee0_1000, 0x51);
    bench.apic(0, 0x310, 1 << 24);
    bench.apic(0, 0x300, 0x4400);
    let state = bench.platform.save_local_apic(1, 100);
    assert!(state.events.nmi);
    let other = self::bench(2);
    let tsc = Tsc::new(1_000_000, 0, 0);
    other
        .platform
        .restore_local_apic(1, &state, tsc, 100)
        .unwrap();
    assert_eq!(other.platform.save_local_apic(1, 100), state);
    assert!(other.platform.is_pending(1));
    assert_eq!(
        other.platform.next_deadline(),
        bench.platform.next_deadline()
    );
    other.platform.reset_local_apic(1);
    assert!(!other.platform.is_pending(1));
}

#[test]
fn threads_do_not_deadlock_nor_lose_interrupts() {
    const ROUNDS: usize = 300;
    let bench = bench(4);
    bench.initialize_pics();
    for pin in 16..20 {
        bench.redirect(pin, 0x8040 + u32::from(pin), u32::from(pin - 16) << 24);
    }
    std::thread::scope(|scope| {
        for vcpu in 0..4 {
            let bench = &bench;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    bench.platform.set_line(16 + vcpu, true);
                    let index = vcpu as usize;
                    let own = 0x50 + vcpu as u8;
                    let mut seen = false;
                    let begun = std::time::Instant::now();
                    while !seen {
                        let vector = bench.platform.acknowledge(index);
                        seen = vector == Some(own);
                        if seen {
                            bench.platform.set_line(16 + vcpu, false);
                        }
                        if vector.is_some() {
                            bench.apic(index, 0xb0, 0);
                        } else {
                            assert!(begun.elapsed().as_secs() < 20, "{vcpu}: lost in {round}");
                            std::thread::yield_now();
                        }
                    }
                    // Everybody disturbs everybody.
                    bench.apic(index, 0x300, 0xc_4060 + vcpu);
                    bench.platform.expire(round as u64);
                }
            });
        }
    });
}

const PORTS: [u16; 11] = [
    0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61,
];

/// What a file can hold.
fn scramble(state: &mut PlatformState, mut random: impl FnMut() -> u64) {
    for channel in &mut state.pit.channels {
        channel.count = random() as u32;
        channel.mode = random() as u8;
        channel.access = random() as u8;
        channel.read_state = random() as u8;
        channel.write_state = random() as u8;
        channel.count_latched = random() as u8;
        channel.bcd = random() & 1 != 0;
    }
    state.pic_master.priority_add = random() as u8;
    state.pic_slave.init_state = random() as u8;
    state.io_apic.redirection.fill_with(&mut random);
    state.clock.guest_ns = random();
}

/// Anything that a guest can do, and any state that a file can hold: no panic.
#[test]
fn arbitrary_accesses_and_states_do_no_harm() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let bench = bench(3);
    let platform = &bench.platform;
    let mut now = 0u64;
    for round in 0..200_000 {
        let (value, vcpu) = (random(), random() as usize % 3);
        let step = random() % 5_000_000;
        now = now.saturating_add(if round > 199_000 { step << 40 } else { step });
        let port = PORTS[random() as usize % PORTS.len()];
        let offset = random() & 0xfff;
        match random() % 13 {
            0 => platform.write_port(port, value as u8, now),
            1 => {
                let _ = platform.read_port(port, now);
            }
            2 => platform.write_io_apic(offset & 0x10, &value.to_le_bytes()[..4]),
            3 => platform.read_io_apic(offset, &mut [0; 8]),
            4 => platform.write_local_apic(vcpu, offset & 0xff0, &value.to_le_bytes()[..4], now),
            5 => platform.read_local_apic(vcpu, offset, &mut [0; 4], now),
            6 => {
                let _ = platform.write_msr(vcpu, 0x800 | offset as u32 & 0xff, value, now);
            }
            7 => {
                let _ = platform.write_msr(vcpu, MSR_TSC_DEADLINE, value, now);
            }
            8 => platform.set_line(value as u32 % 26, value & 1 << 40 != 0),
            9 => {
                let _ = platform.send_msi(0xfee0_0000 | value & 0xf_ffff, offset as u32);
            }
            10 => platform.expire(now),
            11 => {
                let _ = platform.acknowledge(vcpu);
            }
            _ if round % 16 == 0 => {
                let mode = (value & 3) << 10;
                let _ = platform.write_msr(vcpu, MSR_APIC_BASE, 0xfee0_0000 | mode, now);
            }
            _ if round % 16 == 1 => {
                let mut state = platform.save(now, None);
                scramble(&mut state, &mut random);
                platform.restore(&state, now);
            }
            _ => {
                let mut state = platform.save_local_apic(vcpu, now);
                state.page[offset as usize & 0x3ff] = value as u8;
                let _ = platform.restore_local_apic(vcpu, &state, platform.tsc(vcpu), now);
            }
        }
        let _ = platform.next_deadline();
    }
}
