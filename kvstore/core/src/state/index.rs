//! A hash index: which table slots may hold what has this hash, and what the
//! things that are gone had earned.
//!
//! Open addressing with linear probing over cells of eight bytes: half a hash,
//! and a slot or a past. One cache line answers most look-ups, a look-up of
//! something absent touches no table entry, and so does growing. What goes
//! leaves its past in its own cell, where it is found by whoever looks for the
//! cell when it comes back: a table of its own cost two more cache lines for each
//! block that is replaced. Pasts are bounded: a hand goes round the cells and
//! takes them out. Removal moves later cells back, so that an index whose entries
//! come and go all day needs no rebuilding: tombstones made `hashbrown` spend a
//! seventh of an eviction on that. Never iterated.

use crate::ids::BlockId;

/// Cells of an index that holds something.
const CELLS_MIN: usize = 16;
/// In the low half of a cell: it holds a past and no slot.
const PAST: u32 = 1 << 31;
/// And the hand has not yet come by.
const YOUNG: u32 = 1 << 16;

/// An index. The caller keeps what it points to, and says when that goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    /// Tag in the high half; in the low half slot and one, or a past. Zero is empty. Sorted by tag but for what
    /// collides, so that growing is one pass over old and new.
    cells: Vec<u64>,
    used: usize,
    pasts: usize,
    pasts_max: usize,
    /// Where the next past is taken out.
    hand: usize,
}

/// What something had earned that is gone. Another's, at worst, once in a thousand
/// times: only half a hash tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Past {
    pub(crate) turn: u8,
    pub(crate) uses: u8,
}

impl Past {
    fn value(self) -> u32 {
        PAST | YOUNG | u32::from(self.turn) << 8 | u32::from(self.uses)
    }

    fn of(cell: u64) -> Option<Self> {
        let [uses, turn, ..] = cell.to_le_bytes();
        (value_of(cell) & PAST != 0).then_some(Self { turn, uses })
    }
}

/// Of a block: its id's own low bits, which are uniform already.
#[expect(clippy::cast_possible_truncation, reason = "a tag is the low bits of uniform ones")]
pub(crate) fn tag(block: BlockId) -> u32 {
    block.as_u128() as u32
}

fn tag_of(cell: u64) -> u32 {
    u32::try_from(cell >> 32).expect("the upper half of 64 bits has 32")
}

fn value_of(cell: u64) -> u32 {
    u32::try_from(cell & u64::from(u32::MAX)).expect("the lower half of 64 bits has 32")
}

fn cell_of(tag: u32, value: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value)
}

impl Index {
    /// Keeps so many pasts of what is gone.
    pub(crate) fn remember(&mut self, pasts: u32) {
        self.pasts_max = pasts as usize;
        while self.pasts > self.pasts_max {
            self.forget_one();
        }
    }

    /// Where the search for a tag begins: where it stands among all tags.
    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.cells.len() as u64) >> 32) as usize
    }

    fn after(&self, place: usize) -> usize {
        if place + 1 == self.cells.len() { 0 } else { place + 1 }
    }

    /// Cells from one place on to another.
    fn way(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.cells.len() - from }
    }

    /// The first slot with this tag that `is` says is the one.
    pub(crate) fn find(&self, tag: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        self.place(tag, is).map(|place| value_of(self.cells[place]) - 1)
    }

    /// Brings the cells of these tags into the cache. The loads do not wait for
    /// each other, as look-ups do: for many tags that costs a tenth.
    pub(crate) fn warm(&self, tags: impl Iterator<Item = u32>) {
        if !self.cells.is_empty() {
            // A search looks at two or three cells, which may lie across a line's end.
            let cells = tags.fold(0, |all, tag| {
                let home = self.home(tag);
                all ^ self.cells[home] ^ self.cells.get(home + 2).copied().unwrap_or_default()
            });
            std::hint::black_box(cells);
        }
    }

    fn place(&self, tag: u32, is: impl Fn(u32) -> bool) -> Option<usize> {
        if self.cells.is_empty() {
            return None;
        }
        let mut place = self.home(tag);
        loop {
            let cell = self.cells[place];
            if cell == 0 {
                return None;
            }
            if tag_of(cell) == tag && value_of(cell) & PAST == 0 && is(value_of(cell) - 1) {
                return Some(place);
            }
            place = self.after(place);
        }
    }

    /// Adds a slot that is not in the index. What it had earned before, if that is known.
    #[inline(always)]
    pub(crate) fn insert(&mut self, tag: u32, slot: u32) -> Option<Past> {
        assert!(slot < PAST - 1, "a table has fewer than 2^31 entries");
        self.used += 1;
        // Two thirds full at most: then a search that finds nothing looks at five cells, and at two in the middle.
        // As many pasts as slots have their room before they come: when the table is full, and has no time to grow.
        let full = self.used + self.pasts.max(self.pasts_max.min(self.used));
        if full * 3 > self.cells.len() * 2 {
            self.grow(full * 3 / 2 + 1);
        }
        let mut place = self.home(tag);
        let past = loop {
            let cell = self.cells[place];
            if cell == 0 {
                break None;
            }
            if let Some(past) = Past::of(cell).filter(|_| tag_of(cell) == tag) {
                self.pasts -= 1;
                break Some(past);
            }
            place = self.after(place);
        };
        self.cells[place] = cell_of(tag, slot + 1);
        past
    }

    /// To at least so many cells, of 16, 20, 24, 28, 32, 40, 48 ...: growing is cheap, and cells are not.
    #[cold]
    fn grow(&mut self, cells: usize) {
        let cells = cells.max(CELLS_MIN);
        let cells = cells.next_multiple_of(1 << (cells.ilog2() - 2));
        let old = std::mem::replace(&mut self.cells, vec![0; cells]);
        self.hand = 0;
        for cell in old.into_iter().filter(|&cell| cell != 0) {
            let mut place = self.home(tag_of(cell));
            while self.cells[place] != 0 {
                place = self.after(place);
            }
            self.cells[place] = cell;
        }
    }

    /// Takes a slot out. What was found behind it stays findable, and its past stays in its place if any are kept.
    #[inline(always)]
    pub(crate) fn remove(&mut self, tag: u32, slot: u32, past: Option<Past>) {
        let place = self.place(tag, |other| other == slot).expect("only what is in the index is removed");
        self.used -= 1;
        match past.filter(|_| self.pasts_max > 0) {
            None => self.empty(place),
            Some(past) => {
                self.cells[place] = cell_of(tag, past.value());
                self.pasts += 1;
                if self.pasts > self.pasts_max {
                    self.forget_one();
                }
            }
        }
    }

    /// Takes out the next past on the hand's way that it meets again: each stays for one to two rounds.
    fn forget_one(&mut self) {
        loop {
            let cell = self.cells[self.hand];
            if value_of(cell) & PAST != 0 {
                if value_of(cell) & YOUNG == 0 {
                    break;
                }
                self.cells[self.hand] = cell & !u64::from(YOUNG);
            }
            self.hand = self.after(self.hand);
        }
        self.pasts -= 1;
        // What moves into its cell is looked at next.
        self.empty(self.hand);
    }

    fn empty(&mut self, place: usize) {
        let (mut hole, mut place) = (place, place);
        loop {
            place = self.after(place);
            let cell = self.cells[place];
            if cell == 0 {
                break;
            }
            // A cell may move back as far as its home, and not past it.
            if self.way(self.home(tag_of(cell)), place) >= self.way(hole, place) {
                self.cells[hole] = cell;
                hole = place;
            }
        }
        self.cells[hole] = 0;
    }

    /// Slots in the index, and pasts.
    #[cfg(test)]
    fn len(&self) -> (usize, usize) {
        (self.used, self.pasts)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Numbers that look like any others.
    fn random(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed
    }

    /// Moving cells back on removal could lose one behind a hole, or loop: compared with a
    /// map under tags that collide all the time, through growth and around the end, with
    /// and without pasts between them.
    #[test]
    fn it_finds_what_a_map_finds() {
        for pasts in [0, 5, 300] {
            let mut index = Index::default();
            index.remember(pasts);
            let mut map = BTreeMap::<u32, u32>::new();
            let mut seed = 88_172_645_463_325_252;
            for step in 0..200_000u32 {
                let slot = u32::try_from(random(&mut seed) % 600).unwrap();
                // Few tags, many of them at the end of the cells.
                let tag = (slot % 37).wrapping_mul(u32::MAX / 36);
                if map.remove(&slot).is_some() {
                    index.remove(tag, slot, Some(Past { turn: 1, uses: 2 }));
                } else {
                    map.insert(slot, tag);
                    index.insert(tag, slot);
                }
                assert_eq!(index.len().0, map.len());
                assert!(index.len().1 <= pasts as usize);
                if step % 64 == 0 {
                    for slot in 0..600u32 {
                        let tag = (slot % 37).wrapping_mul(u32::MAX / 36);
                        let found = index.find(tag, |other| other == slot);
                        assert_eq!(found, map.contains_key(&slot).then_some(slot));
                    }
                }
            }
        }
    }

    /// A past could be lost, go to another, stay behind, or outlive its use.
    #[test]
    fn a_past_comes_back_once() {
        let mut index = Index::default();
        index.remember(64);
        assert_eq!(index.insert(7, 0), None);
        index.remove(7, 0, Some(Past { turn: 255, uses: 254 }));
        assert_eq!(index.find(7, |_| true), None);
        assert_eq!(index.insert(8, 0), None);
        assert_eq!(index.insert(7, 1), Some(Past { turn: 255, uses: 254 }));
        assert_eq!(index.find(7, |_| true), Some(1));
        index.remove(7, 1, None);
        assert_eq!(index.insert(7, 1), None);
        assert_eq!(index.len(), (2, 0));
    }

    /// Pasts must stay within their number, and the oldest must not be those that stay.
    #[test]
    fn pasts_are_bounded_and_old_ones_go() {
        let mut index = Index::default();
        index.remember(1000);
        let mut seed = 1;
        let tags: Vec<u32> = (0..20_000).map(|_| (random(&mut seed) >> 32) as u32).collect();
        for (&tag, slot) in tags.iter().zip(0..) {
            index.insert(tag, slot);
            index.remove(tag, slot, Some(Past { turn: 0, uses: 0 }));
        }
        assert_eq!(index.len(), (0, 1000));
        let cells = index.cells.len();
        let kept = |range: std::ops::Range<usize>| {
            tags[range].iter().filter(|&&tag| index.clone().insert(tag, 0).is_some()).count()
        };
        assert_eq!(kept(0..17_900), 0, "twice their number ago");
        assert!(kept(19_800..20_000) > 150, "the latest");
        assert!(cells < 2048, "{cells} cells for 1000");
    }
}
