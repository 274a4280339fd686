//! Which candidate to evict: pure functions from read-only views to a choice. They start
//! nothing, so another policy can stand in their place.

use crate::ids::ChunkId;
use crate::state::block::BlockIndex;
use crate::units::Now;

/// How many of the coldest blocks are looked at for one choice.
pub(crate) const SCAN_MAX: usize = 64;

/// A block that could leave a tier, coldest first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) block: BlockIndex,
    /// No child is resident in the same or a faster tier.
    pub(crate) leaf: bool,
    /// An operation needs its frame.
    pub(crate) busy: bool,
    /// A slower tier has it, or it need not be kept.
    pub(crate) expendable: bool,
}

/// What to do to have a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Evict it now.
    Evict(BlockIndex),
    /// It has to be written to the next tier first.
    Demote(BlockIndex),
    /// Nothing can leave.
    Nothing,
}

/// Leaf-first LRU: the coldest leaf, and a parent only when there is no leaf
/// among the coldest. A block that can go at once is preferred to one that has
/// to be written first.
pub(crate) fn victim(candidates: impl Iterator<Item = Candidate>) -> Choice {
    let mut demote = None;
    let mut parent = None;
    for candidate in candidates.take(SCAN_MAX).filter(|candidate| !candidate.busy) {
        match (candidate.leaf, candidate.expendable) {
            (true, true) => return Choice::Evict(candidate.block),
            (true, false) => demote = demote.or(Some(candidate.block)),
            (false, true) => parent = parent.or(Some(candidate.block)),
            (false, false) => {}
        }
    }
    match (demote, parent) {
        (Some(block), _) => Choice::Demote(block),
        (None, Some(block)) => Choice::Evict(block),
        (None, None) => Choice::Nothing,
    }
}

/// A chunk whose memory could be used otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkFacts {
    pub(crate) chunk: ChunkId,
    pub(crate) sealed: u64,
    pub(crate) touched: Now,
}

/// The cheapest chunk to empty: one that holds nothing, else the coldest, and
/// of equally cold ones the one with the fewest blocks.
pub(crate) fn cheapest_chunk(chunks: impl Iterator<Item = ChunkFacts>) -> Option<ChunkId> {
    chunks
        .min_by_key(|facts| (facts.sealed > 0, facts.touched, facts.sealed, facts.chunk))
        .map(|facts| facts.chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(block: u32, leaf: bool, busy: bool, expendable: bool) -> Candidate {
        Candidate { block: BlockIndex(block), leaf, busy, expendable }
    }

    /// Evicting a parent before its children would waste them, and waiting for a
    /// write when another leaf can go at once would waste time.
    #[test]
    fn the_coldest_leaf_that_can_go_at_once_goes_first() {
        let coldest_first = [
            candidate(1, false, false, true),
            candidate(2, true, true, true),
            candidate(3, true, false, false),
            candidate(4, true, false, true),
        ];
        assert_eq!(victim(coldest_first.into_iter()), Choice::Evict(BlockIndex(4)));
        assert_eq!(victim(coldest_first.into_iter().take(3)), Choice::Demote(BlockIndex(3)));
        assert_eq!(victim(coldest_first.into_iter().take(2)), Choice::Evict(BlockIndex(1)));
        assert_eq!(victim(coldest_first.into_iter().skip(1).take(1)), Choice::Nothing);
    }

    /// A choice could walk a whole tier while everybody waits.
    #[test]
    fn a_choice_looks_at_a_bounded_number_of_blocks() {
        let mut seen = 0;
        let busy = (0..10_000).map(|block| candidate(block, true, true, true)).inspect(|_| seen += 1);
        assert_eq!(victim(busy), Choice::Nothing);
        assert_eq!(seen, SCAN_MAX);
    }

    /// Emptying a warm chunk while an empty or a cold one is there would cost copies.
    #[test]
    fn the_cheapest_chunk_is_empty_or_cold() {
        let facts = |chunk, sealed, touched| ChunkFacts {
            chunk: ChunkId::new(chunk),
            sealed,
            touched: Now::from_micros(touched),
        };
        let chunks = [facts(1, 5, 10), facts(2, 0, 99), facts(3, 1, 50)];
        assert_eq!(cheapest_chunk(chunks.into_iter()), Some(ChunkId::new(2)));
        assert_eq!(
            cheapest_chunk(chunks.into_iter().filter(|facts| facts.sealed > 0)),
            Some(ChunkId::new(1))
        );
        assert_eq!(cheapest_chunk(std::iter::empty()), None);
    }
}
