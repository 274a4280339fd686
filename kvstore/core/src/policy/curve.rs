//! What other sizes of a tier would bring: the miss-ratio curve under LRU, from a
//! bounded sample of all blocks that were asked for.
//!
//! A block is in an LRU tier of a size if the blocks used since fit into it with
//! it (tail-to-head LRU, which equals leaf-only LRU, so that the longest cached
//! prefix is exactly the blocks that are in). That distance is measured among
//! blocks sampled by their id and scaled up; when the sample is full, every second
//! block of it is dropped. So the memory is fixed and the rate adapts. It starts where
//! the first block's size says that it will end, so that a request costs a tier that
//! has just begun to fill no more than a full one.

use hashbrown::HashTable;

/// Sizes of a curve.
pub const CURVE_POINTS: usize = 32;
/// The largest size, in sizes of the tier, and the smallest, as its part.
const LARGEST: f64 = 4.0;
const SMALLEST_PART: f64 = 1024.0;
/// Requests between two decays, and what remains then: half after 180,000 requests.
const DECAY_EVERY: u32 = 4096;
const DECAY_KEEP: f64 = 0.985;

const NONE: u32 = u32::MAX;

/// One block of a request's prefix.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    /// Uniform bits of the block id.
    pub key: u64,
    /// What it takes of the tier, in the unit of its size: bytes or blocks.
    pub size: u64,
    /// Tokens that a hit saves.
    pub tokens: u32,
    /// Seconds that a hit saves.
    pub seconds: f32,
}

/// What a whole request asks for: known without a look at each block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked {
    /// Tokens of all blocks.
    pub tokens: f64,
    /// Seconds that all blocks take.
    pub seconds: f64,
}

/// What a tier of one size would bring.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// The size, in the unit of the tier's size.
    pub size: u64,
    /// Tokens found, of those asked for.
    pub token_hits: f64,
    /// Seconds saved, of those that computing everything takes.
    pub second_hits: f64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: u64,
    size: u64,
    place: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    tokens: f64,
    seconds: f64,
}

/// The curve of one tier, over all or for one tenant.
#[derive(Clone, Debug)]
pub struct Curve {
    sizes: [u64; CURVE_POINTS],
    /// The same as numbers to compare with.
    limits: [f64; CURVE_POINTS],
    /// Hits that need at least this size and not less.
    hits: [Sums; CURVE_POINTS],
    asked: Sums,
    /// What was asked for according to the sample; differs from `asked` by luck.
    sampled: Sums,
    /// A block is sampled if so many leading bits of its key are zero.
    shift: u32,
    entries: Vec<Entry>,
    free: Vec<u32>,
    index: HashTable<u32>,
    /// The entry at each place in order of last use; later is hotter.
    places: Vec<u32>,
    /// No place before this one is taken.
    oldest: usize,
    by_place: PlaceSums,
    total: u64,
    entries_max: usize,
    path: Vec<u32>,
    requests: u32,
}

fn hash(key: u64) -> u64 {
    // The leading bits are alike in all sampled blocks.
    key.rotate_left(29)
}

impl Curve {
    /// For a tier of this size, from at most `entries_max` sampled blocks (at least 64).
    pub fn new(size: u64, entries_max: u32) -> Self {
        let entries_max = entries_max.max(64) as usize;
        let sizes = sizes(size);
        Self {
            sizes,
            limits: sizes.map(real),
            hits: [Sums::default(); CURVE_POINTS],
            asked: Sums::default(),
            sampled: Sums::default(),
            shift: 0,
            entries: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            places: Vec::new(),
            oldest: 0,
            by_place: PlaceSums::new(4 * entries_max),
            total: 0,
            entries_max,
            path: Vec::new(),
            requests: 0,
        }
    }

    /// The tier has this size from now on: counts start anew, what is known of blocks stays.
    pub fn resize(&mut self, size: u64) {
        self.sizes = sizes(size);
        self.limits = self.sizes.map(real);
        self.hits = [Sums::default(); CURVE_POINTS];
        self.asked = Sums::default();
        self.sampled = Sums::default();
    }

    /// A request for a prefix: what all of it asks for, and its blocks, head first. Blocks
    /// that are not sampled at the present rate may be left out.
    pub fn request(&mut self, asked: Asked, blocks: impl Iterator<Item = Lookup>) {
        self.requests = self.requests.wrapping_add(1);
        if self.requests.is_multiple_of(DECAY_EVERY) {
            self.decay();
        }
        self.path.clear();
        self.asked.add(Sums { tokens: asked.tokens, seconds: asked.seconds }, 1.0);
        let mut blocks = blocks.peekable();
        if let (true, Some(first)) = (self.entries.is_empty(), blocks.peek()) {
            self.shift = self.shift.max(self.full_shift(first.size));
        }
        let scale = self.scale();
        let mut near = Near::default();
        let mut before = None;
        // Sizes of the blocks so far, while those are what was used last.
        let mut on_top = Some(0);
        for block in blocks {
            if block.key.leading_zeros() < self.shift || self.path.len() >= self.entries_max {
                continue;
            }
            let own = Sums { tokens: f64::from(block.tokens), seconds: f64::from(block.seconds) };
            self.sampled.add(own, scale);
            let found = self.find_after(before, block.key);
            before = found;
            match found {
                // The request names it twice.
                Some(slot) if self.entries[slot as usize].place == NONE => {}
                Some(slot) => {
                    let Entry { place, size, .. } = self.entries[slot as usize];
                    on_top = on_top.filter(|_| place as usize + 1 + self.path.len() == self.places.len());
                    let hotter = match &mut on_top {
                        Some(sum) => std::mem::replace(sum, *sum + size),
                        None => self.total - self.by_place.up_to(place as usize, &mut near),
                    };
                    if let Some(point) = self.point_of(real(hotter) * scale + real(size), &mut near) {
                        self.hits[point].add(own, scale);
                    }
                    self.path.push(slot);
                }
                None => {
                    on_top = None;
                    let slot = self.add(block);
                    self.path.push(slot);
                }
            }
        }
        // Whoever asks again for what was asked for last leaves everything where it is.
        if on_top.is_none() {
            // First all out and then all in: what changes lies side by side, and the sums change together.
            for at in (0..self.path.len()).rev() {
                self.vacate(self.path[at]);
            }
            for at in (0..self.path.len()).rev() {
                self.make_hottest(self.path[at]);
            }
        }
        self.forget_cold();
        while self.entries.len() - self.free.len() > self.entries_max {
            self.halve();
        }
    }

    /// The curve so far, smallest size first.
    pub fn points(&self) -> Vec<CurvePoint> {
        // Whether the hottest blocks are sampled is luck, and they hit: misses are
        // counted from the sample, and what is not a miss is spread as its hits are.
        let found = self.hits.iter().fold(Sums::default(), |sum, hits| sum.with(*hits, 1.0));
        let factor = |asked: f64, sampled: f64, found: f64| {
            let hits = (asked - (sampled - found)).max(0.0);
            if found > 0.0 && asked > 0.0 { hits / found / asked } else { 0.0 }
        };
        let tokens = factor(self.asked.tokens, self.sampled.tokens, found.tokens);
        let seconds = factor(self.asked.seconds, self.sampled.seconds, found.seconds);
        let mut sum = Sums::default();
        let points = self.sizes.iter().zip(&self.hits).map(|(&size, hits)| {
            sum = sum.with(*hits, 1.0);
            CurvePoint {
                size,
                token_hits: (sum.tokens * tokens).min(1.0),
                second_hits: (sum.seconds * seconds).min(1.0),
            }
        });
        points.collect()
    }

    /// One of how many blocks is sampled now.
    pub fn sampled_one_of(&self) -> u64 {
        1 << self.shift.min(63)
    }

    /// A block is sampled now if so many leading bits of its key are zero.
    pub(crate) fn shift(&self) -> u32 {
        self.shift
    }

    /// Share of the blocks that are sampled now.
    pub fn sample_rate(&self) -> f64 {
        1.0 / self.scale()
    }

    /// Seconds that computing everything would have taken lately.
    pub fn asked_seconds(&self) -> f64 {
        self.asked.seconds
    }

    fn scale(&self) -> f64 {
        f64::from(self.shift).exp2()
    }

    /// The rate at which as many blocks of this size as the largest size holds fill the sample.
    fn full_shift(&self, size: u64) -> u32 {
        let blocks = self.sizes[CURVE_POINTS - 1] / size.max(1);
        let times = blocks.div_ceil(self.entries_max as u64);
        (0..64).find(|&shift| times <= 1 << shift).unwrap_or(63)
    }

    /// The entry of a block. `before` is the entry of the one before it in the request: where an earlier request
    /// named both, it lies one place before that.
    fn find_after(&self, before: Option<u32>, key: u64) -> Option<u32> {
        let place = before.and_then(|before| self.entries[before as usize].place.checked_sub(1));
        let beside = place.and_then(|place| self.places.get(place as usize).copied());
        match beside {
            Some(slot) if slot != NONE && self.entries[slot as usize].key == key => Some(slot),
            Some(_) | None => {
                self.index.find(hash(key), |&slot| self.entries[slot as usize].key == key).copied()
            }
        }
    }

    /// The smallest size that holds what is needed; `None` if none does.
    fn point_of(&self, needed: f64, near: &mut Near) -> Option<usize> {
        // Neighbours mostly need the same size, or the next.
        if near.point > 0 && self.limits[near.point - 1] >= needed {
            near.point = self.limits.partition_point(|&limit| limit < needed);
        }
        while self.limits.get(near.point).is_some_and(|&limit| limit < needed) {
            near.point += 1;
        }
        (near.point < CURVE_POINTS).then_some(near.point)
    }

    fn add(&mut self, block: Lookup) -> u32 {
        let entry = Entry { key: block.key, size: block.size, place: NONE };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                u32::try_from(self.entries.len() - 1).expect("the sample is bounded")
            }
        };
        let entries = &self.entries;
        self.index.insert_unique(hash(block.key), slot, |&slot| hash(entries[slot as usize].key));
        slot
    }

    fn make_hottest(&mut self, slot: u32) {
        self.vacate(slot);
        if self.places.len() >= self.by_place.places() {
            self.compact();
        }
        let place = u32::try_from(self.places.len()).expect("places are bounded");
        self.places.push(slot);
        let entry = &mut self.entries[slot as usize];
        entry.place = place;
        let size = entry.size;
        self.total += size;
        self.by_place.set(place as usize, size);
    }

    fn vacate(&mut self, slot: u32) {
        let Entry { place, size, .. } = self.entries[slot as usize];
        if place == NONE {
            return;
        }
        self.places[place as usize] = NONE;
        self.entries[slot as usize].place = NONE;
        self.total -= size;
        self.by_place.set(place as usize, 0);
    }

    /// Drops what no size of the curve would hold.
    fn forget_cold(&mut self) {
        let largest = real(self.sizes[CURVE_POINTS - 1]) / self.scale();
        while real(self.total) > largest {
            while self.places.get(self.oldest) == Some(&NONE) {
                self.oldest += 1;
            }
            let Some(&slot) = self.places.get(self.oldest) else { return };
            self.forget(slot);
        }
    }

    fn forget(&mut self, slot: u32) {
        self.vacate(slot);
        let key = self.entries[slot as usize].key;
        if let Ok(found) = self.index.find_entry(hash(key), |&other| other == slot) {
            found.remove();
        }
        self.free.push(slot);
    }

    /// Renumbers the places that are taken.
    fn compact(&mut self) {
        self.places.retain(|&slot| slot != NONE);
        self.oldest = 0;
        self.by_place.clear();
        for at in 0..self.places.len() {
            let place = u32::try_from(at).expect("places are bounded");
            let entry = &mut self.entries[self.places[at] as usize];
            entry.place = place;
            let size = entry.size;
            self.by_place.set(at, size);
        }
    }

    /// The same of at most so many sampled blocks (at least 64).
    pub(crate) fn of_at_most(&self, entries_max: u32) -> Self {
        let mut curve = self.clone();
        curve.entries_max = entries_max.max(64) as usize;
        while curve.entries.len() - curve.free.len() > curve.entries_max {
            curve.halve();
        }
        curve.by_place = PlaceSums::new(4 * curve.entries_max);
        curve.compact();
        curve
    }

    /// Drops every second block of the sample.
    fn halve(&mut self) {
        self.shift += 1;
        for at in 0..self.places.len() {
            let slot = self.places[at];
            if slot == NONE || self.entries[slot as usize].key.leading_zeros() >= self.shift {
                continue;
            }
            self.forget(slot);
        }
        self.compact();
    }

    fn decay(&mut self) {
        for sums in self.hits.iter_mut().chain([&mut self.asked, &mut self.sampled]) {
            sums.tokens *= DECAY_KEEP;
            sums.seconds *= DECAY_KEEP;
        }
    }
}

/// Places in a group.
const GROUP: usize = 64;

/// Sizes by place, and their sums. A request uses neighbours, which were used by the one before it: one change of a
/// group's sum serves many of its places, and the sum up to a place follows from that up to a place close by.
#[derive(Clone, Debug)]
struct PlaceSums {
    sizes: Vec<u64>,
    /// Sums of groups, as a Fenwick tree.
    groups: Vec<u64>,
    /// A group whose sum has changed by so much since it was put into the tree. It wraps around.
    changed: (usize, u64),
}

/// Where the last look was.
#[derive(Clone, Copy, Debug, Default)]
struct Near {
    place: usize,
    /// Sizes up to there, if anything was looked at yet.
    sum: Option<u64>,
    point: usize,
}

impl PlaceSums {
    fn new(places: usize) -> Self {
        let groups = places.div_ceil(GROUP);
        Self { sizes: vec![0; places], groups: vec![0; groups + 1], changed: (0, 0) }
    }

    fn places(&self) -> usize {
        self.sizes.len()
    }

    fn clear(&mut self) {
        self.sizes.fill(0);
        self.groups.fill(0);
        self.changed = (0, 0);
    }

    fn set(&mut self, place: usize, size: u64) {
        let group = place / GROUP;
        if group != self.changed.0 {
            let (old, change) = std::mem::replace(&mut self.changed, (group, 0));
            let mut at = old + 1;
            while change != 0 && at < self.groups.len() {
                self.groups[at] = self.groups[at].wrapping_add(change);
                at += at & at.wrapping_neg();
            }
        }
        let before = std::mem::replace(&mut self.sizes[place], size);
        self.changed.1 = self.changed.1.wrapping_add(size).wrapping_sub(before);
    }

    /// Sizes at this place and all before it. Nothing has changed since `near` was new.
    fn up_to(&self, place: usize, near: &mut Near) -> u64 {
        let sum = match near.sum {
            Some(sum) if place <= near.place && near.place - place < GROUP => {
                sum - self.sizes[place + 1..=near.place].iter().sum::<u64>()
            }
            Some(sum) if place > near.place && place - near.place < GROUP => {
                sum + self.sizes[near.place + 1..=place].iter().sum::<u64>()
            }
            Some(_) | None => {
                let group = place / GROUP;
                let mut sum = self.sizes[group * GROUP..=place].iter().sum::<u64>();
                if self.changed.0 < group {
                    sum = sum.wrapping_add(self.changed.1);
                }
                let mut at = group;
                while at > 0 {
                    sum = sum.wrapping_add(self.groups[at]);
                    at &= at - 1;
                }
                sum
            }
        };
        (near.place, near.sum) = (place, Some(sum));
        sum
    }
}

impl Sums {
    fn with(self, other: Sums, scale: f64) -> Sums {
        Sums { tokens: self.tokens + other.tokens * scale, seconds: self.seconds + other.seconds * scale }
    }

    fn add(&mut self, other: Sums, scale: f64) {
        *self = self.with(other, scale);
    }
}

/// From far below the tier's size to several times it, in equal ratios.
fn sizes(size: u64) -> [u64; CURVE_POINTS] {
    let step = (LARGEST * SMALLEST_PART).powf(1.0 / real(CURVE_POINTS as u64 - 1));
    let mut sizes = [0; CURVE_POINTS];
    let mut next = real(size.max(1)) / SMALLEST_PART;
    for point in &mut sizes {
        *point = whole(next).max(1);
        next *= step;
    }
    sizes
}

#[expect(clippy::cast_precision_loss, reason = "a size needs no more digits")]
fn real(value: u64) -> f64 {
    value as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative; beyond 2^64 it saturates"
)]
fn whole(value: f64) -> u64 {
    value.round() as u64
}

#[cfg(test)]
mod tests;
