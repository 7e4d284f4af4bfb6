use event_manager::{EventManager, SubscriberOps};
use mica_base::clock::ManualClock;
use std::sync::Mutex;

use super::*;
use crate::legacy::testing::{Line, check_round_trip};

/// 2026-11-24 13:59:58 UTC, a Tuesday.
const NOW: u64 = 1_795_528_798;

struct Bench {
    clock: Arc<ManualClock>,
    line: Arc<Line>,
    rtc: Rtc,
}

fn bench() -> Bench {
    let clock = Arc::new(ManualClock::at(Duration::from_secs(NOW)));
    let line = Line::new();
    let rtc = Rtc::new(clock.clone(), line.clone(), 6 << 30).unwrap();
    Bench { clock, line, rtc }
}

impl Bench {
    fn read(&mut self, index: u8) -> u8 {
        self.rtc.write_byte(port::RTC, index);
        self.rtc.read_byte(port::RTC + 1)
    }

    fn write(&mut self, index: u8, value: u8) {
        self.rtc.write_byte(port::RTC, index);
        self.rtc.write_byte(port::RTC + 1, value);
    }

    fn time(&mut self) -> [u8; 8] {
        TIME_REGISTERS.map(|index| self.read(index))
    }

    fn advance_ms(&mut self, milliseconds: u64) {
        self.clock.advance(Duration::from_millis(milliseconds));
        self.rtc.tick();
    }
}

#[test]
fn time_is_shown_in_the_format_the_guest_chose() {
    for (b, expected) in [
        (0x02, [0x58, 0x59, 0x13, 0x03, 0x24, 0x11, 0x26, 0x20]),
        (0x00, [0x58, 0x59, 0x81, 0x03, 0x24, 0x11, 0x26, 0x20]),
        (0x06, [58, 59, 13, 3, 24, 11, 26, 0x20]),
        (0x04, [58, 59, 0x81, 3, 24, 11, 26, 0x20]),
    ] {
        let mut bench = bench();
        bench.write(register::B, b);
        assert_eq!(bench.time(), expected, "register B {b:#x}");
    }
}

#[test]
fn update_in_progress_warns_before_the_second_turns() {
    let mut bench = bench();
    for (nanos, in_progress) in [
        (0, false),
        (999_755_999, false),
        (1, true),
        (243_999, true),
        (1, false),
    ] {
        bench.clock.advance(Duration::from_nanos(nanos));
        let found = bench.read(register::A) & A_UPDATE_IN_PROGRESS != 0;
        assert_eq!(found, in_progress, "after {nanos} more");
    }
}

/// How Linux sets the clock (`mc146818_set_time`): hold, divider reset, fields, release.
#[test]
fn a_set_clock_goes_on_from_the_new_time_half_a_second_in() {
    let mut bench = bench();
    let (a, b) = (bench.read(register::A), bench.read(register::B));
    bench.write(register::B, b | B_SET);
    bench.write(register::A, a | 0x70);
    for (index, value) in TIME_REGISTERS
        .into_iter()
        .zip([0x50, 0x59, 0x23, 1, 0x31, 0x12, 0x99, 0x20])
    {
        bench.write(index, value);
    }
    bench.clock.advance(Duration::from_secs(5));
    assert_eq!(bench.read(register::SECONDS), 0x50, "held");
    bench.write(register::B, b);
    bench.write(register::A, a);
    assert_eq!(bench.read(register::SECONDS), 0x50);
    bench.advance_ms(500);
    assert_eq!(bench.read(register::SECONDS), 0x51);
    bench.advance_ms(9_000);
    // 2100-01-01 is a Friday.
    assert_eq!(bench.time(), [0, 0, 0, 6, 1, 1, 0, 0x21]);
}

#[test]
fn a_field_written_to_a_running_clock_takes_effect() {
    let mut bench = bench();
    bench.write(register::HOURS, 0x05);
    assert_eq!(bench.time()[..3], [0x58, 0x59, 0x05]);
    bench.advance_ms(2_000);
    assert_eq!(bench.time()[..3], [0, 0, 0x06]);
}

#[test]
fn update_interrupt_comes_each_second_until_acknowledged() {
    let mut bench = bench();
    assert_eq!(bench.rtc.next_deadline(), None);
    bench.write(register::B, B_24_HOURS | flag::UPDATE);
    let deadline = bench.clock.monotonic() + Duration::from_secs(1);
    assert_eq!(bench.rtc.next_deadline(), Some(deadline));
    bench.advance_ms(999);
    assert!(!bench.line.is_high());
    bench.advance_ms(1);
    assert!(bench.line.is_high());
    assert_eq!(
        bench.rtc.next_deadline(),
        None,
        "nothing new until acknowledged"
    );
    let flags = bench.read(register::C);
    assert_eq!(flags & (flag::REQUEST | flag::UPDATE), 0x90);
    assert!(!bench.line.is_high());
    assert_eq!(bench.read(register::C), 0);
    bench.advance_ms(1_000);
    assert_eq!(bench.line.rises(), 2);
}

#[test]
fn periodic_interrupt_follows_its_rate() {
    let mut bench = bench();
    bench.write(register::A, 0x2f); // 2 Hz
    bench.write(register::B, B_24_HOURS | flag::PERIODIC);
    for _ in 0..4 {
        bench.advance_ms(499);
        assert!(!bench.line.is_high());
        bench.advance_ms(1);
        assert!(bench.line.is_high());
        bench.read(register::C);
    }
    bench.write(register::A, 0x20);
    assert_eq!(bench.rtc.next_deadline(), None, "rate 0 is off");
}

#[test]
fn alarm_goes_off_at_its_time() {
    let mut bench = bench();
    bench.write(register::HOURS_ALARM, 0x14);
    bench.write(register::MINUTES_ALARM, 0xff);
    bench.write(register::SECONDS_ALARM, 0x30);
    bench.write(register::B, B_24_HOURS | flag::ALARM);
    let deadline = bench.clock.monotonic() + Duration::from_secs(32);
    assert_eq!(bench.rtc.next_deadline(), Some(deadline));
    bench.advance_ms(31_999);
    assert!(!bench.line.is_high());
    bench.advance_ms(1);
    assert!(bench.line.is_high());
    assert_eq!(
        bench.read(register::C) & (flag::REQUEST | flag::ALARM),
        0xa0
    );
}

#[test]
fn cmos_tells_the_memory_size() {
    let mut bench = bench();
    let word =
        |bench: &mut Bench, low: u8| u16::from_le_bytes([bench.read(low), bench.read(low + 1)]);
    assert_eq!(word(&mut bench, 0x15), 640);
    assert_eq!(word(&mut bench, 0x17), 0xffff);
    assert_eq!(
        u64::from(word(&mut bench, 0x34)) << 16,
        (3 << 30) - (16 << 20)
    );
    assert_eq!(u64::from(word(&mut bench, 0x5b)) << 16, 3 << 30);
    assert_eq!(bench.read(register::D), D_VALID);
}

#[test]
fn the_nmi_mask_is_not_part_of_the_index() {
    let mut bench = bench();
    bench.write(0x80 | 0x40, 0x5a);
    assert_eq!(bench.read(0x40), 0x5a);
}

#[test]
fn an_alarm_missed_while_paused_goes_off_at_resume() {
    let mut bench = bench();
    bench.write(register::B, B_24_HOURS | flag::UPDATE);
    bench.rtc.pause().unwrap();
    bench.advance_ms(5_000);
    assert!(!bench.line.is_high());
    assert_eq!(bench.rtc.next_deadline(), None);
    bench.rtc.resume().unwrap();
    assert!(bench.line.is_high());
    assert_eq!(bench.read(register::SECONDS), 0x03, "the time went on");
}

#[test]
fn state_passes_through_save_and_restore() {
    let mut from = bench();
    from.write(register::YEAR, 0x30);
    from.write(0x40, 9);
    from.write(register::B, B_24_HOURS | flag::UPDATE);
    from.rtc.pause().unwrap();
    let mut into = bench();
    check_round_trip(&from.rtc, &mut into.rtc);
    into.rtc.resume().unwrap();
    assert_eq!(into.time(), from.time());
}

#[test]
fn impossible_states_are_refused() {
    let good = State {
        cmos: vec![0; CMOS_LEN],
        index: 0,
        offset_seconds: 0,
        offset_nanos: 0,
        seen_seconds: 0,
        seen_nanos: 0,
    };
    let mut bench = bench();
    for bad in [
        State {
            cmos: vec![0; 127],
            ..good
        },
        State {
            cmos: vec![0; CMOS_LEN],
            offset_seconds: i64::MIN,
            ..good
        },
        State {
            cmos: vec![0; CMOS_LEN],
            seen_seconds: i64::MIN,
            ..good
        },
        State {
            cmos: vec![0; CMOS_LEN],
            seen_seconds: i64::MAX,
            ..good
        },
    ] {
        let saved = SavedState::new(STATE_VERSION, &bad);
        assert!(
            matches!(bench.rtc.restore(&saved), Err(RestoreError::Impossible(_))),
            "{bad:?}"
        );
    }
}

/// On the host's own clock the event loop raises the interrupt with nobody calling `tick`.
#[test]
fn the_event_loop_raises_the_periodic_interrupt() {
    let line = Line::new();
    let clock = Arc::new(mica_base::clock::HostClock::new());
    let rtc = Arc::new(Mutex::new(Rtc::new(clock, line.clone(), 1 << 30).unwrap()));
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(rtc.clone());
    for (index, value) in [
        (register::A, 0x26),
        (register::B, B_24_HOURS | flag::PERIODIC),
    ] {
        let mut rtc = rtc.lock().unwrap();
        rtc.write_byte(port::RTC, index);
        rtc.write_byte(port::RTC + 1, value);
    }
    for rises in 1..=3 {
        while !line.is_high() {
            assert!(
                events.run_with_timeout(10_000).unwrap() > 0,
                "no timer event"
            );
        }
        assert_eq!(line.rises(), rises);
        assert_eq!(
            events.run_with_timeout(0).unwrap(),
            0,
            "the event was consumed"
        );
        let mut rtc = rtc.lock().unwrap();
        rtc.write_byte(port::RTC, register::C);
        assert_eq!(rtc.read_byte(port::RTC + 1) & 0xc0, 0xc0);
    }
}
