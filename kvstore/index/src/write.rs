//! The writer's side: what changes runs. What it forgets to stay within the limit is in [`room`](crate::room).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::crowd::{CROWDED, Crowd};
use crate::ids::{HolderId, Key, SizeClass, Tier, TierSet};
use crate::listing::{Kind, unlisted_max};
use crate::pool::{FreeExtents, Pool};
use crate::recent::Recent;
use crate::run::{
    EXTENT_KEYS, EXTENT_RECORDS, Next, Place, RECORD_WORDS, RUN_BLOCKS, Record, Run, Tables, about, chain_of,
    chain_word, holder_of, in_tiers, used,
};

/// Blocks applied between two looks at the free lists.
pub(crate) const BATCH: usize = 64;
/// Free runs before a batch: each block could open one.
pub(crate) const RUNS_READY: usize = BATCH + 1;
/// Free extents before a batch: for each block one of keys, of records and of the directory; and a
/// record chain that is packed.
pub(crate) const EXTENTS_READY: usize = 4 * BATCH;

/// What comes before the blocks of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum After {
    /// Nothing: the first is a prompt's first.
    Start,
    /// This block, known or not.
    Block(Key),
    /// Nobody says.
    Unknown,
}

/// What only the writer knows of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Note {
    /// Where the block is that this run goes on from, as a place's bits; 0 if there is none, or if it is gone.
    pub(crate) parent: u32,
    pub(crate) parent_birth: u32,
    /// Runs that go on from this one.
    pub(crate) children: u32,
    /// Counts the lives of this number.
    pub(crate) birth: u32,
    /// Blocks that each directory has. Every live block that the one of beginnings lacks follows a live block in its
    /// run; every one that both lack is in a run that waits.
    pub(crate) listed: [u64; 2],
    /// Whether this number waits for its blocks to be listed, in this life or in an earlier one.
    pub(crate) waits: bool,
}

/// The writer's own state. One at a time changes the tables.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pub(crate) extents: FreeExtents,
    pub(crate) runs: Vec<u32>,
    pub(crate) notes: Vec<Note>,
    /// Runs that have, or had, blocks which no directory has, oldest first.
    pub(crate) unlisted: VecDeque<u32>,
    pub(crate) unlisted_max: usize,
    /// Entries of the inner directory that are to be taken out of it: hashes, and places' bits.
    pub(crate) gone: Vec<(u32, u32)>,
    pub(crate) recent: Recent,
    /// Entries of each directory.
    pub(crate) listed: [u64; 2],
    /// The run that is looked at next when one must go.
    pub(crate) hand: u32,
    /// Operations so far; wraps.
    pub(crate) clock: u32,
    pub(crate) blocks: u64,
    pub(crate) entries: u64,
    pub(crate) records: u64,
    pub(crate) evicted: u64,
    pub(crate) bytes_max: u64,
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
        let unlisted_max = unlisted_max(bytes_max);
        // As long as they become, so that they take no more memory later.
        let unlisted = VecDeque::with_capacity(unlisted_max + 2 * BATCH);
        let gone = Vec::with_capacity((unlisted_max + 1) * RUN_BLOCKS as usize);
        let recent = Recent::new(bytes_max);
        Self { bytes_max, unlisted_max, unlisted, gone, recent, ..Self::default() }
    }

    /// Bytes of the writer's own lists.
    pub(crate) fn bytes(&self) -> u64 {
        let lists = self.notes.capacity() * size_of::<Note>()
            + (self.runs.capacity() + self.extents.capacity()) * size_of::<u32>()
            + self.unlisted.capacity() * size_of::<u32>()
            + self.gone.capacity() * size_of::<(u32, u32)>();
        lists as u64 + self.recent.bytes() + self.crowd.bytes()
    }

    /// Adds `tiers` to what `holder` has of at most [`BATCH`] blocks that come `after` others. New entries.
    pub(crate) fn store(
        &mut self,
        tables: &Tables,
        (holder, tiers, size): (HolderId, TierSet, SizeClass),
        after: After,
        blocks: &[Key],
    ) -> u64 {
        let (mut at, first) = self.place_before(tables, after, blocks);
        let mut part = Part::default();
        let (mut added, mut number) = (0, 0);
        let mut is_warm = false;
        while let Some(key) = blocks.get(number) {
            let found = first.filter(|_| number == 0).or_else(|| self.known(tables, at, *key));
            let place = found.unwrap_or_else(|| {
                // Most blocks after a new one are new: their cache misses overlap.
                if !is_warm {
                    tables.directory.warm(blocks[number..].iter().map(|key| key.hash()));
                    is_warm = true;
                }
                self.place(tables, at, *key)
            });
            number += 1;
            if let Some(before) = at
                && before.position + 1 == RUN_BLOCKS
                && place.position == 0
            {
                tables.runs.at(before.run).set_next(place.run);
            }
            let more = if found.is_none() { self.append(tables, place, &blocks[number..]) } else { 0 };
            if place.run != part.run {
                added += self.hold(tables, (holder, tiers, size), part);
                part = Part { run: place.run, mask: 0 };
            }
            part.mask |= u64::MAX >> (RUN_BLOCKS - 1 - more) << place.position;
            at = Some(Place { position: place.position + more, ..place });
            number += more as usize;
        }
        if let Some((last, key)) = at.zip(blocks.last()) {
            self.note(tables, *key, last);
        }
        added + self.hold(tables, (holder, tiers, size), part)
    }

    /// Makes blocks live behind the last one of a run, as long as they are new and the run has slots. How many.
    fn append(&mut self, tables: &Tables, last: Place, blocks: &[Key]) -> u32 {
        let run = tables.runs.at(last.run);
        let begin = last.position + 1;
        if run.end() != begin {
            return 0;
        }
        let mut count = 0;
        for (key, position) in blocks.iter().zip(begin..RUN_BLOCKS) {
            if tables.directory.may_have(key.hash()) && tables.locate(*key).is_some() {
                break;
            }
            self.fill(tables, run, position, *key);
            count += 1;
        }
        if count == 0 {
            return 0;
        }
        run.set_last(blocks[count as usize - 1]);
        let live = run.live.load(Ordering::Relaxed) | u64::MAX >> (RUN_BLOCKS - count) << begin;
        run.live.store(live, Ordering::Release);
        self.blocks += u64::from(count);
        self.wait(last.run);
        count
    }

    /// Where the block before a batch is, and where its first one is, if that is known and not behind the other. Makes
    /// all ready that the batch may need.
    fn place_before(
        &mut self,
        tables: &Tables,
        after: After,
        blocks: &[Key],
    ) -> (Option<Place>, Option<Place>) {
        let before = match after {
            After::Block(key) => Some(key),
            After::Start | After::Unknown => None,
        };
        let mut place = before.and_then(|key| self.seek(tables, key));
        let mut first = None;
        if place.is_none() && !matches!(after, After::Start) {
            first = blocks.first().and_then(|key| self.seek(tables, *key));
        }
        if self.unlisted.len() > self.unlisted_max {
            self.list_all(tables);
        }
        self.reserve(tables, RUNS_READY, EXTENTS_READY);
        // Something was perhaps forgotten for the sake of this batch.
        place = place.zip(before).filter(|(place, key)| tables.is_at(*place, *key)).map(|(place, _)| place);
        first = first.filter(|place| tables.is_at(*place, blocks[0]));
        (place, first)
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

    /// Makes a block live in a slot that has none, and lists it unless it can be found behind the one before it.
    fn put(&mut self, tables: &Tables, place: Place, key: Key) {
        let live = self.make_live(tables, place, key);
        let follows = place.position > 0 && live >> (place.position - 1) & 1 == 1;
        if !follows {
            return self.list(tables, Kind::First, (key.hash(), place));
        }
        self.wait(place.run);
    }

    /// Has a run wait for its blocks to be listed.
    fn wait(&mut self, number: u32) {
        let note = &mut self.notes[number as usize];
        if !note.waits {
            note.waits = true;
            self.unlisted.push_back(number);
        }
    }

    /// Makes a block live in a slot that has none, and lists it.
    pub(crate) fn put_listed(&mut self, tables: &Tables, place: Place, key: Key) {
        self.make_live(tables, place, key);
        self.list(tables, Kind::First, (key.hash(), place));
    }

    /// The live blocks of the run then.
    fn make_live(&mut self, tables: &Tables, place: Place, key: Key) -> u64 {
        let run = tables.runs.at(place.run);
        self.fill(tables, run, place.position, key);
        let live = run.live.load(Ordering::Relaxed) | 1 << place.position;
        if live >> place.position == 1 {
            run.set_last(key);
        }
        run.live.store(live, Ordering::Release);
        self.blocks += 1;
        live
    }

    /// Writes a key into a slot that has no live block.
    #[inline]
    fn fill(&mut self, tables: &Tables, run: &Run, position: u32, key: Key) {
        let slot = &run.keys[(position / EXTENT_KEYS) as usize];
        if slot.load(Ordering::Relaxed) == 0 {
            let extent = tables.pool.take(&mut self.extents);
            slot.store(extent, Ordering::Release);
        } else if tables.key(run, position) != Some(Key { low: 0, high: 0 }) {
            run.move_fence();
        }
        tables.set_key(run, position, key);
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
        let parent = at.unwrap_or(Place::of(0));
        let above = &mut self.notes[parent.run as usize];
        above.children += 1;
        let parent_birth = above.birth;
        let note = &mut self.notes[run as usize];
        *note = Note {
            parent: parent.bits(),
            parent_birth,
            birth: note.birth,
            waits: note.waits,
            ..Note::default()
        };
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
        if holder_of(run.first[0].load(Ordering::Relaxed)) == Some(holder) {
            return Some(&run.first);
        }
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
        self.records += 1;
        if run.first[0].load(Ordering::Relaxed) == 0 {
            run.first[0].store(word, Ordering::Release);
            return &run.first;
        }
        let (first, count) = chain_of(run.chain.load(Ordering::Relaxed));
        let holders = run.holders.load(Ordering::Relaxed);
        run.holders.store(holders + 1, Ordering::Relaxed);
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
            self.list_records(tables, number);
        } else if let Some(holder) = holder_of(word).filter(|_| count > CROWDED) {
            self.crowd.insert(number, holder, (tail, count % EXTENT_RECORDS));
        }
        &records[slot]
    }

    /// Notes where the records of a run are that has become crowded.
    fn list_records(&mut self, tables: &Tables, number: u32) {
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
        let mut removed = 0;
        let mut at = None;
        for batch in blocks.chunks(BATCH) {
            let mut part = Part::default();
            self.reserve(tables, 0, EXTENTS_READY);
            for key in batch {
                let Some(place) = self.near(tables, at, *key).or_else(|| self.seek(tables, *key)) else {
                    continue;
                };
                if place.run != part.run {
                    removed += self.release(tables, holder, tiers, part);
                    part = Part { run: place.run, mask: 0 };
                }
                part.mask |= 1 << place.position;
                at = Some(place);
            }
            // Most blocks go from the last to the first.
            if let Some((before, key)) = at.and_then(|place| self.before(tables, place)) {
                self.note(tables, key, before);
            }
            removed += self.release(tables, holder, tiers, part);
        }
        removed
    }

    /// For each block the fastest tier in which `holder` has it.
    pub(crate) fn fastest(
        &mut self,
        tables: &Tables,
        holder: HolderId,
        blocks: &[Key],
        found: &mut Vec<Option<Tier>>,
    ) {
        let mut at = None;
        for key in blocks {
            let place = self.near(tables, at, *key).or_else(|| self.seek(tables, *key));
            at = place.or(at);
            let held = place.zip(place.and_then(|place| self.record(tables, place.run, holder)));
            found.push(held.and_then(|(place, record)| {
                let has = |word: &AtomicU64| word.load(Ordering::Relaxed) >> place.position & 1 == 1;
                Tier::ALL.into_iter().zip(&record[1..]).find(|(_, word)| has(word)).map(|(tier, _)| tier)
            }));
        }
    }

    /// The block that the one at `place` goes on from, if it lives.
    fn before(&self, tables: &Tables, place: Place) -> Option<(Place, Key)> {
        let before = match place.position.checked_sub(1) {
            Some(position) => Place { run: place.run, position },
            None => self.parent(place.run)?,
        };
        let run = tables.runs.at(before.run);
        let lives = run.live.load(Ordering::Relaxed) >> before.position & 1 == 1;
        tables.key(run, before.position).filter(|_| lives).map(|key| (before, key))
    }

    /// Where the block is, or was, that a run goes on from; none if that run is gone.
    pub(crate) fn parent(&self, number: u32) -> Option<Place> {
        let note = self.notes[number as usize];
        let place = Place::of(note.parent);
        let is_here = place.run != 0 && self.notes[place.run as usize].birth == note.parent_birth;
        is_here.then_some(place)
    }

    /// The slot before or after `at`, or what the run goes on from, if it holds this block.
    fn near(&self, tables: &Tables, at: Option<Place>, key: Key) -> Option<Place> {
        let Place { run, position } = at?;
        let before = match position.checked_sub(1) {
            Some(position) => Some(Place { run, position }),
            None => self.parent(run),
        };
        let after = Some(Place { run, position: position + 1 }).filter(|after| after.position < RUN_BLOCKS);
        let is_here = |place: &Place| tables.is_at(*place, key);
        before.filter(is_here).or_else(|| after.filter(is_here))
    }

    /// Takes all that a holder has. Entries that are gone.
    pub(crate) fn clear(&mut self, tables: &Tables, holder: HolderId) -> u64 {
        let mut removed = 0;
        for run in 1..tables.runs.items() {
            self.reserve(tables, 0, EXTENTS_READY);
            removed += self.release(tables, holder, TierSet::ALL, Part { run, mask: u64::MAX });
        }
        removed
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
            self.records -= 1;
            if !std::ptr::eq(record, &run.first) {
                if chain_of(run.chain.load(Ordering::Relaxed)).1 > CROWDED {
                    self.crowd.remove(part.run, holder);
                }
                run.holders.store(run.holders.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
            }
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
    pub(crate) fn bury(&mut self, tables: &Tables, number: u32, dead: u64) {
        let run = tables.runs.at(number);
        let live = run.live.load(Ordering::Relaxed) & !dead;
        // First, so that a reader finds them all the time.
        let listed = self.notes[number as usize].listed[Kind::First as usize];
        for position in positions(live & !(live << 1) & !listed) {
            let key = tables.key(run, position).expect("a live block has a key");
            self.list(tables, Kind::First, (key.hash(), Place { run: number, position }));
        }
        if dead > live {
            // The last one goes.
            let last = live.checked_ilog2().and_then(|position| tables.key(run, position));
            run.set_last(last.unwrap_or(Key { low: 0, high: 0 }));
        }
        run.live.store(live, Ordering::Release);
        self.blocks -= u64::from(dead.count_ones());
        self.unlist(tables, number, dead);
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
        run.first.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        run.tail.store(0, Ordering::Relaxed);
        run.holders.store(0, Ordering::Relaxed);
        run.next.store(0, Ordering::Relaxed);
        self.give_chain(&tables.pool, first);
        let note = self.notes[number as usize];
        let parent = &mut self.notes[Place::of(note.parent).run as usize];
        if parent.birth == note.parent_birth {
            parent.children -= 1;
        }
        self.notes[number as usize] =
            Note { birth: note.birth.wrapping_add(1), waits: note.waits, ..Note::default() };
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
        tables.each_in_chain(run, |record| {
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
            self.list_records(tables, number);
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
}

/// The positions of a mask's ones.
pub(crate) fn positions(mut mask: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let position = mask.trailing_zeros();
        mask &= mask.checked_sub(1)?;
        Some(position)
    })
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
