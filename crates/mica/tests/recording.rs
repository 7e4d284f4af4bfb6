//! `mica run --record` and `--replay`: the same run comes out again.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/console.rs"]
mod console;
#[path = "support/images.rs"]
mod images;
#[path = "support/place.rs"]
mod place;

use std::fs::{self, File};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use console::Vm;
use mica_machine::recording::{Entry, Reader, Record, Writer};
use place::Place;

/// How long a guest may take to its prompt, while other tests want the same cores.
const BOOT: Duration = Duration::from_secs(240);
/// How long anything else may take.
const STEP: Duration = Duration::from_secs(60);
const TINY: &str = "tiny# ";
const SAME: &str = "vCPUs and memory are as recorded";

fn place_with_tiny() -> Place {
    let place = Place::new();
    place.add(&images::tiny());
    place
}

/// What the guest printed, without what mica said.
fn guests(transcript: &str) -> String {
    let own = |line: &&str| !line.starts_with("mica: ");
    // This one comes in the middle of what the guest prints.
    let transcript = transcript.replace("mica: disk is paused\n", "");
    transcript.lines().filter(own).collect()
}

/// Replays to the end, and compares what is printed.
#[track_caller]
fn replays_as(place: &Place, recorded: &Vm) {
    let mut replay = place.start("run --replay a.rec");
    let status = replay.wait(BOOT);
    assert_eq!(status.code(), Some(0), "{}", replay.transcript());
    assert!(
        replay.transcript().contains(SAME),
        "{}",
        replay.transcript()
    );
    assert_eq!(guests(replay.transcript()), guests(recorded.transcript()));
}

fn power_off(vm: &mut Vm) {
    vm.send("poweroff\n");
    let status = vm.wait(STEP);
    assert_eq!(status.code(), Some(0), "{}", vm.transcript());
}

#[test]
fn a_whole_life_with_two_processors_comes_out_again() {
    let place = place_with_tiny();
    let mut vm = place.start("run tiny -c 2 --record a.rec");
    vm.expect(TINY, BOOT);
    // Host randomness, both processors, a guest that sleeps, interrupts that nobody can foresee.
    for line in [
        "md5sum /dev/hwrng & dd if=/dev/urandom bs=4k count=64 2>/dev/null | md5sum; kill $!",
        "sleep 1; cat /proc/interrupts; date",
    ] {
        vm.shell(TINY, line, STEP);
    }
    vm.send("reboot\n");
    vm.expect("mica: user space", BOOT);
    vm.expect(TINY, BOOT);
    power_off(&mut vm);
    replays_as(&place, &vm);
}

#[test]
fn a_disk_is_not_needed_again() {
    let place = place_with_tiny();
    let path = place.path().join("run/disk.img");
    let mut content = vec![0u8; 4 << 20];
    let mut value = 1u64;
    for byte in &mut content {
        value = value.wrapping_mul(6364136223846793005).wrapping_add(1);
        *byte = (value >> 56) as u8;
    }
    fs::write(&path, &content).unwrap();
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    fs::set_permissions(&path, everybody).unwrap();
    let mut vm = place.start("run tiny --name disk -c 2 --disk disk.img --record a.rec");
    vm.expect(TINY, BOOT);
    let sum = "md5sum /dev/vda; dd if=/dev/urandom of=/dev/vda bs=64k count=8 conv=fsync; sync";
    vm.shell(TINY, sum, STEP);
    // What a pause costs the guest does not notice; its disk's requests go on afterwards.
    vm.send("dd if=/dev/vda of=/dev/null iflag=direct bs=4k; echo do\"\"ne\n");
    for what in ["pause", "resume"] {
        let command = format!("vm {what} disk");
        assert!(place.command(&command).status().unwrap().success());
    }
    vm.expect("done", STEP);
    vm.shell(TINY, "md5sum /dev/vda", STEP);
    power_off(&mut vm);
    fs::remove_file(&path).unwrap();
    replays_as(&place, &vm);
}

/// Runs `mica` to its end, which is soon.
fn run(place: &Place, arguments: &str) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = place.command(arguments).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// Copies a recording entry by entry, as `change` wants it.
fn rewrite(from: &Path, to: &Path, mut change: impl FnMut(&mut Entry)) {
    let mut reader = Reader::new(Box::new(File::open(from).unwrap())).unwrap();
    let file = File::create(to).unwrap();
    let mut writer = Writer::new(Box::new(file), reader.header()).unwrap();
    while let Some(mut entry) = reader.take().unwrap() {
        change(&mut entry);
        writer.add(entry.position, &entry.record).unwrap();
    }
    writer.flush().unwrap();
}

#[test]
fn what_does_not_fit_is_said() {
    let place = place_with_tiny();
    let mut vm = place.start("run tiny --record a.rec");
    vm.expect(TINY, BOOT);
    power_off(&mut vm);
    let folder = place.path().join("run");
    // As if the machine had been killed.
    let whole = fs::read(folder.join("a.rec")).unwrap();
    fs::write(folder.join("e.rec"), &whole[..whole.len() - 100]).unwrap();
    let (status, said) = run(&place, "run --replay e.rec --console off");
    assert_eq!(status, Some(3), "{said}");
    assert!(said.contains("was not closed"), "{said}");

    let mut changed = false;
    rewrite(&folder.join("a.rec"), &folder.join("b.rec"), |entry| {
        if let Record::Check { registers } = &mut entry.record {
            changed = true;
            *registers ^= 1;
        }
    });
    assert!(changed, "a boot is long enough for a check");
    let (status, said) = run(&place, "run --replay b.rec --console off");
    assert_eq!(status, Some(7), "{said}");
    assert!(said.contains("went another way"), "{said}");

    fs::write(folder.join("c.rec"), "no recording at all").unwrap();
    for (arguments, status, words) in [
        ("run --replay c.rec", 1, "is no recording"),
        ("run --replay d.rec", 1, "No such file"),
        ("run --replay a.rec tiny", 2, "cannot be used with"),
        ("run tiny --record a.rec", 1, "exists"),
        ("run tiny --record d.rec --engine kvm", 1, "software"),
        ("run tiny --record d.rec --gdb g", 2, "cannot be used with"),
    ] {
        let (code, said) = run(&place, arguments);
        assert_eq!(code, Some(status), "{arguments}: {said}");
        assert!(said.contains(words), "{arguments}: {said}");
    }
}
