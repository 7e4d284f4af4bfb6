use std::io::{Cursor, Write};
use std::sync::{Arc, Mutex};

use minicbor::bytes::ByteVec;

use super::*;

/// A file in memory that outlives its writer.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn header() -> Header {
    Header {
        name: "tiny".into(),
        vcpus: 2,
        memory: 64 << 20,
        cpu_profile: "x86-64-v2".into(),
        realtime_ns: 1_700_000_000_000_000_000,
        program: "0.1.0".into(),
    }
}

fn entries() -> Vec<Entry> {
    let place = Place {
        port: true,
        address: 0x3fd,
        size: 1,
    };
    let memory = |fill: u8| Record::Memory {
        address: 0x1000,
        bytes: ByteVec::from(vec![fill; MAX_MEMORY]),
    };
    let records = [
        (0, memory(1)),
        (0, Record::Run),
        (7, Record::read(place, 0x60)),
        (
            7,
            Record::Line {
                gsi: 4,
                level: true,
            },
        ),
        (1 << 40, Record::Idle { ns: 5 }),
        (1 << 40, memory(2)),
        (1 << 40, memory(3)),
        (1 << 41, memory(4)),
        (1 << 41, memory(5)),
        (
            1 << 41,
            Record::End {
                reason: 0,
                vcpus: 1,
                memory: 2,
            },
        ),
    ];
    let entry = |(position, record)| Entry { position, record };
    records.into_iter().map(entry).collect()
}

fn recorded() -> Vec<u8> {
    let file = Shared::default();
    let mut writer = Writer::new(Box::new(file.clone()), &header()).unwrap();
    for entry in entries() {
        writer.add(entry.position, &entry.record).unwrap();
    }
    writer.flush().unwrap();
    let bytes = file.0.lock().unwrap();
    bytes.clone()
}

fn read(bytes: &[u8]) -> Result<Vec<Entry>, ReplayError> {
    let mut reader = Reader::new(Box::new(Cursor::new(bytes.to_vec())))?;
    assert_eq!(*reader.header(), header());
    let mut entries = Vec::new();
    while let Some(entry) = reader.take()? {
        entries.push(entry);
    }
    Ok(entries)
}

#[test]
fn what_is_written_is_read() {
    assert_eq!(read(&recorded()).unwrap(), entries());
}

#[test]
fn a_cut_off_recording_is_read_as_far_as_it_is_whole() {
    let whole = recorded();
    let cut = read(&whole[..whole.len() - 1]).unwrap();
    assert!(cut.len() < entries().len());
    assert_eq!(cut[..], entries()[..cut.len()]);
    let short = Reader::new(Box::new(Cursor::new(whole[..9].to_vec())));
    assert!(matches!(short, Err(ReplayError::NoRecording)));
}

/// A disk that fills up.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0 == 0 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn nothing_follows_what_a_disk_has_not_taken() {
    let begun = Shared::default();
    Writer::new(Box::new(begun.clone()), &header()).unwrap();
    let room = begun.0.lock().unwrap().len() + 5;
    let mut writer = Writer::new(Box::new(Full(room)), &header()).unwrap();
    writer.add(1, &Record::Run).unwrap();
    let error = writer.flush().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    writer.add(2, &Record::Run).unwrap();
    assert!(writer.flush().is_err(), "even if there were room again");
}

#[test]
fn damage_is_noticed() {
    let whole = recorded();
    for at in [whole.len() - 9, whole.len() / 2] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        let error = read(&damaged).unwrap_err();
        assert!(matches!(error, ReplayError::Damaged(_)), "{error}");
    }
    let mut newer = whole.clone();
    newer[8] = 9;
    assert!(matches!(read(&newer), Err(ReplayError::Version(9))));
    for vcpus in [0, 255, u32::MAX] {
        let file = Shared::default();
        let impossible = Header { vcpus, ..header() };
        Writer::new(Box::new(file.clone()), &impossible).unwrap();
        let error = read(&file.0.lock().unwrap()).unwrap_err();
        assert!(error.to_string().contains("vCPUs"), "{error}");
    }
    newer[0] = b'm';
    assert!(matches!(read(&newer), Err(ReplayError::NoRecording)));
}
