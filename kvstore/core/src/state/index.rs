//! A hash index: which table slots may hold what has this hash.
//!
//! Open addressing with linear probing over cells of eight bytes: half a hash
//! and a slot. One cache line answers most look-ups, a look-up of something
//! absent touches no table entry, and so does growing. Removal moves later
//! cells back, so that an index whose entries come and go all day needs no
//! rebuilding: tombstones made `hashbrown` spend a seventh of an eviction on that.
//! Never iterated.

/// Cells of an index that holds something.
const CELLS_MIN: usize = 16;

/// An index. The caller keeps what it points to, and says when that goes.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Tag in the high half, slot and one in the low half; zero is empty. A power of two of them.
    cells: Vec<u64>,
    used: usize,
}

/// The tag of a cell is also its home: the low bits say where the search begins.
fn tag_of(cell: u64) -> u32 {
    u32::try_from(cell >> 32).expect("the upper half of 64 bits has 32")
}

fn slot_of(cell: u64) -> u32 {
    u32::try_from(cell & u64::from(u32::MAX)).expect("the lower half of 64 bits has 32") - 1
}

impl Index {
    fn home(&self, tag: u32) -> usize {
        tag as usize & (self.cells.len() - 1)
    }

    fn after(&self, place: usize) -> usize {
        (place + 1) & (self.cells.len() - 1)
    }

    /// The first slot with this tag that `is` says is the one.
    pub(crate) fn find(&self, tag: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        self.place(tag, is).map(|place| slot_of(self.cells[place]))
    }

    /// Brings the cells of these tags into the cache. The loads do not wait for
    /// each other, as look-ups do: for many tags that costs a tenth.
    pub(crate) fn warm(&self, tags: impl Iterator<Item = u32>) {
        if !self.cells.is_empty() {
            // A search looks at two or three cells, which may lie across a line's end.
            let cells = tags.fold(0, |all, tag| {
                let home = self.home(tag);
                all ^ self.cells[home] ^ self.cells[(home + 2) & (self.cells.len() - 1)]
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
            if tag_of(cell) == tag && is(slot_of(cell)) {
                return Some(place);
            }
            place = self.after(place);
        }
    }

    /// Adds a slot that is not in the index.
    #[inline(always)]
    pub(crate) fn insert(&mut self, tag: u32, slot: u32) {
        // Five eighths full at most: then a search that finds nothing looks at four cells, and at two in the middle.
        if (self.used + 1) * 8 > self.cells.len() * 5 {
            self.grow();
        }
        self.used += 1;
        self.put(u64::from(tag) << 32 | (u64::from(slot) + 1));
    }

    fn put(&mut self, cell: u64) {
        let mut place = self.home(tag_of(cell));
        while self.cells[place] != 0 {
            place = self.after(place);
        }
        self.cells[place] = cell;
    }

    fn grow(&mut self) {
        let cells = (self.cells.len() * 2).max(CELLS_MIN);
        let old = std::mem::replace(&mut self.cells, vec![0; cells]);
        for cell in old.into_iter().filter(|&cell| cell != 0) {
            self.put(cell);
        }
    }

    /// Takes a slot out. What was found behind it stays findable.
    #[inline(always)]
    pub(crate) fn remove(&mut self, tag: u32, slot: u32) {
        let mut hole = self.place(tag, |other| other == slot).expect("only what is in the index is removed");
        let mut place = hole;
        loop {
            place = self.after(place);
            let cell = self.cells[place];
            if cell == 0 {
                break;
            }
            // A cell may move back as far as its home, and not past it.
            let reach = place.wrapping_sub(self.home(tag_of(cell))) & (self.cells.len() - 1);
            let step = place.wrapping_sub(hole) & (self.cells.len() - 1);
            if reach >= step {
                self.cells[hole] = cell;
                hole = place;
            }
        }
        self.cells[hole] = 0;
        self.used -= 1;
    }

    /// Slots in the index.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Moving cells back on removal could lose one behind a hole, or loop: compared with a
    /// map under tags that collide all the time, through growth and around the end.
    #[test]
    fn it_finds_what_a_map_finds() {
        let mut index = Index::default();
        let mut map = BTreeMap::<u32, u32>::new();
        let mut random = 88_172_645_463_325_252u64;
        for step in 0..200_000u32 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let slot: u32 = u32::try_from(random % 600).unwrap();
            // Few tags, many of them at the end of the cells.
            let tag = (slot % 37).wrapping_mul(u32::MAX / 36);
            if map.remove(&slot).is_some() {
                index.remove(tag, slot);
            } else {
                map.insert(slot, tag);
                index.insert(tag, slot);
            }
            assert_eq!(index.len(), map.len());
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
