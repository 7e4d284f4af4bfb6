use super::*;

fn tsc() -> Tsc {
    Tsc::new(1_000_000, 0, 0)
}

fn apic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, tsc());
    write(&mut apic, index::SPURIOUS, 0x1ff);
    apic
}

fn x2apic(id: u32) -> LocalApic {
    let mut apic = apic(id);
    apic.set_base(apic.base() | base::X2APIC).unwrap();
    apic
}

fn write(apic: &mut LocalApic, register: usize, value: u32) -> Effect {
    apic.write_memory(register as u64 * 16, &value.to_le_bytes(), 0)
}

fn read(apic: &LocalApic, register: usize) -> u32 {
    let mut data = [0; 4];
    apic.read_memory(register as u64 * 16, &mut data, 0);
    u32::from_le_bytes(data)
}

fn fixed(vector: u8, level_triggered: bool) -> Message {
    Message {
        vector,
        mode: DeliveryMode::Fixed,
        destination: Destination::Physical(0),
        sender: None,
        level_triggered,
        assert: true,
        redirection_hint: false,
    }
}

#[test]
fn registers_after_power_on() {
    for id in [0, 5] {
        let apic = LocalApic::new(id, tsc());
        let lint0 = if id == 0 { 0x700 } else { 0x1_0000 };
        let expected = [
            (index::ID, id << 24),
            (index::VERSION, 0x0005_0014),
            (index::TPR, 0),
            (index::LDR, 0),
            (index::DFR, u32::MAX),
            (index::SPURIOUS, 0xff),
            (index::LVT_TIMER, 0x1_0000),
            (index::LVT_LINT0, lint0),
            (index::LVT_LINT1, 0x1_0000),
            (index::LVT_ERROR, 0x1_0000),
            (index::CURRENT_COUNT, 0),
        ];
        for (register, value) in expected {
            assert_eq!(read(&apic, register), value, "{id}: {register:#x}");
        }
        assert_eq!(apic.base(), 0xfee0_0800 | if id == 0 { 0x100 } else { 0 });
        assert_eq!(apic.takes_extint(), id == 0);
    }
}

/// What is written to a register and what is read from it.
#[test]
fn writable_bits() {
    let cases = [
        (index::ID, 0x0700_0000),
        (index::VERSION, 0x0005_0014),
        (index::TPR, 0xff),
        (index::LDR, 0xff00_0000),
        (index::DFR, 0xffff_ffff),
        (index::SPURIOUS, 0x3ff),
        (index::ESR, 0),
        (index::ICR2, 0xff00_0000),
        (index::LVT_TIMER, 0x0007_10ff),
        (index::LVT_THERMAL, 0x0001_17ff),
        (index::LVT_LINT0, 0x0001_f7ff),
        (index::LVT_ERROR, 0x0001_10ff),
        (index::DIVIDE, 0xb),
        (index::IRR, 0),
        (0x2f, 0),
    ];
    for (register, value) in cases {
        let mut apic = apic(3);
        let written = if register == index::ID {
            0x07ff_ffff
        } else {
            u32::MAX
        };
        write(&mut apic, register, written);
        assert_eq!(read(&apic, register), value, "{register:#x}");
    }
}

#[test]
fn priorities_decide_which_interrupt_comes() {
    let mut apic = apic(0);
    for vector in [0x31, 0x52, 0x58] {
        assert!(apic.accept(&fixed(vector, false)));
    }
    assert_eq!(apic.acknowledge(), Some(0x58));
    assert_eq!(apic.ppr(), 0x50);
    assert_eq!(apic.acknowledge(), None, "0x52 is of the same class");
    assert_eq!(write(&mut apic, index::EOI, 0), Effect::None);
    assert_eq!(apic.acknowledge(), Some(0x52));
    write(&mut apic, index::EOI, 0);
    apic.set_tpr(0x30);
    assert_eq!(apic.acknowledge(), None);
    assert_eq!(read(&apic, index::PPR), 0x30);
    apic.set_tpr(0x2f);
    assert_eq!(apic.acknowledge(), Some(0x31));
    write(&mut apic, index::EOI, 0);
    assert_eq!(
        write(&mut apic, index::EOI, 0),
        Effect::None,
        "none is left"
    );
}

#[test]
fn the_end_of_a_level_is_broadcast() {
    let mut apic = apic(0);
    apic.accept(&fixed(0x61, true));
    apic.accept(&fixed(0x72, false));
    assert_eq!(read(&apic, index::TMR + 3), 1 << 1);
    apic.acknowledge();
    assert_eq!(write(&mut apic, index::EOI, 0), Effect::None);
    apic.acknowledge();
    assert_eq!(
        write(&mut apic, index::EOI, 0),
        Effect::EndOfInterrupt(0x61)
    );
    apic.accept(&fixed(0x61, false));
    assert_eq!(read(&apic, index::TMR + 3), 0);
}

#[test]
fn a_disabled_one_takes_no_interrupts() {
    let mut apic = LocalApic::new(1, tsc());
    assert!(!apic.accept(&fixed(0x61, false)), "disabled by software");
    let nmi = Message {
        mode: DeliveryMode::Nmi,
        ..fixed(0, false)
    };
    assert!(apic.accept(&nmi));
    assert!(apic.take_events().nmi && !apic.events().nmi);
    write(&mut apic, index::SPURIOUS, 0x1ff);
    write(&mut apic, index::LVT_LINT1, 0x400);
    assert!(apic.signal_lint1() && apic.take_events().nmi);
    write(&mut apic, index::SPURIOUS, 0xff);
    assert_eq!(read(&apic, index::LVT_LINT1), 0x1_0400, "masked with it");
    write(&mut apic, index::LVT_LINT1, 0x400);
    assert!(!apic.signal_lint1());
    apic.set_base(0xfee0_0000).unwrap();
    assert_eq!(read(&apic, index::VERSION), u32::MAX, "nobody answers");
    assert!(apic.takes_extint());
}

#[test]
fn init_and_start_up() {
    let mut apic = apic(1);
    let message = |mode, vector| Message {
        mode,
        ..fixed(vector, false)
    };
    assert!(apic.accept(&message(DeliveryMode::StartUp, 9)));
    assert!(apic.accept(&message(DeliveryMode::Init, 0)));
    let events = apic.events();
    assert!(events.init && events.start_up.is_none(), "INIT forgets it");
    apic.accept(&message(DeliveryMode::StartUp, 8));
    assert_eq!(apic.take_events().start_up, Some(8));
    let deassert = Message {
        assert: false,
        level_triggered: true,
        ..message(DeliveryMode::Init, 0)
    };
    assert!(!apic.accept(&deassert) && apic.events() == Events::default());
    write(&mut apic, index::ID, 0x0900_0000);
    apic.init();
    assert_eq!(read(&apic, index::ID), 0x0900_0000, "INIT keeps the ID");
    assert_eq!(read(&apic, index::SPURIOUS), 0xff);
}

/// Mode, LDR, DFR; destination; whether APIC 5 (index 5) is meant.
#[test]
fn destinations() {
    use Destination::{All, Logical, Myself, Others, Physical};
    let flat = u32::MAX;
    let cases = [
        (false, 0, flat, Physical(5), true),
        (false, 0, flat, Physical(4), false),
        (false, 0, flat, Physical(0xff), true),
        (false, 0x2000_0000, flat, Logical(0x21), true),
        (false, 0x2000_0000, flat, Logical(0x1f), false),
        (false, 0x2000_0000, flat, Logical(0xff), true),
        (false, 0x3200_0000, 0x0fff_ffff, Logical(0x33), true),
        (false, 0x3200_0000, 0x0fff_ffff, Logical(0x23), false),
        (false, 0x3200_0000, 0x0fff_ffff, Logical(0x31), false),
        (false, 0x3200_0000, 0x7fff_ffff, Logical(0x33), false),
        (true, 0, 0, Physical(5), true),
        (true, 0, 0, Physical(u32::MAX), true),
        (true, 0, 0, Physical(0xff), true),
        (true, 0, 0, Logical(0x0000_0020), true),
        (true, 0, 0, Logical(0x0001_0020), false),
        (true, 0, 0, Logical(0x0000_001f), false),
        (true, 0, 0, All, true),
        (false, 0, 0, Myself, false),
        (false, 0, 0, Others, true),
    ];
    for (extended, ldr, dfr, destination, meant) in cases {
        let mut apic = if extended { x2apic(5) } else { apic(5) };
        write(&mut apic, index::LDR, ldr);
        write(&mut apic, index::DFR, dfr);
        let message = Message {
            destination,
            ..fixed(0x40, false)
        };
        let case = format!("x2APIC {extended}, LDR {ldr:#x}, DFR {dfr:#x}, {destination:x?}");
        assert_eq!(apic.is_destination(&message, 5), meant, "{case}");
    }
    let ipi = Message {
        destination: Physical(0xff),
        sender: Some(1),
        ..fixed(0x40, false)
    };
    assert!(!x2apic(5).is_destination(&ipi, 5), "an IPI has 32 bits");
}

#[test]
fn x2apic_registers() {
    let mut apic = x2apic(0x25);
    assert_eq!(apic.read_msr(0x802, 0), Ok(0x25));
    assert_eq!(apic.read_msr(0x80d, 0), Ok(0x0002_0020));
    assert_eq!(read(&apic, index::VERSION), u32::MAX, "no page");
    for refused in [0x80e, 0x831, 0x80b, 0x83f, 0x840, 0x8ff, 0x809, 0x82f] {
        assert_eq!(apic.read_msr(refused, 0), Err(Refused), "{refused:#x}");
    }
    let refused = [
        (0x802, 1),
        (0x80d, 1),
        (0x80e, 1),
        (0x828, 1),
        (0x808, 1 << 32),
        (0x830, 1 << 20),
        (0x83f, 0x100),
        (0x803, 1),
    ];
    for (msr, value) in refused {
        assert_eq!(apic.write_msr(msr, value, 0), Err(Refused), "{msr:#x}");
    }
    let icr = 0x0000_0007_0000_4041;
    let Ok(Effect::Send(message)) = apic.write_msr(0x830, icr, 0) else {
        panic!("no message");
    };
    assert_eq!(message.destination, Destination::Physical(7));
    assert_eq!(apic.read_msr(0x830, 0), Ok(icr));
    let Ok(Effect::Send(message)) = apic.write_msr(0x83f, 0x42, 0) else {
        panic!("no message");
    };
    assert_eq!(
        (message.vector, message.destination),
        (0x42, Destination::Myself)
    );
    assert_eq!(LocalApic::new(0, tsc()).read_msr(0x802, 0), Err(Refused));
}

/// SDM volume 3, figure 11-27.
#[test]
fn transitions_between_modes() {
    let (off, on, extended) = (0, base::ENABLED, base::ENABLED | base::X2APIC);
    let cases = [
        (&[on, off, on][..], true),
        (&[on, extended][..], true),
        (&[on, extended, on][..], false),
        (&[on, extended, off][..], true),
        (&[on, extended, off, extended][..], false),
        (&[on, extended, off, on][..], true),
        (&[off, base::X2APIC][..], false),
        (&[on | 1][..], false),
        (&[on | 1 << 40][..], false),
    ];
    for (path, allowed) in cases {
        let mut apic = LocalApic::new(0, tsc());
        let walked = path
            .iter()
            .try_for_each(|mode| apic.set_base(base::ADDRESS | mode));
        assert_eq!(walked.is_ok(), allowed, "{path:x?}");
    }
}

#[test]
fn the_timer_raises_its_vector() {
    let mut apic = apic(0);
    write(&mut apic, index::DIVIDE, 0xb);
    write(&mut apic, index::LVT_TIMER, 0x2_00ec);
    write(&mut apic, index::INITIAL_COUNT, 1_000_000);
    assert_eq!(apic.next_deadline(), Some(1_000_000));
    apic.expire(1_000_000);
    assert_eq!(apic.acknowledge(), Some(0xec));
    assert_eq!(apic.next_deadline(), Some(2_000_000));
    write(&mut apic, index::LVT_TIMER, 0x3_00ec);
    write(&mut apic, index::EOI, 0);
    apic.expire(2_000_000);
    assert_eq!(apic.acknowledge(), None, "masked");
    write(&mut apic, index::LVT_TIMER, 0x4_00ed);
    assert_eq!(apic.next_deadline(), None);
    apic.set_deadline_tsc(5_000, 0);
    assert_eq!(apic.next_deadline(), Some(5_000));
    apic.expire(5_000);
    assert_eq!((apic.acknowledge(), apic.deadline_tsc()), (Some(0xed), 0));
}

#[test]
fn state_round_trips() {
    for extended in [false, true] {
        let mut apic = if extended { x2apic(6) } else { apic(6) };
        if extended {
            apic.write_msr(0x830, 0x0000_0300_0000_4041, 0).unwrap();
            apic.write_msr(0x832, 0x2_0040, 0).unwrap();
            apic.write_msr(0x838, 5_000_000, 0).unwrap();
        } else {
            write(&mut apic, index::LVT_TIMER, 0x4_0040);
            apic.set_deadline_tsc(99_999, 0);
            write(&mut apic, index::LDR, 0x1200_0000);
        }
        apic.accept(&fixed(0x61, true));
        apic.accept(&fixed(0x34, false));
        apic.acknowledge();
        let page = apic.save(1_234);
        let mut other = LocalApic::new(6, tsc());
        other
            .restore(&page, apic.base(), apic.deadline_tsc(), 1_234)
            .unwrap();
        assert_eq!(other.save(1_234), page, "x2APIC {extended}");
        assert_eq!(other.next_deadline(), apic.next_deadline());
        assert_eq!(other.ppr(), 0x60);
        assert_eq!(page[0x23], 6, "KVM has the ID there in both modes");
        assert_eq!(other.restore(&page[1..], apic.base(), 0, 0), Err(Refused));
        assert_eq!(other.restore(&page, base::X2APIC, 0, 0), Err(Refused));
    }
}

#[test]
fn odd_accesses_do_no_harm() {
    let mut apic = apic(0);
    for offset in 0..0x1000 {
        for len in 1..=8 {
            let mut data = vec![0xa5; len];
            apic.write_memory(offset, &data, offset);
            apic.read_memory(offset, &mut data, offset);
        }
    }
    let apic = self::apic(0);
    let mut half = [0; 2];
    apic.read_memory(0x32, &mut half, 0);
    assert_eq!(half, [0x05, 0x00], "the version's upper half");
}
