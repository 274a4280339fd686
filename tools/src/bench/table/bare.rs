//! The least that any such table does: one hash table of indexes over one array
//! of entries of a cache line each, without leases, recency, parents or answers.
//!
//! It bounds from below what the residency table can cost on this machine.

use std::hint::black_box;

use hashbrown::HashTable;
use terrace_core::BlockId;

use super::shard::{chain, low_bits};

/// One entry: a cache line, of which the id is looked at.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Entry {
    block: BlockId,
    uses: u64,
}

const _: () = assert!(size_of::<Entry>() == 64);

/// A table that is full once `capacity` blocks were put in; then each new one replaces the oldest.
#[derive(Debug)]
pub(super) struct Bare {
    index: HashTable<u32>,
    entries: Vec<Entry>,
    capacity: usize,
    oldest: usize,
}

impl Bare {
    /// An empty table.
    pub(super) fn new(capacity: usize) -> Self {
        Self { index: HashTable::new(), entries: Vec::new(), capacity, oldest: 0 }
    }

    /// Adds blocks that are not there.
    pub(super) fn write(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            assert!(self.find(block).is_none(), "a chain is written once");
            let slot = self.vacate();
            let entry = Entry { block, uses: 0 };
            match self.entries.get_mut(slot) {
                Some(old) => *old = entry,
                None => self.entries.push(entry),
            }
            let entries = &self.entries;
            let slot = u32::try_from(slot).expect("a table of fewer than 2^32 entries");
            self.index.insert_unique(low_bits(block), slot, |&slot| low_bits(entries[slot as usize].block));
        }
    }

    /// Looks blocks up and marks them as used; how many are there.
    pub(super) fn read(&mut self, blocks: &[BlockId]) -> usize {
        let mut found = 0;
        for &block in blocks {
            let Some(slot) = self.find(block) else { continue };
            self.entries[slot].uses += 1;
            found += 1;
        }
        black_box(found)
    }

    fn find(&self, block: BlockId) -> Option<usize> {
        let entries = &self.entries;
        let found = self.index.find(low_bits(block), |&slot| entries[slot as usize].block == block);
        found.map(|&slot| slot as usize)
    }

    /// The slot for a new entry; takes the oldest block out if there is no other.
    fn vacate(&mut self) -> usize {
        if self.entries.len() < self.capacity {
            return self.entries.len();
        }
        let slot = self.oldest;
        self.oldest = (slot + 1) % self.capacity;
        let old = self.entries[slot].block;
        let found = self.index.find_entry(low_bits(old), |&other| other as usize == slot);
        found.expect("every entry is in the index").remove();
        slot
    }
}

/// A table with as many chains as fit.
pub(super) fn filled(capacity: u64) -> anyhow::Result<Bare> {
    let mut table = Bare::new(usize::try_from(capacity)?);
    for number in 0..capacity / super::shard::CHAIN_BLOCKS as u64 {
        table.write(&chain(number));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bound that does less than a table must would be no bound: it holds the newest blocks and only them.
    #[test]
    fn it_holds_the_newest_blocks() {
        let mut table = filled(1_000).unwrap();
        table.write(&chain(5));
        assert_eq!(table.read(&chain(0)), 0);
        assert_eq!(table.read(&chain(1)), 200);
        assert_eq!(table.read(&chain(5)), 200);
        assert_eq!((table.index.len(), table.entries.len()), (1_000, 1_000));
    }
}
