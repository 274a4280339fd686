//! Which sealed blocks are worth a write to Nvme.
//!
//! A block that was used again is written. A new one is written if blocks like it
//! come back often enough: alike are blocks of the same turn, of prompts that are
//! about as long (long prompts come back less often, and cost most).
//! What is refused at its seal is asked about again at its second use, while it is
//! still in memory or after it was computed again. A budget of bytes a day moves
//! the bar: full, everything passes; empty, only what comes back twice as often as
//! the average does.

use crate::api::UseStats;
use crate::units::{ByteCount, Micros, Now};

/// Turns that are told apart.
const TURNS: usize = 4;
/// Octaves of a prompt's blocks that are told apart: up to 255, and more.
const LENGTHS: usize = 9;
#[expect(clippy::cast_possible_truncation, reason = "there are few lengths")]
const LENGTH_LAST: u8 = LENGTHS as u8 - 1;
/// How many blocks of the average each kind is given in advance.
const PRIOR: f32 = 20.0;
/// Below so many new blocks nothing is known, and everything passes.
const LEARNED_MIN: f32 = 256.0;
/// What a budget can save up: an hour of it.
const HOUR_PART: f64 = 24.0;
const DAY: Micros = Micros::new(24 * 3600 * 1_000_000);

/// The kind of a prompt by how many blocks it has.
pub(crate) fn length_kind(blocks: u64) -> u8 {
    let octave = blocks.max(1).ilog2();
    u8::try_from(octave).unwrap_or(u8::MAX).min(LENGTH_LAST)
}

/// How many new blocks of each kind there were, and how many of them were used again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Returns {
    added: [[f32; LENGTHS]; TURNS],
    back: [[f32; LENGTHS]; TURNS],
}

impl Returns {
    pub(crate) fn is_new(&mut self, turn: u8, length: u8) {
        let (turn, length) = place(turn, length);
        self.added[turn][length] += 1.0;
    }

    pub(crate) fn came_back(&mut self, turn: u8, length: u8) {
        let (turn, length) = place(turn, length);
        self.back[turn][length] += 1.0;
    }

    pub(crate) fn decay(&mut self, keep: f32) {
        for counts in [&mut self.added, &mut self.back] {
            counts.iter_mut().flatten().for_each(|count| *count *= keep);
        }
    }

    /// How often blocks of this kind come back, as a multiple of the average;
    /// one while nothing is known.
    fn against_average(&self, turn: u8, length: u8) -> f32 {
        let added: f32 = self.added.iter().flatten().sum();
        let back: f32 = self.back.iter().flatten().sum();
        if added < LEARNED_MIN || back < 1.0 {
            return 1.0;
        }
        let average = back / added;
        let (turn, length) = place(turn, length);
        let rate = (self.back[turn][length] + PRIOR * average) / (self.added[turn][length] + PRIOR);
        rate / average
    }
}

fn place(turn: u8, length: u8) -> (usize, usize) {
    (usize::from(turn).min(TURNS - 1), usize::from(length).min(LENGTHS - 1))
}

/// Bytes that may be written, a token bucket.
#[derive(Clone, Debug)]
pub struct WriteBudget {
    bytes_per_day: Option<u64>,
    left: f64,
    at: Now,
}

impl WriteBudget {
    /// A full budget; `None` has no limit and is never more than half full, so that
    /// only what pays is written.
    pub fn new(bytes_per_day: Option<ByteCount>, now: Now) -> Self {
        let bytes_per_day = bytes_per_day.map(ByteCount::get);
        let left = bytes_per_day.map_or(0.0, |bytes| real(bytes) / HOUR_PART);
        Self { bytes_per_day, left, at: now }
    }

    /// How full it is, from 0 (or below) to 1.
    pub fn fill(&mut self, now: Now) -> f64 {
        let Some(bytes) = self.bytes_per_day else { return 0.5 };
        let most = real(bytes) / HOUR_PART;
        let passed = real(now.since(self.at).get()) / real(DAY.get());
        self.left = (self.left + passed * real(bytes)).min(most);
        self.at = self.at.max(now);
        if most > 0.0 { self.left / most } else { 0.0 }
    }

    /// A write is started.
    pub fn spend(&mut self, bytes: ByteCount) {
        if self.bytes_per_day.is_some() {
            self.left -= real(bytes.get());
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a budget needs no more digits")]
fn real(value: u64) -> f64 {
    value as f64
}

/// What the devices are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// Nothing.
    Idle,
    /// They serve somebody.
    Busy,
}

/// Decides about writes and counts them.
#[derive(Clone, Debug)]
pub struct Admit {
    budget: WriteBudget,
    written: u64,
    refused: u64,
}

impl Admit {
    /// With a budget.
    pub fn new(budget: WriteBudget) -> Self {
        Self { budget, written: 0, refused: 0 }
    }

    /// Is a block worth a write, when it is sealed or used again? `prompt` is how many
    /// blocks its prompt has. True counts as written.
    pub fn decide(
        &mut self,
        now: Now,
        duel: &super::Duel,
        stats: UseStats,
        prompt: u32,
        bytes: ByteCount,
        devices: Devices,
    ) -> bool {
        let fill = self.budget.fill(now);
        let unspent = self.budget.bytes_per_day.is_some() && fill >= 0.5;
        let likely = if stats.uses > 0 {
            // It came back already.
            f64::INFINITY
        } else {
            f64::from(duel.hazards().returns.against_average(stats.turn, length_kind(u64::from(prompt))))
        };
        let pays = fill > 0.0 && likely >= 2.0 * (1.0 - fill);
        let write = pays || (unspent && devices == Devices::Idle);
        if write {
            self.budget.spend(bytes);
            self.written += bytes.get();
        } else {
            self.refused += bytes.get();
        }
        write
    }

    /// Bytes that passed.
    pub fn written(&self) -> ByteCount {
        ByteCount::new(self.written)
    }

    /// Bytes that were refused, once for each time that they were asked about.
    pub fn refused(&self) -> ByteCount {
        ByteCount::new(self.refused)
    }
}
