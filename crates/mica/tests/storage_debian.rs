//! QEMU boots Debian from a disk that `mica storage export` serves, by UEFI and the disk's own boot
//! loader. Inside, fio verifies what it wrote, while the export is killed and started again.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/exporter.rs"]
mod exporter;
#[path = "support/images.rs"]
mod images;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use exporter::Exporter;
use xtask::guest::Guest;
use xtask::session::Session;

const BOOT: Duration = Duration::from_secs(300);
const STEP: Duration = Duration::from_secs(120);
const PROMPT: &str = "root@debian-fio:~# ";
const FIRMWARE: &str = "/usr/share/OVMF";

/// Writes a file at random, reads it back and compares checksums, four times over.
const FIO: &str = "fio --name=verify --filename=/root/data --size=32M --loops=4 --rw=randwrite \
    --bsrange=4k-64k --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 \
    --end_fsync=1 --output=/root/report; echo \"fio exit: $?\"";

fn start(socket: &Path, directory: &Path) -> Session {
    let variables = directory.join("variables");
    std::fs::copy(format!("{FIRMWARE}/OVMF_VARS_4M.fd"), &variables).unwrap();
    let code = format!("if=pflash,format=raw,readonly=on,file={FIRMWARE}/OVMF_CODE_4M.fd");
    let variables = format!("if=pflash,format=raw,file={}", variables.display());
    let chardev = format!("socket,id=disk,path={},reconnect=1", socket.display());
    Guest::new()
        .timeout(Duration::from_secs(800))
        .args(["-drive", &code, "-drive", &variables])
        .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
        .args(["-numa", "node,memdev=ram", "-chardev", &chardev])
        .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2"])
        .start()
        .unwrap()
}

/// Runs a command in the guest's shell and returns what it prints.
fn shell(session: &mut Session, command: &str) -> String {
    session.send(&format!("{command}\n")).unwrap();
    session.expect(PROMPT, STEP).unwrap()
}

/// How many writes the guest's disk has completed.
fn writes(session: &mut Session) -> u64 {
    let output = shell(
        session,
        "set -- $(cat /sys/block/vda/stat); echo writes=$5.",
    );
    let (_, count) = output.rsplit_once("writes=").unwrap();
    count.split('.').next().unwrap().parse().unwrap()
}

#[test]
fn debian_boots_and_loses_nothing_when_its_backend_is_killed() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("sock"));
    let image = images::debian_with_fio().join("disk.raw");
    let copied = Command::new("cp")
        .args([
            "--sparse=always".as_ref(),
            image.as_os_str(),
            disk.as_os_str(),
        ])
        .status();
    assert!(copied.unwrap().success());

    let mut exporter = Exporter::start(&disk, &socket);
    let mut session = start(&socket, directory.path());
    session.expect(" login: ", BOOT).unwrap();
    session.send("root\n").unwrap();
    session.expect(PROMPT, STEP).unwrap();
    let source = shell(&mut session, "findmnt -no SOURCE /");
    assert!(source.contains("/dev/vda"), "{source}");

    shell(&mut session, &format!("({FIO}) >/root/outcome 2>&1 &"));
    for _ in 0..3 {
        let before = writes(&mut session);
        while writes(&mut session) < before + 200 {}
        exporter.kill();
        exporter = Exporter::start(&disk, &socket);
    }
    let running = shell(&mut session, "jobs -r");
    assert!(
        running.contains("Running"),
        "fio ended before the last kill: {running}"
    );
    let outcome = shell(
        &mut session,
        "wait; cat /root/outcome; tail -n 5 /root/report",
    );
    assert!(outcome.contains("fio exit: 0"), "{outcome}");

    session.send("poweroff\n").unwrap();
    let ended = session.finish().unwrap();
    assert_eq!(ended.status, 0, "{}", ended.output);
    let stats = exporter.stop();
    let none = serde_json::Value::from(0);
    assert_eq!((&stats["errors"], &stats["malformed"]), (&none, &none));
}
