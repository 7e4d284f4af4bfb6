//! Bytes of a fuzzer, taken piece by piece.

/// What is left of the input; past its end everything is zero.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        let mut bytes = taken.to_vec();
        bytes.resize(len, 0);
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.bytes(1)[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }
}

/// Runs a fuzz function on `count` pseudo-random inputs of up to `max_len` bytes; a failure names
/// the seed of its input.
#[cfg(test)]
pub(crate) fn check_random(fuzz: fn(&[u8]), count: u64, max_len: u64) {
    for seed in 1..=count {
        // xorshift64*, seeded so that near seeds differ at once.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
        };
        let len = next() % (max_len + 1);
        // Small values reach further than large ones.
        let data: Vec<u8> = (0..len)
            .map(|_| match next() % 3 {
                0 => next() as u8,
                _ => next() as u8 & 7,
            })
            .collect();
        let outcome = std::panic::catch_unwind(|| fuzz(&data));
        assert!(outcome.is_ok(), "seed {seed}");
    }
}
