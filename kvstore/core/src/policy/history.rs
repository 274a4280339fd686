//! What evicted blocks had earned: a small bounded table, so that a block that is
//! computed again does not start its life without a past.
//!
//! Eight bytes a block. A set of eight is one cache line; the entry that was put
//! into it first leaves it first.

use crate::api::UseStats;
use crate::ids::BlockId;

const WAYS: usize = 8;
/// Most entries: 32 MiB.
const ENTRIES_MAX: u32 = 1 << 22;

/// Statistics of blocks that are gone, by id.
#[derive(Clone, Debug)]
pub(crate) struct History {
    /// Tag in the high 48 bits, then turn, then uses plus one in a byte each; zero is empty.
    words: Vec<u64>,
    /// Words before the first set, so that each lies in one cache line. Aligned memory would be written when it is
    /// asked for; this is the kernel's until it is used.
    skew: usize,
    sets: usize,
}

impl History {
    /// Remembers about this many blocks.
    pub(crate) fn new(blocks: u32) -> Self {
        let entries = blocks.clamp(64, ENTRIES_MAX).next_power_of_two();
        let words = vec![0u64; entries as usize + WAYS];
        let skew = words.as_ptr().align_offset(size_of::<[u64; WAYS]>()).min(WAYS);
        Self { words, skew, sets: entries as usize / WAYS }
    }

    /// Brings what is remembered of these blocks into the cache. The loads do not wait for each other.
    pub(crate) fn warm(&self, blocks: impl Iterator<Item = BlockId>) {
        let sets = blocks.fold(0, |all, block| all ^ self.words[self.place(block).0]);
        std::hint::black_box(sets);
    }

    /// A block leaves its last tier.
    #[inline(always)]
    pub(crate) fn remember(&mut self, block: BlockId, stats: UseStats) {
        let (at, tag) = self.place(block);
        let mut moved =
            tag << 16 | u64::from(stats.turn) << 8 | u64::from(stats.uses.saturating_add(1).max(1));
        // To the front; what was there moves on, as far as the place of the old entry, a free one, or the end.
        for entry in &mut self.words[at..at + WAYS] {
            moved = std::mem::replace(entry, moved);
            if moved >> 16 == tag || moved == 0 {
                break;
            }
        }
    }

    /// What it had earned, if it is remembered; its depth is not kept.
    #[inline(always)]
    pub(crate) fn recall(&self, block: BlockId) -> Option<UseStats> {
        let (at, tag) = self.place(block);
        let &entry = self.words[at..at + WAYS].iter().find(|&&entry| entry >> 16 == tag)?;
        let [uses, turn, ..] = entry.to_le_bytes();
        Some(UseStats { depth: 0, turn, uses: uses - 1 })
    }

    /// Where its set begins, and a tag that is not zero.
    #[expect(clippy::cast_possible_truncation, reason = "uniform bits: any of them will do")]
    fn place(&self, block: BlockId) -> (usize, u64) {
        let bits = block.as_u128();
        let at = self.skew + ((bits >> 64) as usize & (self.sets - 1)) * WAYS;
        (at, ((bits as u64) >> 16).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> BlockId {
        let high = u128::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        BlockId::from_bytes((high ^ (high >> 64)).to_le_bytes())
    }

    /// A past could be lost, go to another block, or never be replaced.
    #[test]
    fn the_latest_past_of_a_block_is_recalled() {
        let mut history = History::new(64);
        history.remember(id(1), UseStats { depth: 9, turn: 3, uses: 0 });
        history.remember(id(1), UseStats { depth: 9, turn: 4, uses: u8::MAX });
        assert_eq!(history.recall(id(1)), Some(UseStats { depth: 0, turn: 4, uses: u8::MAX - 1 }));
        assert_eq!(history.recall(id(2)), None);
    }

    /// It must stay within its size, and forget the oldest first.
    #[test]
    fn it_is_bounded_and_forgets_the_oldest() {
        let mut history = History::new(1024);
        for number in 0..10_000 {
            history.remember(id(number), UseStats { depth: 0, turn: 1, uses: 1 });
        }
        let known = (0..10_000).filter(|&number| history.recall(id(number)).is_some()).count();
        let latest = (9_600..10_000).filter(|&number| history.recall(id(number)).is_some()).count();
        assert!(known <= 1024, "{known} of at most 1024");
        assert!(latest >= 390, "the latest 400 of 1024 are kept but for crowded sets: {latest}");
        assert_eq!(history.recall(id(0)), None);
    }
}
