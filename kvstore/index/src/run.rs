//! Runs: up to 64 consecutive blocks of a chain, their keys, and a record for each holder.
//!
//! Only the writer changes a run; readers look at any time. Every reuse of a place (a freed run, an extent,
//! a key's slot) moves the run's fence first, so a reader that sees the same fence before and after has
//! seen one state of each word, and none of another run.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::directory::Directory;
use crate::ids::{HolderId, Key, SizeClass, TierSet};
use crate::pool::{Extent, Pool, Slab};

/// Blocks in a run: one bit each in a word.
pub(crate) const RUN_BLOCKS: u32 = 64;
/// Runs of one index: what is left of 32 bits beside the position.
pub(crate) const RUNS_MAX: u64 = 1 << 26;
pub(crate) const EXTENT_KEYS: u32 = 8;
const KEY_EXTENTS: usize = (RUN_BLOCKS / EXTENT_KEYS) as usize;
/// Words of a record: what it is about, and a bit for each block in each tier.
pub(crate) const RECORD_WORDS: usize = 4;
pub(crate) const EXTENT_RECORDS: u32 = 4;
/// What a holder has of a run.
pub(crate) type Record = [AtomicU64; RECORD_WORDS];
const _: () = assert!(EXTENT_RECORDS as usize * RECORD_WORDS == Extent::WORDS);

/// Two cache lines a run, next to each other: all that a look-up needs of a run that one holder has whole.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub(crate) struct Run {
    /// Blocks that somebody holds.
    pub(crate) live: AtomicU64,
    /// The first extent of records, and the records in the chain, those without a holder included.
    pub(crate) chain: AtomicU64,
    pub(crate) fence: AtomicU32,
    /// The last extent of records, for the writer.
    pub(crate) tail: AtomicU32,
    /// Records in the chain that have a holder, for the writer.
    pub(crate) holders: AtomicU32,
    /// The run that probably goes on from the last block of this one; 0 if none was seen.
    pub(crate) next: AtomicU32,
    /// The first record; without a holder at times.
    pub(crate) first: Record,
    /// Extents of eight keys each.
    pub(crate) keys: [AtomicU32; KEY_EXTENTS],
    /// The key of the last live block, both halves; for a moment that of one that is just becoming it, or was it.
    pub(crate) last: [AtomicU64; 2],
}

const _: () = assert!(size_of::<Run>() == 128);

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) run: u32,
    pub(crate) position: u32,
}

impl Place {
    pub(crate) const fn of(bits: u32) -> Self {
        Self { run: bits / RUN_BLOCKS, position: bits % RUN_BLOCKS }
    }

    pub(crate) const fn bits(self) -> u32 {
        self.run * RUN_BLOCKS + self.position
    }
}

/// Everything that readers see.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) pool: Pool,
    pub(crate) runs: Slab<Run>,
    /// Where the blocks are that follow none in their run: a look-up gets to all others from these.
    pub(crate) directory: Directory,
    /// Where others are, as far as somebody may ask for them by their keys alone.
    pub(crate) inner: Directory,
}

impl Tables {
    pub(crate) fn bytes(&self) -> u64 {
        self.pool.bytes() + self.runs.bytes() + self.directory.bytes() + self.inner.bytes()
    }

    /// The key in a slot, whether its block is live or not; none if the slot never held one.
    #[inline]
    pub(crate) fn key(&self, run: &Run, position: u32) -> Option<Key> {
        let extent = run.keys[(position / EXTENT_KEYS) as usize].load(Ordering::Acquire);
        if extent == 0 {
            return None;
        }
        let at = (position % EXTENT_KEYS) as usize * 2;
        let words = self.pool.at(extent);
        Some(Key { low: words[at].load(Ordering::Relaxed), high: words[at + 1].load(Ordering::Relaxed) })
    }

    /// Writes a key into a slot whose extent is there.
    pub(crate) fn set_key(&self, run: &Run, position: u32, key: Key) {
        let extent = run.keys[(position / EXTENT_KEYS) as usize].load(Ordering::Relaxed);
        let at = (position % EXTENT_KEYS) as usize * 2;
        let words = self.pool.at(extent);
        words[at].store(key.low, Ordering::Relaxed);
        words[at + 1].store(key.high, Ordering::Relaxed);
    }

    /// Where a live block is, and the run's fence from before, if it is one that the first directory has.
    #[inline]
    pub(crate) fn locate(&self, key: Key) -> Option<(Place, u32)> {
        self.locate_in(&self.directory, key)
    }

    /// The same of the other directory.
    pub(crate) fn locate_inner(&self, key: Key) -> Option<(Place, u32)> {
        self.locate_in(&self.inner, key)
    }

    #[inline]
    fn locate_in(&self, directory: &Directory, key: Key) -> Option<(Place, u32)> {
        directory.find(&self.pool, key.hash(), |bits| {
            let place = Place::of(bits);
            // Overflow that was reused under a reader's eyes has any number in it.
            let run = self.runs.get(place.run)?;
            let seen = run.fence.load(Ordering::Acquire);
            let live = run.live.load(Ordering::Acquire) >> place.position & 1 == 1;
            (live && self.key(run, place.position) == Some(key)).then_some((place, seen))
        })
    }

    /// Whether a place holds this block, and it lives.
    #[inline]
    pub(crate) fn is_at(&self, place: Place, key: Key) -> bool {
        let run = self.runs.at(place.run);
        run.live.load(Ordering::Relaxed) >> place.position & 1 == 1
            && self.key(run, place.position) == Some(key)
    }

    /// Where a block probably is; to be compared with its key.
    #[inline]
    pub(crate) fn guess(&self, key: Key) -> Option<Place> {
        self.directory.guess(key.hash()).map(Place::of)
    }

    /// Calls `act` with the words of every record, those without a holder included, until it says stop.
    #[inline]
    pub(crate) fn each_record(&self, run: &Run, mut act: impl FnMut(&Record) -> Next) {
        if matches!(act(&run.first), Next::Go) {
            self.each_in_chain(run, act);
        }
    }

    /// The records behind the first.
    #[inline]
    pub(crate) fn each_in_chain(&self, run: &Run, mut act: impl FnMut(&Record) -> Next) {
        let (mut extent, mut left) = chain_of(run.chain.load(Ordering::Acquire));
        while extent != 0 {
            let (records, _) = self.pool.at(extent).as_chunks::<RECORD_WORDS>();
            for record in records.iter().take(left as usize) {
                if matches!(act(record), Next::Stop) {
                    return;
                }
            }
            left = left.saturating_sub(EXTENT_RECORDS);
            extent = if left == 0 { 0 } else { self.pool.next(extent) };
        }
    }

    /// The record of a holder, if it is in the chain.
    #[inline]
    pub(crate) fn record(&self, run: &Run, holder: HolderId) -> Option<&Record> {
        let (mut extent, mut left) = chain_of(run.chain.load(Ordering::Acquire));
        while extent != 0 {
            let (records, _) = self.pool.at(extent).as_chunks::<RECORD_WORDS>();
            let mut those = records.iter().take(left as usize);
            if let Some(found) =
                those.find(|record| holder_of(record[0].load(Ordering::Relaxed)) == Some(holder))
            {
                return Some(found);
            }
            left = left.saturating_sub(EXTENT_RECORDS);
            extent = if left == 0 { 0 } else { self.pool.next(extent) };
        }
        None
    }
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Go,
    Stop,
}

impl Run {
    /// Moves the fence: what follows may reuse places that a reader is looking at.
    pub(crate) fn move_fence(&self) {
        let moved = self.fence.load(Ordering::Relaxed).wrapping_add(1);
        self.fence.store(moved, Ordering::Release);
        fence(Ordering::Release);
    }

    /// Whether nothing was reused since the fence was `seen`.
    #[inline]
    pub(crate) fn is_unmoved(&self, seen: u32) -> bool {
        fence(Ordering::Acquire);
        self.fence.load(Ordering::Relaxed) == seen
    }

    /// Moves the hint, which readers do not trust.
    #[inline]
    pub(crate) fn set_next(&self, next: u32) {
        if self.next.load(Ordering::Relaxed) != next {
            self.next.store(next, Ordering::Release);
        }
    }

    /// Notes the key of the last live block.
    #[inline]
    pub(crate) fn set_last(&self, key: Key) {
        self.last[0].store(key.low, Ordering::Relaxed);
        self.last[1].store(key.high, Ordering::Relaxed);
    }

    /// Whether the last live block is this one. No may be wrong for a moment.
    #[inline]
    pub(crate) fn ends_with(&self, key: Key) -> bool {
        let [low, high] = &self.last;
        low.load(Ordering::Relaxed) == key.low && high.load(Ordering::Relaxed) == key.high
    }

    /// The position after the last live block.
    #[inline]
    pub(crate) fn end(&self) -> u32 {
        u64::BITS - self.live.load(Ordering::Relaxed).leading_zeros()
    }
}

/// First extent and number of records.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "both halves are 32 bits")]
pub(crate) const fn chain_of(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

pub(crate) fn chain_word(extent: u32, records: u32) -> u64 {
    u64::from(extent) << 32 | u64::from(records)
}

const HOLDER_SHIFT: u32 = 44;
const SIZE_SHIFT: u32 = 38;
const HEAT_SHIFT: u32 = 32;
const SIX_BITS: u64 = 63;
/// Operations of the index after which a heat is half.
const HALF_LIFE_SHIFT: u32 = 17;
/// What a use adds to a heat, which is at most 63.
const HEAT_OF_USE: u64 = 4;

/// The holder that a record is of.
#[inline]
pub(crate) const fn holder_of(about: u64) -> Option<HolderId> {
    let number = about >> HOLDER_SHIFT;
    if number == 0 { None } else { Some(HolderId(number as u32 - 1)) }
}

/// A record's first word: holder, size class, heat, and the operation of its last use.
pub(crate) fn about(holder: HolderId, size: SizeClass, clock: u32) -> u64 {
    (u64::from(holder.0) + 1) << HOLDER_SHIFT
        | size.bits() << SIZE_SHIFT
        | HEAT_OF_USE << HEAT_SHIFT
        | u64::from(clock)
}

/// The word after another use. A size that nobody said stays what it was.
pub(crate) fn used(about: u64, size: SizeClass, clock: u32) -> u64 {
    let heat = (heat_at(about, clock) + HEAT_OF_USE).min(SIX_BITS);
    let size = if size == SizeClass::UNKNOWN { about >> SIZE_SHIFT & SIX_BITS } else { size.bits() };
    about >> HOLDER_SHIFT << HOLDER_SHIFT | size << SIZE_SHIFT | heat << HEAT_SHIFT | u64::from(clock)
}

pub(crate) fn size_of_record(about: u64) -> SizeClass {
    SizeClass::from_bits(about >> SIZE_SHIFT & SIX_BITS)
}

/// The heat at an operation, 0 to 63.
#[inline]
pub(crate) fn heat_at(about: u64, clock: u32) -> u64 {
    (about >> HEAT_SHIFT & SIX_BITS) >> (age_at(about, clock) >> HALF_LIFE_SHIFT).min(31)
}

/// Operations since the last use.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the low half is the operation")]
pub(crate) const fn age_at(about: u64, clock: u32) -> u32 {
    clock.wrapping_sub(about as u32)
}

/// The bits of a mask in the tiers of a set, in the order of [`Tier::ALL`](crate::Tier::ALL).
pub(crate) fn in_tiers(tiers: TierSet, mask: u64) -> [u64; 3] {
    crate::Tier::ALL.map(|tier| if tiers.has(tier) { mask } else { 0 })
}
