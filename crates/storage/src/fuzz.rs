//! The entry points of the fuzz targets: what a hostile guest or frontend can hand in.

/// A hostile guest's memory, rings and request chains, and a hostile frontend's in-flight region.
pub fn fuzz_block_requests(data: &[u8]) {
    crate::vhost_user::fuzz_chains(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring with one well-formed request of the given type, as `fuzz_block_requests` takes it.
    fn sample(shape: u8, kind: u8, region: &[u8]) -> Vec<u8> {
        let mut data = vec![shape];
        data.extend(region);
        let mut memory = vec![0; 0x6000];
        let mut descriptor = |index: usize, address: u64, len: u32, flags: u8, next: u8| {
            let at = index * 16;
            memory[at..at + 8].copy_from_slice(&address.to_le_bytes());
            memory[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
            memory[at + 12] = flags;
            memory[at + 14] = next;
        };
        // Addresses count from the descriptor table on, which is at 0x1000.
        descriptor(0, 0x5000, 16, 1, 1);
        descriptor(1, 0x6000, 512, if kind == 1 { 1 } else { 3 }, 2);
        descriptor(2, 0x5010, 1, 2, 0);
        memory[0x1002] = 1; // The available ring's index.
        memory[0x4000] = kind;
        data.extend(memory);
        data
    }

    #[test]
    fn arbitrary_guests_are_survived() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let region = [0; 272];
        let samples = [
            sample(0, 0, &[]),
            sample(0, 1, &[]),
            sample(2, 4, &[]),
            sample(1, 8, &region),
            sample(3, 11, &region),
            sample(1, 13, &region),
        ];
        for data in &samples {
            let stats = crate::vhost_user::fuzz_chains(data);
            // A discard without ranges is an error; the others are as they should be.
            assert_eq!(stats.malformed + stats.unsupported, 0, "{stats:?}");
            let expected = u64::from(matches!(data.len(), 0x6111) && data[0x4111] >= 11);
            assert_eq!(stats.errors, expected, "{stats:?}");
        }
        for round in 0..300 {
            let mut data = samples[round % samples.len()].clone();
            for _ in 0..random() % 12 {
                // Near a place that matters, more often than not.
                let bases = [0, 1, 13, 17, 273, 0x1001, 0x1111, 0x4001, 0x4111];
                let base = bases[(random() % bases.len() as u64) as usize];
                let at = (base + (random() % 48) as usize).min(data.len() - 1);
                data[at] = random() as u8;
            }
            let len = match random() % 4 {
                0 => (random() % data.len() as u64) as usize,
                _ => data.len(),
            };
            fuzz_block_requests(&data[..len]);
        }
    }
}
