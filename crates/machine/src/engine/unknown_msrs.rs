//! Model-specific registers that a guest asks for and nobody knows.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bus::lock;

/// How many different unknown registers are remembered, and so logged, before the rest is only
/// counted.
const MAX_NAMED: usize = 64;

/// The guest's accesses to registers that the engine does not have.
#[derive(Default)]
pub(crate) struct UnknownMsrs {
    accesses: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    all: HashSet<u32>,
    fresh: Vec<u32>,
}

impl UnknownMsrs {
    pub(crate) fn note(&self, index: u32) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        let mut seen = lock(&self.seen);
        if seen.all.len() < MAX_NAMED && seen.all.insert(index) {
            seen.fresh.push(index);
        }
    }

    pub(crate) fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }

    pub(crate) fn take_fresh(&self) -> Vec<u32> {
        std::mem::take(&mut lock(&self.seen).fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_of_all_registers_does_not_grow_the_log() {
        let unknown = UnknownMsrs::default();
        for index in 0..10_000 {
            unknown.note(index);
            unknown.note(index);
        }
        assert_eq!(unknown.accesses(), 20_000);
        assert_eq!(unknown.take_fresh().len(), MAX_NAMED);
        assert!(unknown.take_fresh().is_empty());
    }
}
