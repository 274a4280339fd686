//! What the writer forgets to stay within the limit, and the memory that it takes until then.

use std::sync::atomic::Ordering;

use crate::run::{Next, Run, Tables, age_at, heat_at, holder_of};
use crate::write::{Note, Writer, all_of};

/// Runs without a successor that are compared when one must go.
const CANDIDATES: usize = 8;
/// Runs looked at for them.
const LOOKED_AT_MAX: u32 = 4_096;

impl Writer {
    /// Makes sure that there are so many free runs and extents: makes them within the limit, else forgets the coldest.
    pub(crate) fn reserve(&mut self, tables: &Tables, runs: usize, extents: usize) {
        while self.runs.len() < runs {
            if !self.grow_runs(tables) && !self.evict(tables) {
                panic!("{} bytes hold less than one batch", self.bytes_max);
            }
        }
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
        self.notes.reserve_exact(range.len());
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
