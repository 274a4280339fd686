//! What to evict: pure functions from read-only views to a choice. They start
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
