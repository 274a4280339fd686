//! A sampled memory of blocks that were asked for, resident or not, several times
//! as many as the tier holds. It feeds the life tables, and it carries two shadow
//! caches of the tier's size: what the tier would hold under LRU, and under the
//! learned policy.
//!
//! Blocks are kept in order of last use, a prompt's tail before its head, so that
//! no block outlives its ancestors. In this order the LRU shadow is simply the
//! hottest blocks down to an edge: leaf-only LRU and tail-to-head LRU are the same.
//! The learned shadow is a subset with its own queues. Ages are tracked by one
//! pointer a bucket that moves along the same order.
//!
//! A large tier is sampled by bits of the block id: a block is in an
//! ancestor-closed cache or not regardless of which others are watched, so a
//! smaller cache over a uniform sample of the forest behaves like the large one.

use hashbrown::HashTable;

use crate::api::UseStats;
use crate::ids::BlockId;
use crate::policy::admission::length_kind;
use crate::policy::class::{Class, Tick};
use crate::policy::hazards::{BUCKETS, Hazards, bucket_start};
use crate::policy::queues::{Facts, Links, Look, NONE, Place, Queues, Slab};
use crate::units::BlockCount;

/// Blocks watched at most: what a table of 65,536 buckets holds.
const ENTRIES_MAX: u32 = 14_336;
/// Blocks watched for each that the tier holds, before sampling.
const REACH: u32 = 8;
/// A small tier's blocks come back long after they left it: these are watched at least.
const ENTRIES_MIN: u32 = 8192;

/// In the LRU shadow.
const IN_LRU: u8 = 1;
/// In the learned shadow.
const IN_LEARNED: u8 = 2;

/// Has its place in the order of last use: all but the new blocks of the request at hand.
const LINKED: u8 = 4;

/// One block of a request's prefix.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Uniform bits of the block id.
    pub key: u64,
    /// Seconds that a hit on it saves.
    pub seconds: f32,
    /// What a use of it is worth to the order of eviction, per byte.
    pub worth: f32,
}

impl Step {
    /// The bits of an id by which ghosts and curves know and sample it.
    pub fn key_of(block: BlockId) -> u64 {
        let [.., a, b, c, d, e, f, g, h] = block.to_bytes();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

/// Seconds that one request would have saved.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Saved {
    pub(crate) lru: f64,
    pub(crate) learned: f64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: u64,
    hotter: u32,
    colder: u32,
    parent: u32,
    used: Tick,
    links: Links,
    worth: f32,
    /// Children in the learned shadow.
    children: u16,
    uses: u8,
    turn: u8,
    bucket: u8,
    flags: u8,
    /// Blocks of the prompt that it came with, as an octave.
    length: u8,
}

const _: () = assert!(size_of::<Entry>() <= 48);
const _: () = assert!(ENTRIES_MAX < 1 << 16, "a child count fits");

impl Entry {
    fn class(&self) -> Class {
        Class::of(UseStats { depth: 0, turn: self.turn, uses: self.uses })
    }
}

#[derive(Clone, Debug, Default)]
struct Entries(Vec<Entry>);

impl Entries {
    fn at(&self, index: u32) -> &Entry {
        &self.0[index as usize]
    }

    fn at_mut(&mut self, index: u32) -> &mut Entry {
        &mut self.0[index as usize]
    }
}

impl Look for Entries {
    fn links(&self, index: u32) -> Links {
        self.at(index).links
    }

    fn facts(&self, index: u32) -> Facts {
        let entry = self.at(index);
        Facts { class: entry.class(), used: entry.used, worth: entry.worth }
    }
}

impl Slab for Entries {
    fn links_mut(&mut self, index: u32) -> &mut Links {
        &mut self.at_mut(index).links
    }
}

/// The watched blocks and both shadows.
#[derive(Clone, Debug)]
pub(crate) struct Ghost {
    entries: Entries,
    free: Vec<u32>,
    index: HashTable<u32>,
    hottest: u32,
    coldest: u32,
    length: u32,
    /// The hottest block that is at least as old as each bucket.
    oldest_from: [u32; BUCKETS],
    /// A block is watched if so many leading bits of its key are zero.
    shift: u32,
    /// Sampled blocks that the tier holds.
    capacity: u32,
    /// Blocks watched at most.
    limit: u32,
    /// The coldest block of the LRU shadow.
    lru_edge: u32,
    lru_length: u32,
    queues: Queues,
    learned_length: u32,
    /// Of the request at hand, head first. Kept to allocate once.
    path: Vec<u32>,
    tick: Tick,
}

fn hash(key: u64) -> u64 {
    // The leading bits are alike in all watched blocks.
    key.rotate_left(29)
}

impl Ghost {
    /// For a tier that holds this many blocks.
    pub(crate) fn new(capacity: BlockCount) -> Self {
        let mut ghost = Self {
            entries: Entries::default(),
            free: Vec::new(),
            index: HashTable::new(),
            hottest: NONE,
            coldest: NONE,
            length: 0,
            oldest_from: [NONE; BUCKETS],
            shift: 0,
            capacity: 0,
            limit: 0,
            lru_edge: NONE,
            lru_length: 0,
            queues: Queues::default(),
            learned_length: 0,
            path: Vec::new(),
            tick: Tick::default(),
        };
        ghost.size(capacity);
        ghost
    }

    /// The tier holds this many blocks from now on. Starts to watch anew if that
    /// changes which blocks are sampled.
    pub(crate) fn resize(&mut self, capacity: BlockCount) {
        let shift = self.shift;
        self.size(capacity);
        if self.shift != shift {
            let tick = self.tick;
            *self = Self::new(capacity);
            self.tick = tick;
        }
    }

    fn size(&mut self, capacity: BlockCount) {
        let capacity = capacity.get().max(1);
        let watched = u64::from(capacity) * u64::from(REACH);
        self.shift = (0..32).find(|shift| watched >> shift <= u64::from(ENTRIES_MAX)).unwrap_or(32);
        self.capacity = (capacity >> self.shift).max(1);
        self.limit = (self.capacity * REACH).clamp(ENTRIES_MIN, ENTRIES_MAX);
    }

    /// One of how many blocks is watched, as a power of two.
    pub(crate) fn shift(&self) -> u32 {
        self.shift
    }

    /// A request for a prefix of so many blocks, head first. What is missing counts as computed and kept.
    pub(crate) fn request(
        &mut self,
        blocks: u64,
        steps: impl Iterator<Item = Step>,
        hazards: &mut Hazards,
    ) -> Saved {
        self.tick = self.tick.next();
        self.grow_older(hazards);
        let saved = self.take_path(steps, hazards);
        self.count_new(blocks, hazards);
        if self.is_hottest() {
            self.stay_hottest(hazards);
        } else {
            for at in (0..self.path.len()).rev() {
                let index = self.path[at];
                self.make_hottest(index, hazards);
            }
        }
        self.keep_path(hazards);
        while self.length > self.limit {
            self.forget_coldest(hazards);
        }
        saved
    }

    /// Blocks reach further buckets as time goes by.
    fn grow_older(&mut self, hazards: &mut Hazards) {
        for bucket in 1..BUCKETS {
            let start = bucket_start(bucket);
            loop {
                let next = match self.oldest_from[bucket] {
                    NONE => self.coldest,
                    reached => self.entries.at(reached).hotter,
                };
                if next == NONE || self.tick.since(self.entries.at(next).used) < start {
                    break;
                }
                let entry = self.entries.at_mut(next);
                entry.bucket = u8::try_from(bucket).expect("there are few buckets");
                hazards.reached(entry.class(), bucket);
                self.oldest_from[bucket] = next;
            }
            if self.oldest_from[bucket] == NONE {
                break;
            }
        }
    }

    /// Looks the prefix up, counts hits, and adds what is not watched yet.
    fn take_path(&mut self, steps: impl Iterator<Item = Step>, hazards: &mut Hazards) -> Saved {
        let mut saved = Saved::default();
        let mut turn = 0;
        self.path.clear();
        let shift = self.shift;
        for step in steps.filter(|step| step.key.leading_zeros() >= shift) {
            if self.path.len() >= self.limit as usize / 2 {
                break;
            }
            let before = self.path.last().copied();
            match self.find_after(before, step.key) {
                // A block has one predecessor; a prefix that says otherwise ends here.
                Some(index) if before.is_some_and(|before| self.entries.at(index).parent != before) => break,
                Some(index) => {
                    if before.is_none() {
                        self.climb(index, hazards);
                    }
                    let flags = self.entries.at(index).flags;
                    saved.lru += f64::from(if flags & IN_LRU == 0 { 0.0 } else { step.seconds });
                    saved.learned += f64::from(if flags & IN_LEARNED == 0 { 0.0 } else { step.seconds });
                    self.use_again(index, hazards);
                    self.path.push(index);
                    turn = self.entries.at(index).turn.saturating_add(1);
                }
                None => {
                    let index = self.add(step, before.unwrap_or(NONE), turn);
                    self.path.push(index);
                }
            }
        }
        saved
    }

    /// The length of a prompt says how likely its new blocks come back.
    fn count_new(&mut self, length: u64, hazards: &mut Hazards) {
        let kind = length_kind(length);
        for &index in &self.path {
            let entry = self.entries.at_mut(index);
            if entry.flags & LINKED == 0 {
                entry.length = kind;
                hazards.returns.is_new(entry.turn, kind);
            }
        }
    }

    /// A request that starts amid a known prefix uses what is before it too.
    fn climb(&mut self, index: u32, hazards: &mut Hazards) {
        let mut parent = self.entries.at(index).parent;
        while parent != NONE {
            self.use_again(parent, hazards);
            self.path.push(parent);
            parent = self.entries.at(parent).parent;
        }
        self.path.reverse();
    }

    fn use_again(&mut self, index: u32, hazards: &mut Hazards) {
        self.queues.unlist(&mut self.entries, index);
        let entry = self.entries.at_mut(index);
        hazards.used(entry.class(), usize::from(entry.bucket));
        if entry.uses == 0 {
            hazards.returns.came_back(entry.turn, entry.length);
        }
        entry.uses = entry.uses.saturating_add(1);
    }

    /// `before` is the block before it in the request: where an earlier one named both, they are neighbours.
    fn find_after(&self, before: Option<u32>, key: u64) -> Option<u32> {
        let beside = before.map_or(NONE, |before| self.entries.at(before).colder);
        if beside != NONE && self.entries.at(beside).key == key { Some(beside) } else { self.find(key) }
    }

    fn find(&self, key: u64) -> Option<u32> {
        self.index.find(hash(key), |&index| self.entries.at(index).key == key).copied()
    }

    fn add(&mut self, step: Step, parent: u32, turn: u8) -> u32 {
        let entry = Entry {
            key: step.key,
            hotter: NONE,
            colder: NONE,
            parent,
            used: self.tick,
            links: Links::default(),
            worth: step.worth,
            children: 0,
            uses: 0,
            turn,
            bucket: 0,
            flags: 0,
            length: 0,
        };
        let index = match self.free.pop() {
            Some(index) => {
                *self.entries.at_mut(index) = entry;
                index
            }
            None => {
                self.entries.0.push(entry);
                u32::try_from(self.entries.0.len() - 1).expect("entries are bounded")
            }
        };
        let entries = &self.entries;
        self.index.insert_unique(hash(step.key), index, |&index| hash(entries.at(index).key));
        index
    }

    fn link_hottest(&mut self, index: u32) {
        let old = self.hottest;
        let entry = self.entries.at_mut(index);
        (entry.hotter, entry.colder) = (NONE, old);
        match old {
            NONE => self.coldest = index,
            old => self.entries.at_mut(old).hotter = index,
        }
        self.hottest = index;
        self.oldest_from[0] = index;
        self.length += 1;
    }

    fn unlink(&mut self, index: u32) {
        let Entry { hotter, colder, bucket, flags, .. } = *self.entries.at(index);
        for from in (0..=usize::from(bucket)).rev() {
            if self.oldest_from[from] == index {
                self.oldest_from[from] = colder;
            }
        }
        if flags & IN_LRU != 0 {
            self.entries.at_mut(index).flags &= !IN_LRU;
            self.lru_length -= 1;
            if self.lru_edge == index {
                self.lru_edge = hotter;
            }
        }
        match hotter {
            NONE => self.hottest = colder,
            hotter => self.entries.at_mut(hotter).colder = colder,
        }
        match colder {
            NONE => self.coldest = hotter,
            colder => self.entries.at_mut(colder).hotter = hotter,
        }
        self.length -= 1;
    }

    /// Whether the request names what was used last, all of it in the LRU shadow.
    fn is_hottest(&self) -> bool {
        let mut next = self.hottest;
        self.path.iter().all(|&index| {
            let entry = self.entries.at(index);
            let is_next = index == next && entry.flags & IN_LRU != 0;
            next = entry.colder;
            is_next
        })
    }

    /// What was used last is used again: all lies where it is, and is young.
    fn stay_hottest(&mut self, hazards: &mut Hazards) {
        let Some(&last) = self.path.last() else { return };
        let colder = self.entries.at(last).colder;
        for &index in &self.path {
            let entry = self.entries.at_mut(index);
            for from in 1..=usize::from(entry.bucket) {
                if self.oldest_from[from] == index {
                    self.oldest_from[from] = colder;
                }
            }
            entry.used = self.tick;
            entry.bucket = 0;
            hazards.reached(entry.class(), 0);
        }
    }

    /// It was used by this request: to the hot end, and into the LRU shadow.
    fn make_hottest(&mut self, index: u32, hazards: &mut Hazards) {
        if self.entries.at(index).flags & LINKED != 0 {
            self.unlink(index);
        }
        self.link_hottest(index);
        let entry = self.entries.at_mut(index);
        entry.used = self.tick;
        entry.bucket = 0;
        entry.flags |= LINKED | IN_LRU;
        hazards.reached(entry.class(), 0);
        self.lru_length += 1;
        if self.lru_edge == NONE {
            self.lru_edge = index;
        }
        while self.lru_length > self.capacity {
            let edge = self.entries.at_mut(self.lru_edge);
            edge.flags &= !IN_LRU;
            self.lru_edge = edge.hotter;
            self.lru_length -= 1;
        }
    }

    /// The learned shadow takes the path in, then lets go what ranks least.
    fn keep_path(&mut self, hazards: &Hazards) {
        for at in 0..self.path.len() {
            let entry = self.entries.at_mut(self.path[at]);
            if entry.flags & IN_LEARNED == 0 {
                entry.flags |= IN_LEARNED;
                let parent = entry.parent;
                self.learned_length += 1;
                if parent != NONE {
                    self.entries.at_mut(parent).children += 1;
                }
            }
        }
        if let Some(&last) = self.path.last()
            && self.entries.at(last).children == 0
        {
            self.queues.list(&mut self.entries, last, Place::Ordinary, self.tick);
        }
        while self.learned_length > self.capacity {
            let victim = self.queues.least(&self.entries, hazards, self.tick, |_| false);
            let Some(victim) = victim else { break };
            self.leave_learned(victim);
        }
    }

    fn leave_learned(&mut self, index: u32) {
        self.queues.unlist(&mut self.entries, index);
        let entry = self.entries.at_mut(index);
        entry.flags &= !IN_LEARNED;
        let parent = entry.parent;
        self.learned_length -= 1;
        if parent != NONE {
            let entry = self.entries.at_mut(parent);
            entry.children -= 1;
            if entry.children == 0 {
                self.queues.list(&mut self.entries, parent, Place::Ordinary, self.tick);
            }
        }
    }

    fn forget_coldest(&mut self, hazards: &mut Hazards) {
        let index = self.coldest;
        if self.entries.at(index).flags & IN_LEARNED != 0 {
            self.leave_learned(index);
        }
        let entry = self.entries.at(index);
        assert!(entry.children == 0, "no block outlives its ancestors");
        hazards.lost(entry.class(), usize::from(entry.bucket));
        let key = entry.key;
        self.unlink(index);
        if let Ok(found) = self.index.find_entry(hash(key), |&slot| slot == index) {
            found.remove();
        }
        self.free.push(index);
    }
}

#[cfg(test)]
mod tests;
