use mica_base::units::Bytes as Size;

use super::*;
use crate::memory::{MemoryOptions, allocate};

const AT: u64 = 0x1000;

fn memory() -> GuestMemory {
    allocate(Size(1 << 20), &MemoryOptions::default()).unwrap()
}

fn instant(now_ns: u64) -> Instant {
    Instant {
        now_ns,
        realtime_ns: 1_700_000_000_500_000_000 + now_ns,
        clock: GuestClock::new(0),
        tsc: Tsc::new(2_400_000, 77, 0),
    }
}

fn read<T: vm_memory::ByteValued>(memory: &GuestMemory, address: u64) -> T {
    memory.read_obj(GuestAddress(address)).unwrap()
}

/// What a guest computes from the structure (the kernel's msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
fn guest_time(memory: &GuestMemory, tsc: u64) -> u64 {
    let delta = tsc - read::<u64>(memory, AT + 8);
    let shift = read::<i8>(memory, AT + 28);
    let delta = if shift < 0 {
        delta >> -shift
    } else {
        delta << shift
    };
    let multiplier = u128::from(read::<u32>(memory, AT + 24));
    read::<u64>(memory, AT + 16) + ((u128::from(delta) * multiplier) >> 32) as u64
}

#[test]
fn a_guest_computes_the_machine_s_time() {
    let memory = memory();
    let mut clock = PvClock::default();
    let early = instant(1_000_000);
    clock
        .write_msr(msr::SYSTEM_TIME, AT | 1, &memory, &early)
        .unwrap();
    assert_eq!(clock.read_msr(msr::SYSTEM_TIME_OLD), Ok(AT | 1));
    for later in [1_000_000, 5_000_000, 60_000_000_000] {
        let time = guest_time(&memory, early.tsc.at(later));
        assert!(time.abs_diff(later) < 100, "{later} is {time}");
    }
    let version = read::<u32>(&memory, AT);
    assert!(version != 0 && version.is_multiple_of(2));
    assert_eq!(read::<u8>(&memory, AT + 29), TSC_STABLE);

    clock.update(&memory, &instant(2_000_000), true);
    assert_eq!(read::<u32>(&memory, AT), version + 2);
    assert_eq!(read::<u8>(&memory, AT + 29), TSC_STABLE | GUEST_STOPPED);
    clock.update(&memory, &instant(2_000_000), false);
    let flags = read::<u8>(&memory, AT + 29);
    assert_eq!(flags, TSC_STABLE | GUEST_STOPPED, "the guest clears it");

    clock
        .write_msr(msr::SYSTEM_TIME, AT, &memory, &early)
        .unwrap();
    let before = read::<u32>(&memory, AT);
    clock.update(&memory, &early, false);
    assert_eq!(read::<u32>(&memory, AT), before, "it is off");
}

#[test]
fn the_scale_is_exact_for_any_frequency() {
    for khz in [
        1,
        1000,
        999_999,
        1_000_000,
        1_000_001,
        2_000_000,
        2_399_998,
        u32::MAX,
    ] {
        let (multiplier, shift) = time_scale(khz);
        assert!(multiplier >> 31 == 1, "{khz} kHz: {multiplier:#x}");
        // A second's cycles are a second.
        let cycles = u128::from(khz) * 1000;
        let shifted = if shift < 0 {
            cycles >> -shift
        } else {
            cycles << shift
        };
        let ns = (shifted * u128::from(multiplier)) >> 32;
        assert!(ns.abs_diff(1_000_000_000) < 20, "{khz} kHz: {ns}");
    }
}

#[test]
fn the_wall_clock_is_that_of_time_zero() {
    let memory = memory();
    let mut clock = PvClock::default();
    for number in [msr::WALL_CLOCK, msr::WALL_CLOCK_OLD] {
        clock
            .write_msr(number, AT + 0x40, &memory, &instant(3_000_000_000))
            .unwrap();
        assert_eq!(read::<u32>(&memory, AT + 0x44), 1_700_000_000);
        assert_eq!(read::<u32>(&memory, AT + 0x48), 500_000_000);
    }
    assert_eq!(read::<u32>(&memory, AT + 0x40), 4, "two updates");
}

#[test]
fn bad_addresses_do_no_harm() {
    let memory = memory();
    let mut clock = PvClock::default();
    for address in [u64::MAX, u64::MAX - 0x3f, (1 << 20) - 2, 0x1003] {
        for number in [msr::SYSTEM_TIME, msr::WALL_CLOCK] {
            let _ = clock.write_msr(number, address, &memory, &instant(9));
        }
        clock.update(&memory, &instant(10), true);
    }
    assert!(!PvClock::owns_msr(0x4b56_4d02));
    assert_eq!(clock.read_msr(0x4b56_4d02), Err(Refused));
}

#[test]
fn the_clock_stands_still_while_it_is_saved() {
    let mut clock = GuestClock::new(1_000);
    let saved = clock.save(5_000, Some(7));
    assert_eq!((saved.guest_ns, saved.realtime_ns), (4_000, Some(7)));
    clock.restore(&saved, 90);
    assert_eq!(clock.at(100), 4_010);
    assert_eq!(clock.save(90, Some(7)), saved);
}
