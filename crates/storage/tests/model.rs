//! Random requests against an export, with a map of what every block must hold beside it.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/driver.rs"]
mod driver;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use driver::{Answer, Ask, DATA, Guest, IO_ERROR, NO_EVENT_IDX, NO_INDIRECT, OK, Random};
use mica_storage::store::{Engine, FileStore, FileStoreOptions};
use mica_storage::vhost_user::{Export, ExportOptions};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

const SECTOR: usize = 512;
const SECTORS: u64 = 4096;
const REQUESTS: usize = 3000;

/// What a sector must hold; `None` after a discard.
type Model = Vec<Option<Vec<u8>>>;

/// A request in flight, with the sectors that no other may touch meanwhile.
struct Pending {
    ask: Ask,
    first: u64,
    count: u64,
}

fn random_ask(random: &mut Random, granule: u64) -> (Ask, u64, u64) {
    let count = granule * (1 + random.below((DATA / SECTOR) as u64 / granule));
    let first = granule * random.below((SECTORS - count) / granule + 1);
    let kind = match random.below(10) {
        0..=3 => VIRTIO_BLK_T_IN,
        4..=7 => VIRTIO_BLK_T_OUT,
        8 => VIRTIO_BLK_T_WRITE_ZEROES,
        _ if random.below(2) == 0 => VIRTIO_BLK_T_DISCARD,
        _ => VIRTIO_BLK_T_FLUSH,
    };
    let mut ask = Ask::new(kind, first);
    ask.indirect = random.below(2) == 0;
    ask.cut = [usize::MAX, SECTOR, 100, 4096][random.below(4) as usize];
    let bytes = count as usize * SECTOR;
    match kind {
        VIRTIO_BLK_T_IN => ask.expect = bytes,
        VIRTIO_BLK_T_OUT => ask.out = random.bytes(bytes),
        VIRTIO_BLK_T_FLUSH => {}
        _ => {
            let unmap = kind == VIRTIO_BLK_T_WRITE_ZEROES && random.below(2) == 0;
            ask.sector = 0;
            ask.out = first.to_le_bytes().to_vec();
            ask.out.extend((count as u32).to_le_bytes());
            ask.out.extend(u32::from(unmap).to_le_bytes());
        }
    }
    (ask, first, count)
}

fn settle(model: &mut Model, pending: &Pending, answer: &Answer) {
    assert_eq!(answer.status, OK, "{:?}", pending.ask.kind);
    let range = pending.first as usize..(pending.first + pending.count) as usize;
    match pending.ask.kind {
        VIRTIO_BLK_T_IN => {
            assert_eq!(answer.len as usize, pending.ask.expect + 1);
            for (sector, data) in range.zip(answer.data.chunks(SECTOR)) {
                if let Some(expected) = &model[sector] {
                    assert!(data == expected, "sector {sector} holds something else");
                }
            }
        }
        VIRTIO_BLK_T_OUT => {
            for (sector, data) in range.zip(pending.ask.out.chunks(SECTOR)) {
                model[sector] = Some(data.to_vec());
            }
        }
        VIRTIO_BLK_T_WRITE_ZEROES => model[range].fill(Some(vec![0; SECTOR])),
        VIRTIO_BLK_T_DISCARD => model[range].fill(None),
        _ => {}
    }
}

struct Case {
    threads: bool,
    direct: bool,
    without: u64,
    queues: u16,
}

/// Random requests until all are answered; what the disk must hold then.
fn load(guest: &mut Guest, case: &Case, granule: u64, random: &mut Random) -> Model {
    let mut model: Model = vec![Some(vec![0; SECTOR]); SECTORS as usize];
    let mut pending: HashMap<(usize, u16), Pending> = HashMap::new();
    let mut left = REQUESTS;
    while left > 0 || !pending.is_empty() {
        let queue = random.below(u64::from(case.queues)) as usize;
        for _ in 0..random.below(8).min(left as u64) {
            let (mut ask, first, count) = random_ask(random, granule);
            ask.indirect &= case.without & NO_INDIRECT == 0;
            let touches =
                |other: &Pending| first < other.first + other.count && other.first < first + count;
            if pending.values().any(touches) {
                continue;
            }
            let Some(slot) = guest.submit(queue, &ask) else {
                break;
            };
            left -= 1;
            pending.insert((queue, slot), Pending { ask, first, count });
        }
        guest.kick(queue);
        let answers = match guest.in_flight(queue) {
            0 => continue,
            _ => guest.wait(queue),
        };
        for answer in answers {
            let pending = pending.remove(&(queue, answer.slot)).unwrap();
            settle(&mut model, &pending, &answer);
        }
    }
    model
}

fn run(case: &Case, directory: &Path) {
    let path = directory.join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(SECTORS * SECTOR as u64).unwrap();
    let options = FileStoreOptions {
        direct: case.direct,
        threads_only: case.threads,
        ..FileStoreOptions::default()
    };
    let store = FileStore::open(&path, options).unwrap();
    let threads = *store.engine() != Engine::IoUring;
    assert_eq!(case.threads, threads, "{:?}", store.engine());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = ExportOptions {
        require_sealed_memory: true,
        ..ExportOptions::default()
    };
    let export = Export::spawn(Arc::new(store), theirs, options).unwrap();
    let mut guest = Guest::new(case.queues);
    let mut frontend = guest.connect(ours, case.without);
    let config = driver::config(&mut frontend);
    let block = u32::from_le_bytes(config[20..24].try_into().unwrap());
    let granule = u64::from(block) / SECTOR as u64;

    let model = load(&mut guest, case, granule, &mut Random::new());
    drop(frontend);
    let stats = export.stop();
    let bad = stats.errors + stats.malformed + stats.unsupported + stats.in_flight;
    assert_eq!(bad, 0, "{stats:?}");
    let total = stats.reads + stats.writes + stats.flushes + stats.discards + stats.write_zeroes;
    assert_eq!(total, REQUESTS as u64);
    let contents = std::fs::read(&path).unwrap();
    for (sector, (expected, data)) in model.iter().zip(contents.chunks(SECTOR)).enumerate() {
        let holds = expected.as_ref().is_none_or(|expected| data == expected);
        assert!(holds, "sector {sector}");
    }
}

#[test]
fn every_block_holds_what_was_written_last() {
    for (threads, direct, without, queues) in [
        (false, false, 0, 3),
        (false, false, NO_EVENT_IDX | NO_INDIRECT, 1),
        (true, false, 0, 2),
        // Where O_DIRECT works, that is on a real file system.
        (false, true, 0, 2),
        (true, true, NO_EVENT_IDX, 1),
    ] {
        let case = Case {
            threads,
            direct,
            without,
            queues,
        };
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        println!("threads {threads}, direct {direct}, without {without:#x}, queues {queues}");
        run(&case, directory.path());
    }
}

/// A discard or write-zeroes range.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Kind, sector, data for the device, length of data from it, status, status if read-only.
type Row = (u32, u64, Vec<u8>, usize, u8, u8);

fn rows() -> Vec<Row> {
    use driver::UNSUPPORTED as UNKNOWN;
    const READ: u32 = VIRTIO_BLK_T_IN;
    const WRITE: u32 = VIRTIO_BLK_T_OUT;
    const DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
    const ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;
    const ID: u32 = VIRTIO_BLK_T_GET_ID;
    let sector = vec![0; 512];
    let long = u64::MAX / 512 + 1;
    vec![
        (READ, 2047, vec![], 512, OK, OK),
        (READ, 2047, vec![], 1024, IO_ERROR, IO_ERROR),
        (READ, u64::MAX, vec![], 512, IO_ERROR, IO_ERROR),
        (READ, long, vec![], 512, IO_ERROR, IO_ERROR),
        (READ, 0, vec![], 100, IO_ERROR, IO_ERROR),
        (WRITE, 2047, sector.clone(), 0, OK, IO_ERROR),
        (WRITE, 2048, sector, 0, IO_ERROR, IO_ERROR),
        (VIRTIO_BLK_T_FLUSH, 0, vec![], 0, OK, OK),
        (99, 0, vec![], 512, UNKNOWN, UNKNOWN),
        (DISCARD, 0, range(0, 8, 0), 0, OK, IO_ERROR),
        (DISCARD, 0, range(0, 8, 1), 0, UNKNOWN, IO_ERROR),
        (DISCARD, 0, range(2047, 2, 0), 0, IO_ERROR, IO_ERROR),
        (DISCARD, 0, range(0, u32::MAX, 0), 0, IO_ERROR, IO_ERROR),
        (DISCARD, 0, vec![0; 15], 0, IO_ERROR, IO_ERROR),
        (ZEROES, 0, range(8, 8, 1), 0, OK, IO_ERROR),
        (ZEROES, 0, range(8, 8, 2), 0, UNKNOWN, IO_ERROR),
        (ID, 0, vec![], 20, OK, OK),
        (ID, 0, vec![], 19, IO_ERROR, IO_ERROR),
    ]
}

#[test]
fn what_is_out_of_range_fails_and_what_is_unknown_is_unsupported() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    for read_only in [false, true] {
        let options = FileStoreOptions {
            read_only,
            ..FileStoreOptions::default()
        };
        let store = Arc::new(FileStore::open(&path, options).unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let options = ExportOptions {
            serial: "MICA-1".into(),
            ..ExportOptions::default()
        };
        let export = Export::spawn(store, theirs, options).unwrap();
        let mut guest = Guest::new(1);
        let _frontend = guest.connect(ours, 0);
        for (kind, sector, out, expect, writable, read_only_status) in &rows() {
            let ask = Ask {
                out: out.clone(),
                expect: *expect,
                ..Ask::new(*kind, *sector)
            };
            let status = if read_only {
                read_only_status
            } else {
                writable
            };
            let answer = guest.run(0, &ask);
            assert_eq!(answer.status, *status, "read-only {read_only}: {ask:?}");
            if *kind == VIRTIO_BLK_T_GET_ID && answer.status == OK {
                assert_eq!(answer.data, b"MICA-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
            }
        }
        drop(export);
    }
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, [0; 512]).unwrap();
    let open = |read_only| {
        let options = FileStoreOptions {
            read_only,
            lock_patience: std::time::Duration::ZERO,
            ..FileStoreOptions::default()
        };
        FileStore::open(&path, options)
    };
    let writer = open(false).unwrap();
    for read_only in [false, true] {
        let error = open(read_only).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    drop(writer);
    let readers = (open(true).unwrap(), open(true).unwrap());
    assert!(open(false).is_err());
    drop(readers);
    open(false).unwrap();
    std::fs::write(&path, [0; 513]).unwrap();
    assert!(
        open(false)
            .unwrap_err()
            .to_string()
            .contains("truncate -s %512")
    );
    assert!(FileStore::open(Path::new("/dev/null"), FileStoreOptions::default()).is_err());
}
