//! `mica run` boots Debian from its disk, as its boot loader would, on a real KVM.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/lab.rs"]
mod lab;

use std::time::Duration;

use lab::{BOOT, Host, STEP};

const LOGIN: &str = " login: ";
const PROMPT: &str = "root@debian:~# ";

/// Logs in and leaves the guest at the shell's prompt.
fn log_in(host: &mut Host) {
    host.expect(LOGIN, 2 * BOOT);
    host.send("root\n");
    host.expect(PROMPT, STEP);
}

fn guest(host: &mut Host, line: &str) -> String {
    host.send(&format!("{line}\n"));
    // Without what bash says to terminals about pasting.
    host.expect(PROMPT, STEP).replace("\x1b[?2004l\r", "")
}

#[test]
fn the_debian_disk_on_kvm() {
    let image = lab::image("debian");
    let mut host = Host::start(|lab| {
        lab.disk(image.join("disk.raw"))
            .file(image.join("manifest.json"), "/home/images/debian.json")
            .timeout(Duration::from_secs(1500))
    });
    host.begin("mica run /dev/vdb -c 2 -m 1G 2>events");
    log_in(&mut host);
    assert!(guest(&mut host, "nproc").contains("\r\n2\r\n"));
    // The root file system is the disk that the kernel came from, and takes writes.
    assert!(guest(&mut host, "findmnt -no SOURCE,FSTYPE /").contains("/dev/vda"));
    // Processors that firmware would have left alike, with clocks that go alike.
    let warnings = guest(&mut host, "dmesg --level warn,err");
    for complaint in ["inconsistent", "Unstable clock"] {
        assert!(!warnings.contains(complaint), "{warnings}");
    }
    guest(&mut host, "echo kept >/root/kept && sync");
    host.send("reboot\n");
    log_in(&mut host);
    assert!(guest(&mut host, "cat /root/kept").contains("\r\nkept\r\n"));
    host.send("poweroff\n");
    let status = host.status(BOOT).0;
    let events = host.shell("cat events");
    assert_eq!(status, 0, "{events}");
    assert!(events.contains("vdb reboots"), "{events}");
    assert!(events.contains("vdb powered off"), "{events}");
    finds_images_with_a_disk(&mut host);
    host.finish();
}

/// `mica run NAME` takes the image's disk; this one is cut off behind its partition table.
fn finds_images_with_a_disk(host: &mut Host) {
    host.shell(
        "cd /home/images; mkdir debian; \
         sed 's/\"size\": [0-9]*/\"size\": 1048576/' debian.json >debian/manifest.json; \
         dd if=/dev/vdb of=debian/disk.raw bs=1M count=1 2>&1",
    );
    let (status, output) = host.run("mica run debian");
    assert_eq!(status, 1, "{output}");
    assert!(output.contains("debian: the disk"), "{output}");
}
