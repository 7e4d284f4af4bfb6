use super::*;
use crate::testing::{Buffer, TestMachine};
use crate::virtio::entropy::Entropy;

const VERSION_1: u64 = 1 << 32;
const NOTIFY_AT: u64 = 0xc000_3000;

fn machine() -> TestMachine {
    let device = Entropy::new("rng0").unwrap();
    TestMachine::new(Arc::new(Mutex::new(device)))
}

fn request(machine: &mut TestMachine) {
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(at, 8)]);
    machine.kick(0);
    assert_eq!(machine.take_used(0).len(), 1);
}

fn status(machine: &TestMachine) -> u8 {
    machine.bar_read::<1>(20)[0]
}

/// Offset in the configuration space of the virtio capability of that kind.
fn capability(machine: &TestMachine, kind: u8) -> u8 {
    let [mut at] = machine.config_read::<1>(0x34);
    while at != 0 {
        let [id, next] = machine.config_read::<2>(at);
        if id == 9 && machine.config_read::<1>(at + 3) == [kind] {
            return at;
        }
        at = next;
    }
    panic!("no virtio capability {kind}");
}

#[test]
fn a_driver_finds_its_structures_by_the_capabilities() {
    let machine = machine();
    assert_eq!(machine.config_read(0), [0xf4, 0x1a, 0x44, 0x10]);
    for (kind, offset) in [(1, 0), (2, 0x3000), (3, 0x1000), (4, 0x2000)] {
        let at = capability(&machine, kind);
        assert_eq!(machine.config_read::<1>(at + 4), [0], "BAR");
        assert_eq!(u32::from_le_bytes(machine.config_read(at + 8)), offset);
    }
    let notify = capability(&machine, 2);
    assert_eq!(u32::from_le_bytes(machine.config_read(notify + 16)), 4);
}

#[test]
fn msix_delivers_the_queues_own_vector() {
    let mut machine = machine();
    assert!(machine.start(VERSION_1));
    request(&mut machine);
    assert_eq!(machine.messages(), [1]);
    assert!(!machine.interrupts.level(16 + 5));
    assert_eq!(machine.bar_read(0x1000), [0], "no ISR with MSI-X");
}

#[test]
fn intx_is_high_until_the_isr_is_read() {
    let mut machine = machine();
    assert!(machine.start_intx(VERSION_1));
    request(&mut machine);
    assert!(machine.messages().is_empty());
    assert!(machine.interrupts.level(21));
    machine.config_write(0x04, &[6, 4]);
    assert!(!machine.interrupts.level(21), "INTx is disabled");
    machine.config_write(0x04, &[6, 0]);
    assert!(machine.interrupts.level(21));
    assert_eq!(machine.bar_read(0x1000), [1]);
    assert!(!machine.interrupts.level(21));
    assert_eq!(machine.bar_read(0x1000), [0]);
}

#[test]
fn a_queue_without_a_vector_is_silent() {
    let mut machine = machine();
    machine.enable_msix(2);
    assert!(machine.start_intx(VERSION_1));
    request(&mut machine);
    assert!(machine.messages().is_empty());
    assert!(!machine.interrupts.level(21));
    machine.bar_write(22, &[0, 0]);
    machine.bar_write(26, &[7, 0]);
    assert_eq!(machine.bar_read(26), [0xff, 0xff], "no such vector");
    machine.bar_write(26, &[1, 0]);
    assert_eq!(machine.bar_read(26), [1, 0]);
}

#[test]
fn unknown_or_missing_features_are_refused() {
    for features in [0, VERSION_1 | 1 << 40, VERSION_1 | 1] {
        let mut machine = machine();
        assert!(!machine.start(features), "{features:#x}");
        assert_eq!(status(&machine), 3);
        machine.bar_write(20, &[0xf]);
        assert_eq!(status(&machine) & 4, 0, "no DRIVER_OK without FEATURES_OK");
    }
}

#[test]
fn doorbells_follow_the_driver_and_the_bar() {
    let mut machine = machine();
    assert!(machine.interrupts.doorbells().is_empty());
    assert!(machine.start(VERSION_1));
    assert_eq!(machine.interrupts.doorbells(), [NOTIFY_AT]);
    machine.config_write(0x10, &0xc010_0000_u32.to_le_bytes());
    assert_eq!(machine.interrupts.doorbells(), [0xc010_3000]);
    // Into guest memory, where nothing of ours may answer.
    machine.config_write(0x10, &0x0010_0000_u32.to_le_bytes());
    assert!(machine.interrupts.doorbells().is_empty());
    machine.config_write(0x10, &0xc000_0000_u32.to_le_bytes());
    machine.config_write(0x04, &[0, 0]);
    assert!(machine.interrupts.doorbells().is_empty());
    machine.config_write(0x04, &[6, 0]);
    assert_eq!(machine.interrupts.doorbells(), [NOTIFY_AT]);
    request(&mut machine);
    machine.bar_write(20, &[0]);
    assert!(machine.interrupts.doorbells().is_empty());
    assert_eq!(status(&machine), 0);
}

#[test]
fn a_notification_by_the_bus_serves_the_queue_too() {
    let mut machine = machine();
    assert!(machine.start(VERSION_1));
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(at, 8)]);
    machine.bar_write(0x3000, &[0, 0]);
    machine.bar_write(0x3004, &[1, 0]);
    machine.run();
    assert_eq!(machine.take_used(0).len(), 1);
}

#[test]
fn queues_outside_ram_need_a_reset() {
    let mut machine = machine();
    machine.enable_msix(2);
    for status in [0, 1, 3_u8] {
        machine.bar_write(20, &[status]);
    }
    machine.choose_features(VERSION_1);
    machine.bar_write(20, &[0xb]);
    machine.bar_write(16, &[0, 0]);
    machine.bar_write(32, &0xdead_0000_0000_u64.to_le_bytes());
    machine.bar_write(28, &[1, 0]);
    machine.bar_write(20, &[0xf]);
    assert_eq!(status(&machine), 0x4f);
    assert_eq!(machine.messages(), [0], "a configuration change says so");
    assert!(machine.interrupts.doorbells().is_empty());
    assert!(machine.start(VERSION_1), "a reset makes it good");
    request(&mut machine);
}

#[test]
fn a_buffer_from_before_driver_ok_is_served() {
    let mut machine = machine();
    machine.start_held_back(VERSION_1);
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(at, 8)]);
    machine.notify(0);
    assert!(machine.take_used(0).is_empty(), "the driver is not ready");
    machine.bar_write(20, &[0xf]);
    machine.run();
    assert_eq!(machine.take_used(0).len(), 1);
}

#[test]
fn the_access_capability_reaches_the_bar() {
    let machine = machine();
    let at = capability(&machine, 5);
    machine.config_write(at + 8, &20_u32.to_le_bytes());
    machine.config_write(at + 12, &1_u32.to_le_bytes());
    machine.config_write(at + 16, &[1]);
    assert_eq!(status(&machine), 1);
    assert_eq!(machine.config_read::<4>(at + 16), [1, 0, 0, 0]);
    for (offset, len, bar) in [(u32::MAX, 1, 0), (20, 3, 0), (20, u32::MAX, 0), (20, 1, 1)] {
        machine.config_write(at + 4, &[bar]);
        machine.config_write(at + 8, &offset.to_le_bytes());
        machine.config_write(at + 12, &len.to_le_bytes());
        machine.config_write(at + 16, &[3]);
        assert_eq!(status(&machine), 1);
    }
}

#[test]
fn a_machine_reset_brings_everything_back() {
    let mut machine = machine();
    let fresh = machine.save();
    assert!(machine.start(VERSION_1));
    machine.config_write(0x10, &0xc010_0000_u32.to_le_bytes());
    for device in &machine.devices {
        device.lock().unwrap().reset();
    }
    machine.config_write(0x04, &[6, 0]);
    let address = machine.devices.len() - 1;
    assert_eq!(machine.save()[..address], fresh[..address]);
    assert!(machine.start(VERSION_1));
    request(&mut machine);
}

#[test]
fn a_running_driver_goes_on_after_restore() {
    let mut machine = machine();
    assert!(machine.start(VERSION_1 | 1 << 29));
    request(&mut machine);
    machine.config_write(0x10, &0xc000_0000_u32.to_le_bytes());
    // A request that is there but was never served.
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(at, 8)]);
    let copy = Entropy::new("rng0").unwrap();
    let mut machine = machine.migrate(Arc::new(Mutex::new(copy)));
    assert_eq!(machine.take_used(0).len(), 1);
    assert_eq!(machine.messages(), [1]);
    assert_eq!(machine.interrupts.doorbells(), [NOTIFY_AT]);
    request(&mut machine);
}

#[test]
fn a_pending_intx_survives_restore() {
    let mut machine = machine();
    assert!(machine.start_intx(VERSION_1));
    request(&mut machine);
    let copy = Entropy::new("rng0").unwrap();
    let machine = machine.migrate(Arc::new(Mutex::new(copy)));
    assert!(machine.interrupts.level(21));
    assert_eq!(machine.bar_read(0x1000), [1]);
    assert!(!machine.interrupts.level(21));
}

#[test]
fn a_paused_device_leaves_memory_alone() {
    let mut machine = machine();
    assert!(machine.start(VERSION_1));
    machine.save();
    let at = machine.buffer(0, 8);
    machine.add(0, &[Buffer::writable(at, 8)]);
    machine.kick(0);
    assert!(machine.take_used(0).is_empty());
    for device in &machine.devices {
        device.lock().unwrap().resume().unwrap();
    }
    machine.run();
    assert_eq!(machine.take_used(0).len(), 1);
}

#[test]
fn another_devices_state_is_refused_and_changes_nothing() {
    let machine = machine();
    let console = TestMachine::new(Arc::new(Mutex::new(
        crate::virtio::console::Console::new("console0", None, Box::new(Nowhere)).unwrap(),
    )));
    let (ours, theirs) = (machine.save(), console.save());
    let mut device = machine.devices[1].lock().unwrap();
    assert!(device.restore(&theirs[1]).is_err());
    assert_eq!(device.save(), ours[1]);
}

struct Nowhere;

impl crate::console::ConsoleSink for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

#[test]
fn a_backends_eventfd_becomes_an_interrupt_either_way() {
    let interrupts = crate::testing::TestInterrupts::default();
    let msix = Msix::new(2, &interrupts).unwrap();
    let interrupt = Arc::new(Interrupt::new(msix, 1, EventFd::new(EFD_NONBLOCK).unwrap()));
    let mut events = event_manager::EventManager::new().unwrap();
    use event_manager::SubscriberOps;
    events.add_subscriber(Relay(interrupt.clone()));

    interrupt.used_eventfd(0).write(1).unwrap();
    events.run_with_timeout(0).unwrap();
    assert_eq!(interrupt.take_isr(), 1);

    interrupt
        .msix
        .write_table(16, &0xfee0_0000_u64.to_le_bytes());
    interrupt.msix.write_table(24, &9_u64.to_le_bytes());
    interrupt.msix.set_control(1 << 15);
    interrupt.set_vector(Some(0), 1);
    interrupt.used_eventfd(0).write(1).unwrap();
    assert_eq!(interrupts.take_messages(), [(0xfee0_0000, 9)]);
}
