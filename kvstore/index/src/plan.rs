//! From whom to fetch which blocks, when several holders have them.

use crate::find::{Found, Span};
use crate::ids::{HolderId, Tier};

/// Blocks that are given to one source at a time. Smaller pieces balance better and cost more requests.
const PIECE_BLOCKS: u32 = 16;

/// Blocks to fetch from one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// From whom.
    pub holder: HolderId,
    /// From which of its tiers.
    pub tier: Tier,
    /// First block.
    pub start: u32,
    /// The block after the last.
    pub end: u32,
}

/// Who serves which blocks, and how long that takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In the order of the prompt; together they cover it from the target's own fastest prefix to `end`.
    pub pieces: Vec<Piece>,
    /// The block after the last that is fetched.
    pub end: u32,
    /// Until the slowest source is done, in the unit of the costs.
    pub time: f64,
}

/// The best sources for the blocks from `start` to `end` of what was found. `cost` says how long a source
/// takes before its first block and for each block; none if it cannot be used. Sources work side by side,
/// so each piece goes to the source that would be done with it first. Ends early where nobody can be used.
pub fn source_plan(
    found: &Found,
    start: u32,
    end: u32,
    mut cost: impl FnMut(HolderId, Tier) -> Option<(f64, f64)>,
) -> Plan {
    let mut spans: Vec<&Span> = found.beyond(start).filter(|span| span.start < end).collect();
    spans.sort_by_key(|span| span.start);
    let mut sources: Vec<Source> = Vec::new();
    let mut open: Vec<(usize, &Span)> = Vec::new();
    let mut waiting = spans.into_iter().peekable();
    let mut plan = Plan { end: start, ..Plan::default() };
    while plan.end < end {
        open.retain(|(_, span)| span.end > plan.end);
        while let Some(span) = waiting.next_if(|span| span.start <= plan.end) {
            let holder = found.holders()[span.held as usize].holder;
            if let Some(source) = source_of(&mut sources, holder, span.tier, &mut cost) {
                open.push((source, span));
            }
        }
        // As far as the same spans are open, so that all are asked for as many blocks.
        let next = waiting.peek().map_or(end, |span| span.start);
        let ends = open.iter().map(|(_, span)| span.end);
        let stop = ends.chain([next, end, plan.end + PIECE_BLOCKS]).min().unwrap_or(end);
        let best = open.iter().map(|(source, _)| (sources[*source].done_after(stop - plan.end), *source));
        let Some((done, source)) = best.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))) else { break };
        sources[source].done = done;
        plan.time = plan.time.max(done);
        let (holder, tier) = (sources[source].holder, sources[source].tier);
        plan.push(Piece { holder, tier, start: plan.end, end: stop });
    }
    plan
}

impl Plan {
    fn push(&mut self, piece: Piece) {
        self.end = piece.end;
        match self.pieces.last_mut() {
            Some(last) if last.holder == piece.holder && last.tier == piece.tier => last.end = piece.end,
            Some(_) | None => self.pieces.push(piece),
        }
    }
}

/// A holder's tier as a source.
#[derive(Clone, Copy, Debug)]
struct Source {
    holder: HolderId,
    tier: Tier,
    per_block: f64,
    /// When it is done with what it was given.
    done: f64,
}

impl Source {
    fn done_after(&self, blocks: u32) -> f64 {
        self.done + self.per_block * f64::from(blocks)
    }
}

fn source_of(
    sources: &mut Vec<Source>,
    holder: HolderId,
    tier: Tier,
    cost: &mut impl FnMut(HolderId, Tier) -> Option<(f64, f64)>,
) -> Option<usize> {
    if let Some(known) = sources.iter().position(|source| source.holder == holder && source.tier == tier) {
        return Some(known);
    }
    let (done, per_block) = cost(holder, tier)?;
    sources.push(Source { holder, tier, per_block, done });
    Some(sources.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Index, Key, Limits, TierSet};

    fn index(blocks: u64, holders: &[(u32, TierSet, usize)]) -> Found {
        let index = Index::new(Limits { holders: 16, bytes: 4 << 20 });
        let prompt: Vec<Key> = (0..blocks).map(Key::from_alias).collect();
        for (holder, tiers, count) in holders {
            index.store(HolderId(*holder), *tiers, None, &prompt[..*count]).unwrap();
        }
        let mut found = Found::new();
        index.find(&prompt, &mut found);
        found
    }

    /// Two equal sources could get everything from one: each must get half, and the time must halve.
    #[test]
    fn equal_sources_share_the_work() {
        let found = index(320, &[(1, TierSet::PINNED, 320), (2, TierSet::PINNED, 320)]);
        let plan = source_plan(&found, 0, 320, |_, _| Some((0.0, 1.0)));
        assert_eq!(plan.end, 320);
        assert_eq!(plan.time, 160.0);
        let of_first: u32 = plan.pieces.iter().filter(|p| p.holder.0 == 1).map(|p| p.end - p.start).sum();
        assert_eq!(of_first, 160);
    }

    /// A fast source that has only the beginning must not be asked for more, and a slow one fills the rest;
    /// a source that cannot be used ends the plan where it alone has blocks.
    #[test]
    fn sources_serve_what_they_have() {
        let found = index(100, &[(1, TierSet::HBM, 40), (2, TierSet::NVME, 90), (3, TierSet::NVME, 100)]);
        let cost = |holder: HolderId, _| match holder.0 {
            1 => Some((0.0, 1.0)),
            2 => Some((5.0, 20.0)),
            _ => None,
        };
        let plan = source_plan(&found, 10, 100, cost);
        assert_eq!(plan.end, 90);
        let mut at = 10;
        for piece in &plan.pieces {
            assert_eq!(piece.start, at, "pieces follow each other");
            assert_eq!(piece.holder.0, if piece.start < 40 { 1 } else { 2 });
            at = piece.end;
        }
        assert_eq!(at, 90);
        assert_eq!(plan.time, 5.0 + 50.0 * 20.0);
    }
}
