//! A stock Debian kernel in QEMU uses a disk that `mica storage export` serves, and does not notice that
//! the backend is killed and started again while it writes.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/exporter.rs"]
mod exporter;
#[path = "support/images.rs"]
mod images;

use std::path::Path;
use std::time::Duration;

use exporter::Exporter;
use xtask::guest::Guest;
use xtask::session::Session;

const BOOT: Duration = Duration::from_secs(120);
const STEP: Duration = Duration::from_secs(60);

/// What the guest writes in one round.
const ROUND_BYTES: usize = 8 << 20;

fn start(socket: &Path) -> Session {
    let image = images::tiny();
    let chardev = format!("socket,id=disk,path={},reconnect=1", socket.display());
    Guest::new()
        .memory_mib(256)
        .kernel(
            image.join("kernel"),
            Some(&image.join("initrd")),
            "console=ttyS0 quiet",
        )
        .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"])
        .args(["-numa", "node,memdev=ram", "-chardev", &chardev])
        .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2"])
        .start()
        .unwrap()
}

/// Runs a shell command in the guest and returns what it prints.
fn shell(session: &mut Session, command: &str) -> String {
    // The terminal echoes the line; the quotes keep the echo from looking like the output.
    session
        .send(&format!("{command}; echo st''atus $?.\n"))
        .unwrap();
    let output = session.expect("status ", STEP).unwrap();
    let status = session.expect(".", STEP).unwrap();
    assert_eq!(status, "0.", "{command}: {output}");
    output
}

#[test]
fn a_guest_does_not_notice_that_its_backend_is_killed() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, socket) = (directory.path().join("disk"), directory.path().join("sock"));
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut exporter = Exporter::start(&image, &socket);
    let mut session = start(&socket);
    session.expect("tiny# ", BOOT).unwrap();
    let identity = shell(
        &mut session,
        "cat /sys/block/vda/serial; ls /sys/block/vda/mq",
    );
    assert!(identity.contains("MICA-TEST"), "{identity}");
    assert!(identity.contains('1'), "two queues: {identity}");
    shell(
        &mut session,
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8",
    );
    shell(&mut session, "echo 0 >/tmp/round");

    let write = "while ! [ -e /tmp/stop ]; do \
        read round </tmp/round; \
        dd if=/tmp/data of=/dev/vda bs=64k oflag=direct conv=fsync,notrunc seek=$((round % 8 * 128)) 2>/dev/null \
        || echo fai''led; \
        echo $((round + 1)) >/tmp/round; echo rou''nd $round; done &\n";
    session.send(write).unwrap();
    for _ in 0..3 {
        // After a round, the next one is under way.
        for _ in 0..2 {
            let output = session.expect("round ", STEP).unwrap();
            assert!(!output.contains("failed"), "{output}");
        }
        exporter.kill();
        exporter = Exporter::start(&image, &socket);
    }
    for _ in 0..9 {
        let output = session.expect("round ", STEP).unwrap();
        assert!(!output.contains("failed"), "{output}");
    }
    shell(
        &mut session,
        "touch /tmp/stop; wait; blockdev --flushbufs /dev/vda",
    );
    let compare = "for i in 0 1 2 3 4 5 6 7; do \
        dd if=/dev/vda bs=64k iflag=direct skip=$((i * 128)) count=128 2>/dev/null | cmp - /tmp/data || break; \
        done && [ $i = 7 ]";
    shell(&mut session, compare);
    session.send("poweroff\n").unwrap();
    let outcome = session.finish().unwrap();
    assert_eq!(outcome.status, 0, "{}", outcome.output);
    let stats = exporter.stop();
    assert_eq!(
        (&stats["errors"], &stats["malformed"]),
        (&0.into(), &0.into())
    );
    let disk = std::fs::read(&image).unwrap();
    let rounds: Vec<&[u8]> = disk.chunks(ROUND_BYTES).collect();
    assert!(rounds[0].iter().any(|byte| *byte != 0));
    assert!(rounds.iter().all(|round| *round == rounds[0]));
}
