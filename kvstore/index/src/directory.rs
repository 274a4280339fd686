//! From a key's hash to where the key is: run and position in one 32-bit place.
//!
//! Linear hashing: one bucket at a time is split while the table grows, so that no store pays for a
//! rebuild. A bucket is one cache line of seven entries and a link to overflow. Entries never move but when
//! their bucket is split; a reader that missed looks again if a split came between.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::pool::{FreeExtents, Pool, Slab};

/// Entries wanted in a bucket, on average. Buckets that wait for their split have up to twice as many.
const LOAD: u32 = 4;
const SLOTS: usize = 7;

/// Seven entries (hash in the high half, place in the low; 0 if empty) and the first overflow extent.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Bucket {
    entries: [AtomicU64; SLOTS],
    overflow: AtomicU64,
}

const _: () = assert!(size_of::<Bucket>() == 64);

#[derive(Debug)]
pub(crate) struct Directory {
    buckets: Slab<Bucket>,
    /// Buckets in use in the low half; a bucket's number is the hash's low bits. The high half counts the
    /// times that entries moved within a bucket.
    shape: AtomicU64,
}

impl Directory {
    pub(crate) fn new(buckets_max: u64) -> Self {
        let buckets = Slab::new(buckets_max);
        let first = buckets.grow().expect("a slab has room for one segment");
        Self { buckets, shape: AtomicU64::new(u64::from(first.end)) }
    }

    fn count(&self) -> u32 {
        place_of(self.shape.load(Ordering::Relaxed))
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
            let bucket = self.buckets.at(bucket_of(hash, place_of(shape)));
            if let Some(found) = search(&bucket.entries, hash, &mut accept) {
                return Some(found);
            }
            let mut extent = extent_of(&bucket.overflow);
            while extent != 0 {
                if let Some(found) = search(pool.at(extent), hash, &mut accept) {
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

    /// Loads the line that [`Self::find`] will need.
    #[inline]
    pub(crate) fn warm(&self, hash: u32) -> u64 {
        self.buckets.at(bucket_of(hash, self.count())).entries[0].load(Ordering::Relaxed)
    }

    /// Adds an entry. May take one extent.
    pub(crate) fn insert(&self, pool: &Pool, free: &mut FreeExtents, hash: u32, place: u32) {
        let bucket = self.buckets.at(bucket_of(hash, self.count()));
        put(bucket, pool, free, entry(hash, place));
    }

    /// Takes an entry out.
    ///
    /// # Panics
    /// If it is not there: two structures of ours disagree.
    pub(crate) fn remove(&self, pool: &Pool, hash: u32, place: u32) {
        let bucket = self.buckets.at(bucket_of(hash, self.count()));
        let wanted = entry(hash, place);
        let mut slots: &[AtomicU64] = &bucket.entries;
        let mut extent = extent_of(&bucket.overflow);
        loop {
            if let Some(slot) = slots.iter().find(|slot| slot.load(Ordering::Relaxed) == wanted) {
                slot.store(0, Ordering::Release);
                return;
            }
            assert!(extent != 0, "every live block is in the directory");
            slots = pool.at(extent);
            extent = pool.next(extent);
        }
    }

    /// Splits a bucket if there are so many entries that it pays. `grow` says whether memory may be taken.
    pub(crate) fn keep_up(
        &self,
        pool: &Pool,
        free: &mut FreeExtents,
        entries: u64,
        grow: impl FnOnce(u64) -> bool,
    ) {
        let count = self.count();
        if entries <= u64::from(count) * u64::from(LOAD) {
            return;
        }
        if count == self.buckets.items()
            && (!grow(Slab::<Bucket>::segment_bytes()) || self.buckets.grow().is_none())
        {
            return;
        }
        let old = self.buckets.at(bucket_of(count, count));
        // Half of a chain needs less than the chain has. Only keys that were made to collide have long ones.
        if chain_extents(old, pool) + 2 <= free.len() {
            self.split(pool, free, count);
        }
    }

    /// Copies what belongs into the new bucket, shows it, and then takes it out of the old one.
    fn split(&self, pool: &Pool, free: &mut FreeExtents, count: u32) {
        let old = self.buckets.at(bucket_of(count, count));
        let new = self.buckets.at(count);
        let moves = |word: u64| word != 0 && bucket_of(hash_of(word), count + 1) == count;
        each(old, pool, |slot| {
            let word = slot.load(Ordering::Relaxed);
            if moves(word) {
                put(new, pool, free, word);
            }
        });
        self.shape.fetch_add(1, Ordering::Release);
        fence(Ordering::Release);
        each(old, pool, |slot| {
            if moves(slot.load(Ordering::Relaxed)) {
                slot.store(0, Ordering::Relaxed);
            }
        });
        self.shorten(old, pool, free);
    }

    /// Frees the overflow of a bucket whose own slots can take all of it: copies, says so, then unlinks.
    fn shorten(&self, bucket: &Bucket, pool: &Pool, free: &mut FreeExtents) {
        let first = extent_of(&bucket.overflow);
        let mut entries = 0;
        each(bucket, pool, |slot| entries += usize::from(slot.load(Ordering::Relaxed) != 0));
        if first == 0 || entries > SLOTS {
            return;
        }
        let mut extent = first;
        while extent != 0 {
            for slot in pool.at(extent) {
                let word = slot.load(Ordering::Relaxed);
                if word != 0 {
                    let empty = bucket.entries.iter().find(|own| own.load(Ordering::Relaxed) == 0);
                    empty.expect("as many are free as are needed").store(word, Ordering::Relaxed);
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

fn each(bucket: &Bucket, pool: &Pool, mut act: impl FnMut(&AtomicU64)) {
    bucket.entries.iter().for_each(&mut act);
    let mut extent = extent_of(&bucket.overflow);
    while extent != 0 {
        pool.at(extent).iter().for_each(&mut act);
        extent = pool.next(extent);
    }
}

/// Extents of a bucket's overflow.
fn chain_extents(bucket: &Bucket, pool: &Pool) -> usize {
    let (mut extents, mut extent) = (0, extent_of(&bucket.overflow));
    while extent != 0 {
        extents += 1;
        extent = pool.next(extent);
    }
    extents
}

fn put(bucket: &Bucket, pool: &Pool, free: &mut FreeExtents, word: u64) {
    let mut slots: &[AtomicU64] = &bucket.entries;
    let mut extent = extent_of(&bucket.overflow);
    loop {
        if let Some(slot) = slots.iter().find(|slot| slot.load(Ordering::Relaxed) == 0) {
            slot.store(word, Ordering::Release);
            return;
        }
        if extent == 0 {
            break;
        }
        slots = pool.at(extent);
        extent = pool.next(extent);
    }
    let taken = pool.take(free);
    pool.at(taken)[0].store(word, Ordering::Relaxed);
    pool.link(taken, extent_of(&bucket.overflow));
    bucket.overflow.store(u64::from(taken), Ordering::Release);
}

#[inline]
fn search<T>(slots: &[AtomicU64], hash: u32, accept: &mut impl FnMut(u32) -> Option<T>) -> Option<T> {
    for slot in slots {
        let word = slot.load(Ordering::Acquire);
        if hash_of(word) == hash
            && word != 0
            && let Some(found) = accept(place_of(word))
        {
            return Some(found);
        }
    }
    None
}

/// The bucket of a hash while `count` buckets are in use.
#[inline]
fn bucket_of(hash: u32, count: u32) -> u32 {
    let wide = count.next_power_of_two();
    let bucket = hash & (wide - 1);
    if bucket < count { bucket } else { bucket & (wide / 2 - 1) }
}

fn entry(hash: u32, place: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(place)
}

#[inline]
const fn hash_of(word: u64) -> u32 {
    (word >> 32) as u32
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn place_of(word: u64) -> u32 {
    word as u32
}

#[inline]
fn extent_of(word: &AtomicU64) -> u32 {
    place_of(word.load(Ordering::Acquire))
}
