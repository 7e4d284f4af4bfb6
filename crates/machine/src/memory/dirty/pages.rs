//! A set of guest pages, one bit for each page of RAM.

use mica_base::units::PAGE_SIZE;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

/// A set of 4 KiB pages of one guest's RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    regions: Vec<Region>,
}

/// Bit `n % 64` of word `n / 64` stands for page `n` from `first_page`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Region {
    first_page: u64,
    pages: u64,
    words: Vec<u64>,
}

impl Region {
    fn end_page(&self) -> u64 {
        self.first_page + self.pages
    }

    /// The bits of the last word that stand for pages; all ones for the words before it.
    fn valid_bits(&self, word: usize) -> u64 {
        match self.pages - word as u64 * 64 {
            tail @ 0..64 => (1 << tail) - 1,
            _ => u64::MAX,
        }
    }
}

impl DirtyPages {
    /// The empty set over the RAM of `memory`.
    #[must_use]
    pub fn new(memory: &GuestMemory) -> Self {
        let regions = memory.iter().map(|region| {
            let pages = region.len() / PAGE_SIZE;
            Region {
                first_page: region.start_addr().0 / PAGE_SIZE,
                pages,
                words: vec![0; pages.div_ceil(64) as usize],
            }
        });
        Self {
            regions: regions.collect(),
        }
    }

    /// Adds every page that `len` bytes at `address` touch. What is no RAM is ignored.
    pub fn mark(&mut self, address: GuestAddress, len: u64) {
        let Some(last_byte) = len.checked_sub(1) else {
            return;
        };
        let first = address.0 / PAGE_SIZE;
        let last = address.0.saturating_add(last_byte) / PAGE_SIZE;
        for region in &mut self.regions {
            for page in first.max(region.first_page)..(last + 1).min(region.end_page()) {
                let bit = page - region.first_page;
                region.words[(bit / 64) as usize] |= 1 << (bit % 64);
            }
        }
    }

    /// Adds pages from a bitmap that starts at the RAM region at `start`: bit `n % 64` of word
    /// `n / 64` is its page `n`. Bits beyond the region's end are ignored, as is a bitmap for a
    /// region that does not exist.
    pub fn add_words(&mut self, start: GuestAddress, words: &[u64]) {
        let first_page = start.0 / PAGE_SIZE;
        let found = self.regions.iter_mut();
        for region in found.filter(|region| region.first_page == first_page) {
            for (index, &word) in words.iter().enumerate().take(region.words.len()) {
                region.words[index] |= word & region.valid_bits(index);
            }
        }
    }

    /// Adds every page of `other`, a set over the same RAM.
    pub fn union(&mut self, other: &Self) {
        for region in &other.regions {
            self.add_words(GuestAddress(region.first_page * PAGE_SIZE), &region.words);
        }
    }

    /// Adds all RAM.
    pub fn mark_all(&mut self) {
        for region in &mut self.regions {
            for index in 0..region.words.len() {
                region.words[index] = region.valid_bits(index);
            }
        }
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        for region in &mut self.regions {
            region.words.fill(0);
        }
    }

    /// Whether the page at `address` is in the set.
    #[must_use]
    pub fn contains(&self, address: GuestAddress) -> bool {
        let page = address.0 / PAGE_SIZE;
        self.regions.iter().any(|region| {
            (region.first_page..region.end_page()).contains(&page) && {
                let bit = page - region.first_page;
                region.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
            }
        })
    }

    /// The number of pages in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// The set as ranges in ascending order: the address and length in bytes of each run of pages.
    /// A run does not cross the border of a RAM region.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs {
            regions: &self.regions,
            page: 0,
        }
    }
}

/// Iterates over the runs of a [`DirtyPages`].
pub struct Runs<'a> {
    regions: &'a [Region],
    /// Where the search goes on, from the start of the first of `regions`.
    page: u64,
}

impl Iterator for Runs<'_> {
    type Item = (GuestAddress, u64);

    fn next(&mut self) -> Option<Self::Item> {
        while let Some((region, rest)) = self.regions.split_first() {
            let start = find(&region.words, self.page, true).min(region.pages);
            if start == region.pages {
                self.regions = rest;
                self.page = 0;
                continue;
            }
            let end = find(&region.words, start, false).min(region.pages);
            self.page = end;
            let address = GuestAddress((region.first_page + start) * PAGE_SIZE);
            return Some((address, (end - start) * PAGE_SIZE));
        }
        None
    }
}

/// The first bit from `from` on that equals `value`, or the number of bits.
fn find(words: &[u64], from: u64, value: bool) -> u64 {
    let mut index = (from / 64) as usize;
    let mut ignored = (1u64 << (from % 64)) - 1;
    while let Some(&word) = words.get(index) {
        let candidates = if value { word } else { !word } & !ignored;
        if candidates != 0 {
            return index as u64 * 64 + u64::from(candidates.trailing_zeros());
        }
        ignored = 0;
        index += 1;
    }
    words.len() as u64 * 64
}

#[cfg(test)]
mod tests {
    use mica_base::units::Bytes;

    use super::*;
    use crate::layout;
    use crate::memory::{MemoryOptions, allocate};

    fn set(ram: u64) -> DirtyPages {
        DirtyPages::new(&allocate(Bytes(ram), &MemoryOptions::default()).unwrap())
    }

    /// Marks `ranges` and checks the runs that come out.
    fn check(ram: u64, ranges: &[(u64, u64)], runs: &[(u64, u64)]) {
        let mut dirty = set(ram);
        for &(address, len) in ranges {
            dirty.mark(GuestAddress(address), len);
        }
        let found: Vec<_> = dirty.runs().map(|(at, len)| (at.0, len)).collect();
        assert_eq!(found, runs);
        let bytes: u64 = runs.iter().map(|run| run.1).sum();
        assert_eq!(dirty.count(), bytes / PAGE_SIZE);
        for &(address, _) in runs {
            assert!(dirty.contains(GuestAddress(address)));
        }
    }

    #[test]
    fn runs_are_maximal_and_in_order() {
        const MIB: u64 = 1 << 20;
        check(MIB, &[], &[]);
        check(MIB, &[(0, 0)], &[]);
        check(MIB, &[(0xfff, 1)], &[(0, 0x1000)]);
        check(MIB, &[(0xfff, 2)], &[(0, 0x2000)]);
        check(
            MIB,
            &[(0x5000, 1), (0x3000, 1), (0x4000, 1)],
            &[(0x3000, 0x3000)],
        );
        // Across a word's border, and the last page.
        check(MIB, &[(63 << 12, 0x2000)], &[(63 << 12, 0x2000)]);
        check(MIB, &[(MIB - 1, 1)], &[(MIB - 4096, 4096)]);
        check(MIB, &[(0, u64::MAX)], &[(0, MIB)]);
        check(MIB, &[(MIB, 4096), (u64::MAX, 5)], &[]);
        // A region whose pages do not fill the last word, and the hole.
        check(
            layout::LOW_RAM_END + 3 * 4096,
            &[(layout::LOW_RAM_END - 1, u64::MAX)],
            &[
                (layout::LOW_RAM_END - 4096, 4096),
                (layout::HIGH_RAM_START, 3 * 4096),
            ],
        );
    }

    #[test]
    fn bits_beyond_the_region_are_ignored() {
        let mut dirty = set(3 * 4096);
        dirty.add_words(GuestAddress(0), &[u64::MAX, u64::MAX]);
        dirty.add_words(GuestAddress(1 << 40), &[u64::MAX]);
        assert_eq!(dirty.count(), 3);
        let mut all = set(3 * 4096);
        all.mark_all();
        assert_eq!(dirty, all);
    }

    #[test]
    fn union_and_clear() {
        let mut one = set(1 << 20);
        let mut two = one.clone();
        one.mark(GuestAddress(0x1000), 1);
        two.mark(GuestAddress(0x2000), 1);
        one.union(&two);
        assert_eq!(
            one.runs().collect::<Vec<_>>(),
            [(GuestAddress(0x1000), 0x2000)]
        );
        one.clear();
        assert_eq!(one.runs().next(), None);
    }
}
