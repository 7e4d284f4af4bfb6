use super::*;

/// As a PC's firmware or Linux initializes them: vectors 0x30 and 0x38.
fn initialized(icw4: u8) -> Pic {
    let mut pic = Pic::new();
    for (command, data, base, icw3) in [(0x20, 0x21, 0x30, 4), (0xa0, 0xa1, 0x38, 2)] {
        pic.write(command, 0x11);
        pic.write(data, base);
        pic.write(data, icw3);
        pic.write(data, icw4);
        pic.write(data, 0);
    }
    pic
}

fn pulse(pic: &mut Pic, irq: u8) {
    pic.set_line(irq, true);
    pic.set_line(irq, false);
}

fn isr(pic: &mut Pic, command: u16) -> u8 {
    pic.write(command, 0x0b);
    pic.read(command)
}

#[test]
fn each_input_gives_its_vector() {
    for irq in (0..16).filter(|irq| *irq != 2) {
        let mut pic = initialized(1);
        assert!(!pic.output());
        pulse(&mut pic, irq);
        assert!(pic.output(), "IRQ {irq}");
        assert_eq!(pic.acknowledge(), 0x30 + irq);
        assert!(!pic.output(), "IRQ {irq}");
        let cascaded = irq >= 8;
        assert_eq!(isr(&mut pic, 0x20), if cascaded { 4 } else { 1 << irq });
        assert_eq!(
            isr(&mut pic, 0xa0),
            if cascaded { 1 << (irq - 8) } else { 0 }
        );
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!((isr(&mut pic, 0x20), isr(&mut pic, 0xa0)), (0, 0));
    }
}

#[test]
fn a_lower_priority_waits_for_the_end_of_interrupt() {
    let mut pic = initialized(1);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x34);
    pulse(&mut pic, 6);
    assert!(!pic.output(), "6 is below 4");
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x31, "1 is above 4");
    pic.write(0x20, 0x20);
    assert!(!pic.output());
    pic.write(0x20, 0x64);
    assert_eq!(pic.acknowledge(), 0x36);
}

#[test]
fn a_request_that_went_away_is_spurious() {
    let mut pic = initialized(1);
    assert_eq!(pic.acknowledge(), 0x37);
    assert_eq!(isr(&mut pic, 0x20), 0, "IRQ 7 is not in service");
    // The slave's: its level-triggered line falls between request and acknowledge.
    pic.write(0x4d1, 0x08);
    pic.set_line(11, true);
    pic.set_line(11, false);
    assert_eq!(pic.acknowledge(), 0x3f);
    assert_eq!((isr(&mut pic, 0x20), isr(&mut pic, 0xa0)), (4, 0));
}

#[test]
fn level_triggered_inputs_ask_until_the_line_falls() {
    let mut pic = initialized(1);
    pic.write(0x4d0, 0xff);
    pic.write(0x4d1, 0xff);
    assert_eq!((pic.read(0x4d0), pic.read(0x4d1)), (0xf8, 0xde));
    pic.set_line(5, true);
    assert_eq!(pic.acknowledge(), 0x35);
    pic.write(0x20, 0x20);
    assert!(pic.output(), "still high");
    pic.set_line(5, false);
    assert!(!pic.output());
    // An edge-triggered one does not ask again.
    pic.set_line(1, true);
    assert_eq!(pic.acknowledge(), 0x31);
    pic.write(0x20, 0x20);
    assert!(!pic.output());
}

#[test]
fn a_masked_edge_is_kept() {
    let mut pic = initialized(1);
    pic.write(0x21, 0x10);
    assert_eq!(pic.read(0x21), 0x10);
    pulse(&mut pic, 4);
    assert!(!pic.output());
    pic.write(0x20, 0x0a);
    assert_eq!(pic.read(0x20), 0x10, "IRR");
    pic.write(0x21, 0);
    assert_eq!(pic.acknowledge(), 0x34);
}

#[test]
fn automatic_end_of_interrupt_and_its_rotation() {
    let mut pic = initialized(3);
    pulse(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x33);
    assert_eq!(isr(&mut pic, 0x20), 0);
    pic.write(0x20, 0x80);
    pulse(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x33);
    pulse(&mut pic, 3);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x34, "3 is the lowest after its turn");
    pic.write(0x20, 0x00);
    assert_eq!(pic.acknowledge(), 0x33);
    assert_eq!(pic.save().0.priority_add, 5, "no more rotation");
}

/// OCW2 by OCW2: what becomes of ISR and of the highest input.
#[test]
fn rotation_commands() {
    let cases = [
        (0x20, 0b0001_0000, 0),
        (0xa0, 0b0001_0000, 4),
        (0x64, 0b0000_1000, 0),
        (0xe4, 0b0000_1000, 5),
        (0xc6, 0b0001_1000, 7),
        (0x40, 0b0001_1000, 0),
    ];
    for (command, in_service, highest) in cases {
        let mut pic = initialized(1);
        pulse(&mut pic, 4);
        pic.acknowledge();
        pulse(&mut pic, 3);
        pic.acknowledge();
        assert_eq!(isr(&mut pic, 0x20), 0b0001_1000);
        pic.write(0x20, command);
        assert_eq!(isr(&mut pic, 0x20), in_service, "OCW2 {command:#x}");
        assert_eq!(pic.save().0.priority_add, highest, "OCW2 {command:#x}");
    }
}

#[test]
fn poll_takes_the_request() {
    let mut pic = initialized(1);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), 0x07, "bit 7 clear: none");
    pulse(&mut pic, 6);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), 0x86);
    assert!(!pic.output());
    assert_eq!(pic.read(0x21), 0, "the next read is an ordinary one");
}

#[test]
fn special_mask_mode_lets_lower_priorities_through() {
    let mut pic = initialized(1);
    pulse(&mut pic, 2);
    pulse(&mut pic, 3);
    pic.acknowledge();
    pulse(&mut pic, 5);
    assert!(!pic.output());
    pic.write(0x21, 0x04);
    pic.write(0x20, 0x68);
    assert_eq!(pic.acknowledge(), 0x33);
    pic.write(0x20, 0x48);
    assert!(!pic.output());
}

#[test]
fn special_fully_nested_mode_lets_a_second_slave_interrupt_in() {
    for (icw4, nested) in [(0x01, false), (0x11, true)] {
        let mut pic = initialized(icw4);
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x3c);
        pulse(&mut pic, 9);
        assert_eq!(pic.output(), nested, "ICW4 {icw4:#x}");
    }
}

#[test]
fn initialization_clears_what_the_data_sheet_says() {
    let mut pic = initialized(0x13);
    pic.write(0x21, 0xff);
    pic.write(0x20, 0xc3);
    pulse(&mut pic, 1);
    pic.write(0x20, 0x10);
    let (master, _) = pic.save();
    assert_eq!((master.imr, master.irr, master.priority_add), (0, 0, 0));
    assert!(!master.auto_eoi && !master.special_fully_nested_mode);
    // Three words without ICW4.
    pic.write(0x21, 0x47);
    pic.write(0x21, 4);
    pic.write(0x21, 0xaa);
    assert_eq!(pic.save().0.irq_base, 0x40);
    assert_eq!(pic.read(0x21), 0xaa);
}

#[test]
fn state_round_trips() {
    let mut pic = initialized(0x13);
    pic.write(0x4d1, 0x0e);
    pic.write(0x20, 0xc3);
    pulse(&mut pic, 6);
    pic.set_line(10, true);
    pic.write(0xa0, 0x11);
    pic.write(0x20, 0x0c);
    let mut other = Pic::new();
    let (master, slave) = pic.save();
    other.restore(&master, &slave);
    assert_eq!(other, pic);
    assert_eq!(other.acknowledge(), pic.acknowledge());
}
