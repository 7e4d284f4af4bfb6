//! Recordings that anybody may have written.

use super::Reader;

/// Reads `data` as a recording, to its end or its first fault.
#[doc(hidden)]
pub fn fuzz_recording(data: &[u8]) {
    let Ok(mut reader) = Reader::new(Box::new(std::io::Cursor::new(data.to_vec()))) else {
        return;
    };
    assert!((1..=254).contains(&reader.header().vcpus));
    let mut position = 0;
    while let Ok(Some(entry)) = reader.take() {
        assert!(entry.position >= position);
        position = entry.position;
    }
}
