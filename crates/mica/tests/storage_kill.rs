//! `mica storage export` killed under load, again and again: a successor finishes what was in flight,
//! and every acknowledged write is there.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "../../storage/tests/support/driver.rs"]
mod driver;
#[path = "support/exporter.rs"]
mod exporter;

use std::collections::HashMap;
use std::process::Command;
use std::time::Instant;

use driver::{Ask, Guest, OK, PATIENCE, Random, SLOTS};
use exporter::Exporter;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

const SECTOR: usize = 512;
/// Each request covers one cell, so that large writes are cut in the middle, too.
const CELL: usize = 32 * 1024;
const CELLS: u64 = 256;
const QUEUES: u16 = 2;
const KILLS: usize = 25;

/// A cell's content: its number and version all over.
fn content(cell: u64, version: u64) -> Vec<u8> {
    let unit = [cell.to_le_bytes(), version.to_le_bytes()].concat();
    unit.repeat(CELL / unit.len())
}

/// A request in flight.
struct Pending {
    cell: u64,
    /// What the cell holds once the request is done.
    version: u64,
    reads: bool,
}

struct Load {
    guest: Guest,
    random: Random,
    /// The version of each cell that was acknowledged last.
    versions: Vec<u64>,
    pending: HashMap<(usize, u16), Pending>,
}

impl Load {
    fn submit(&mut self, queue: usize) {
        while self.guest.in_flight(queue) < usize::from(SLOTS) {
            let cell = self.random.below(CELLS);
            if self.pending.values().any(|other| other.cell == cell) {
                continue;
            }
            let mut version = self.versions[cell as usize];
            let reads = self.random.below(4) == 0;
            let sector = cell * (CELL / SECTOR) as u64;
            let ask = if reads {
                Ask {
                    expect: CELL,
                    ..Ask::new(VIRTIO_BLK_T_IN, sector)
                }
            } else {
                version += 1;
                Ask {
                    out: content(cell, version),
                    ..Ask::new(VIRTIO_BLK_T_OUT, sector)
                }
            };
            let slot = self.guest.submit(queue, &ask).unwrap();
            let pending = Pending {
                cell,
                version,
                reads,
            };
            self.pending.insert((queue, slot), pending);
        }
        self.guest.kick(queue);
    }

    /// Takes what is there without waiting. How much it was.
    fn take(&mut self, queue: usize) -> usize {
        let answers = self.guest.take(queue);
        for answer in &answers {
            let done = self.pending.remove(&(queue, answer.slot)).unwrap();
            assert_eq!(answer.status, OK);
            self.versions[done.cell as usize] = done.version;
            let expected = content(done.cell, done.version);
            assert!(
                !done.reads || answer.data == expected,
                "cell {} does not read as version {}",
                done.cell,
                done.version
            );
        }
        answers.len()
    }
}

#[test]
fn a_killed_backend_loses_nothing() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, socket) = (directory.path().join("disk"), directory.path().join("sock"));
    let blank: Vec<u8> = (0..CELLS).flat_map(|cell| content(cell, 0)).collect();
    std::fs::write(&image, blank).unwrap();
    let mut load = Load {
        guest: Guest::new(QUEUES),
        random: Random::new(),
        versions: vec![0; CELLS as usize],
        pending: HashMap::new(),
    };
    for _ in 0..KILLS {
        let exporter = Exporter::start(&image, &socket);
        let _frontend = load.guest.connect(exporter.connect(), 0);
        let mut left = 1 + load.random.below(400) as usize;
        let deadline = Instant::now() + PATIENCE;
        while left > 0 {
            assert!(Instant::now() < deadline, "the backend does not answer");
            for queue in 0..usize::from(QUEUES) {
                load.submit(queue);
                left = left.saturating_sub(load.take(queue));
            }
        }
        exporter.kill();
    }

    let exporter = Exporter::start(&image, &socket);
    let _frontend = load.guest.connect(exporter.connect(), 0);
    let deadline = Instant::now() + PATIENCE;
    while !load.pending.is_empty() {
        let lost = load.pending.len();
        assert!(Instant::now() < deadline, "{lost} requests are lost");
        for queue in 0..usize::from(QUEUES) {
            if load.take(queue) == 0 && load.guest.in_flight(queue) > 0 {
                load.guest.wait_for_call(queue);
            }
        }
    }
    let stats = exporter.stop();
    assert_eq!(
        (&stats["errors"], &stats["malformed"]),
        (&0.into(), &0.into())
    );
    let disk = std::fs::read(&image).unwrap();
    for (cell, data) in disk.chunks(CELL).enumerate() {
        let version = load.versions[cell];
        let expected = content(cell as u64, version);
        assert!(
            data == expected,
            "cell {cell} does not hold version {version}"
        );
    }
    assert!(!socket.exists());
}

#[test]
fn a_second_export_is_refused_with_the_reason() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = directory.path().join("disk");
    std::fs::write(&image, [0; SECTOR]).unwrap();
    let exporter = Exporter::start(&image, &directory.path().join("sock"));
    let output = Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["storage", "export"])
        .arg(&image)
        .arg("--vhost-user")
        .arg(directory.path().join("other"))
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(message.contains(image.to_str().unwrap()), "{message}");
    assert!(message.contains("in use by another process"), "{message}");
    exporter.stop();
}
