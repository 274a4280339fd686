//! How soon blocks come back, learned as life tables: per class and age, how many
//! blocks reached that age unused and how many were used at it.
//!
//! Whoever watches a sample of blocks, resident or not, reports when one reaches
//! an age ([`Hazards::reached`]) and when it is used ([`Hazards::used`]). Because
//! blocks are counted when they reach an age and not when they leave, the tables
//! are unbiased from the first moment on, and ages beyond a tier's reach are
//! learned as well as those within. Counts decay, so that they follow change.

use crate::policy::admission::Returns;
use crate::policy::class::{CLASSES, Class};

/// Ages are told apart by octaves, up to 2^23 requests. Two or four steps an octave
/// changed token hits by less than 0.3 points on any trace, and cost as many times
/// the work of following blocks as they age.
pub(crate) const BUCKETS: usize = 24;
/// Uses between two recomputations of the ranks. One costs as much as 50 uses.
const LEARN_EVERY: u32 = 8192;
/// The first recomputation; until then nothing is known and all ranks are equal.
const LEARN_FIRST: u32 = 256;
/// What remains of the counts at each recomputation: half after 110,000 uses.
const KEEP: f32 = 0.95;
/// How many blocks of the average class each class is given in advance, so that
/// one early use does not make a rare class precious.
const PRIOR: f64 = 20.0;

/// The bucket of an age in requests.
pub(crate) fn bucket(age: u32) -> usize {
    let octave = (u64::from(age) + 1).ilog2();
    (octave as usize).min(BUCKETS - 1)
}

/// The youngest age of a bucket, and of the one past the last.
pub(crate) fn bucket_start(bucket: usize) -> u32 {
    (1 << bucket) - 1
}

type Table<T> = [[T; BUCKETS]; CLASSES];

/// Life tables of all classes, and the ranks that follow from them.
#[derive(Clone, Debug)]
pub(crate) struct Hazards {
    reached: Box<Table<f32>>,
    used: Box<Table<f32>>,
    /// Most uses per request of the clock that keeping a block from an age on can bring.
    density: Box<Table<f32>>,
    uses: u32,
    learned: u32,
    /// How many new blocks come back at all, for admission.
    pub(crate) returns: Returns,
}

impl Hazards {
    pub(crate) fn new() -> Self {
        let zeros = || Box::new([[0.0; BUCKETS]; CLASSES]);
        Self {
            reached: zeros(),
            used: zeros(),
            density: zeros(),
            uses: 0,
            learned: 0,
            returns: Returns::default(),
        }
    }

    /// An unused block of a class became as old as a bucket.
    pub(crate) fn reached(&mut self, class: Class, bucket: usize) {
        self.reached[class.index()][bucket] += 1.0;
    }

    /// A block is used whose age is in a bucket that it was reported to have reached.
    pub(crate) fn used(&mut self, class: Class, bucket: usize) {
        self.used[class.index()][bucket] += 1.0;
        self.uses = self.uses.wrapping_add(1);
        let early = self.uses < LEARN_EVERY && self.uses >= LEARN_FIRST && self.uses.is_power_of_two();
        if early || self.uses.is_multiple_of(LEARN_EVERY) {
            self.learn();
        }
    }

    /// A block is no longer watched; it counts for half of the bucket that it is in.
    pub(crate) fn lost(&mut self, class: Class, bucket: usize) {
        let reached = &mut self.reached[class.index()][bucket];
        *reached = (*reached - 0.5).max(0.0);
    }

    /// What keeping a block of this class and age is worth: `worth` per use, times
    /// the most uses per request of the clock that can be had by keeping it for the
    /// best length of time from now on. The block with the least goes first.
    pub(crate) fn rank(&self, class: Class, age: u32, worth: f32) -> f32 {
        self.density[class.index()][bucket(age)] * worth
    }

    /// How often the ranks were learned; before the first time all are equal.
    pub(crate) fn learned(&self) -> u32 {
        self.learned
    }

    fn learn(&mut self) {
        self.learned = self.learned.wrapping_add(1);
        let pooled = self.pooled();
        // Ages that nobody has reached yet say nothing: the walk ends before them.
        let end = pooled.iter().rposition(|&(reached, _)| reached > 0.5).map_or(1, |last| last + 1);
        for class in 0..CLASSES {
            let mut hazard = [0.0; BUCKETS];
            for (bucket, &(reached, used)) in pooled.iter().enumerate() {
                let average = used / (reached + 1.0);
                let own_reached = f64::from(self.reached[class][bucket]);
                let own_used = f64::from(self.used[class][bucket]);
                let share = (own_used + PRIOR * average) / (own_reached + PRIOR);
                hazard[bucket] = share.clamp(0.0, 1.0);
            }
            for from in 0..BUCKETS {
                self.density[class][from] = narrow(best_density(&hazard, from, end.max(from + 1)));
            }
        }
        for counts in [&mut self.reached, &mut self.used] {
            counts.iter_mut().flatten().for_each(|count| *count *= KEEP);
        }
        self.returns.decay(KEEP);
    }

    /// Reached and used of all classes together, by age.
    fn pooled(&self) -> [(f64, f64); BUCKETS] {
        let mut pooled = [(0.0, 0.0); BUCKETS];
        for (reached, used) in self.reached.iter().zip(self.used.iter()) {
            for (bucket, sum) in pooled.iter_mut().enumerate() {
                sum.0 += f64::from(reached[bucket]);
                sum.1 += f64::from(used[bucket]);
            }
        }
        pooled
    }
}

/// Of all lengths of time to keep a block from bucket `from` on, the one with the
/// most uses per time (the Gittins index): uses and time of a block that is given
/// up at its first use or at the end, whichever is earlier.
fn best_density(hazard: &[f64; BUCKETS], from: usize, end: usize) -> f64 {
    let (mut unused, mut uses, mut time, mut best) = (1.0, 0.0, 0.0, 0.0f64);
    for (bucket, &share) in hazard.iter().enumerate().take(end).skip(from) {
        let width = f64::from(bucket_start(bucket + 1) - bucket_start(bucket));
        uses += unused * share;
        time += unused * width * (1.0 - share / 2.0);
        unused *= 1.0 - share;
        best = best.max(uses / time.max(1e-9));
    }
    best
}

#[expect(clippy::cast_possible_truncation, reason = "a probability or density needs no more digits")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::UseStats;

    fn class(uses: u8) -> Class {
        Class::of(UseStats { depth: 0, turn: 0, uses })
    }

    /// Lives one block: reaches each age up to `age`, and is used there or lost.
    fn live(hazards: &mut Hazards, class: Class, age: u32, used: bool) {
        (0..=bucket(age)).for_each(|bucket| hazards.reached(class, bucket));
        if used {
            hazards.used(class, bucket(age));
        } else {
            hazards.lost(class, bucket(age));
        }
    }

    /// An age on a border could fall into the wrong bucket, or a bucket be empty.
    #[test]
    fn buckets_cover_all_ages_in_order() {
        for number in 1..BUCKETS {
            let start = bucket_start(number);
            assert_eq!(bucket(start), number, "the youngest age of bucket {number}");
            assert_eq!(bucket(start - 1), number - 1, "the age before bucket {number}");
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(u32::MAX), BUCKETS - 1);
    }

    /// A class that never comes back must rank below one that does, however new both are.
    #[test]
    fn a_class_that_comes_back_is_worth_keeping_until_it_is_late() {
        let (once, again) = (class(0), class(1));
        let mut hazards = Hazards::new();
        for _ in 0..2 * LEARN_EVERY {
            live(&mut hazards, again, 100, true);
            live(&mut hazards, once, 5000, false);
        }
        assert!(hazards.rank(again, 0, 1.0) > 100.0 * hazards.rank(once, 0, 1.0));
        let before = hazards.rank(again, 0, 1.0);
        let soon = hazards.rank(again, 90, 1.0);
        let late = hazards.rank(again, 300, 1.0);
        assert!(soon > before, "the nearer the use, the less time it takes: {soon} {before}");
        assert!(late < before / 2.0, "past its time it is worth less: {late} {before}");
        assert!((hazards.rank(again, 0, 3.0) / before - 3.0).abs() < 1e-3, "worth is a factor");
    }

    /// What was true long ago must not rule for ever.
    #[test]
    fn the_tables_follow_change() {
        let (first, second) = (class(0), class(1));
        let mut hazards = Hazards::new();
        let phase = |hazards: &mut Hazards, hot: Class, cold: Class| {
            for _ in 0..40 * LEARN_EVERY {
                live(hazards, hot, 50, true);
                live(hazards, cold, 2000, false);
            }
        };
        phase(&mut hazards, first, second);
        assert!(hazards.rank(first, 0, 1.0) > 10.0 * hazards.rank(second, 0, 1.0));
        phase(&mut hazards, second, first);
        assert!(hazards.rank(second, 0, 1.0) > 3.0 * hazards.rank(first, 0, 1.0));
    }
}
