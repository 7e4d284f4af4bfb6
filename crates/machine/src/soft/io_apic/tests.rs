use super::*;

/// A chip and the messages that it has sent.
#[derive(Default)]
struct Bench {
    chip: IoApic,
    sent: Vec<Message>,
    /// Nobody accepts.
    deaf: bool,
}

impl Bench {
    fn run(&mut self, act: impl FnOnce(&mut IoApic, Deliver)) -> usize {
        let before = self.sent.len();
        let sent = &mut self.sent;
        let deaf = self.deaf;
        act(&mut self.chip, &mut |message| {
            sent.push(*message);
            !deaf
        });
        self.sent.len() - before
    }

    fn write(&mut self, register: u8, value: u32) -> usize {
        self.run(|chip, deliver| {
            chip.write(SELECT, register.into(), deliver);
            chip.write(WINDOW, value, deliver);
        })
    }

    fn read(&mut self, register: u8) -> u32 {
        self.run(|chip, deliver| chip.write(SELECT, register.into(), deliver));
        self.chip.read(WINDOW)
    }

    fn line(&mut self, pin: usize, level: bool) -> usize {
        self.run(|chip, deliver| chip.set_line(pin, level, deliver))
    }

    fn eoi(&mut self, vector: u8) -> usize {
        self.run(|chip, deliver| chip.end_of_interrupt(vector, deliver))
    }
}

#[test]
fn registers_as_on_kvm() {
    let mut bench = Bench::default();
    assert_eq!(bench.read(1), 0x0017_0011);
    bench.write(1, 0);
    assert_eq!(bench.read(1), 0x0017_0011);
    bench.write(0, 0xff00_0000);
    assert_eq!(bench.read(0), 0x0f00_0000);
    assert_eq!(bench.read(2), 0x0f00_0000);
    assert_eq!(bench.read(0x10), 1 << 16, "masked after power-on");
    assert_eq!(bench.read(0x3f), 0);
    for missing in [3, 0x0f, 0x40, 0xff] {
        assert_eq!(bench.read(missing), u32::MAX, "{missing:#x}");
        bench.write(missing, 5);
    }
    assert_eq!(bench.chip.read(0x20), 0);
    assert_eq!(bench.chip.read(0), 0xff, "the selected register");
}

#[test]
fn an_entry_becomes_a_message() {
    use DeliveryMode::{ExtInt, Fixed, Init, LowestPriority, Nmi};
    let cases = [
        (0x0031, Fixed, Destination::Physical(3), false),
        (0x0931, LowestPriority, Destination::Logical(3), false),
        (0x8031, Fixed, Destination::Physical(3), true),
        (0x0431, Nmi, Destination::Physical(3), false),
        (0x0531, Init, Destination::Physical(3), false),
        (0x0731, ExtInt, Destination::Physical(3), false),
    ];
    for (low, mode, destination, level_triggered) in cases {
        let mut bench = Bench::default();
        bench.write(0x15, 3 << 24);
        bench.write(0x14, low);
        assert_eq!(bench.line(2, true), 1, "{low:#x}");
        let message = bench.sent[0];
        assert_eq!(message.vector, 0x31);
        assert_eq!(message.mode, mode, "{low:#x}");
        assert_eq!(message.destination, destination, "{low:#x}");
        assert_eq!(message.level_triggered, level_triggered, "{low:#x}");
    }
}

#[test]
fn a_level_waits_for_its_end_of_interrupt() {
    let mut bench = Bench::default();
    bench.write(0x32, 0x8040);
    assert_eq!(bench.line(17, true), 1);
    assert_eq!(bench.read(0x32), 0xc040, "remote IRR");
    assert_eq!(bench.line(17, true), 0);
    assert_eq!(bench.eoi(0x41), 0, "another vector");
    assert_eq!(bench.eoi(0x40), 1, "still high");
    bench.line(17, false);
    assert_eq!(bench.eoi(0x40), 0);
    assert_eq!(bench.read(0x32), 0x8040);
    bench.deaf = true;
    assert_eq!(bench.line(17, true), 1);
    assert_eq!(bench.read(0x32), 0x8040, "nobody has accepted it");
}

#[test]
fn an_edge_is_sent_once() {
    let mut bench = Bench::default();
    bench.write(0x18, 0x0034);
    assert_eq!(bench.line(4, true), 1);
    assert_eq!(bench.line(4, true), 0);
    assert_eq!(bench.eoi(0x34), 0);
    bench.line(4, false);
    assert_eq!(bench.line(4, true), 1);
    assert_eq!(bench.line(24, true), 0, "no such pin");
}

#[test]
fn unmasking_sends_levels_only() {
    for (low, sent) in [(0x0_8040, 1), (0x0_0040, 0)] {
        let mut bench = Bench::default();
        bench.write(0x32, low | 1 << 16);
        assert_eq!(bench.line(17, true), 0);
        assert_eq!(bench.write(0x32, low), sent, "{low:#x}");
    }
}

#[test]
fn remote_irr_is_read_only_but_falls_with_the_trigger_mode() {
    let mut bench = Bench::default();
    bench.write(0x32, 0x8040);
    bench.line(17, true);
    bench.line(17, false);
    bench.write(0x32, 0x1_8040);
    assert_eq!(bench.read(0x32), 0x1_c040);
    bench.write(0x32, 0x1_0040);
    bench.write(0x32, 0x1_f040);
    assert_eq!(bench.read(0x32), 0x1_a040, "neither status bit is taken");
}

#[test]
fn state_round_trips() {
    let mut bench = Bench::default();
    bench.write(0x10, 0x0030);
    bench.write(0x32, 0x8040);
    bench.write(0x34, 0x1_8041);
    for pin in [0, 17, 18] {
        bench.line(pin, true);
    }
    let saved = bench.chip.save();
    assert_eq!(saved.irr, 0b110 << 16, "the edge is delivered");
    let mut other = IoApic::new();
    other.restore(&saved);
    assert_eq!(other.save(), saved);
}
