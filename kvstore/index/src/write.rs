//! The writer's side: what changes runs, and what it forgets to stay within the limit.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use crate::crowd::{CROWDED, Crowd};
use crate::ids::{HolderId, Key, SizeClass, TierSet};
use crate::pool::{FreeExtents, Pool};
use crate::run::{
    EXTENT_RECORDS, Next, Place, RECORD_WORDS, RUN_BLOCKS, Record, Run, Tables, about, age_at, chain_of,
    chain_word, heat_at, holder_of, in_tiers, used,
};

/// Blocks applied between two looks at the free lists.
pub(crate) const BATCH: usize = 64;
/// Free runs before a batch: each block could open one.
const RUNS_READY: usize = BATCH + 1;
/// Free extents before a batch: for each block one of keys, of records and of the directory; and a
/// record chain that is packed.
const EXTENTS_READY: usize = 4 * BATCH;
/// Runs without a successor that are compared when one must go.
const CANDIDATES: usize = 8;
/// Runs looked at for them.
const LOOKED_AT_MAX: u32 = 4_096;

/// What only the writer knows of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Note {
    /// The run that this one goes on from; 0 if none, or if that is gone.
    pub(crate) parent: u32,
    pub(crate) parent_birth: u32,
    /// Runs that go on from this one.
    pub(crate) children: u32,
    /// Counts the lives of this number.
    pub(crate) birth: u32,
}

/// The writer's own state. One at a time changes the tables.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    extents: FreeExtents,
    runs: Vec<u32>,
    pub(crate) notes: Vec<Note>,
    /// The run that is looked at next when one must go.
    hand: u32,
    /// Operations so far; wraps.
    pub(crate) clock: u32,
    pub(crate) blocks: u64,
    pub(crate) entries: u64,
    pub(crate) records: u64,
    pub(crate) evicted: u64,
    bytes_max: u64,
    crowd: Crowd,
}

/// Blocks of one run that a call is about.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    run: u32,
    mask: u64,
}

impl Writer {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, ..Self::default() }
    }

    /// Bytes of the writer's own lists.
    pub(crate) fn bytes(&self) -> u64 {
        let lists = self.notes.capacity() * size_of::<Note>()
            + (self.runs.capacity() + self.extents.capacity()) * size_of::<u32>();
        lists as u64 + self.crowd.bytes()
    }

    /// Adds `tiers` to what `holder` has of at most [`BATCH`] blocks that follow `before`. New entries.
    pub(crate) fn store(
        &mut self,
        tables: &Tables,
        (holder, tiers, size): (HolderId, TierSet, SizeClass),
        before: Option<Key>,
        blocks: &[Key],
    ) -> u64 {
        self.reserve(tables, 0);
        let mut at = before.and_then(|key| tables.locate(key)).map(|(place, _)| place);
        let mut part = Part::default();
        let mut added = 0;
        let mut is_warm = false;
        for (number, key) in blocks.iter().enumerate() {
            let place = match self.known(tables, at, *key) {
                Some(place) => place,
                None => {
                    // Most blocks after a new one are new: their cache misses overlap.
                    if !is_warm {
                        warm(tables, blocks[number..].iter().copied());
                        is_warm = true;
                    }
                    self.place(tables, at, *key)
                }
            };
            if let Some(before) = at
                && before.position + 1 == RUN_BLOCKS
                && place.position == 0
            {
                tables.runs.at(before.run).set_next(place.run);
            }
            if place.run != part.run {
                added += self.hold(tables, (holder, tiers, size), part);
                part = Part { run: place.run, mask: 0 };
            }
            part.mask |= 1 << place.position;
            at = Some(place);
        }
        added + self.hold(tables, (holder, tiers, size), part)
    }

    /// Where a live block is, if it is. Most blocks follow the one before.
    #[inline]
    fn known(&self, tables: &Tables, at: Option<Place>, key: Key) -> Option<Place> {
        if let Some(Place { run, position }) = at {
            let here = tables.runs.at(run);
            let next = if position + 1 < RUN_BLOCKS {
                Place { run, position: position + 1 }
            } else {
                Place { run: here.next.load(Ordering::Relaxed), position: 0 }
            };
            let there = tables.runs.at(next.run);
            let live = there.live.load(Ordering::Relaxed) >> next.position & 1 == 1;
            if live && tables.key(there, next.position) == Some(key) {
                return Some(next);
            }
        }
        tables.locate(key).map(|(place, _)| place)
    }

    /// Gives a block that is not live a place: after the one before it, or in a run of its own.
    fn place(&mut self, tables: &Tables, at: Option<Place>, key: Key) -> Place {
        let place = self.place_after(tables, at, key).unwrap_or_else(|| self.open(tables, at));
        self.put(tables, place, key);
        place
    }

    /// Makes a block live in a slot that has none.
    pub(crate) fn put(&mut self, tables: &Tables, place: Place, key: Key) {
        let run = tables.runs.at(place.run);
        let slot = &run.keys[(place.position / 8) as usize];
        if slot.load(Ordering::Relaxed) == 0 {
            let extent = tables.pool.take(&mut self.extents);
            slot.store(extent, Ordering::Release);
        } else if tables.key(run, place.position) != Some(Key { low: 0, high: 0 }) {
            run.move_fence();
        }
        tables.set_key(run, place.position, key);
        let live = run.live.load(Ordering::Relaxed) | 1 << place.position;
        run.live.store(live, Ordering::Release);
        tables.directory.insert(&tables.pool, &mut self.extents, key.hash(), place.bits());
        self.blocks += 1;
        let (own, most) = (self.bytes(), self.bytes_max);
        let has_room = |bytes| tables.bytes() + own + bytes <= most;
        let hash_at = |bits| {
            let place = Place::of(bits);
            let key = tables.key(tables.runs.at(place.run), place.position);
            key.expect("what the directory points to has a key").hash()
        };
        tables.directory.keep_up(&tables.pool, &mut self.extents, self.blocks, has_room, hash_at);
    }

    /// The slot after `at`, if the run ends there, or if the slot held this very block before.
    fn place_after(&self, tables: &Tables, at: Option<Place>, key: Key) -> Option<Place> {
        let Place { run, position } = at?;
        if position + 1 == RUN_BLOCKS {
            return None;
        }
        let here = tables.runs.at(run);
        let dead = here.live.load(Ordering::Relaxed) >> (position + 1) & 1 == 0;
        let fits = here.end() == position + 1 || (dead && tables.key(here, position + 1) == Some(key));
        fits.then_some(Place { run, position: position + 1 })
    }

    /// A new run that goes on from `at`.
    pub(crate) fn open(&mut self, tables: &Tables, at: Option<Place>) -> Place {
        let run = self.runs.pop().expect("a batch begins only with enough free runs");
        assert!(tables.runs.at(run).live.load(Ordering::Relaxed) == 0, "a free run has no live block");
        let parent = at.map_or(0, |place| place.run);
        let parent_birth = self.notes[parent as usize].birth;
        self.notes[parent as usize].children += 1;
        let note = &mut self.notes[run as usize];
        *note = Note { parent, parent_birth, children: 0, birth: note.birth };
        Place { run, position: 0 }
    }

    /// Sets the bits of a holder in a run. New entries.
    fn hold(
        &mut self,
        tables: &Tables,
        (holder, tiers, size): (HolderId, TierSet, SizeClass),
        part: Part,
    ) -> u64 {
        if part.mask == 0 {
            return 0;
        }
        let record = match self.record(tables, part.run, holder) {
            Some(record) => {
                let word = used(record[0].load(Ordering::Relaxed), size, self.clock);
                record[0].store(word, Ordering::Relaxed);
                record
            }
            None => self.admit(tables, part.run, about(holder, size, self.clock)),
        };
        let before = all_of(record);
        for (word, bits) in record[1..].iter().zip(in_tiers(tiers, part.mask)) {
            if bits != 0 {
                word.store(word.load(Ordering::Relaxed) | bits, Ordering::Release);
            }
        }
        let added = u64::from((part.mask & !before).count_ones());
        self.entries += added;
        added
    }

    /// The record of a holder in a run.
    #[inline]
    fn record<'a>(&self, tables: &'a Tables, number: u32, holder: HolderId) -> Option<&'a Record> {
        let run = tables.runs.at(number);
        let (_, count) = chain_of(run.chain.load(Ordering::Relaxed));
        if count <= CROWDED {
            return tables.record(run, holder);
        }
        let (extent, slot) = self.crowd.find(number, holder)?;
        let (records, _) = tables.pool.at(extent).as_chunks::<RECORD_WORDS>();
        Some(&records[slot as usize])
    }

    /// A record for a holder that has none in this run.
    pub(crate) fn admit<'a>(&mut self, tables: &'a Tables, number: u32, word: u64) -> &'a Record {
        let run = tables.runs.at(number);
        let (first, count) = chain_of(run.chain.load(Ordering::Relaxed));
        let holders = run.holders.load(Ordering::Relaxed);
        run.holders.store(holders + 1, Ordering::Relaxed);
        self.records += 1;
        if holders < count
            && let Some((record, place)) = vacant(tables, first, count)
        {
            record[0].store(word, Ordering::Release);
            if let Some(holder) = holder_of(word).filter(|_| count > CROWDED) {
                self.crowd.insert(number, holder, place);
            }
            return record;
        }
        let slot = (count % EXTENT_RECORDS) as usize;
        let mut tail = run.tail.load(Ordering::Relaxed);
        let mut head = first;
        if slot == 0 {
            let extent = tables.pool.take(&mut self.extents);
            if count == 0 {
                head = extent;
            } else {
                tables.pool.link(tail, extent);
            }
            tail = extent;
            run.tail.store(extent, Ordering::Relaxed);
        }
        let (records, _) = tables.pool.at(tail).as_chunks::<RECORD_WORDS>();
        records[slot][0].store(word, Ordering::Relaxed);
        run.chain.store(chain_word(head, count + 1), Ordering::Release);
        if count == CROWDED {
            self.list(tables, number);
        } else if let Some(holder) = holder_of(word).filter(|_| count > CROWDED) {
            self.crowd.insert(number, holder, (tail, count % EXTENT_RECORDS));
        }
        &records[slot]
    }

    /// Notes where the records of a run are that has become crowded.
    fn list(&mut self, tables: &Tables, number: u32) {
        let (mut extent, mut left) = chain_of(tables.runs.at(number).chain.load(Ordering::Relaxed));
        while left > 0 {
            let (records, _) = tables.pool.at(extent).as_chunks::<RECORD_WORDS>();
            for (slot, record) in (0..).zip(records.iter().take(left as usize)) {
                if let Some(holder) = holder_of(record[0].load(Ordering::Relaxed)) {
                    self.crowd.insert(number, holder, (extent, slot));
                }
            }
            left = left.saturating_sub(EXTENT_RECORDS);
            extent = tables.pool.next(extent);
        }
    }

    /// Takes `tiers` away from what `holder` has of these blocks. Entries that are gone.
    pub(crate) fn remove(
        &mut self,
        tables: &Tables,
        holder: HolderId,
        tiers: TierSet,
        blocks: &[Key],
    ) -> u64 {
        let (mut part, mut removed) = (Part::default(), 0);
        let mut at = None;
        for key in blocks {
            let Some(place) = near(tables, at, *key).or_else(|| tables.locate(*key).map(|(place, _)| place))
            else {
                continue;
            };
            if place.run != part.run {
                removed += self.release(tables, holder, tiers, part);
                part = Part { run: place.run, mask: 0 };
            }
            part.mask |= 1 << place.position;
            at = Some(place);
        }
        removed + self.release(tables, holder, tiers, part)
    }

    /// Takes all that a holder has. Entries that are gone.
    pub(crate) fn clear(&mut self, tables: &Tables, holder: HolderId) -> u64 {
        (1..tables.runs.items())
            .map(|run| self.release(tables, holder, TierSet::ALL, Part { run, mask: u64::MAX }))
            .sum()
    }

    /// Clears bits of a holder in a run, and what nobody holds then. Entries that are gone.
    fn release(&mut self, tables: &Tables, holder: HolderId, tiers: TierSet, part: Part) -> u64 {
        if part.mask == 0 {
            return 0;
        }
        let run = tables.runs.at(part.run);
        let Some(record) = self.record(tables, part.run, holder) else { return 0 };
        let before = all_of(record);
        for (word, bits) in record[1..].iter().zip(in_tiers(tiers, part.mask)) {
            if bits != 0 {
                word.store(word.load(Ordering::Relaxed) & !bits, Ordering::Release);
            }
        }
        let after = all_of(record);
        if after == 0 {
            record[0].store(0, Ordering::Release);
            if chain_of(run.chain.load(Ordering::Relaxed)).1 > CROWDED {
                self.crowd.remove(part.run, holder);
            }
            run.holders.store(run.holders.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
            self.records -= 1;
        }
        let mut dead = before & !after;
        let removed = u64::from(dead.count_ones());
        self.entries -= removed;
        tables.each_record(run, |other| {
            dead &= !all_of(other);
            if dead == 0 { Next::Stop } else { Next::Go }
        });
        if dead != 0 {
            self.bury(tables, part.run, dead);
        }
        if run.live.load(Ordering::Relaxed) != 0 {
            self.pack(tables, part.run);
        }
        removed
    }

    /// Takes blocks that nobody holds out of the directory, and a run without blocks out of use.
    fn bury(&mut self, tables: &Tables, number: u32, dead: u64) {
        let run = tables.runs.at(number);
        let live = run.live.load(Ordering::Relaxed) & !dead;
        run.live.store(live, Ordering::Release);
        warm(tables, positions(dead).filter_map(|position| tables.key(run, position)));
        for position in positions(dead) {
            let key = tables.key(run, position).expect("a block that was live has a key");
            tables.directory.remove(&tables.pool, key.hash(), Place { run: number, position }.bits());
            self.blocks -= 1;
        }
        let kept = if live == 0 { 0 } else { run.end().div_ceil(8) as usize };
        if run.keys[kept..].iter().any(|slot| slot.load(Ordering::Relaxed) != 0) {
            run.move_fence();
            for slot in &run.keys[kept..] {
                let extent = slot.load(Ordering::Relaxed);
                if extent != 0 {
                    slot.store(0, Ordering::Relaxed);
                    self.extents.give(extent);
                }
            }
        }
        if live == 0 {
            self.close(tables, number);
        }
    }

    /// A run without live blocks becomes free.
    fn close(&mut self, tables: &Tables, number: u32) {
        let run = tables.runs.at(number);
        run.move_fence();
        let (first, count) = chain_of(run.chain.load(Ordering::Relaxed));
        if count > CROWDED {
            self.crowd.clear(number);
        }
        run.chain.store(0, Ordering::Relaxed);
        run.tail.store(0, Ordering::Relaxed);
        run.holders.store(0, Ordering::Relaxed);
        run.next.store(0, Ordering::Relaxed);
        self.give_chain(&tables.pool, first);
        let note = self.notes[number as usize];
        let parent = &mut self.notes[note.parent as usize];
        if parent.birth == note.parent_birth {
            parent.children -= 1;
        }
        self.notes[number as usize] = Note { birth: note.birth.wrapping_add(1), ..Note::default() };
        self.runs.push(number);
    }

    fn give_chain(&mut self, pool: &Pool, first: u32) {
        let mut extent = first;
        while extent != 0 {
            let next = pool.next(extent);
            self.extents.give(extent);
            extent = next;
        }
    }

    /// Packs records when most of the chain has no holder. Readers have the old chain until the new one is whole.
    fn pack(&mut self, tables: &Tables, number: u32) {
        let run = tables.runs.at(number);
        let (first, count) = chain_of(run.chain.load(Ordering::Relaxed));
        let holders = run.holders.load(Ordering::Relaxed);
        let extents = holders.div_ceil(EXTENT_RECORDS);
        if count <= 2 * EXTENT_RECORDS || holders > count / 4 || extents as usize > self.extents.len() {
            return;
        }
        let mut kept = Vec::with_capacity(holders as usize);
        tables.each_record(run, |record| {
            if record[0].load(Ordering::Relaxed) != 0 {
                kept.push([0, 1, 2, 3].map(|word| record[word].load(Ordering::Relaxed)));
            }
            Next::Go
        });
        let (mut head, mut tail) = (0, 0);
        for (number, words) in kept.iter().enumerate() {
            let slot = number % EXTENT_RECORDS as usize;
            if slot == 0 {
                let extent = tables.pool.take(&mut self.extents);
                if head == 0 {
                    head = extent;
                } else {
                    tables.pool.link(tail, extent);
                }
                tail = extent;
            }
            let (records, _) = tables.pool.at(tail).as_chunks::<RECORD_WORDS>();
            for (word, value) in records[slot].iter().zip(words) {
                word.store(*value, Ordering::Relaxed);
            }
        }
        run.chain.store(chain_word(head, holders), Ordering::Release);
        run.tail.store(tail, Ordering::Relaxed);
        run.move_fence();
        self.give_chain(&tables.pool, first);
        if count > CROWDED {
            self.crowd.clear(number);
        }
        if holders > CROWDED {
            self.list(tables, number);
        }
    }

    /// Notes that `holder` was used for these blocks.
    pub(crate) fn touch(&mut self, tables: &Tables, holder: HolderId, blocks: &[Key]) {
        let (mut at, mut touched) = (None, 0);
        for key in blocks {
            let Some(place) = self.known(tables, at, *key) else { return };
            if place.run != touched
                && let Some(record) = self.record(tables, place.run, holder)
            {
                let word = used(record[0].load(Ordering::Relaxed), SizeClass::UNKNOWN, self.clock);
                record[0].store(word, Ordering::Relaxed);
            }
            touched = place.run;
            at = Some(place);
        }
    }

    /// Makes sure that a batch, and so many records of one run beside it, find what they may need: makes it within the limit, else forgets the coldest.
    pub(crate) fn reserve(&mut self, tables: &Tables, records: usize) {
        while self.runs.len() < RUNS_READY {
            if !self.grow_runs(tables) && !self.evict(tables) {
                panic!("{} bytes hold less than one batch", self.bytes_max);
            }
        }
        let extents = EXTENTS_READY + records.div_ceil(EXTENT_RECORDS as usize);
        while self.extents.len() < extents {
            let room = self.has_room(tables, tables.pool.segment_bytes());
            let grown = room && tables.pool.grow(&mut self.extents);
            if !grown && !self.evict(tables) {
                panic!("{} bytes hold less than one batch", self.bytes_max);
            }
        }
    }

    fn has_room(&self, tables: &Tables, bytes: u64) -> bool {
        tables.bytes() + self.bytes() + bytes <= self.bytes_max
    }

    fn grow_runs(&mut self, tables: &Tables) -> bool {
        if !self.has_room(tables, tables.runs.segment_bytes() + tables.runs.segment_bytes() / 2) {
            return false;
        }
        let Some(range) = tables.runs.grow() else { return false };
        self.notes.resize(range.end as usize, Note::default());
        self.runs.extend(range.rev().filter(|run| *run != 0));
        true
    }

    /// Forgets the coldest of some runs that nothing goes on from. False if there is no run at all.
    fn evict(&mut self, tables: &Tables) -> bool {
        let runs = tables.runs.items();
        let mut coldest: Option<(bool, u64, u32, u32)> = None;
        let mut leaves = 0;
        for _ in 0..LOOKED_AT_MAX.min(runs) {
            self.hand = if self.hand + 1 < runs { self.hand + 1 } else { 1 };
            let run = tables.runs.at(self.hand);
            if run.live.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let is_inner = self.notes[self.hand as usize].children > 0;
            if is_inner && coldest.is_some_and(|(inner, ..)| !inner) {
                continue;
            }
            let (heat, age) = self.warmth(tables, run);
            let rank = (is_inner, heat, u32::MAX - age, self.hand);
            if coldest.is_none_or(|found| rank < found) {
                coldest = Some(rank);
            }
            leaves += usize::from(!is_inner);
            if leaves == CANDIDATES {
                break;
            }
        }
        // A free run may lie in every place that was looked at; then another look finds the others.
        let Some((.., number)) = coldest else { return self.blocks > 0 };
        self.forget(tables, number);
        true
    }

    /// Heat and age of a run: those of its warmest record.
    fn warmth(&self, tables: &Tables, run: &Run) -> (u64, u32) {
        let mut warmest = (0, u32::MAX);
        tables.each_record(run, |record| {
            let word = record[0].load(Ordering::Relaxed);
            if holder_of(word).is_some() {
                warmest = (warmest.0.max(heat_at(word, self.clock)), warmest.1.min(age_at(word, self.clock)));
            }
            Next::Go
        });
        warmest
    }

    /// Takes a whole run out.
    fn forget(&mut self, tables: &Tables, number: u32) {
        let run = tables.runs.at(number);
        let (mut entries, mut records) = (0, 0);
        tables.each_record(run, |record| {
            entries += u64::from(all_of(record).count_ones());
            records += u64::from(record[0].load(Ordering::Relaxed) != 0);
            for word in record {
                word.store(0, Ordering::Relaxed);
            }
            Next::Go
        });
        self.entries -= entries;
        self.records -= records;
        self.evicted += entries;
        let live = run.live.load(Ordering::Relaxed);
        self.bury(tables, number, live);
    }
}

/// Loads the directory's lines for keys side by side.
fn warm(tables: &Tables, keys: impl Iterator<Item = Key>) {
    black_box(keys.fold(0, |sum, key| sum ^ tables.directory.warm(key.hash())));
}

/// The positions of a mask's ones.
fn positions(mut mask: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let position = mask.trailing_zeros();
        mask &= mask.checked_sub(1)?;
        Some(position)
    })
}

/// The slot after or before `at`, if it holds this block.
fn near(tables: &Tables, at: Option<Place>, key: Key) -> Option<Place> {
    let Place { run, position } = at?;
    let here = tables.runs.at(run);
    let live = here.live.load(Ordering::Relaxed);
    let is_here = |position: &u32| live >> position & 1 == 1 && tables.key(here, *position) == Some(key);
    let before = position.checked_sub(1).filter(is_here);
    let found = before.or_else(|| Some(position + 1).filter(|after| *after < RUN_BLOCKS && is_here(after)));
    found.map(|position| Place { run, position })
}

/// A record that has no holder.
fn vacant(tables: &Tables, first: u32, count: u32) -> Option<(&Record, (u32, u32))> {
    let (mut extent, mut left) = (first, count);
    while left > 0 {
        let (records, _) = tables.pool.at(extent).as_chunks::<RECORD_WORDS>();
        let mut those = (0..).zip(records.iter().take(left as usize));
        if let Some((slot, record)) = those.find(|(_, record)| record[0].load(Ordering::Relaxed) == 0) {
            return Some((record, (extent, slot)));
        }
        left = left.saturating_sub(EXTENT_RECORDS);
        extent = tables.pool.next(extent);
    }
    None
}

/// Blocks that a record has in any tier.
#[inline]
pub(crate) fn all_of(record: &Record) -> u64 {
    record[1..].iter().fold(0, |bits, word| bits | word.load(Ordering::Relaxed))
}
