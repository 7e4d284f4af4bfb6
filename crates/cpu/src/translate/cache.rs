//! Blocks by where their code is.
//!
//! The map is by physical address, so that it outlives every change of the page tables; a small
//! table by linear address in front of it is valid until translations are flushed or blocks dropped.

use std::collections::HashMap;

use crate::memory::{PAGE, Ram};
use crate::microop::Block;
use crate::state::Mode;

/// Blocks that are kept at most.
const BLOCKS: usize = 1 << 15;
/// Entries of the table by linear address.
const RECENT: usize = 1 << 12;

/// What a block's translation depends on, beside its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Physical address of the first byte.
    pub(crate) physical: u64,
    /// RIP; 0 in 64-bit mode, whose blocks are position-independent.
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
    pub(crate) user: bool,
}

#[derive(Clone, Copy, Default)]
struct Recent {
    rip: u64,
    stamp: u64,
    block: u32,
}

/// The blocks of a physical page.
#[derive(Default)]
struct Page {
    /// [`Ram::code_generation`] when they were translated.
    generation: u32,
    keys: Vec<Key>,
}

/// Translated blocks.
#[derive(Default)]
pub(crate) struct BlockCache {
    blocks: Vec<Block>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
    pages: HashMap<u64, Page>,
    recent: Vec<Recent>,
    /// How often blocks were dropped.
    drops: u64,
    /// [`Ram::code_epoch`] that the blocks are up to date with.
    pub(crate) epoch: u64,
    /// [`Ram::watch_epoch`] that the TLB is up to date with.
    pub(crate) watched: u64,
}

impl BlockCache {
    /// Identifies what entries by linear address depend on; never zero.
    pub(crate) fn stamp(&self, tlb_generation: u64, mode: Mode, user: bool) -> u64 {
        (tlb_generation + self.drops + 1) << 3 | (mode as u64) << 1 | u64::from(user)
    }

    fn recent_index(rip: u64) -> usize {
        (rip ^ rip >> 12) as usize % RECENT
    }

    /// The block that was recently executed at an address.
    #[inline]
    pub(crate) fn recent(&self, rip: u64, stamp: u64) -> Option<u32> {
        let recent = self.recent.get(Self::recent_index(rip))?;
        (recent.rip == rip && recent.stamp == stamp).then_some(recent.block)
    }

    /// Remembers the block at an address.
    pub(crate) fn remember(&mut self, rip: u64, stamp: u64, block: u32) {
        if self.recent.is_empty() {
            self.recent = vec![Recent::default(); RECENT];
        }
        self.recent[Self::recent_index(rip)] = Recent { rip, stamp, block };
    }

    /// The block of that number.
    #[inline]
    pub(crate) fn block(&self, number: u32) -> &Block {
        &self.blocks[number as usize]
    }

    /// The block of that key.
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Adds a block, or replaces that of its key. `generation` is its page's, from before its bytes
    /// were read.
    pub(crate) fn insert(&mut self, ram: &Ram, key: Key, block: Block, generation: u32) -> u32 {
        if self.by_key.len() >= BLOCKS {
            self.clear();
        }
        self.remove(&key);
        self.register(key, key.physical, generation);
        if let Some(second) = block.second {
            self.register(key, second, ram.code_generation(second));
        }
        let number = self.free.pop().unwrap_or(self.blocks.len() as u32);
        if number as usize == self.blocks.len() {
            self.blocks.push(block);
        } else {
            self.blocks[number as usize] = block;
        }
        self.by_key.insert(key, number);
        number
    }

    fn register(&mut self, key: Key, physical: u64, generation: u32) {
        let page = self.pages.entry(physical / PAGE).or_default();
        let stale = if page.generation == generation {
            Vec::new()
        } else {
            std::mem::take(&mut page.keys)
        };
        page.generation = generation;
        page.keys.push(key);
        stale.iter().for_each(|key| self.remove(key));
    }

    fn remove(&mut self, key: &Key) {
        if let Some(number) = self.by_key.remove(key) {
            self.blocks[number as usize] = Block::default();
            self.free.push(number);
            self.drops += 1;
        }
    }

    fn clear(&mut self) {
        self.blocks.clear();
        self.free.clear();
        self.by_key.clear();
        self.pages.clear();
        self.drops += 1;
    }

    /// Drops the blocks of pages that were written.
    #[cold]
    pub(crate) fn drop_stale(&mut self, ram: &Ram) {
        let mut stale = Vec::new();
        self.pages.retain(|&number, page| {
            let fresh = ram.code_generation(number * PAGE) == page.generation;
            if !fresh {
                stale.append(&mut page.keys);
            }
            fresh
        });
        stale.iter().for_each(|key| self.remove(key));
    }
}
