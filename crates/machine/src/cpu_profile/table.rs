//! The answers of the CPUID instruction.

use super::features::{Feature, Register};
use super::topology;

/// What CPUID answers to one leaf and subleaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question, if the leaf looks at it.
    pub subleaf: Option<u32>,
    /// EAX of the answer.
    pub eax: u32,
    /// EBX of the answer.
    pub ebx: u32,
    /// ECX of the answer.
    pub ecx: u32,
    /// EDX of the answer.
    pub edx: u32,
}

impl CpuidLeaf {
    /// A leaf that does not look at ECX, all zeros.
    #[must_use]
    pub fn new(leaf: u32) -> Self {
        Self {
            leaf,
            ..Self::default()
        }
    }

    /// A leaf with subleaves, all zeros.
    #[must_use]
    pub fn indexed(leaf: u32, subleaf: u32) -> Self {
        Self {
            leaf,
            subleaf: Some(subleaf),
            ..Self::default()
        }
    }

    pub(super) fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    pub(super) fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// All answers of one processor, or of an engine about what it can give.
///
/// A question that has no entry is answered with zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    /// Sorted by leaf and subleaf, each once.
    leaves: Vec<CpuidLeaf>,
}

impl CpuidTable {
    /// A table of `leaves`; the first of several entries for one question counts.
    #[must_use]
    pub fn new(leaves: Vec<CpuidLeaf>) -> Self {
        let mut leaves = leaves;
        leaves.sort_by_key(|leaf| (leaf.leaf, leaf.subleaf));
        leaves.dedup_by_key(|leaf| (leaf.leaf, leaf.subleaf));
        Self { leaves }
    }

    /// All entries, in ascending order.
    #[must_use]
    pub fn leaves(&self) -> &[CpuidLeaf] {
        &self.leaves
    }

    /// The entry that answers `leaf` and `subleaf`.
    #[must_use]
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
        self.leaves
            .iter()
            .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|index| index == subleaf))
    }

    /// EAX, EBX, ECX and EDX of an answer.
    #[must_use]
    pub fn answer(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.get(leaf, subleaf)
            .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    /// One register of an answer.
    #[must_use]
    pub fn register(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.get(leaf, subleaf)
            .map_or(0, |entry| entry.register(register))
    }

    /// Whether the processor has `feature`.
    #[must_use]
    pub fn has(&self, feature: &Feature) -> bool {
        self.register(feature.leaf, feature.subleaf, feature.register) >> feature.bit & 1 == 1
    }

    /// The vendor string of leaf 0.
    #[must_use]
    pub fn vendor(&self) -> String {
        let Some(leaf) = self.get(0, 0) else {
            return String::new();
        };
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The table of vCPU `index`, whose APIC ID is its index.
    #[must_use]
    pub fn for_vcpu(&self, index: u32) -> Self {
        let mut table = self.clone();
        topology::set_apic_id(&mut table, index);
        table
    }

    /// Puts `entry` in the place of the one that answers the same question.
    pub(super) fn set(&mut self, entry: CpuidLeaf) {
        let key = |entry: &CpuidLeaf| (entry.leaf, entry.subleaf);
        match self.leaves.binary_search_by_key(&key(&entry), key) {
            Ok(index) => self.leaves[index] = entry,
            Err(index) => self.leaves.insert(index, entry),
        }
    }

    /// Turns a feature on, in a leaf that is made for it if need be.
    pub(super) fn add(&mut self, feature: &Feature) {
        let mut entry = self.get(feature.leaf, feature.subleaf).copied();
        let entry = entry.get_or_insert_with(|| match feature.leaf {
            7 | 0xd => CpuidLeaf::indexed(feature.leaf, feature.subleaf),
            leaf => CpuidLeaf::new(leaf),
        });
        *entry.register_mut(feature.register) |= 1 << feature.bit;
        self.set(*entry);
    }

    /// Turns a feature off.
    pub(super) fn clear(&mut self, feature: &Feature) {
        for entry in self.leaves_mut(feature.leaf) {
            if entry.subleaf.is_none_or(|index| index == feature.subleaf) {
                *entry.register_mut(feature.register) &= !(1 << feature.bit);
            }
        }
    }

    /// All entries of a leaf.
    pub(super) fn leaves_mut(&mut self, leaf: u32) -> impl Iterator<Item = &mut CpuidLeaf> {
        self.leaves
            .iter_mut()
            .filter(move |entry| entry.leaf == leaf)
    }

    /// Keeps the leaves of which `keep` says so.
    pub(super) fn retain(&mut self, keep: impl Fn(u32) -> bool) {
        self.leaves.retain(|entry| keep(entry.leaf));
    }
}
