//! `mica run` boots Debian from its disk, as its boot loader would, on a real KVM.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/images.rs"]
mod images;
#[path = "support/lab.rs"]
mod lab;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use lab::{BOOT, Host, STEP};

const LOGIN: &str = " login: ";
const PROMPT: &str = "root@debian-socat:~# ";

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

/// Names the VM's vsock to the copy of this program in the lab; unset elsewhere.
const VSOCK: &str = "MICA_TEST_VSOCK";

/// The host's side of the vsock, in the lab; a test that does nothing where there is none. It waits
/// for its guest to connect, connects to the guest itself, and tells how that went.
#[test]
fn host_of_a_vsock() {
    let Ok(path) = std::env::var(VSOCK) else {
        return;
    };
    let listener = UnixListener::bind(format!("{path}_5678")).unwrap();
    let (mut guest, _) = listener.accept().unwrap();
    let mut line = String::new();
    BufReader::new(&guest).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let mut stream = connect_to_guest(&path);
    let text = b"from host to guest and back again\n".repeat(8000);
    let mut sender = stream.get_ref().try_clone().unwrap();
    let sent = text.clone();
    let sender = std::thread::spawn(move || {
        sender.write_all(&sent).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    assert!(received == text.to_ascii_uppercase(), "{}", received.len());
    guest.write_all(b"all came back\n").unwrap();
}

/// The guest's program may need a moment until it listens.
fn connect_to_guest(path: &str) -> BufReader<UnixStream> {
    let deadline = Instant::now() + STEP;
    loop {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(STEP)).unwrap();
        stream.write_all(b"CONNECT 1234\n").unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        if line.starts_with("OK ") {
            return stream;
        }
        assert!(Instant::now() < deadline, "the guest does not listen");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Connections both ways between programs of the host and of the guest.
fn speaks_over_its_vsock(host: &mut Host) {
    guest(host, "socat -t 60 VSOCK-LISTEN:1234 SYSTEM:'tr a-z A-Z' &");
    let output = guest(host, "echo ready | socat -t 60 - VSOCK-CONNECT:2:5678");
    assert!(output.contains("all came back"), "{output}");
}

#[test]
fn the_debian_disk_on_kvm() {
    let image = images::debian_with_socat();
    let mut host = Host::start(|lab| {
        lab.disk(image.join("disk.raw"))
            .file(image.join("manifest.json"), "/home/images/debian.json")
            .file(std::env::current_exe().unwrap(), "/usr/bin/vsock-host")
            .timeout(Duration::from_secs(1500))
    });
    host.shell("mkdir -m 700 /run/mica");
    let run = "mica run /dev/vdb -c 2 -m 1G --vsock 5 2>events";
    host.begin(&format!(
        "{VSOCK}=/run/mica/vdb.vsock vsock-host --exact host_of_a_vsock >vsock 2>&1 & {run}"
    ));
    log_in(&mut host);
    assert!(guest(&mut host, "nproc").contains("\r\n2\r\n"));
    // The root file system is the disk that the kernel came from, and takes writes.
    assert!(guest(&mut host, "findmnt -no SOURCE,FSTYPE /").contains("/dev/vda"));
    // Processors that firmware would have left alike, with clocks that go alike.
    let warnings = guest(&mut host, "dmesg --level warn,err");
    for complaint in ["inconsistent", "Unstable clock"] {
        assert!(!warnings.contains(complaint), "{warnings}");
    }
    speaks_over_its_vsock(&mut host);
    guest(&mut host, "echo kept >/root/kept && sync");
    host.send("reboot\n");
    log_in(&mut host);
    assert!(guest(&mut host, "cat /root/kept").contains("\r\nkept\r\n"));
    host.send("poweroff\n");
    let status = host.status(BOOT).0;
    let events = host.shell("cat events vsock");
    assert_eq!(status, 0, "{events}");
    assert!(events.contains("vdb reboots"), "{events}");
    assert!(events.contains("vdb powered off"), "{events}");
    assert!(events.contains("1 passed"), "{events}");
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
