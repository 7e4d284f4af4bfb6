//! Random numbers, with a love for the edges.

/// xorshift64*, seeded through splitmix64 so that near seeds give far streams.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ z >> 31) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound.max(1)
    }

    /// True `percent` times of a hundred.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer of any size: edges of all sizes, small ones, anything.
    pub(crate) fn integer(&mut self) -> u64 {
        let size = self.pick(&[8u32, 16, 32, 64]);
        let sign = 1u64 << (size - 1);
        let high = if self.chance(50) {
            0
        } else {
            self.next() & !((sign - 1) << 1 | 1)
        };
        match self.below(12) {
            0 => high,
            1 => high | 1,
            2 => u64::MAX >> (64 - size) | high,
            3 => sign | high,
            4 => (sign - 1) | high,
            5 => 1 << self.below(64),
            6 => self.below(100),
            7 => self.below(100).wrapping_neg(),
            8 => (self.next() as i64 >> self.below(64)) as u64,
            _ => self.next(),
        }
    }

    pub(crate) fn float32(&mut self) -> u32 {
        let sign = (self.next() as u32) & 1 << 31;
        let fraction = self.fraction(23) as u32;
        let exponent = match self.below(8) {
            0 => 0,
            1 => 255,
            2 => 1,
            3 => 254,
            4 => self.below(256) as u32,
            // Around one, and around the integers' limits.
            5 => 120 + self.below(64) as u32,
            _ => 120 + self.below(16) as u32,
        };
        sign | exponent << 23 | fraction
    }

    pub(crate) fn float64(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        let fraction = self.fraction(52);
        let exponent = match self.below(8) {
            0 => 0,
            1 => 2047,
            2 => 1,
            3 => 2046,
            4 => self.below(2048),
            5 => 1010 + self.below(100),
            // Around the limits of single precision.
            6 => 1023 + 127 - 2 + self.below(4),
            _ => 1016 + self.below(16),
        };
        sign | exponent << 52 | fraction
    }

    /// Ten bytes of a long double, six of zero.
    pub(crate) fn float80(&mut self) -> [u8; 16] {
        let exponent = match self.below(8) {
            0 => 0,
            1 => 0x7fff,
            2 => 1,
            3 => 0x7ffe,
            4 => self.below(0x8000),
            5 => 0x3fff + 1020 + self.below(8),
            _ => 0x3ff0 + self.below(64),
        };
        let integer = match (exponent, self.below(20)) {
            // Unnormal numbers, pseudo-infinities and pseudo-denormals.
            (_, 0) => self.next() & 1 << 63,
            (0, _) => 0,
            _ => 1 << 63,
        };
        let fraction = if exponent == 0 && self.chance(50) {
            0
        } else {
            self.fraction(63)
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&(integer | fraction).to_le_bytes());
        let top = exponent as u16 | (self.next() as u16 & 1 << 15);
        bytes[8..10].copy_from_slice(&top.to_le_bytes());
        bytes
    }

    fn fraction(&mut self, bits: u32) -> u64 {
        let mask = (1u64 << bits) - 1;
        match self.below(6) {
            0 => 0,
            1 => mask,
            2 => 1 << (bits - 1),
            3 => 1,
            4 => self.next() & mask & (u64::MAX << self.below(bits.into())),
            _ => self.next() & mask,
        }
    }

    /// Sixteen bytes for a vector register.
    pub(crate) fn vector(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        match self.below(4) {
            0 => bytes
                .chunks_mut(4)
                .for_each(|c| c.copy_from_slice(&self.float32().to_le_bytes())),
            1 => bytes
                .chunks_mut(8)
                .for_each(|c| c.copy_from_slice(&self.float64().to_le_bytes())),
            2 => bytes
                .chunks_mut(8)
                .for_each(|c| c.copy_from_slice(&self.integer().to_le_bytes())),
            _ => bytes
                .chunks_mut(8)
                .for_each(|c| c.copy_from_slice(&self.next().to_le_bytes())),
        }
        bytes
    }
}
