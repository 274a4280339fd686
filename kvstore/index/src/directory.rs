//! From a key's hash to where the key is: run and position in one 32-bit place.
//!
//! Linear hashing: one bucket at a time is split while the table grows, so that no store pays for a
//! rebuild. A bucket is one cache line of ten entries and a link to overflow. An entry keeps a
//! part of its hash; the key itself lies where the entry points. Entries never move but when their bucket is split; a
//! reader that missed looks again if a split came between.

use std::hint::black_box;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::pool::{FreeExtents, Pool, Slab};
use crate::write::positions;

/// Entries wanted in a bucket, on average. Buckets that wait for their split have up to twice as many.
const LOAD: u32 = 4;
const SLOTS: usize = 10;
/// Lines that are loaded side by side, at most.
const WARMED_MAX: usize = 64;
/// While there are few buckets a tag is 16 bits of the hash from this one on, so that it says where an entry
/// goes when its bucket is split; the smallest table has as many buckets.
const FIRST_BITS: u32 = 10;
/// The first of the high bits.
const HIGH_BITS: u32 = 16;
/// From a bucket's split to this level on it is the high bits, which say as much up to the largest table, and
/// differ between entries of one bucket where the low ones do no longer.
const HIGH_LEVEL: u32 = 19;

/// Ten entries: a place (0 if there is none) and the tag of its key's hash; and the first overflow extent.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Bucket {
    places: [AtomicU32; SLOTS],
    tags: [AtomicU16; SLOTS],
    overflow: AtomicU32,
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// An entry's place in memory, in a bucket's line or in its overflow.
enum Slot<'a> {
    Own(&'a AtomicU32, &'a AtomicU16),
    Over(&'a AtomicU64),
}

impl Slot<'_> {
    /// Tag and place; place 0 if there is none.
    fn entry(&self) -> (u16, u32) {
        match self {
            Self::Own(place, tag) => (tag.load(Ordering::Relaxed), place.load(Ordering::Relaxed)),
            Self::Over(word) => entry_of(word.load(Ordering::Relaxed)),
        }
    }

    /// The place last: who sees it sees the tag, and the key that it points to.
    fn set(&self, (tag, place): (u16, u32)) {
        match self {
            Self::Own(places, tags) => {
                tags.store(tag, Ordering::Relaxed);
                places.store(place, Ordering::Release);
            }
            Self::Over(word) => word.store(word_of(tag, place), Ordering::Release),
        }
    }

    fn clear(&self) {
        match self {
            Self::Own(place, _) => place.store(0, Ordering::Release),
            Self::Over(word) => word.store(0, Ordering::Release),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Directory {
    buckets: Slab<Bucket>,
    /// Buckets in use in the low half; a bucket's number is the hash's low bits. The high half counts the
    /// times that entries moved within a bucket.
    shape: AtomicU64,
    tags: Tags,
}

/// What becomes of tags as the table grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tags {
    /// They become the hash's high bits, so that few look-ups are misled by them. Keys are read then.
    Change,
    /// They stay, and say less the larger the table is.
    Stay,
}

impl Directory {
    pub(crate) fn new(buckets_max: u64, tags: Tags) -> Self {
        let most = match tags {
            Tags::Change => 1 << 31,
            Tags::Stay => 1 << (FIRST_BITS + u16::BITS),
        };
        let buckets = Slab::new(buckets_max.min(most));
        let first = buckets.grow().expect("a slab has room for one segment");
        assert!(first.end >= 1 << FIRST_BITS, "a segment of buckets has fewer than a tag needs");
        Self { buckets, shape: AtomicU64::new(u64::from(first.end)), tags }
    }

    /// The bucket and the tag of a hash while `count` buckets are in use.
    #[inline]
    fn home_of(&self, hash: u32, count: u32) -> (u32, u16) {
        match self.tags {
            Tags::Change => home_of(hash, count),
            Tags::Stay => (bucket_of(hash, count), tag_of(hash, FIRST_BITS)),
        }
    }

    fn count(&self) -> u32 {
        low_of(self.shape.load(Ordering::Relaxed))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.buckets.bytes()
    }

    /// The first place under `hash` that `accept` takes.
    #[inline]
    pub(crate) fn find<T>(
        &self,
        pool: &Pool,
        hash: u32,
        mut accept: impl FnMut(u32) -> Option<T>,
    ) -> Option<T> {
        loop {
            let shape = self.shape.load(Ordering::Acquire);
            let (number, tag) = self.home_of(hash, low_of(shape));
            let bucket = self.buckets.at(number);
            for (kept, place) in bucket.tags.iter().zip(&bucket.places) {
                if kept.load(Ordering::Relaxed) == tag {
                    let place = place.load(Ordering::Acquire);
                    if place != 0
                        && let Some(found) = accept(place)
                    {
                        return Some(found);
                    }
                }
            }
            let mut extent = bucket.overflow.load(Ordering::Acquire);
            while extent != 0 {
                if let Some(found) = search(pool.at(extent), tag, &mut accept) {
                    return Some(found);
                }
                extent = pool.next(extent);
            }
            fence(Ordering::Acquire);
            // Each round follows a split of the writer's, so this ends even if the writer does not.
            if self.shape.load(Ordering::Relaxed) == shape {
                return None;
            }
        }
    }

    /// Loads the lines that look-ups, changes or both will need, side by side: where they are is worked out before, so that
    /// nothing but loads stands between the loads.
    #[inline]
    pub(crate) fn warm(&self, hashes: impl Iterator<Item = u32>) {
        let count = self.count();
        let first = self.buckets.at(0);
        let mut lines = [first; WARMED_MAX];
        let mut warmed = 0;
        for (line, hash) in lines.iter_mut().zip(hashes) {
            *line = self.buckets.at(bucket_of(hash, count));
            warmed += 1;
        }
        let overflow = |line: &&Bucket| line.overflow.load(Ordering::Relaxed);
        black_box(lines[..warmed].iter().fold(0, |sum, line| sum ^ overflow(line)));
    }

    /// Whether a key of this hash may be in it; no is certain, for the writer.
    #[inline]
    pub(crate) fn may_have(&self, hash: u32) -> bool {
        let (number, tag) = self.home_of(hash, self.count());
        let bucket = self.buckets.at(number);
        let same = mask_of(|slot| bucket.tags[slot].load(Ordering::Relaxed) == tag);
        same != 0 || bucket.overflow.load(Ordering::Relaxed) != 0
    }

    /// The bucket that a hash belongs to now.
    #[inline]
    pub(crate) fn bucket(&self, hash: u32) -> u32 {
        bucket_of(hash, self.count())
    }

    /// By how much a bucket's number is shifted to get one of so many bits.
    pub(crate) fn shift(&self, bits: u32) -> u32 {
        self.count().next_power_of_two().ilog2().saturating_sub(bits)
    }

    /// A place that a key of this hash may be at. Overflow is not looked at.
    #[inline]
    pub(crate) fn guess(&self, hash: u32) -> Option<u32> {
        let (number, tag) = self.home_of(hash, self.count());
        let bucket = self.buckets.at(number);
        let mut entries = bucket.tags.iter().zip(&bucket.places);
        entries.find_map(|(kept, place)| {
            let is_it = kept.load(Ordering::Relaxed) == tag;
            Some(place.load(Ordering::Acquire)).filter(|place| is_it && *place != 0)
        })
    }

    /// Adds an entry. May take one extent.
    pub(crate) fn insert(&self, pool: &Pool, free: &mut FreeExtents, hash: u32, place: u32) {
        let (number, tag) = self.home_of(hash, self.count());
        put(self.buckets.at(number), pool, free, (tag, place));
    }

    /// Takes an entry out. Its tag counts, too: a place whose last key has not been taken out yet may have another entry, and
    /// entries go where their tags say when their bucket is split.
    ///
    /// # Panics
    /// If it is not there: two structures of ours disagree.
    pub(crate) fn remove(&self, pool: &Pool, hash: u32, place: u32) {
        let (number, tag) = self.home_of(hash, self.count());
        let bucket = self.buckets.at(number);
        let is_it = mask_of(|slot| bucket.own(slot).entry() == (tag, place));
        if let Some(slot) = ones_of(is_it).next() {
            return bucket.own(slot).clear();
        }
        let mut extent = bucket.overflow.load(Ordering::Relaxed);
        loop {
            assert!(extent != 0, "every live block is in the directory");
            let mut words = pool.at(extent).iter();
            if let Some(word) = words.find(|word| entry_of(word.load(Ordering::Relaxed)) == (tag, place)) {
                return word.store(0, Ordering::Release);
            }
            extent = pool.next(extent);
        }
    }

    /// Entries of all buckets.
    #[cfg(test)]
    pub(crate) fn entries(&self, pool: &Pool) -> u64 {
        let mut entries = 0;
        for bucket in 0..self.count() {
            each(self.buckets.at(bucket), pool, |slot| entries += u64::from(slot.entry().1 != 0));
        }
        entries
    }

    /// Whether so many entries are many.
    #[inline]
    pub(crate) fn is_full(&self, entries: u64) -> bool {
        entries > u64::from(self.count()) * u64::from(LOAD)
    }

    /// Splits buckets while there are so many entries that it pays, at most so many. `grow` says whether memory may be taken,
    /// `hash_at` what the hash of the key at a place is.
    pub(crate) fn keep_up(
        &self,
        pool: &Pool,
        free: &mut FreeExtents,
        (entries, splits_max): (u64, u32),
        grow: impl Fn(u64) -> bool,
        hash_at: impl Fn(u32) -> u32,
    ) {
        let wanted = u32::try_from(entries.div_ceil(u64::from(LOAD))).unwrap_or(u32::MAX);
        // Those that are split next lie behind each other.
        let first = self.count();
        let last = wanted.min(first.saturating_add(splits_max));
        if last > first + 1 {
            self.warm((first..last).map(|count| bucket_of(count, count)));
        }
        for count in first..last {
            if count == self.buckets.items()
                && (!grow(self.buckets.segment_bytes()) || self.buckets.grow().is_none())
            {
                return;
            }
            let old = self.buckets.at(bucket_of(count, count));
            // Two halves of a chain need at most an extent more each than the chain has. Only keys that were made to
            // collide have long ones.
            if 2 * chain_extents(old, pool) + 2 > free.len() {
                return;
            }
            self.split(pool, free, count, &hash_at);
        }
    }

    /// Copies what belongs into the new bucket, shows it, and then takes it out of the old one. Where tags change, the
    /// old bucket's are copied, too.
    fn split(&self, pool: &Pool, free: &mut FreeExtents, count: u32, hash_at: impl Fn(u32) -> u32) {
        let (old, new) = (self.buckets.at(bucket_of(count, count)), self.buckets.at(count));
        let level = count.ilog2();
        let changes = self.tags == Tags::Change;
        if changes && level + 1 == HIGH_LEVEL {
            let mut before = Vec::new();
            each(old, pool, |slot| before.extend(Some(slot).filter(|slot| slot.entry().1 != 0)));
            for (_, place) in before.iter().map(Slot::entry) {
                let (number, tag) = home_of(hash_at(place), count + 1);
                put(if number == count { new } else { old }, pool, free, (tag, place));
            }
            self.shape.fetch_add(1, Ordering::Release);
            fence(Ordering::Release);
            before.iter().for_each(Slot::clear);
        } else {
            let first = if !changes || level < HIGH_LEVEL { FIRST_BITS } else { HIGH_BITS };
            let moves = |(tag, place): (u16, u32)| place != 0 && tag >> (level - first) & 1 == 1;
            if old.overflow.load(Ordering::Relaxed) == 0 {
                return self.split_own(old, new, moves);
            }
            each(old, pool, |slot| {
                if moves(slot.entry()) {
                    put(new, pool, free, slot.entry());
                }
            });
            self.shape.fetch_add(1, Ordering::Release);
            fence(Ordering::Release);
            each(old, pool, |slot| {
                if moves(slot.entry()) {
                    slot.clear();
                }
            });
        }
        self.shorten(old, pool, free);
    }

    /// A split of a bucket without overflow, which most are. The new one is empty.
    fn split_own(&self, old: &Bucket, new: &Bucket, moves: impl Fn((u16, u32)) -> bool) {
        let entries: [(u16, u32); SLOTS] = std::array::from_fn(|slot| old.own(slot).entry());
        let mask = mask_of(|slot| moves(entries[slot]));
        for (slot, target) in ones_of(mask).zip(0..) {
            new.own(target).set(entries[slot]);
        }
        self.shape.fetch_add(1, Ordering::Release);
        fence(Ordering::Release);
        ones_of(mask).for_each(|slot| old.own(slot).clear());
    }

    /// Frees the overflow of a bucket whose own slots can take all of it: copies, says so, then unlinks.
    fn shorten(&self, bucket: &Bucket, pool: &Pool, free: &mut FreeExtents) {
        let first = bucket.overflow.load(Ordering::Relaxed);
        let mut entries = 0;
        each(bucket, pool, |slot| entries += usize::from(slot.entry().1 != 0));
        if first == 0 || entries > SLOTS {
            return;
        }
        let mut extent = first;
        while extent != 0 {
            for word in pool.at(extent) {
                let entry = entry_of(word.load(Ordering::Relaxed));
                if entry.1 != 0 {
                    let empty = own(bucket).find(|slot| slot.entry().1 == 0);
                    empty.expect("as many are free as are needed").set(entry);
                }
            }
            extent = pool.next(extent);
        }
        self.shape.fetch_add(1 << 32, Ordering::Release);
        fence(Ordering::Release);
        bucket.overflow.store(0, Ordering::Relaxed);
        extent = first;
        while extent != 0 {
            let next = pool.next(extent);
            free.give(extent);
            extent = next;
        }
    }
}

impl Bucket {
    #[inline]
    fn own(&self, slot: usize) -> Slot<'_> {
        Slot::Own(&self.places[slot], &self.tags[slot])
    }
}

/// A bit for each slot that is so. Which ones are is as good as drawn, so nothing is branched on them one by one.
#[inline]
fn mask_of(is_so: impl Fn(usize) -> bool) -> u32 {
    (0..SLOTS).fold(0, |mask, slot| mask | u32::from(is_so(slot)) << slot)
}

/// The slots of a mask.
#[inline]
fn ones_of(mask: u32) -> impl Iterator<Item = usize> {
    positions(mask.into()).map(|slot| slot as usize)
}

fn own(bucket: &Bucket) -> impl Iterator<Item = Slot<'_>> {
    (0..SLOTS).map(|slot| bucket.own(slot))
}

fn each<'a>(bucket: &'a Bucket, pool: &'a Pool, mut act: impl FnMut(Slot<'a>)) {
    own(bucket).for_each(&mut act);
    let mut extent = bucket.overflow.load(Ordering::Acquire);
    while extent != 0 {
        pool.at(extent).iter().map(Slot::Over).for_each(&mut act);
        extent = pool.next(extent);
    }
}

/// Extents of a bucket's overflow.
fn chain_extents(bucket: &Bucket, pool: &Pool) -> usize {
    let (mut extents, mut extent) = (0, bucket.overflow.load(Ordering::Acquire));
    while extent != 0 {
        extents += 1;
        extent = pool.next(extent);
    }
    extents
}

fn put(bucket: &Bucket, pool: &Pool, free: &mut FreeExtents, (tag, place): (u16, u32)) {
    let empty = mask_of(|slot| bucket.places[slot].load(Ordering::Relaxed) == 0);
    if let Some(slot) = ones_of(empty).next() {
        return bucket.own(slot).set((tag, place));
    }
    let first = bucket.overflow.load(Ordering::Relaxed);
    let mut extent = first;
    while extent != 0 {
        if let Some(word) = pool.at(extent).iter().find(|word| word.load(Ordering::Relaxed) == 0) {
            word.store(word_of(tag, place), Ordering::Release);
            return;
        }
        extent = pool.next(extent);
    }
    let taken = pool.take(free);
    pool.at(taken)[0].store(word_of(tag, place), Ordering::Relaxed);
    pool.link(taken, first);
    bucket.overflow.store(taken, Ordering::Release);
}

#[inline]
fn search<T>(words: &[AtomicU64], tag: u16, accept: &mut impl FnMut(u32) -> Option<T>) -> Option<T> {
    words.iter().find_map(|word| {
        let (kept, place) = entry_of(word.load(Ordering::Acquire));
        if kept == tag && place != 0 { accept(place) } else { None }
    })
}

/// The bucket of a hash while `count` buckets are in use.
#[inline]
fn bucket_of(hash: u32, count: u32) -> u32 {
    let wide = count.next_power_of_two();
    let bucket = hash & (wide - 1);
    if bucket < count { bucket } else { bucket & (wide / 2 - 1) }
}

/// The bucket and the tag of a hash while `count` buckets are in use.
#[inline]
fn home_of(hash: u32, count: u32) -> (u32, u16) {
    let bucket = bucket_of(hash, count);
    let half = 1 << (HIGH_LEVEL - 1);
    let is_high = count >= 2 * half || count > half && (bucket >= half || bucket < count - half);
    (bucket, tag_of(hash, if is_high { HIGH_BITS } else { FIRST_BITS }))
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "a tag is a part of the hash")]
const fn tag_of(hash: u32, first: u32) -> u16 {
    (hash >> first) as u16
}

/// An entry as overflow keeps it: tag in the high half, place in the low.
fn word_of(tag: u16, place: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(place)
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "both halves are what is asked for")]
const fn entry_of(word: u64) -> (u16, u32) {
    ((word >> 32) as u16, word as u32)
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low_of(shape: u64) -> u32 {
    shape as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    // A place is used again while the entry of its last key waits to be taken out. Taken out by its place alone, the new
    // key's would go instead, and the old one would be where no split puts the new one.
    #[test]
    fn a_place_with_two_keys_loses_the_one_that_is_meant() {
        let (directory, pool, mut free) =
            (Directory::new(1 << 12, Tags::Stay), Pool::new(1 << 12), FreeExtents::default());
        assert!(pool.grow(&mut free));
        let hash = |key: u32| key << FIRST_BITS | 5;
        // The bucket's own slots and some overflow: the two are in it first and last.
        for key in 0..40 {
            directory.insert(&pool, &mut free, hash(key), if key == 39 { 1 } else { key + 1 });
        }
        let places = |key: u32| {
            let mut found = Vec::new();
            let all = directory.find::<()>(&pool, hash(key), |place| {
                found.push(place);
                None
            });
            assert_eq!(all, None);
            found
        };
        for (gone, stays) in [(39, 0), (0, 7)] {
            directory.remove(&pool, hash(gone), 1);
            assert_eq!((places(gone), places(stays)), (vec![], vec![stays + 1]));
        }
    }
}
