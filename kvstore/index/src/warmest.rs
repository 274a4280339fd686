//! What of an index is warm, for people: its runs by their heat, and what they go on from.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::atomic::Ordering;

use crate::ids::{HolderId, Key};
use crate::index::Index;
use crate::run::{Next, heat_at, holder_of, size_of_record};
use crate::write::all_of;

/// Runs that are looked at in one turn; writers take theirs in between.
const TURN: u32 = 4096;
/// Most holders that are named of a run.
pub const HOLDERS_SHOWN: usize = 8;

/// A run: blocks that follow each other, as they were looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Its number, which it keeps as long as it has blocks.
    pub number: u32,
    /// The number of the run it goes on from; 0 if none is known.
    pub parent: u32,
    /// Its first block.
    pub first: Key,
    /// Its blocks.
    pub blocks: u32,
    /// Pairs of block and holder.
    pub entries: u64,
    /// Entries in `Hbm`, `Pinned` and `Nvme`; one may be in several.
    pub tiers: [u64; 3],
    /// At most so many bytes; 0 where nobody said how long blocks are.
    pub bytes_max: u64,
    /// Heat of its warmest holder, 0 to 63.
    pub heat: u8,
    /// Who has a part of it, at most [`HOLDERS_SHOWN`] of them.
    pub holders: Vec<HolderId>,
    /// How many have.
    pub holders_count: u32,
}

impl Index {
    /// The `count` warmest runs, warmest first; of equals the one that is held most. With `with_parents`, what these
    /// go on from as well, at most eight times as many in all. Looks at every run, a few thousand in a turn, so that
    /// writers wait for no longer; what changes meanwhile may be seen before or after.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn warmest(&self, count: usize, with_parents: bool) -> Vec<Stretch> {
        let mut warmest = BinaryHeap::new();
        let mut start = 1;
        while start < self.tables.runs.items() {
            let writer = self.guard();
            let end = self.tables.runs.items().min(start + TURN);
            for number in start..end {
                let Some(rank) = self.rank(number, writer.clock) else { continue };
                warmest.push(Reverse((rank, number)));
                if warmest.len() > count {
                    warmest.pop();
                }
            }
            drop(writer);
            start = end;
        }
        let mut numbers: Vec<_> = warmest.into_iter().map(|Reverse(found)| found).collect();
        numbers.sort_unstable_by(|one, two| two.cmp(one));
        let mut found: BTreeMap<u32, usize> = BTreeMap::new();
        let mut stretches = Vec::new();
        let most = if with_parents { count.saturating_mul(8) } else { count };
        for (_, mut number) in numbers {
            while number != 0 && stretches.len() < most && !found.contains_key(&number) {
                let Some(stretch) = self.stretch(number) else { break };
                found.insert(number, stretches.len());
                number = if with_parents { stretch.parent } else { 0 };
                stretches.push(stretch);
            }
        }
        stretches
    }

    /// Heat and entries of a run; none if it has no blocks.
    fn rank(&self, number: u32, clock: u32) -> Option<(u64, u64)> {
        let run = self.tables.runs.at(number);
        let (mut heat, mut entries) = (0, 0);
        if run.live.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.tables.each_record(run, |record| {
            let about = record[0].load(Ordering::Relaxed);
            if holder_of(about).is_some() {
                heat = heat.max(heat_at(about, clock));
                entries += u64::from(all_of(record).count_ones());
            }
            Next::Go
        });
        Some((heat, entries))
    }

    fn stretch(&self, number: u32) -> Option<Stretch> {
        let writer = self.guard();
        let run = self.tables.runs.at(number);
        let live = run.live.load(Ordering::Relaxed);
        let first = self.tables.key(run, live.trailing_zeros().min(63))?;
        let (heat, entries) = self.rank(number, writer.clock)?;
        let mut stretch = Stretch {
            number,
            parent: writer.parent(number).map_or(0, |place| place.run),
            first,
            blocks: live.count_ones(),
            entries,
            tiers: [0; 3],
            bytes_max: 0,
            heat: u8::try_from(heat).unwrap_or(u8::MAX),
            holders: Vec::new(),
            holders_count: 0,
        };
        self.tables.each_record(run, |record| {
            let about = record[0].load(Ordering::Relaxed);
            if let Some(holder) = holder_of(about).filter(|_| all_of(record) != 0) {
                if stretch.holders.len() < HOLDERS_SHOWN {
                    stretch.holders.push(holder);
                }
                stretch.holders_count += 1;
                for (tier, word) in stretch.tiers.iter_mut().zip(&record[1..]) {
                    *tier += u64::from(word.load(Ordering::Relaxed).count_ones());
                }
                stretch.bytes_max = stretch.bytes_max.max(size_of_record(about).bytes_max());
            }
            Next::Go
        });
        stretch.bytes_max = stretch.bytes_max.saturating_mul(u64::from(stretch.blocks));
        Some(stretch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Limits, SizeClass, TierSet};

    fn chain(start: u64, count: u64) -> Vec<Key> {
        (start..start + count).map(Key::from_alias).collect()
    }

    /// An operator would look at the wrong prefixes: the warmest must come first whatever was stored last, with what
    /// it goes on from, and never more than were asked for.
    #[test]
    fn the_warmest_come_first_with_their_parents() {
        let index = Index::new(Limits { holders: 16, bytes: 16 << 20 });
        assert!(index.warmest(10, true).is_empty());
        let (trunk, one, two) = (chain(0, 64), chain(1000, 64), chain(2000, 64));
        let size = SizeClass::of_bytes(4096);
        for holder in 0..12 {
            index.store_sized(HolderId(holder), TierSet::PINNED, size, None, &trunk).unwrap();
        }
        index.store(HolderId(0), TierSet::NVME, Some(trunk[63]), &one).unwrap();
        index.store(HolderId(1), TierSet::HBM, Some(trunk[63]), &two).unwrap();
        for _ in 0..5 {
            index.touch(HolderId(0), &[&trunk[..], &one].concat()).unwrap();
        }
        for start in 0..100 {
            index.store(HolderId(2), TierSet::PINNED, None, &chain(10_000 + start * 100, 1)).unwrap();
        }
        let hot = index.warmest(2, false);
        let firsts: Vec<Key> = hot.iter().map(|stretch| stretch.first).collect();
        assert_eq!(firsts, [trunk[0], one[0]], "{hot:?}");
        assert_eq!(
            (hot[0].holders.len(), hot[0].holders_count, hot[0].entries),
            (HOLDERS_SHOWN, 12, 12 * 64)
        );
        assert_eq!((hot[0].tiers, hot[0].bytes_max, hot[0].blocks), ([0, 12 * 64, 0], 64 * 4096, 64));
        assert_eq!((hot[1].tiers, hot[1].parent, hot[0].parent), ([0, 0, 64], hot[0].number, 0));
        assert!(hot[0].heat > 0 && hot[1].heat > 0);
        index.remove(HolderId(0), TierSet::ALL, &one).unwrap();
        for holder in 0..12 {
            index.remove(HolderId(holder), TierSet::ALL, &trunk[1..]).unwrap();
        }
        let left = index.warmest(1000, true);
        assert_eq!(left.len(), 102, "a part of the trunk, one branch, and the single ones");
        for _ in 0..9 {
            index.touch(HolderId(1), &two).unwrap();
        }
        let tree = index.warmest(1, true);
        assert_eq!(tree[0].first, two[0]);
        assert!(tree.len() <= 2 && tree[1..].iter().all(|stretch| stretch.number == tree[0].parent));
    }
}
