use super::*;
use crate::legacy::testing::{Line, Requests, check_round_trip, write_all};

struct Bench {
    keyboard_line: Arc<Line>,
    mouse_line: Arc<Line>,
    requests: Arc<Requests>,
    i8042: I8042,
}

fn bench(has_mouse: bool) -> Bench {
    let keyboard_line = Line::new();
    let mouse_line = Line::new();
    let requests = Arc::new(Requests::default());
    let i8042 = I8042::new(
        keyboard_line.clone(),
        mouse_line.clone(),
        requests.clone(),
        has_mouse,
    );
    Bench {
        keyboard_line,
        mouse_line,
        requests,
        i8042,
    }
}

const DATA: u16 = port::I8042_DATA;
const COMMAND: u16 = port::I8042_COMMAND;

impl Bench {
    fn command(&mut self, command: u8, data: Option<u8>) {
        assert_eq!(self.i8042.read_byte(COMMAND) & 0x02, 0, "always ready");
        self.i8042.write_byte(COMMAND, command);
        if let Some(byte) = data {
            self.i8042.write_byte(DATA, byte);
        }
    }

    /// Everything that waits, with whether it is flagged as the mouse's.
    fn drain(&mut self) -> Vec<(bool, u8)> {
        let mut bytes = vec![];
        loop {
            let status = self.i8042.read_byte(COMMAND);
            if status & status::OUTPUT_FULL == 0 {
                return bytes;
            }
            bytes.push((status & status::FROM_MOUSE != 0, self.i8042.read_byte(DATA)));
        }
    }

    fn keyboard(&mut self, command: u8) -> Vec<u8> {
        self.i8042.write_byte(DATA, command);
        self.drain().into_iter().map(|(_, byte)| byte).collect()
    }
}

#[test]
fn commands_are_answered() {
    for (has_mouse, command, data, answers) in [
        (true, 0xaa, None, vec![(false, 0x55)]),
        (true, 0xab, None, vec![(false, 0x00)]),
        (true, 0x20, None, vec![(false, mode::POWER_ON)]),
        (true, 0xa9, None, vec![(false, 0x00)]),
        (false, 0xa9, None, vec![(false, 0x01)]),
        (true, 0xd2, Some(0x42), vec![(false, 0x42)]),
        (true, 0xd3, Some(0x5a), vec![(true, 0x5a)]),
        (false, 0xd3, Some(0x5a), vec![(false, 0x5a)]),
        (true, 0xd4, Some(0xf2), vec![(true, 0xfa), (true, 0x00)]),
        (false, 0xd4, Some(0xf2), vec![(true, 0xfe)]),
        (true, 0xc0, None, vec![(false, 0x80)]),
        (true, 0xd0, None, vec![(false, OUTPUT_PORT)]),
        (true, 0x99, None, vec![]),
    ] {
        let mut bench = bench(has_mouse);
        bench.command(command, data);
        assert_eq!(bench.drain(), answers, "{command:#x}, mouse {has_mouse}");
    }
}

/// What Linux's i8042 and atkbd drivers do at boot, in order.
#[test]
fn linux_finds_controller_keyboard_and_mouse() {
    let mut bench = bench(true);
    assert_eq!(bench.drain(), [], "flush");
    bench.command(0xaa, None);
    assert_eq!(bench.drain(), [(false, 0x55)]);
    bench.command(0x20, None);
    let mode = bench.drain()[0].1;
    let quiet = mode & !0x03 | 0x30;
    bench.command(0x60, Some(quiet));
    let rises = bench.keyboard_line.rises();
    bench.command(0x20, None);
    assert_eq!(bench.drain(), [(false, quiet)]);
    // Second port: loopback, then off and on again as the command byte shows.
    bench.command(0xd3, Some(0xa5));
    assert_eq!(bench.drain(), [(true, 0xa5)]);
    for (command, off) in [(0xa7, true), (0xa8, false)] {
        bench.command(command, None);
        bench.command(0x20, None);
        assert_eq!(bench.drain()[0].1 & mode::MOUSE_OFF != 0, off);
    }
    assert_eq!(bench.keyboard_line.rises(), rises, "polled since");
    // Interrupts on; then the keyboard: identity, LEDs, rate, scan set, enable.
    bench.command(0x60, Some(mode | 0x03));
    assert_eq!(bench.keyboard(0xf2), [0xfa, 0xab, 0x41]);
    assert_eq!(
        bench.keyboard_line.rises(),
        rises + 3,
        "an edge for each byte"
    );
    assert_eq!(bench.keyboard(0xed), [0xfa]);
    assert_eq!(bench.keyboard(0x02), [0xfa]);
    assert_eq!(bench.i8042.keyboard().leds(), 2);
    assert_eq!(bench.keyboard(0xf4), [0xfa]);
    // The mouse: reset, wheel, reporting.
    bench.command(0xd4, Some(0xff));
    assert_eq!(bench.drain(), [(true, 0xfa), (true, 0xaa), (true, 0x00)]);
    assert_eq!(bench.mouse_line.rises(), 3);
}

#[test]
fn keys_arrive_translated_unless_the_guest_says_otherwise() {
    for (mode, expected) in [
        (0x41, vec![0xe0, 0x48, 0xe0, 0xc8]),
        (0x01, vec![0xe0, 0x75, 0xe0, 0xf0, 0x75]),
    ] {
        let mut bench = bench(false);
        bench.command(0x60, Some(mode));
        assert!(bench.i8042.press(Key(0xe048), true));
        assert!(bench.i8042.press(Key(0xe048), false));
        assert!(bench.keyboard_line.is_high());
        let bytes: Vec<u8> = bench.drain().into_iter().map(|(_, byte)| byte).collect();
        assert_eq!(bytes, expected, "mode {mode:#x}");
        assert!(!bench.keyboard_line.is_high());
    }
}

#[test]
fn a_port_that_is_off_keeps_its_bytes() {
    let mut bench = bench(false);
    bench.command(0xad, None);
    bench.i8042.press(Key(0x1e), true);
    assert_eq!(bench.drain(), []);
    bench.command(0xae, None);
    assert_eq!(bench.drain(), [(false, 0x1e)]);
}

#[test]
fn the_reset_line_resets() {
    for (command, data, resets) in [
        (0xfe, None, 1),
        (0xf0, None, 1),
        (0xff, None, 0),
        (0xd1, Some(0xfe), 1),
        (0xd1, Some(0xdf), 0),
    ] {
        let mut bench = bench(false);
        bench.command(command, data);
        assert_eq!(
            bench.requests.take(),
            vec![PowerEvent::Reset; resets],
            "{command:#x}"
        );
    }
}

#[test]
fn an_unread_controller_stays_bounded() {
    let mut bench = bench(true);
    for round in 0..1_000 {
        bench.command(0xaa, None);
        bench.command(0xd3, Some(round as u8));
        bench.i8042.press(Key(0x1e), round % 2 == 0);
        bench.i8042.move_pointer(PointerEvent {
            right: i32::MAX,
            ..PointerEvent::default()
        });
        assert!(bench.i8042.state.is_possible(true));
    }
}

#[test]
fn state_passes_through_save_and_restore() {
    let mut from = bench(true);
    write_all(
        &mut from.i8042,
        &[(COMMAND, 0x60), (DATA, 0x43), (COMMAND, 0xd4), (DATA, 0xf4)],
    );
    from.drain();
    from.i8042.press(Key(0x1e), true);
    from.i8042.press(Key(0x1e), false);
    from.i8042.move_pointer(PointerEvent {
        right: 7,
        ..PointerEvent::default()
    });
    write_all(&mut from.i8042, &[(COMMAND, 0xd1)]);
    let mut into = bench(true);
    check_round_trip(&from.i8042, &mut into.i8042);
    assert!(into.keyboard_line.is_high());
    assert_eq!(into.drain(), from.drain());

    let mut without = bench(false);
    assert!(matches!(
        without.i8042.restore(&from.i8042.save()),
        Err(RestoreError::Impossible(_))
    ));
}
