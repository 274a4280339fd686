//! One publisher's stream of batches: what of it may be applied, and applying it.
//!
//! Batches are numbered from 0 in each life of the publisher. A number that is
//! missing must be asked for; whether a publisher that was away is the same one is
//! told by its last batch, which holds its time. A state machine without sockets.

use std::hash::{DefaultHasher, Hash as _, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use terrace_index::events::{Event, decode};
use terrace_index::{Key, SizeClass};

use super::holders::{Holder, Holders};

/// Most ranks of one publisher.
const RANKS_MAX: usize = 64;

/// Counts of an engine, for metrics.
#[derive(Debug, Default)]
pub(super) struct Shown {
    pub(super) connected: AtomicBool,
    pub(super) batches: AtomicU64,
    pub(super) events: AtomicU64,
    /// Batches that were there before.
    pub(super) repeated: AtomicU64,
    /// Times that numbers were missing.
    pub(super) gaps: AtomicU64,
    /// Times that a publisher's blocks were forgotten, as it began a new life or what was missing could not be had.
    pub(super) forgotten: AtomicU64,
    /// Messages that are no batch.
    pub(super) bad: AtomicU64,
}

/// [`Shown`], read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) connected: bool,
    pub(super) batches: u64,
    pub(super) events: u64,
    pub(super) repeated: u64,
    pub(super) gaps: u64,
    pub(super) forgotten: u64,
    pub(super) bad: u64,
}

impl Shown {
    pub(super) fn row(&self) -> Row {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Row {
            connected: self.connected.load(Ordering::Relaxed),
            batches: read(&self.batches),
            events: read(&self.events),
            repeated: read(&self.repeated),
            gaps: read(&self.gaps),
            forgotten: read(&self.forgotten),
            bad: read(&self.bad),
        }
    }

    pub(super) fn count(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It was the next one.
    Applied,
    /// It was there before.
    Repeated,
    /// Batches before it are missing, this one first. Nothing was applied.
    Gap {
        /// The first that is missing.
        from: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Publisher {
    name: String,
    holders: Arc<Holders>,
    shown: Arc<Shown>,
    /// A holder for each rank. A publisher that gives none has one.
    ranks: Vec<(Option<u32>, Holder)>,
    /// The number that comes next; none before the first batch of a life.
    next: Option<u64>,
    /// Fingerprint of the batch before it.
    last: u64,
}

impl Publisher {
    /// One that has told nothing yet.
    pub(super) fn new(name: String, holders: Arc<Holders>, shown: Arc<Shown>) -> Self {
        Self { name, holders, shown, ranks: Vec::new(), next: None, last: 0 }
    }

    /// The number of the last batch that was applied.
    pub(super) fn last(&self) -> Option<u64> {
        self.next.map(|next| next - 1)
    }

    /// Whether this is the last batch that was applied, byte by byte.
    pub(super) fn is_last(&self, number: u64, payload: &[u8]) -> bool {
        self.last() == Some(number) && fingerprint(payload) == self.last
    }

    /// Applies a batch if it is the next one. The first of a life may have any number.
    pub(super) fn take(&mut self, number: u64, payload: &[u8]) -> Taken {
        match self.next {
            Some(next) if number < next => {
                Shown::count(&self.shown.repeated);
                return Taken::Repeated;
            }
            Some(next) if number > next => return Taken::Gap { from: next },
            Some(_) | None => {}
        }
        // A publisher counts from 0, and cannot have come to the end.
        let Some(next) = number.checked_add(1) else {
            Shown::count(&self.shown.bad);
            return Taken::Repeated;
        };
        (self.next, self.last) = (Some(next), fingerprint(payload));
        self.apply(payload);
        Taken::Applied
    }

    /// What it held is not to be believed any more; its next batch may have any number.
    pub(super) fn forget(&mut self) {
        if self.next.take().is_some() {
            Shown::count(&self.shown.forgotten);
        }
        self.ranks.clear();
    }

    /// A batch that cannot be read is passed over: what it says is late, and costs a miss at most.
    fn apply(&mut self, payload: &[u8]) {
        let batch = match decode(payload) {
            Ok(batch) => batch,
            Err(error) => {
                Shown::count(&self.shown.bad);
                tracing::debug!(engine = self.name, %error, "a batch of events cannot be read");
                return;
            }
        };
        Shown::count(&self.shown.batches);
        self.shown.events.fetch_add(batch.events.len() as u64, Ordering::Relaxed);
        match self.place(batch.rank) {
            Some(place) => apply(&self.holders, &self.ranks[place].1, &batch.events),
            None => Shown::count(&self.shown.bad),
        }
    }

    /// A rank's place, made if it is new; none if there are too many.
    fn place(&mut self, rank: Option<u32>) -> Option<usize> {
        let known = self.ranks.iter().position(|(known, _)| *known == rank);
        if known.is_some() || self.ranks.len() == RANKS_MAX {
            return known;
        }
        let name = rank.map_or_else(|| self.name.clone(), |rank| format!("{}#{rank}", self.name));
        self.ranks.push((rank, self.holders.take(name)?));
        Some(self.ranks.len() - 1)
    }
}

/// Applies events of one holder in their order, in one turn unless it is cleared in between.
pub(super) fn apply(holders: &Holders, holder: &Holder, events: &[Event]) {
    const MADE: &str = "the index was made for all publishers' holders";
    let keys = |blocks: &[u64]| -> Vec<Key> { blocks.iter().map(|block| Key::from_alias(*block)).collect() };
    // Of an engine with several groups of layers the first one speaks for all: only it has every block.
    let is_first = |group: &Option<u32>| group.unwrap_or(0) == 0;
    for part in events.split_inclusive(|event| *event == Event::Cleared) {
        let mut turn = holders.index().changes();
        for event in part {
            match event {
                Event::Stored(stored) if is_first(&stored.group) => {
                    let (tiers, size, blocks) = (stored.tiers, SizeClass::UNKNOWN, keys(&stored.blocks));
                    // Engines name a parent, but of a prompt's first block.
                    let told = match stored.parent.map(Key::from_alias) {
                        Some(parent) => turn.store_sized(holder.id(), tiers, size, Some(parent), &blocks),
                        None => turn.store_start(holder.id(), tiers, size, &blocks),
                    };
                    told.expect(MADE);
                }
                Event::Removed { blocks, tiers, group } if is_first(group) => {
                    turn.remove(holder.id(), *tiers, &keys(blocks)).expect(MADE);
                }
                Event::Stored(_) | Event::Removed { .. } | Event::Cleared => {}
            }
        }
        drop(turn);
        for event in part {
            if let Event::Stored(stored) = event {
                holders.learned().learn_event(stored);
            }
        }
        if part.last() == Some(&Event::Cleared) {
            holder.forget();
        }
    }
}

fn fingerprint(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use terrace_index::events::{Medium, Move, encode};
    use terrace_index::{Found, Index, Limits};

    use super::*;
    use crate::names::Names;

    fn publisher() -> (Publisher, Arc<Shown>) {
        let holders = 4 + super::super::ENGINE_HOLDERS_MAX;
        let index = Arc::new(Index::new(Limits { holders, bytes: 4 << 20 }));
        let (holders, shown) =
            (Arc::new(Holders::new(index, 4, Arc::new(Names::new(0)))), Arc::new(Shown::default()));
        (Publisher::new("a".to_owned(), holders, Arc::clone(&shown)), shown)
    }

    fn stored(parent: Option<u64>, blocks: &[u64], rank: Option<u32>) -> Vec<u8> {
        let medium = Medium::CpuPinned;
        encode(1.0, &[Move::Stored { parent, blocks, tokens: &[], block_size: 16, medium }], rank)
    }

    fn held(publisher: &Publisher, blocks: &[u64]) -> Vec<(String, u32)> {
        let keys: Vec<Key> = blocks.iter().map(|block| Key::from_alias(*block)).collect();
        let mut found = Found::new();
        publisher.holders.index().find(&keys, &mut found);
        let name = |held: &terrace_index::Held| publisher.holders.name(held.holder).unwrap();
        found.holders().iter().map(|held| (name(held), held.prefix[2])).collect()
    }

    /// Batches that are applied twice, out of order or over a hole would credit blocks that are gone: each
    /// number counts once and in order, a hole is named, and after it nothing is believed.
    #[test]
    fn batches_count_once_and_in_order() {
        let (mut publisher, shown) = publisher();
        assert_eq!(publisher.take(7, &stored(None, &[1, 2], None)), Taken::Applied, "it was followed late");
        assert_eq!(publisher.take(7, &stored(None, &[9], None)), Taken::Repeated);
        assert_eq!(publisher.take(9, &stored(Some(2), &[4], None)), Taken::Gap { from: 8 });
        assert_eq!(held(&publisher, &[1, 2, 4]), [("a".to_owned(), 2)]);
        assert_eq!(publisher.take(8, &stored(Some(2), &[3], None)), Taken::Applied);
        assert_eq!(publisher.take(9, &stored(Some(3), &[4], None)), Taken::Applied);
        assert_eq!(held(&publisher, &[1, 2, 3, 4]), [("a".to_owned(), 4)]);
        publisher.forget();
        assert!(held(&publisher, &[1, 2, 3, 4]).is_empty());
        assert_eq!(publisher.take(0, &stored(None, &[5], None)), Taken::Applied, "a new life");
        let row = shown.row();
        assert_eq!((row.batches, row.repeated, row.forgotten, row.bad), (4, 1, 1, 0));
        assert_eq!(publisher.take(u64::MAX, &[]), Taken::Gap { from: 1 });
        publisher.forget();
        assert_eq!(publisher.take(u64::MAX, &[]), Taken::Repeated, "no publisher comes so far");
    }

    /// A publisher that was restarted and has come to the same number would be taken for the old one: the bytes of
    /// the last batch tell.
    #[test]
    fn the_last_batch_tells_lives_apart() {
        let (mut publisher, _) = publisher();
        let (one, two) = (stored(None, &[1], None), stored(None, &[2], None));
        assert!(!publisher.is_last(0, &one));
        publisher.take(0, &one);
        assert!(publisher.is_last(0, &one) && !publisher.is_last(0, &two) && !publisher.is_last(1, &one));
    }

    /// Ranks of one engine have caches of their own, and what is cleared by one stays with the others; a batch that is
    /// no `MessagePack` is counted and costs nothing else.
    #[test]
    fn ranks_are_holders_of_their_own() {
        let (mut publisher, shown) = publisher();
        publisher.take(0, &stored(None, &[1, 2], Some(0)));
        publisher.take(1, &stored(None, &[1], Some(1)));
        assert_eq!(publisher.take(2, b"\xc1nothing"), Taken::Applied);
        let expected = [("a#0".to_owned(), 2), ("a#1".to_owned(), 1)];
        assert_eq!(held(&publisher, &[1, 2]), expected);
        publisher.take(3, &encode(1.0, &[Move::Cleared], Some(0)));
        assert_eq!(held(&publisher, &[1, 2]), expected[1..]);
        assert_eq!((shown.row().bad, shown.row().batches), (1, 3));
        for rank in 2..80 {
            publisher.take(2 + u64::from(rank), &stored(None, &[1], Some(rank)));
        }
        assert_eq!(publisher.ranks.len(), RANKS_MAX);
    }
}
