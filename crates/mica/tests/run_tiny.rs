//! `mica run` with the tiny guest on a real KVM: the console, the ways to end, the exit statuses, the
//! events, the disks, and what it says when it cannot.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/images.rs"]
mod images;
#[path = "support/lab.rs"]
mod lab;

use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{BOOT, Host, PROMPT, STEP};
use serde_json::Value;

/// Boots to the shell with two vCPUs, reboots from inside, powers off.
fn lives_a_whole_life(host: &mut Host) {
    host.begin("mica run tiny -c 2 2>events");
    host.expect(PROMPT, BOOT);
    assert!(host.guest("nproc").contains("\r\n2\r\n"));
    assert!(host.guest("echo $((6 * 7))").contains("\r\n42\r\n"));
    host.send("reboot\n");
    host.expect("mica: user space", BOOT);
    host.expect(PROMPT, BOOT);
    assert!(host.guest("nproc").contains("\r\n2\r\n"));
    host.send("poweroff\n");
    assert_eq!(host.status(STEP).0, 0);
    let events = host.shell("cat events");
    for said in ["tiny runs on kvm", "tiny reboots", "tiny powered off"] {
        assert!(events.contains(said), "{said}: {events}");
    }
}

/// Ctrl-] q ends the VM, whatever the guest does.
fn obeys_the_escape_key(host: &mut Host) {
    host.begin("mica run tiny 2>events");
    host.expect("mica: user space", BOOT);
    host.send("\x1dq");
    let (status, output) = host.status(STEP);
    assert_eq!(status, 3, "{output}");
}

/// How each end of a guest becomes an exit status, with standard input at end of file.
fn tells_how_the_guest_ended(host: &mut Host) {
    for (options, command, status, says) in [
        (
            "-c 1",
            "echo a b | tr a-z A-Z; nproc; exit 9",
            0,
            "A B\r\n1\r\nmica: exit 9",
        ),
        (
            "--no-reboot --append reboot=t",
            "reboot -f",
            5,
            "triple fault",
        ),
        (
            "--on-panic stop",
            "echo c >/proc/sysrq-trigger",
            6,
            "kernel panic",
        ),
    ] {
        let (ended, output) = host.run(&run_inside(options, command));
        assert_eq!(ended, status, "{command}: {output}");
        assert!(output.contains(says), "{command}: {output}");
    }
}

/// `mica run` of the tiny guest whose only work is `command`.
fn run_inside(options: &str, command: &str) -> String {
    let encoded: String = command
        .bytes()
        .map(|byte| match byte.is_ascii_alphanumeric() {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02x}"),
        })
        .collect();
    // The last --append counts, and there may be one in the options.
    let (options, append) = match options.split_once("--append ") {
        Some((options, append)) => (options, append),
        None => (options, ""),
    };
    format!("mica run tiny {options} --append '{append} mica.run={encoded}'")
}

/// SIGTERM presses the power button, and the guest shuts down.
fn shuts_down_on_a_signal(host: &mut Host) {
    host.shell("mkfifo in; rm -f console");
    host.begin("mica run tiny <in >console 2>events & mica=$!; exec 9>in");
    assert_eq!(host.status(STEP).0, 0);
    host.until("grep -q 'tiny# ' console");
    host.begin("kill $mica; wait $mica");
    let status = host.status(STEP).0;
    let events = host.shell("exec 9>&-; cat events; rm in");
    assert_eq!(status, 0, "{events}");
    assert!(events.contains("asking the guest to shut down"), "{events}");
    assert!(events.contains("powered off"), "{events}");
}

/// Events are lines of JSON from the start to the end.
fn reports_events(host: &mut Host) {
    let command = run_inside("-c 2 --console file:/tmp/console", "reboot -f");
    let (status, output) = host.run(&command.replace("mica run", "mica -o json run --no-reboot"));
    assert_eq!(status, 4, "{output}");
    let events: Vec<Value> = output
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    let names: Vec<&str> = events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .filter(|name| *name != "unclaimed")
        .collect();
    assert_eq!(
        names,
        ["starting", "jailed", "booting", "running", "stopped"]
    );
    assert_eq!(events[0]["vcpus"], 2);
    assert_eq!(events[0]["memory"], 512 << 20);
    let last = events.last().unwrap();
    assert_eq!(last["reason"], "reset", "{last}");
    let console = host.shell("cat console; rm console");
    assert!(console.contains("mica: user space"), "{console}");
}

/// Several disks of `mica run` itself, one of them read-only.
fn serves_disks(host: &mut Host) {
    host.shell(
        "for n in 0 1 2; do dd if=/dev/zero of=d$n bs=1M count=$((4 + n)) 2>&1; \
         echo disk $n >n; dd if=n of=d$n conv=notrunc 2>&1; done",
    );
    let (status, output) = host.run(&run_inside(
        "-c 2 --disk d0 --disk d1,ro --disk d2",
        "for n in a b c; do read line </dev/vd$n; echo $line $(blockdev --getsize64 /dev/vd$n); \
         echo new $n | dd of=/dev/vd$n conv=notrunc,fsync 2>/dev/null && echo wrote $n; done; \
         cat /sys/block/vd?/ro",
    ));
    assert_eq!(status, 0, "{output}");
    for line in [
        "disk 0 4194304\r\nwrote a\r\n",
        "disk 1 5242880\r\ndisk 2 6291456\r\nwrote c\r\n",
        "0\r\n1\r\n0\r\n",
    ] {
        assert!(output.contains(line), "{line:?}: {output}");
    }
    let heads = host.shell("for n in 0 1 2; do head -n 1 d$n; done; rm d0 d1 d2");
    assert_eq!(heads, "new a\ndisk 1\nnew c\n");
}

/// A disk's own boot entry is booted, here with a copy of the disk that is thrown away.
fn boots_a_disk_and_forgets_what_it_wrote(host: &mut Host) {
    let before = host.shell("md5sum /dev/vdb");
    let write =
        "echo changed | dd of=/dev/vda bs=4k seek=1 conv=fsync && head -c 8 /dev/vda | wc -c";
    let run = run_inside("--no-reboot", write).replace("run tiny", "run /dev/vdb --ephemeral");
    let (status, output) = host.run(&run);
    assert_eq!(status, 0, "{output}");
    assert!(output.contains("mica: exit 0"), "{output}");
    assert_eq!(host.shell("md5sum /dev/vdb"), before);
}

/// An ext4 file system on a bare disk, with the tiny image's kernel and a boot entry for it.
fn bootable_disk(directory: &Path) -> PathBuf {
    let image = images::tiny();
    let root = directory.join("root");
    std::fs::create_dir_all(root.join("loader/entries")).unwrap();
    for name in ["kernel", "initrd"] {
        std::fs::copy(image.join(name), root.join(name)).unwrap();
    }
    std::fs::write(
        root.join("loader/entries/tiny.conf"),
        "title Tiny\nlinux /kernel\ninitrd /initrd\noptions console=ttyS0 quiet panic=1\n",
    )
    .unwrap();
    let disk = directory.join("disk");
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&root, &disk])
        .arg("32M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    disk
}

/// What cannot be run is refused with a reason that names it.
fn refuses_with_a_reason(host: &mut Host) {
    host.shell(
        "dd if=/dev/urandom of=random bs=1M count=1 2>&1; : >empty; echo text >text; \
         dd if=/dev/zero of=zeros bs=1M count=1 2>&1; \
         { dd if=/dev/zero bs=512 count=1; echo 'EFI PART'; } >odd 2>errors; \
         dd if=odd of=truncated bs=512 conv=sync 2>&1; \
         dd if=/home/images/tiny/vmlinux of=half bs=1M count=3 2>&1",
    );
    for (arguments, says) in [
        ("./random", "random: the disk has no boot entry"),
        ("./zeros", "zeros: the disk has no boot entry"),
        ("./empty", "empty: the disk has no boot entry"),
        ("./truncated", "truncated: the disk has no boot entry"),
        ("./odd", "./odd has 521 bytes"),
        ("/nowhere/disk.img", "no file called '/nowhere/disk.img'"),
        ("nothing", "no image and no file called 'nothing'"),
        (
            "--kernel /nowhere/vmlinuz",
            "cannot read /nowhere/vmlinuz: No such file",
        ),
        ("--kernel text", "neither a bzImage nor an x86-64 ELF file"),
        ("--kernel half", "malformed: a segment lies beyond the end"),
        (
            "--kernel half --initrd /nowhere/initrd",
            "cannot read /nowhere/initrd",
        ),
        (
            "tiny --disk /nowhere/disk",
            "cannot open /nowhere/disk: No such file",
        ),
        (
            "tiny --disk vhost-user:/nowhere/socket",
            "no backend listens at /nowhere/socket",
        ),
        ("tiny --ephemeral", "there is no disk to copy"),
        ("tiny --name ../up", "'../up' is no name for a VM"),
        ("tiny --huge-pages 1G -m 1G", "reserve them with"),
        ("tiny -m 24M", "the guest needs at least 66M of RAM"),
    ] {
        let (status, output) = host.run(&format!("mica run {arguments}"));
        assert_eq!(status, 1, "{arguments}: {output}");
        assert!(output.contains(says), "{arguments}: {output}");
        assert!(!output.contains("panicked"), "{arguments}: {output}");
    }
}

#[test]
fn the_tiny_guest_on_kvm() {
    let directory = tempfile::tempdir().unwrap();
    let disk = bootable_disk(directory.path());
    let mut host = Host::start(|lab| lab.disk(disk));
    for part in [
        lives_a_whole_life,
        obeys_the_escape_key,
        tells_how_the_guest_ended,
        shuts_down_on_a_signal,
        reports_events,
        serves_disks,
        boots_a_disk_and_forgets_what_it_wrote,
        refuses_with_a_reason,
    ] {
        part(&mut host);
    }
    host.finish();
}
