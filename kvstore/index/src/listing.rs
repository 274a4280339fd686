//! Which blocks can be found by their keys alone, for the writer.
//!
//! Blocks that follow none in their run are in the first directory at once: look-ups and stores get to all others from
//! these. The others are wanted by their keys only where somebody begins in the middle: goes on from there, removes
//! from there. Most do so where the last change ended, which [`Recent`](crate::recent::Recent) knows; for the rest there
//! is the other directory. Runs wait for it until there are many, or until somebody asks for a block that was not found:
//! putting in thousands in the order of the directory costs less than one by one.

use std::sync::atomic::Ordering;

use crate::directory::Directory;
use crate::ids::Key;
use crate::run::{Place, RUN_BLOCKS, Tables};
use crate::write::{BATCH, EXTENTS_READY, Note, Writer, positions};

/// Runs that wait until their blocks are put into the directory, at most: few enough that nobody waits long when they are.
const UNLISTED_MAX: usize = 2_048;
/// Bytes of an index for each of them: the scratch to list them is a small part of it.
const BYTES_A_RUN: u64 = 1 << 18;
/// Buckets that are split after a batch, at most: more than it makes necessary.
const SPLITS_A_BATCH: u32 = 32;
const _: () = assert!(SPLITS_A_BATCH as usize * 2 == BATCH);
/// Parts of the directory that are listed into one after the other, as a power of two.
const PARTS_BITS: u32 = 11;

/// [`UNLISTED_MAX`], or less for an index of few bytes.
pub(crate) fn unlisted_max(bytes_max: u64) -> usize {
    usize::try_from(bytes_max / BYTES_A_RUN).unwrap_or(usize::MAX).min(UNLISTED_MAX)
}

/// The two directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// That of the blocks which follow none in their run.
    First,
    /// That of the others, as far as somebody may ask for them by their keys alone.
    Inner,
}

impl Kind {
    fn of(self, tables: &Tables) -> &Directory {
        match self {
            Self::First => &tables.directory,
            Self::Inner => &tables.inner,
        }
    }
}

impl Note {
    pub(crate) fn is_listed(&self) -> u64 {
        self.listed[0] | self.listed[1]
    }
}

impl Writer {
    /// Remembers a place that something may go on from. What has to give way for it is listed. May take two extents.
    pub(crate) fn note(&mut self, tables: &Tables, key: Key, place: Place) {
        let Some(other) = self.recent.note(key, place) else { return };
        let run = tables.runs.at(other.run);
        let lacking = run.live.load(Ordering::Relaxed) & !self.notes[other.run as usize].is_listed();
        if lacking >> other.position & 1 == 1
            && let Some(key) = tables.key(run, other.position)
        {
            self.list(tables, Kind::Inner, (key.hash(), other));
        }
    }

    /// Where a live block is, whatever is known of it but its key. May forget something.
    pub(crate) fn seek(&mut self, tables: &Tables, key: Key) -> Option<Place> {
        let recent = self.recent.find(key).filter(|place| tables.is_at(*place, key));
        if let Some(place) = recent
            && tables.runs.at(place.run).holders.load(Ordering::Relaxed) == 0
        {
            // Only its holder goes on from it, and does so now.
            self.recent.forget(key);
        }
        let inner = || tables.locate_inner(key).map(|(place, _)| place);
        let found = recent.or_else(|| tables.locate(key).map(|(place, _)| place)).or_else(inner);
        if found.is_some() || self.unlisted.is_empty() {
            return found;
        }
        self.list_all(tables);
        inner()
    }

    /// Puts every live block into a directory.
    pub(crate) fn list_all(&mut self, tables: &Tables) {
        let mut entries = Vec::with_capacity(self.unlisted.len() * RUN_BLOCKS as usize);
        while let Some(number) = self.unlisted.pop_front() {
            let note = &mut self.notes[number as usize];
            note.waits = false;
            let run = tables.runs.at(number);
            for position in positions(run.live.load(Ordering::Relaxed) & !note.is_listed()) {
                let key = tables.key(run, position).expect("a live block has a key");
                entries.push((key.hash(), Place { run: number, position }.bits()));
            }
        }
        let ordered = in_parts(&tables.inner, &entries);
        let before = self.evicted;
        for batch in ordered.chunks(BATCH) {
            self.reserve(tables, 0, EXTENTS_READY);
            tables.inner.warm(batch.iter().map(|(hash, _)| *hash));
            for (hash, place) in batch.iter().map(|(hash, bits)| (*hash, Place::of(*bits))) {
                // What was forgotten meanwhile has no blocks.
                let live = || tables.runs.at(place.run).live.load(Ordering::Relaxed);
                if self.evicted == before || live() >> place.position & 1 == 1 {
                    self.enter(tables, Kind::Inner, (hash, place));
                }
            }
            self.keep_up(tables, Kind::Inner, SPLITS_A_BATCH);
        }
    }

    /// Puts a block into a directory. May take two extents.
    pub(crate) fn list(&mut self, tables: &Tables, kind: Kind, entry: (u32, Place)) {
        self.enter(tables, kind, entry);
        self.keep_up(tables, kind, 1);
    }

    /// Puts a block into a directory that is to keep up with it later. May take an extent.
    fn enter(&mut self, tables: &Tables, kind: Kind, (hash, place): (u32, Place)) {
        kind.of(tables).insert(&tables.pool, &mut self.extents, hash, place.bits());
        self.notes[place.run as usize].listed[kind as usize] |= 1 << place.position;
        self.listed[kind as usize] += 1;
    }

    /// Splits buckets of a directory whose entries are too many for it, if there is room.
    fn keep_up(&mut self, tables: &Tables, kind: Kind, splits_max: u32) {
        let (directory, entries) = (kind.of(tables), self.listed[kind as usize]);
        if !directory.is_full(entries) {
            return;
        }
        let hash_at = |bits| {
            let place = Place::of(bits);
            let key = tables.key(tables.runs.at(place.run), place.position);
            key.expect("what the directory points to has a key").hash()
        };
        let (own, most) = (self.bytes(), self.bytes_max);
        let has_room = |bytes| tables.bytes() + own + bytes <= most;
        let entries = (entries, splits_max);
        directory.keep_up(&tables.pool, &mut self.extents, entries, has_room, hash_at);
    }

    /// Takes blocks out of the directories that have them: now out of that of beginnings, and out of the other with many
    /// more. What it still has of them misleads nobody, as places are compared with keys.
    pub(crate) fn unlist(&mut self, tables: &Tables, number: u32, dead: u64) {
        let run = tables.runs.at(number);
        let note = &mut self.notes[number as usize];
        let [first, inner] = note.listed.map(|listed| listed & dead);
        note.listed = note.listed.map(|listed| listed & !dead);
        for position in positions(first | inner) {
            let hash = tables.key(run, position).expect("a block that was live has a key").hash();
            let place = Place { run: number, position }.bits();
            if first >> position & 1 == 1 {
                tables.directory.remove(&tables.pool, hash, place);
                self.listed[Kind::First as usize] -= 1;
            }
            if inner >> position & 1 == 1 {
                self.gone.push((hash, place));
            }
        }
        if self.gone.len() >= self.unlisted_max * RUN_BLOCKS as usize {
            self.unlist_gone(tables);
        }
    }

    fn unlist_gone(&mut self, tables: &Tables) {
        for batch in in_parts(&tables.inner, &self.gone).chunks(BATCH) {
            tables.inner.warm(batch.iter().map(|(hash, _)| *hash));
            batch.iter().for_each(|(hash, place)| tables.inner.remove(&tables.pool, *hash, *place));
        }
        self.listed[Kind::Inner as usize] -= self.gone.len() as u64;
        self.gone.clear();
    }
}

/// Entries with those of one part of a directory after each other: parts are in the cache, the directory is not.
fn in_parts(directory: &Directory, entries: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let shift = directory.shift(PARTS_BITS);
    let part = |hash: u32| (directory.bucket(hash) >> shift) as usize;
    let mut ends = [0usize; 1 << PARTS_BITS];
    entries.iter().for_each(|(hash, _)| ends[part(*hash)] += 1);
    let mut end = 0;
    for part in &mut ends {
        end += std::mem::replace(part, end);
    }
    let mut ordered = vec![(0, 0); entries.len()];
    for entry in entries {
        let next = &mut ends[part(entry.0)];
        ordered[*next] = *entry;
        *next += 1;
    }
    ordered
}
