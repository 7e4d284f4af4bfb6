use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::legacy::testing::{Line, check_round_trip, write_all};

const BASE: u16 = 0x3f8;
const DATA: u16 = BASE;
const IER: u16 = BASE + 1;
const IIR: u16 = BASE + 2;
const FCR: u16 = BASE + 2;
const LCR: u16 = BASE + 3;
const MCR: u16 = BASE + 4;
const LSR: u16 = BASE + 5;
const MSR: u16 = BASE + 6;
const SCRATCH: u16 = BASE + 7;

#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl ConsoleSink for Printed {
    fn write(&mut self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes);
    }
}

struct Bench {
    serial: Serial,
    line: Arc<Line>,
    printed: Printed,
}

fn bench() -> Bench {
    let line = Line::new();
    let printed = Printed::default();
    let serial = Serial::new("serial0", BASE, line.clone(), Box::new(printed.clone()));
    Bench {
        serial,
        line,
        printed,
    }
}

/// A UART as an open terminal device leaves it: FIFOs with trigger level 8, RTS, DTR and OUT2.
fn opened() -> Bench {
    let mut bench = bench();
    write_all(&mut bench.serial, &[(FCR, 0x87), (MCR, 0x0b), (IER, 0x05)]);
    bench
}

#[test]
fn what_is_written_reaches_the_sink_in_order() {
    let mut bench = bench();
    for byte in b"hello" {
        assert_eq!(bench.serial.read_byte(LSR), 0x60);
        bench.serial.write_byte(DATA, *byte);
    }
    assert_eq!(*bench.printed.0.lock().unwrap(), b"hello");
}

#[test]
fn registers_hold_what_the_part_implements() {
    for (port, written, read) in [
        (IER, 0xff, 0x0f),
        (LCR, 0x1f, 0x1f),
        (MCR, 0xff, 0x1f),
        (SCRATCH, 0xa5, 0xa5),
        (LSR, 0x00, 0x60),
        (MSR, 0x00, 0xb0),
    ] {
        let mut bench = bench();
        bench.serial.write_byte(port, written);
        assert_eq!(bench.serial.read_byte(port), read, "port {port:#x}");
    }
}

#[test]
fn divisor_latch_hides_data_and_interrupt_enable() {
    let mut bench = bench();
    write_all(
        &mut bench.serial,
        &[(IER, 0x05), (LCR, 0x83), (DATA, 0x0c), (IER, 0x01)],
    );
    assert_eq!(bench.serial.read_byte(DATA), 0x0c);
    assert_eq!(bench.serial.read_byte(IER), 0x01);
    bench.serial.write_byte(LCR, 0x03);
    assert_eq!(bench.serial.read_byte(IER), 0x05);
    assert!(bench.printed.0.lock().unwrap().is_empty());
}

/// The probe of Linux's 8250 driver (`autoconfig`): it must come to 16550A.
#[test]
fn linux_autoconfiguration_finds_a_16550a() {
    let mut serial = bench().serial;
    serial.write_byte(IER, 0);
    assert_eq!(serial.read_byte(IER), 0);
    serial.write_byte(IER, 0x0f);
    assert_eq!(serial.read_byte(IER), 0x0f);
    serial.write_byte(IER, 0);

    serial.write_byte(MCR, 0x1a);
    assert_eq!(serial.read_byte(MSR) & 0xf0, 0x90, "loopback");
    serial.write_byte(MCR, 0);

    serial.write_byte(LCR, 0xbf);
    serial.write_byte(BASE + 2, 0);
    serial.write_byte(LCR, 0);
    serial.write_byte(FCR, 0x01);
    assert_eq!(serial.read_byte(IIR) >> 6, 3, "16550A");
    // Not a 16650 or 16850: those answer the enhanced registers with zero.
    for lcr in [0x80, 0xbf] {
        serial.write_byte(LCR, lcr);
        assert_ne!(serial.read_byte(BASE + 2), 0);
    }
    // Not a National SuperIO: its register at 2 follows the loopback bit.
    serial.write_byte(LCR, 0xe0);
    let before = serial.read_byte(BASE + 2) & 0x10;
    write_all(&mut serial, &[(LCR, 0), (MCR, 0x10), (LCR, 0xe0)]);
    assert_eq!(serial.read_byte(BASE + 2) & 0x10, before);
    write_all(&mut serial, &[(LCR, 0), (MCR, 0)]);
    // Not a 16750: no 64-byte FIFO.
    write_all(&mut serial, &[(FCR, 0x21)]);
    assert_eq!(serial.read_byte(IIR) >> 5, 6);
    // Not an XScale: no unit enable bit.
    serial.write_byte(IER, 0x40);
    assert_eq!(serial.read_byte(IER), 0);
}

/// The transmit interrupt as Linux tests it at startup (`serial8250_THRE_test`).
#[test]
fn transmitter_interrupt_comes_at_each_enabling_and_goes_by_reading_iir() {
    let mut bench = opened();
    for _ in 0..2 {
        bench.serial.write_byte(IER, 0x02);
        assert!(bench.line.is_high());
        assert_eq!(bench.serial.read_byte(IIR), 0xc2);
        assert!(!bench.line.is_high());
        assert_eq!(bench.serial.read_byte(IIR), 0xc1);
        bench.serial.write_byte(IER, 0x00);
    }
    bench.serial.write_byte(IER, 0x02);
    bench.serial.read_byte(IIR);
    bench.serial.write_byte(DATA, b'x');
    assert_eq!(bench.serial.read_byte(IIR), 0xc2, "due again after a write");
}

#[test]
fn received_data_interrupts_by_level_and_by_timeout() {
    let mut bench = opened();
    assert_eq!(bench.serial.push_input(b"1234567"), 7);
    assert!(bench.line.is_high());
    assert_eq!(bench.serial.read_byte(IIR), 0xcc, "below the trigger");
    assert_eq!(bench.serial.push_input(b"8"), 1);
    assert_eq!(bench.serial.read_byte(IIR), 0xc4, "at the trigger");
    for expected in b"12345678" {
        assert_eq!(bench.serial.read_byte(LSR), 0x61);
        assert!(bench.line.is_high());
        assert_eq!(bench.serial.read_byte(DATA), *expected);
    }
    assert_eq!(bench.serial.read_byte(LSR), 0x60);
    assert_eq!(bench.serial.read_byte(IIR), 0xc1);
    assert!(!bench.line.is_high());
}

#[test]
fn interrupts_are_identified_by_priority() {
    let mut bench = opened();
    let serial = &mut bench.serial;
    // Overrun in loopback, so that all four sources are due.
    write_all(serial, &[(IER, 0x0f), (MCR, 0x18)]);
    for byte in 0..17 {
        serial.write_byte(DATA, byte);
    }
    serial.write_byte(MCR, 0x0b);
    assert_eq!(serial.read_byte(IIR), 0xc6);
    assert_eq!(serial.read_byte(LSR), 0x63);
    assert_eq!(serial.read_byte(IIR), 0xc4);
    while serial.read_byte(LSR) & 1 != 0 {
        serial.read_byte(DATA);
    }
    assert_eq!(serial.read_byte(IIR), 0xc2);
    assert_eq!(serial.read_byte(IIR), 0xc0);
    assert_ne!(serial.read_byte(MSR) & 0x0f, 0);
    assert_eq!(serial.read_byte(IIR), 0xc1);
}

#[test]
fn out2_gates_the_interrupt_line() {
    let mut bench = opened();
    bench.serial.write_byte(IER, 0x02);
    assert!(bench.line.is_high());
    bench.serial.write_byte(MCR, 0x03);
    assert!(!bench.line.is_high());
    bench.serial.write_byte(MCR, 0x0b);
    assert!(bench.line.is_high());
}

#[test]
fn loopback_returns_what_is_written_and_prints_nothing() {
    let mut bench = opened();
    bench.serial.write_byte(MCR, 0x1b);
    assert!(!bench.serial.wants_input());
    assert_eq!(bench.serial.push_input(b"z"), 0);
    bench.serial.write_byte(DATA, 0x5a);
    assert_eq!(bench.serial.read_byte(DATA), 0x5a);
    assert!(bench.printed.0.lock().unwrap().is_empty());
    for (mcr, msr) in [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80)] {
        bench.serial.write_byte(MCR, mcr);
        assert_eq!(bench.serial.read_byte(MSR) & 0xf0, msr, "MCR {mcr:#x}");
    }
}

#[test]
fn input_waits_for_the_guest_and_is_never_lost() {
    let wanted = Arc::new(AtomicU32::new(0));
    let mut bench = bench();
    let count = Arc::clone(&wanted);
    bench.serial.on_input_wanted(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    assert_eq!(bench.serial.push_input(b"typed early"), 0);
    // The driver starts: the FIFO resets come first, RTS last.
    write_all(&mut bench.serial, &[(FCR, 0x01), (FCR, 0x07), (FCR, 0x81)]);
    assert_eq!(wanted.load(Ordering::Relaxed), 0);
    bench.serial.write_byte(MCR, 0x0b);
    assert_eq!(wanted.load(Ordering::Relaxed), 1);

    let input: Vec<u8> = (0..100).collect();
    let (mut sent, mut read) = (0, Vec::new());
    while read.len() < input.len() {
        sent += bench.serial.push_input(&input[sent..]);
        assert!(bench.serial.registers.received.len() <= FIFO_DEPTH);
        read.push(bench.serial.read_byte(DATA));
    }
    assert_eq!(read, input);
    assert!(wanted.load(Ordering::Relaxed) > 10, "told at each refill");
}

#[test]
fn without_fifos_one_byte_is_buffered() {
    let mut bench = bench();
    write_all(&mut bench.serial, &[(MCR, 0x0b), (IER, 0x01)]);
    assert_eq!(bench.serial.push_input(b"ab"), 1);
    assert_eq!(bench.serial.read_byte(IIR), 0x04);
    assert_eq!(bench.serial.read_byte(DATA), b'a');
    assert!(bench.serial.wants_input());
}

#[test]
fn state_passes_through_save_and_restore() {
    let mut from = opened();
    from.serial.push_input(b"abc");
    write_all(&mut from.serial, &[(SCRATCH, 7), (LCR, 0x83), (DATA, 3)]);
    let mut into = bench();
    check_round_trip(&from.serial, &mut into.serial);
    assert!(into.line.is_high());
    into.serial.write_byte(LCR, 3);
    assert_eq!(into.serial.read_byte(DATA), b'a');
}

#[test]
fn a_state_with_an_overfull_fifo_is_refused() {
    let mut bench = bench();
    let registers = Registers {
        received: (0..17).collect(),
        ..Registers::default()
    };
    let state = SavedState::new(STATE_VERSION, &registers);
    assert!(matches!(
        bench.serial.restore(&state),
        Err(RestoreError::Impossible(_))
    ));
}

#[test]
fn reset_lowers_the_line() {
    let mut bench = opened();
    bench.serial.push_input(b"x");
    assert!(bench.line.is_high());
    bench.serial.reset();
    assert!(!bench.line.is_high());
    assert_eq!(bench.serial.read_byte(LSR), 0x60);
}
