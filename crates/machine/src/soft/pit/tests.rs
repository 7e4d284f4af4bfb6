use super::*;

/// The first nanosecond after that many clock pulses.
fn at(ticks: u64) -> u64 {
    (u128::from(ticks) * NS_PER_SECOND).div_ceil(FREQUENCY) as u64
}

fn load(pit: &mut Pit, channel: u16, mode: u8, count: u16, now: u64) {
    pit.write(0x43, (channel as u8) << 6 | 0x30 | mode << 1, now);
    let [low, high] = count.to_le_bytes();
    pit.write(0x40 + channel, low, now);
    pit.write(0x40 + channel, high, now);
}

fn count(pit: &mut Pit, channel: u16, now: u64) -> u16 {
    pit.write(0x43, (channel as u8) << 6, now);
    let low = pit.read(0x40 + channel, now);
    u16::from_le_bytes([low, pit.read(0x40 + channel, now)])
}

fn status(pit: &mut Pit, channel: u16, now: u64) -> u8 {
    pit.write(0x43, 0xe0 | 2 << channel, now);
    pit.read(0x40 + channel, now)
}

/// Mode, count, pulses since loading; the count that is read, and OUT.
#[test]
fn counts_and_outputs_of_each_mode() {
    let cases = [
        (0, 1000, 0, 1000, false),
        (0, 1000, 999, 1, false),
        (0, 1000, 1000, 0, true),
        (0, 1000, 1001, 0xffff, true),
        (1, 1000, 999, 1, true),
        (1, 1000, 1000, 0, false),
        (2, 1000, 1, 999, false),
        (2, 1000, 2000, 1000, true),
        (2, 1000, 2999, 1, false),
        (3, 1000, 100, 800, true),
        (3, 1000, 499, 2, true),
        (3, 1000, 500, 1000, false),
        (3, 1000, 1000, 1000, true),
        (3, 1001, 500, 1, true),
        (3, 1001, 501, 1000, false),
        (4, 1000, 999, 1, false),
        (4, 1000, 1000, 0, true),
        (4, 1000, 1001, 0xffff, false),
        (5, 1000, 1000, 0, true),
        (0, 0, 1, 0xffff, false),
        (2, 0, 0x1_0001, 0xffff, false),
        (6, 1000, 2000, 1000, true),
    ];
    for (mode, loaded, ticks, shown, out) in cases {
        let mut pit = Pit::new(0);
        load(&mut pit, 2, mode, loaded, 50);
        let now = 50 + at(ticks);
        let case = format!("mode {mode}, {loaded} after {ticks}");
        assert_eq!(count(&mut pit, 2, now), shown, "{case}");
        assert_eq!(status(&mut pit, 2, now) & 0x80 != 0, out, "{case}");
        assert_eq!(pit.read(0x61, now) & 0x20 != 0, out, "{case}");
    }
}

#[test]
fn decimal_counting() {
    let mut pit = Pit::new(0);
    pit.write(0x43, 0xb1, 0);
    pit.write(0x42, 0x00, 0);
    pit.write(0x42, 0x10, 0);
    assert_eq!(count(&mut pit, 2, at(1)), 0x0999);
    assert_eq!(count(&mut pit, 2, at(1000)), 0);
    assert_eq!(count(&mut pit, 2, at(1001)), 0x9999);
    load(&mut pit, 2, 2, 0, 0);
    pit.write(0x43, 0xb5, 0);
    assert_eq!(count(&mut pit, 2, at(1)), 0x9999);
    assert_eq!(count(&mut pit, 2, at(10_000)), 0, "10000 in four digits");
}

#[test]
fn a_periodic_counter_interrupts_without_drift() {
    let mut pit = Pit::new(0);
    assert_eq!(pit.next_deadline(), None, "nothing is programmed");
    load(&mut pit, 0, 2, 1193, 0);
    for turn in 1..=5000 {
        let deadline = pit.next_deadline().unwrap();
        assert_eq!(deadline, at(1193 * turn));
        assert!(!pit.expire(deadline - 1));
        assert!(pit.expire(deadline));
    }
    // Late: one interrupt for all that were missed, and then on time.
    assert!(pit.expire(at(1193 * 9000) + 5));
    assert_eq!(pit.next_deadline(), Some(at(1193 * 9001)));
}

#[test]
fn a_guest_cannot_storm_the_host_with_interrupts() {
    let mut pit = Pit::new(0);
    load(&mut pit, 0, 2, 1, 0);
    let mut last = 0;
    for _ in 0..100 {
        let deadline = pit.next_deadline().unwrap();
        assert!(deadline >= last + MIN_PERIOD_NS, "{last} {deadline}");
        assert!(pit.expire(deadline));
        last = deadline;
    }
}

#[test]
fn a_one_shot_interrupts_once() {
    for mode in [0, 1, 4] {
        let mut pit = Pit::new(0);
        load(&mut pit, 0, mode, 500, 0);
        assert_eq!(pit.next_deadline(), Some(at(500)), "mode {mode}");
        assert!(pit.expire(at(500)));
        assert_eq!(pit.next_deadline(), None, "mode {mode}");
    }
    let mut pit = Pit::new(0);
    load(&mut pit, 0, 5, 500, 0);
    assert_eq!(pit.next_deadline(), None, "its gate never rises");
}

#[test]
fn latches_hold_until_they_are_read() {
    let mut pit = Pit::new(0);
    load(&mut pit, 0, 2, 0x1234, 0);
    // Count and status of counter 0; a second latch command is ignored.
    pit.write(0x43, 0xc2, 0);
    pit.write(0x43, 0xc2, at(100));
    assert_eq!(pit.read(0x40, at(200)), 0x34, "status: both bytes, mode 2");
    assert_eq!(pit.read(0x40, at(200)), 0x34);
    assert_eq!(pit.read(0x40, at(300)), 0x12);
    assert_eq!(pit.read(0x40, at(4)), 0x30, "now the counter itself");
    // One byte only.
    pit.write(0x43, 0x24, 0);
    pit.write(0x40, 0x56, 0);
    pit.write(0x43, 0x00, 0);
    assert_eq!(pit.read(0x40, 0), 0x56);
    assert_eq!(pit.save().channels[0].count, 0x5600);
}

#[test]
fn the_speaker_port() {
    let mut pit = Pit::new(0);
    assert_eq!(pit.read(0x61, 0) & 3, 0);
    pit.write(0x61, 3, 0);
    assert_eq!(pit.read(0x61, 0) & 3, 3);
    assert_eq!(pit.read(0x61, 1 << 14) & 0x10, 0x10);
    assert_eq!(pit.read(0x61, 2 << 14) & 0x10, 0);
    pit.write(0x61, 0, 0);
    load(&mut pit, 2, 1, 1000, 0);
    pit.write(0x61, 1, at(5000));
    assert_eq!(pit.read(0x61, at(5500)) & 0x20, 0x20, "restarted");
    assert_eq!(pit.read(0x61, at(6001)) & 0x20, 0);
}

#[test]
fn state_round_trips_and_counters_start_again() {
    let mut pit = Pit::new(0);
    load(&mut pit, 0, 3, 0x2000, 0);
    pit.write(0x61, 2, 0);
    pit.write(0x43, 0xd2, at(3));
    pit.write(0x43, 0xb0, at(3));
    pit.write(0x42, 0x99, at(3));
    let saved = pit.save();
    let mut other = Pit::new(0);
    other.restore(&saved, 7_000);
    assert_eq!(other.save(), saved);
    assert_eq!(other.next_deadline(), Some(7_000 + at(0x2000)));
    // The power-on state, and one of all zeros, do no harm.
    for state in [Pit::new(0).save(), PitState::default()] {
        other.restore(&state, 0);
        assert_eq!(other.save(), state);
        other.expire(u64::MAX);
        other.read(0x40, u64::MAX);
    }
}
