//! `mica run` on this machine with the processor in software: stock Debian, without KVM and without
//! root.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/console.rs"]
mod console;
#[path = "support/images.rs"]
mod images;
#[path = "support/place.rs"]
mod place;

use std::fs;
use std::time::{Duration, Instant};

use place::Place;
use xtask::session::Turn;

/// How long a guest may take to its prompt, while other tests want the same cores.
const BOOT: Duration = Duration::from_secs(240);
/// How long anything else may take.
const STEP: Duration = Duration::from_secs(60);

const TINY: &str = "tiny# ";
const DEBIAN: &str = "root@debian-socat:~# ";

/// Boots the tiny guest to its shell, uses it, reboots it from inside and powers it off.
fn tiny_lives_a_whole_life(vcpus: u32) {
    let place = Place::new();
    place.add(&images::tiny());
    let mut vm = place.start(&format!("run tiny --engine soft -c {vcpus}"));
    vm.expect(TINY, BOOT);
    let count = vm.shell(TINY, "nproc", STEP);
    assert!(count.contains(&format!("\r\n{vcpus}\r\n")), "{count}");
    assert!(
        vm.shell(TINY, "echo $((6 * 7))", STEP)
            .contains("\r\n42\r\n")
    );
    if vcpus > 1 {
        uses_what_kvm_has(&mut vm);
    }
    // What the guest measures of its own clock must be a second of ours, more or less.
    let before = Instant::now();
    vm.shell(TINY, "sleep 2", STEP);
    let slept = before.elapsed();
    assert!(slept >= Duration::from_millis(1500), "{slept:?}");
    vm.send("reboot\n");
    vm.expect("mica: user space", BOOT);
    vm.expect(TINY, BOOT);
    vm.send("poweroff\n");
    let status = vm.wait(STEP);
    assert_eq!(status.code(), Some(0), "{}", vm.transcript());
    for said in ["runs on soft", "tiny reboots", "tiny powered off"] {
        assert!(
            vm.transcript().contains(said),
            "{said}: {}",
            vm.transcript()
        );
    }
}

/// A kernel with several processors finds KVM's paravirtual features and uses them.
fn uses_what_kvm_has(vm: &mut console::Vm) {
    let log = vm.shell(TINY, "dmesg", STEP);
    for said in [
        "Hypervisor detected: KVM",
        "kvm-clock: using sched offset",
        "kvm-guest: PV spinlocks enabled",
        "kvm-guest: setup PV IPIs",
        "kvm-guest: setup PV sched yield",
        "kvm-guest: KVM setup pv remote TLB flush",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
}

#[test]
fn tiny_with_one_processor() {
    tiny_lives_a_whole_life(1);
}

#[test]
fn tiny_with_two_processors() {
    tiny_lives_a_whole_life(2);
}

#[test]
fn tiny_with_four_processors() {
    tiny_lives_a_whole_life(4);
}

/// Boots Debian from its disk to the login prompt and looks around.
fn debian_boots(vcpus: u32) {
    let place = Place::new();
    place.add(&images::debian_with_socat());
    // Its systemd gives up on devices that are slow to come, so it has the machine for itself.
    let _turn = Turn::exclusive().unwrap();
    let options = format!("run debian-socat --engine soft -m 512M -c {vcpus}");
    let mut vm = place.start(&options);
    vm.expect(" login: ", 2 * BOOT);
    vm.send("root\n");
    vm.expect(DEBIAN, BOOT);
    let count = vm.shell(DEBIAN, "nproc", STEP);
    assert!(count.contains(&format!("\r\n{vcpus}\r\n")), "{count}");
    let root = vm.shell(DEBIAN, "findmnt -no SOURCE,FSTYPE /", STEP);
    assert!(root.contains("/dev/vda"), "{root}");
    // Processors that firmware would have left alike, with clocks that go alike.
    let warnings = vm.shell(DEBIAN, "dmesg --level warn,err", STEP);
    for complaint in ["inconsistent", "Unstable clock", "soft lockup", "rcu:"] {
        assert!(!warnings.contains(complaint), "{warnings}");
    }
    let failed = vm.shell(DEBIAN, "systemctl --failed --no-legend | wc -l", STEP);
    assert!(failed.contains("\r\n0\r\n"), "{failed}");
    vm.send("poweroff\n");
    let status = vm.wait(BOOT);
    assert_eq!(status.code(), Some(0), "{}", vm.transcript());
}

#[test]
fn debian_with_one_processor() {
    debian_boots(1);
}

#[test]
fn debian_with_two_processors() {
    debian_boots(2);
}

#[test]
fn debian_with_four_processors() {
    debian_boots(4);
}

/// `auto` says which engine it takes and why; without a usable KVM it is this one.
#[test]
fn auto_says_which_engine_and_why() {
    let place = Place::new();
    place.add(&images::tiny());
    let mut vm = place.start("run tiny");
    let line = vm.expect("Ctrl-] h helps", STEP);
    let kvm = line.contains("runs on kvm (ring 0 at ");
    assert!(kvm || line.contains("runs on soft (no KVM: "), "{line}");
    vm.expect(TINY, BOOT);
    vm.send("\x1dq");
    assert_eq!(vm.wait(STEP).code(), Some(3));
}

/// What the software engine lacks is refused by name.
#[test]
fn profiles_beyond_level_2_are_refused() {
    let place = Place::new();
    place.add(&images::tiny());
    let output = place
        .command("run tiny --engine soft --cpu-profile x86-64-v3")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        text.contains("avx2") && text.contains("x86-64-v2"),
        "{text}"
    );
}

/// A halted guest uses no host time, and Ctrl-C ends a busy one cleanly.
#[test]
fn an_idle_guest_costs_nothing_and_a_busy_one_can_be_stopped() {
    let place = Place::new();
    place.add(&images::tiny());
    let mut vm = place.start("run tiny --engine soft -c 2");
    vm.expect(TINY, BOOT);
    // What the boot has left to do is done in the first of these at the latest. Of 500 ticks a second of
    // one core has 100; timekeeping takes some.
    let used = || {
        let before = cpu_ticks_of_children(vm.pid());
        std::thread::sleep(Duration::from_secs(5));
        cpu_ticks_of_children(vm.pid()) - before
    };
    let idle = (0..3).any(|_| used() < 100);
    assert!(idle, "100 ticks in five seconds of idleness, three times");
    let before = cpu_ticks_of_children(vm.pid());
    vm.send("while :; do :; done\n");
    let deadline = Instant::now() + STEP;
    while cpu_ticks_of_children(vm.pid()) < before + 50 {
        assert!(Instant::now() < deadline, "{}", vm.transcript());
        std::thread::sleep(Duration::from_millis(50));
    }
    vm.send("\x1dq");
    assert_eq!(vm.wait(STEP).code(), Some(3));
}

/// User and system time of a process's children, in clock ticks.
fn cpu_ticks_of_children(pid: u32) -> u64 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children
        .split_whitespace()
        .map(|child| {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap();
            let fields = stat.rsplit(") ").next().unwrap();
            let ticks = fields.split(' ').skip(11).take(2);
            ticks
                .map(|ticks| ticks.parse::<u64>().unwrap())
                .sum::<u64>()
        })
        .sum()
}
