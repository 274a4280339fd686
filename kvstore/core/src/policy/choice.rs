//! Which candidate to evict: pure functions from read-only views to a choice. They start
//! nothing, so another policy can stand in their place.

use crate::ids::ChunkId;
use crate::state::block::BlockIndex;
use crate::units::Now;

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

/// A chunk whose memory could be used otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkFacts {
    pub(crate) chunk: ChunkId,
    pub(crate) sealed: u64,
    pub(crate) touched: Now,
    /// Sessions that may keep its memory after it is gone.
    pub(crate) kept_by: usize,
}

/// The cheapest chunk to empty: one whose memory comes back, then one that holds nothing, else the coldest, and
/// of equally cold ones the one with the fewest blocks.
pub(crate) fn cheapest_chunk(chunks: impl Iterator<Item = ChunkFacts>) -> Option<ChunkId> {
    chunks
        .min_by_key(|facts| (facts.kept_by, facts.sealed > 0, facts.touched, facts.sealed, facts.chunk))
        .map(|facts| facts.chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Emptying a warm chunk while an empty or a cold one is there would cost copies.
    #[test]
    fn the_cheapest_chunk_is_empty_or_cold() {
        let facts = |chunk, sealed, touched| ChunkFacts {
            chunk: ChunkId::new(chunk),
            sealed,
            touched: Now::from_micros(touched),
            kept_by: 0,
        };
        let chunks = [facts(1, 5, 10), facts(2, 0, 99), facts(3, 1, 50)];
        assert_eq!(cheapest_chunk(chunks.into_iter()), Some(ChunkId::new(2)));
        assert_eq!(
            cheapest_chunk(chunks.into_iter().filter(|facts| facts.sealed > 0)),
            Some(ChunkId::new(1))
        );
        let kept = chunks.map(|facts| ChunkFacts { kept_by: usize::from(facts.sealed < 5), ..facts });
        assert_eq!(cheapest_chunk(kept.into_iter()), Some(ChunkId::new(1)), "its memory alone comes back");
        assert_eq!(cheapest_chunk(std::iter::empty()), None);
    }
}
