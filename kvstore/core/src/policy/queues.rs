//! The evictable blocks of one tier and frame size, in the order in which they
//! may go: intrusive lists over the caller's slab.
//!
//! There is one list a class, in order of last use, so that the least recently
//! used block is at the cold end of one of them ([`Queues::coldest`]) and the one
//! with the least rank at an end of one of them ([`Queues::least`]): within a class
//! ranks change with age alone, and the oldest and the newest are looked at. Both
//! orders are served by the same lists at any time, so that a cache can follow the
//! better one without any work. Orphans go before all others, retained blocks after.
//!
//! The caller lists leaves only, and says when a block becomes or stops being one.
//! Every operation is O(1) or O(lists); nothing is allocated or drawn at random.

use crate::policy::class::{CLASSES, Class, Tick};
use crate::policy::hazards::Hazards;

/// No block.
pub(crate) const NONE: u32 = u32::MAX;
/// How far from each end a place is looked for when a block that was not used now is listed.
const PLACE_STEPS: u32 = 24;
/// How many busy blocks are passed over at one end of one list.
const SKIPS_MAX: u32 = 8;

const UNLISTED: u8 = u8::MAX;
const FIRST: u8 = 0;
const CLASS_BASE: u8 = 1;
#[expect(clippy::cast_possible_truncation, reason = "there are few classes")]
const LAST: u8 = CLASS_BASE + CLASSES as u8;
const LISTS: usize = LAST as usize + 1;

/// A block's place, kept in the caller's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Links {
    hotter: u32,
    colder: u32,
    list: u8,
    /// Uses since it was listed, for S3-FIFO.
    pub(crate) mark: u8,
}

const _: () = assert!(size_of::<Links>() == 12);

impl Default for Links {
    fn default() -> Self {
        Self { hotter: NONE, colder: NONE, list: UNLISTED, mark: 0 }
    }
}

impl Links {
    /// Is it in a list?
    pub(crate) fn is_listed(self) -> bool {
        self.list != UNLISTED
    }
}

/// What the order depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) class: Class,
    /// Its last use.
    pub(crate) used: Tick,
    /// Seconds that a use saves, per byte; any unit that is the same for all blocks of the lists.
    pub(crate) worth: f32,
}

/// The caller's entries.
pub(crate) trait Slab {
    fn links(&self, index: u32) -> Links;
    fn links_mut(&mut self, index: u32) -> &mut Links;
    fn facts(&self, index: u32) -> Facts;
}

/// Among which blocks one is listed.
#[allow(dead_code, reason = "the shadows and the replay know neither orphans nor promises")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It cannot be reached any more: before all others.
    Orphan,
    /// By class and last use.
    Ordinary,
    /// It was promised to stay: after all others.
    Retained,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    hottest: u32,
    coldest: u32,
}

/// The lists of one tier and frame size.
#[derive(Clone, Debug)]
pub(crate) struct Queues {
    lists: [Ends; LISTS],
    /// Bit n: list n is not empty.
    filled: u32,
    /// The choice of each class list that was found at `found_at`, while its bit in
    /// `found` is set: until the list or the time changes.
    choices: [Found; LISTS],
    found: u32,
    found_for: Option<(Tick, Order)>,
}

/// By what the next to leave is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Age,
    /// By the ranks that were learned so many times.
    Rank(u32),
}

/// Who would leave a list first, and how much it is worth.
#[derive(Clone, Copy, Debug)]
struct Found {
    rank: f32,
    age: u32,
    index: u32,
}

impl Found {
    fn before(&self, other: &Found) -> bool {
        self.rank < other.rank || (self.rank == other.rank && self.age > other.age)
    }
}

/// The bits of the class lists.
const CLASS_LISTS: u32 = ((1 << CLASSES) - 1) << CLASS_BASE;

const _: () = assert!(LISTS <= u32::BITS as usize);

impl Default for Queues {
    fn default() -> Self {
        Self {
            lists: [Ends { hottest: NONE, coldest: NONE }; LISTS],
            filled: 0,
            choices: [Found { rank: 0.0, age: 0, index: NONE }; LISTS],
            found: 0,
            found_for: None,
        }
    }
}

impl Queues {
    /// Lists a block at its place by last use. A block that is used now goes to the
    /// hot end at once; for others the place is looked for from both ends, for a
    /// bounded number of steps, beyond which the nearer of the two ends is taken.
    ///
    /// # Panics
    /// If it is listed already.
    pub(crate) fn list(&mut self, slab: &mut impl Slab, index: u32, place: Place, now: Tick) {
        let list = match place {
            Place::Orphan => FIRST,
            Place::Ordinary => CLASS_BASE + slab.facts(index).class.number(),
            Place::Retained => LAST,
        };
        self.list_in(slab, index, list, now);
    }

    /// Lists a block in a list by its number.
    pub(crate) fn list_in(&mut self, slab: &mut impl Slab, index: u32, list: u8, now: Tick) {
        let colder = self.place(slab, list, now.since(slab.facts(index).used), now);
        self.insert(slab, index, list, colder);
    }

    /// The block behind which one of this age goes, on the colder side.
    fn place(&self, slab: &impl Slab, list: u8, age: u32, now: Tick) -> u32 {
        let age_of = |index: u32| now.since(slab.facts(index).used);
        let ends = self.lists[usize::from(list)];
        let (mut from_hot, mut from_cold) = (ends.hottest, ends.coldest);
        for _ in 0..PLACE_STEPS {
            if from_hot == NONE || age_of(from_hot) >= age {
                return from_hot;
            }
            if age_of(from_cold) < age {
                return slab.links(from_cold).colder;
            }
            from_hot = slab.links(from_hot).colder;
            from_cold = slab.links(from_cold).hotter;
        }
        if from_hot == NONE || from_cold == NONE {
            return from_hot;
        }
        let nearer_hot = age - age_of(from_hot).min(age) <= age_of(from_cold).saturating_sub(age);
        if nearer_hot { from_hot } else { slab.links(from_cold).colder }
    }

    /// Puts an unlisted block at the hot end of a list by its number.
    pub(crate) fn push(&mut self, slab: &mut impl Slab, index: u32, list: u8) {
        let hottest = self.lists[usize::from(list)].hottest;
        self.insert(slab, index, list, hottest);
    }

    /// The block at the cold end of a list by its number, busy ones passed over.
    pub(crate) fn cold_end(&self, slab: &impl Slab, list: u8, busy: &impl Fn(u32) -> bool) -> Option<u32> {
        self.end(slab, list, End::Cold, busy)
    }

    /// Puts an unlisted block on the hotter side of `colder`.
    fn insert(&mut self, slab: &mut impl Slab, index: u32, list: u8, colder: u32) {
        let ends = &mut self.lists[usize::from(list)];
        let hotter = if colder == NONE { ends.coldest } else { slab.links(colder).hotter };
        let links = slab.links_mut(index);
        assert!(links.list == UNLISTED, "a block is in at most one list of a tier");
        *links = Links { hotter, colder, list, mark: links.mark };
        match hotter {
            NONE => ends.hottest = index,
            hotter => slab.links_mut(hotter).colder = index,
        }
        match colder {
            NONE => ends.coldest = index,
            colder => slab.links_mut(colder).hotter = index,
        }
        self.filled |= 1 << list;
        self.found &= !(1 << list);
    }

    /// Takes a block out, if it is listed.
    pub(crate) fn unlist(&mut self, slab: &mut impl Slab, index: u32) {
        let Links { hotter, colder, list, mark } = slab.links(index);
        if list == UNLISTED {
            return;
        }
        *slab.links_mut(index) = Links { mark, ..Links::default() };
        self.found &= !(1 << list);
        let ends = &mut self.lists[usize::from(list)];
        match hotter {
            NONE => ends.hottest = colder,
            hotter => slab.links_mut(hotter).colder = colder,
        }
        match colder {
            NONE => ends.coldest = hotter,
            colder => slab.links_mut(colder).hotter = hotter,
        }
        if ends.coldest == NONE {
            self.filled &= !(1 << list);
        }
    }

    /// The block that was not used for longest: orphans first, retained ones last.
    /// `busy` blocks are passed over, up to a few in each list; one that is no longer
    /// busy is found again at the next tick.
    pub(crate) fn coldest(&mut self, slab: &impl Slab, now: Tick, busy: impl Fn(u32) -> bool) -> Option<u32> {
        self.choose(slab, &busy, now, Order::Age, &[End::Cold], |_, _| 0.0)
    }

    /// The block with the least expected savings per byte and time: orphans first,
    /// retained ones last. Of equals the one that was not used for longest.
    pub(crate) fn least(
        &mut self,
        slab: &impl Slab,
        hazards: &Hazards,
        now: Tick,
        busy: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        let order = Order::Rank(hazards.learned());
        self.choose(slab, &busy, now, order, &[End::Cold, End::Hot], |facts, age| {
            hazards.rank(facts.class, age, facts.worth)
        })
    }

    /// An orphan if there is one, else the block that is before all others of those
    /// at the ends of the class lists, else a retained block.
    fn choose(
        &mut self,
        slab: &impl Slab,
        busy: &impl Fn(u32) -> bool,
        now: Tick,
        order: Order,
        looked_at: &[End],
        rank: impl Fn(Facts, u32) -> f32,
    ) -> Option<u32> {
        if let Some(orphan) = self.end(slab, FIRST, End::Cold, busy) {
            return Some(orphan);
        }
        if self.found_for != Some((now, order)) {
            self.found_for = Some((now, order));
            self.found = 0;
        }
        let mut best: Option<Found> = None;
        let mut left = self.filled & CLASS_LISTS;
        while left != 0 {
            let list = left.trailing_zeros();
            left &= left - 1;
            let at = list as usize;
            if self.found & (1 << list) == 0 || busy(self.choices[at].index) {
                self.found &= !(1 << list);
                let Some(found) = self.find_in(slab, at, busy, now, looked_at, &rank) else { continue };
                self.choices[at] = found;
                self.found |= 1 << list;
            }
            if best.is_none_or(|best| self.choices[at].before(&best)) {
                best = Some(self.choices[at]);
            }
        }
        best.map(|found| found.index).or_else(|| self.end(slab, LAST, End::Cold, busy))
    }

    fn find_in(
        &self,
        slab: &impl Slab,
        list: usize,
        busy: &impl Fn(u32) -> bool,
        now: Tick,
        looked_at: &[End],
        rank: &impl Fn(Facts, u32) -> f32,
    ) -> Option<Found> {
        let mut best: Option<Found> = None;
        for &end in looked_at {
            let index = self.end(slab, u8::try_from(list).ok()?, end, busy)?;
            let facts = slab.facts(index);
            let age = now.since(facts.used);
            let found = Found { rank: rank(facts, age), age, index };
            if best.is_none_or(|best| found.before(&best)) {
                best = Some(found);
            }
        }
        best
    }

    /// The first block from an end of a list that is not busy.
    fn end(&self, slab: &impl Slab, list: u8, end: End, busy: &impl Fn(u32) -> bool) -> Option<u32> {
        let ends = self.lists[usize::from(list)];
        let mut index = match end {
            End::Cold => ends.coldest,
            End::Hot => ends.hottest,
        };
        for _ in 0..=SKIPS_MAX {
            if index == NONE {
                return None;
            }
            if !busy(index) {
                return Some(index);
            }
            index = match end {
                End::Cold => slab.links(index).hotter,
                End::Hot => slab.links(index).colder,
            };
        }
        None
    }
}

#[derive(Clone, Copy)]
enum End {
    Cold,
    Hot,
}

#[cfg(test)]
mod tests;
