//! Blocks by where their code is.
//!
//! The map is by physical address, so that it outlives every change of the page tables; a small
//! table by linear address in front of it is valid until translations are flushed or blocks dropped.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::memory::{PAGE, Ram};
use crate::microop::Block;
use crate::mmu::Tlb;
use crate::state::Mode;

/// Blocks that are kept at most.
const BLOCKS: usize = 1 << 15;
/// Entries of the table by linear address.
const RECENT: usize = 1 << 12;

/// Hashes keys of a few words that no guest can choose freely enough to harm more than itself.
#[derive(Default)]
pub(crate) struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        let mixed = (self.0.rotate_left(5) ^ value).wrapping_mul(ODD);
        self.0 = mixed ^ mixed >> 32;
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}

type WordMap<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;

/// What code may do, as far as its translation depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CodeRights {
    /// At CPL 3.
    pub(crate) user: bool,
    /// With SSE.
    pub(crate) vectors: bool,
}

/// What a block's translation depends on, beside its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Physical address of the first byte.
    pub(crate) physical: u64,
    /// RIP; 0 in 64-bit mode, whose blocks are position-independent.
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
    pub(crate) rights: CodeRights,
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
    by_key: WordMap<Key, u32>,
    pages: WordMap<u64, Page>,
    recent: Vec<Recent>,
    /// How often blocks were dropped.
    drops: u64,
    /// [`Ram::code_epoch`] that the blocks are up to date with.
    pub(crate) epoch: u64,
    /// [`Ram::watch_epoch`] that the TLB is up to date with.
    pub(crate) watched: u64,
}

impl BlockCache {
    /// Identifies what entries by linear address depend on, for code on pages that are global or not;
    /// never zero.
    #[inline]
    pub(crate) fn stamp(&self, tlb: &Tlb, global: bool, mode: Mode, rights: CodeRights) -> u64 {
        let generation = if global {
            tlb.global_generation
        } else {
            tlb.generation
        };
        let rights = u64::from(rights.vectors) << 1 | u64::from(rights.user);
        let flags = u64::from(global) << 4 | (mode as u64) << 2 | rights;
        (generation + self.drops + 1) << 5 | flags
    }

    fn recent_index(rip: u64) -> usize {
        (rip ^ rip >> 12) as usize % RECENT
    }

    /// The block that was recently executed at an address, if its stamp is one of these.
    #[inline]
    pub(crate) fn recent(&self, rip: u64, stamps: [u64; 2]) -> Option<u32> {
        let recent = self.recent.get(Self::recent_index(rip))?;
        (recent.rip == rip && stamps.contains(&recent.stamp)).then_some(recent.block)
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
    pub(crate) fn insert(&mut self, key: Key, block: Block, generation: u32) -> u32 {
        if self.by_key.len() >= BLOCKS {
            self.clear();
        }
        self.remove(&key);
        self.register(key, key.physical, generation);
        if let Some((second, generation)) = block.second {
            self.register(key, second, generation);
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
        // A block that was translated again, because a device wrote its page, is there already.
        if !page.keys.contains(&key) {
            page.keys.push(key);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a page knows of its blocks does not grow when they are translated again and again.
    #[test]
    fn a_block_is_known_once_to_its_pages() {
        let key = Key {
            physical: 2 * PAGE - 1,
            rip: 0,
            mode: Mode::Bits64,
            rights: CodeRights {
                user: false,
                vectors: true,
            },
        };
        let mut cache = BlockCache::default();
        for generation in 0..100 {
            let block = Block {
                second: Some((2 * PAGE, generation / 2)),
                ..Block::default()
            };
            cache.insert(key, block, 0);
            for page in [1, 2] {
                assert_eq!(cache.pages[&page].keys, [key], "page {page}");
            }
            assert_eq!(cache.blocks.len() - cache.free.len(), 1);
        }
    }
}
