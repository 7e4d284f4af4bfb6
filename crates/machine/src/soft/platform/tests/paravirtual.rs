use super::*;
use std::cell::Cell;

/// Acknowledges, and says whether the guest was spared the end.
fn acknowledge(bench: &Bench, vcpu: usize) -> (Option<u8>, bool) {
    let offered = Cell::new(false);
    let vector = bench.platform.acknowledge_sparing_end(vcpu, || {
        offered.set(true);
        true
    });
    (vector, offered.get())
}

#[test]
fn the_end_is_spared_only_where_nobody_waits_for_it() {
    let bench = bench(1);
    bench.platform.send_msi(0xfee0_0000, 0x51);
    assert_eq!(acknowledge(&bench, 0), (Some(0x51), true));
    bench.platform.settle_end(0, true);
    assert!(!bench.platform.is_pending(0));
    // Another one waits behind it.
    bench.platform.send_msi(0xfee0_0000, 0x61);
    bench.platform.send_msi(0xfee0_0000, 0x51);
    assert_eq!(acknowledge(&bench, 0), (Some(0x61), false));
    bench.apic(0, 0xb0, 0);
    assert_eq!(acknowledge(&bench, 0), (Some(0x51), true));
    bench.platform.settle_end(0, true);
    // The I/O APIC waits for the end of a level.
    bench.redirect(17, 0x8045, 0);
    bench.platform.set_line(17, true);
    assert_eq!(acknowledge(&bench, 0), (Some(0x45), false));
    bench.apic(0, 0xb0, 0);
    assert_eq!(acknowledge(&bench, 0), (Some(0x45), false), "still high");
}

#[test]
fn a_request_meanwhile_always_wakes() {
    for ended in [true, false] {
        let bench = bench(1);
        bench.platform.send_msi(0xfee0_0000, 0x51);
        assert_eq!(acknowledge(&bench, 0), (Some(0x51), true));
        bench.woken();
        // Of lower priority: it is deliverable only if the other has ended.
        bench.platform.send_msi(0xfee0_0000, 0x41);
        assert_eq!(bench.woken(), [0]);
        assert!(bench.platform.is_pending(0));
        bench.platform.settle_end(0, ended);
        assert_eq!(bench.platform.is_pending(0), ended);
        let now = ended.then_some(0x41);
        assert_eq!(bench.platform.acknowledge(0), now, "ended: {ended}");
        if !ended {
            bench.apic(0, 0xb0, 0);
            assert_eq!(bench.platform.acknowledge(0), Some(0x41));
        }
    }
}

#[test]
fn a_higher_one_in_between_has_an_end_of_its_own() {
    let bench = bench(1);
    bench.platform.send_msi(0xfee0_0000, 0x41);
    assert_eq!(acknowledge(&bench, 0), (Some(0x41), true));
    bench.platform.send_msi(0xfee0_0000, 0x61);
    bench.platform.settle_end(0, false);
    assert_eq!(acknowledge(&bench, 0), (Some(0x61), true));
    bench.platform.settle_end(0, true);
    bench.platform.send_msi(0xfee0_0000, 0x42);
    assert!(!bench.platform.is_pending(0), "0x41 is in service");
    bench.apic(0, 0xb0, 0);
    assert_eq!(bench.platform.acknowledge(0), Some(0x42));
}

#[test]
fn init_forgets_what_was_spared() {
    let bench = bench(1);
    bench.platform.send_msi(0xfee0_0000, 0x51);
    assert_eq!(acknowledge(&bench, 0), (Some(0x51), true));
    bench.platform.init_local_apic(0);
    bench.apic(0, 0xf0, 0x1ff);
    bench.apic(0, 0x80, 0x90);
    bench.platform.send_msi(0xfee0_0000, 0x41);
    assert!(!bench.platform.is_pending(0), "the task priority holds it");
}

#[test]
fn interrupts_go_to_the_ids_of_a_bitmap() {
    let bench = bench(4);
    let message = |command| Message::from_icr(0, command, 0);
    let platform = &bench.platform;
    let some = |id: u32| id == 1 || id == 3 || id == 9;
    assert_eq!(platform.deliver_to_each(some, &message(0x71)), 2);
    assert_eq!(bench.woken(), [1, 3]);
    assert_eq!(platform.acknowledge(3), Some(0x71));
    assert_eq!(platform.deliver_to_each(|id| id == 0, &message(0x400)), 1);
    assert!(platform.take_events(0).nmi);
    // No broadcast: nobody has that ID.
    assert_eq!(platform.deliver_to_each(|id| id == 0xff, &message(0x71)), 0);
    bench.apic(2, 0xf0, 0xff);
    assert_eq!(platform.deliver_to_each(|id| id == 2, &message(0x71)), 0);
    // In xAPIC mode the guest may have changed it.
    bench.apic(1, 0x20, 0x0700_0000);
    assert_eq!(
        (platform.find_by_id(1), platform.find_by_id(7)),
        (None, Some(1))
    );
    platform
        .write_msr(1, MSR_APIC_BASE, 0xfee0_0c00, 0)
        .unwrap();
    assert_eq!(platform.find_by_id(1), Some(1));
    platform
        .write_msr(1, MSR_APIC_BASE, 0xfee0_0000, 0)
        .unwrap();
    assert_eq!(platform.find_by_id(1), None, "it is off");
}

#[test]
fn a_kick_is_an_event() {
    let bench = bench(2);
    bench.platform.kick(1);
    bench.platform.kick(0xff);
    bench.platform.kick(u32::MAX);
    assert_eq!(bench.woken(), [1]);
    assert!(bench.platform.take_events(1).kick);
    assert!(!bench.platform.is_pending(1));
}
