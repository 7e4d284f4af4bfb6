use std::time::Duration;

use mica_base::clock::ManualClock;

use super::*;
use crate::legacy::testing::{Line, Requests, check_round_trip, write_all};

struct Bench {
    clock: Arc<ManualClock>,
    sci: Arc<Line>,
    requests: Arc<Requests>,
    power: Power,
}

fn bench() -> Bench {
    let clock = Arc::new(ManualClock::default());
    let sci = Line::new();
    let requests = Arc::new(Requests::default());
    let power = Power::new(clock.clone(), sci.clone(), requests.clone());
    Bench {
        clock,
        sci,
        requests,
        power,
    }
}

fn read_timer(power: &mut Power) -> u32 {
    let mut data = [0; 4];
    power.read(port::PM_TIMER, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn only_s5_switches_the_machine_off() {
    for (control, expected) in [
        (0x0001_u16, vec![]),
        (0x2000, vec![]),
        (0x2000 | 3 << 10, vec![]),
        (5 << 10, vec![]),
        (0x2000 | 5 << 10, vec![PowerEvent::PowerOff]),
    ] {
        let mut bench = bench();
        bench.power.write(port::PM1_CONTROL, &control.to_le_bytes());
        assert_eq!(bench.requests.take(), expected, "{control:#x}");
        // SCI_EN reads as one and SLP_EN as zero, whatever was written.
        let mut read = [0; 2];
        bench.power.read(port::PM1_CONTROL, &mut read);
        assert_eq!(u16::from_le_bytes(read) & 0x2001, 1, "{control:#x}");
    }
}

#[test]
fn reset_control_resets_when_its_cpu_bit_rises() {
    for (writes, resets) in [
        (vec![2, 6], 1),
        (vec![6], 1),
        (vec![4], 1),
        (vec![2], 0),
        (vec![6, 6], 1),
        (vec![6, 2, 6], 2),
    ] {
        let mut bench = bench();
        for value in &writes {
            bench.power.write_byte(port::RESET_CONTROL, *value);
        }
        assert_eq!(
            bench.requests.take(),
            vec![PowerEvent::Reset; resets],
            "{writes:?}"
        );
    }
}

#[test]
fn power_button_raises_the_sci_until_its_status_is_cleared() {
    let mut bench = bench();
    assert!(!bench.power.press_power_button());
    assert!(!bench.sci.is_high(), "not enabled yet");
    bench
        .power
        .write(port::PM1_EVENT + 2, &0x0100_u16.to_le_bytes());
    assert!(bench.sci.is_high(), "the early press was kept");
    let mut status = [0; 2];
    bench.power.read(port::PM1_EVENT, &mut status);
    assert_eq!(u16::from_le_bytes(status), 0x0100);
    bench
        .power
        .write(port::PM1_EVENT, &0x0100_u16.to_le_bytes());
    assert!(!bench.sci.is_high());
    assert!(bench.power.press_power_button());
    assert_eq!(bench.sci.rises(), 2);
}

#[test]
fn general_purpose_events_raise_the_sci_when_enabled() {
    let mut bench = bench();
    bench.power.raise_gpe(9);
    bench.power.raise_gpe(200);
    assert!(!bench.sci.is_high());
    bench.power.write_byte(port::GPE0 + 3, 0x02);
    assert!(bench.sci.is_high());
    bench.power.write_byte(port::GPE0 + 1, 0x02);
    assert!(!bench.sci.is_high());
}

#[test]
fn timer_counts_at_its_frequency_and_stands_still_while_paused() {
    let mut bench = bench();
    bench.clock.advance(Duration::from_secs(1));
    assert_eq!(read_timer(&mut bench.power), 3_579_545);
    bench.power.pause().unwrap();
    bench.clock.advance(Duration::from_secs(100));
    assert_eq!(read_timer(&mut bench.power), 3_579_545);
    bench.power.resume().unwrap();
    bench.clock.advance(Duration::from_secs(2));
    assert_eq!(read_timer(&mut bench.power), 3 * 3_579_545);
}

#[test]
fn timer_status_reports_the_top_bit_changing() {
    let mut bench = bench();
    assert_eq!(bench.power.read_byte(port::PM1_EVENT) & 1, 0);
    bench.clock.advance(Duration::from_secs(600));
    assert_eq!(bench.power.read_byte(port::PM1_EVENT) & 1, 1);
    bench.power.write_byte(port::PM1_EVENT, 1);
    assert_eq!(bench.power.read_byte(port::PM1_EVENT) & 1, 0);
}

#[test]
fn state_passes_through_save_and_restore() {
    let mut from = bench();
    write_all(
        &mut from.power,
        &[(0x603, 0x01), (0x604, 0x02), (0x622, 0x10), (0xcf9, 2)],
    );
    from.power.raise_gpe(4);
    from.power.press_power_button();
    from.clock.advance(Duration::from_secs(700));
    from.power.pause().unwrap();
    let mut into = bench();
    check_round_trip(&from.power, &mut into.power);
    assert!(into.sci.is_high());
    assert_eq!(
        read_timer(&mut into.power),
        read_timer(&mut from.power),
        "the timer goes on from where it stood"
    );
}

#[test]
fn reset_clears_events_but_not_the_timer() {
    let mut bench = bench();
    bench.power.write_byte(0x603, 1);
    bench.power.press_power_button();
    bench.clock.advance(Duration::from_secs(1));
    bench.power.reset();
    assert!(!bench.sci.is_high());
    assert_eq!(read_timer(&mut bench.power), 3_579_545);
}
