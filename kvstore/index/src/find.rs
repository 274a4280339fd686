//! What is held of a prompt: for each holder its longest prefix by tier, and every span it has.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use crate::ids::{HolderId, Key, SizeClass, Tier};
use crate::run::{Next, Place, Run, Tables, holder_of, size_of_record};

/// Readings of a run that changed meanwhile, before it counts as gone.
const READINGS_MAX: usize = 4;
/// How far ahead of a run's first block the directory's line is loaded.
const AHEAD: usize = 64;

/// One holder's part of a prompt. Counts are blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Who.
    pub holder: HolderId,
    /// Longest prefix in `Hbm`; in `Hbm` or `Pinned`; in any tier.
    pub prefix: [u32; 3],
    /// Blocks of the longest prefix by the fastest tier that has them. Their sum is `prefix[2]`.
    pub fastest: [u32; 3],
    /// Blocks of the prompt that it has, those beyond its prefix included.
    pub blocks: u32,
    /// Size class of its blocks, as last said.
    pub size: SizeClass,
    /// Heat of the last run it has a part of, 0 to 63, as of its last use.
    pub heat: u8,
    /// Its last span, as an index.
    last_span: u32,
}

/// Consecutive blocks that a holder has, in the fastest tier that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Who: an index into [`Found::holders`].
    pub held: u32,
    /// Fastest tier of these blocks.
    pub tier: Tier,
    /// First block.
    pub start: u32,
    /// The block after the last.
    pub end: u32,
}

/// The answer, and the scratch to find the next one without allocating. Spans of one holder are in order.
#[derive(Clone, Debug, Default)]
pub struct Found {
    blocks: u32,
    holders: Vec<Held>,
    spans: Vec<Span>,
    /// For each holder's number its index in `holders`, if that index names it.
    slots: Vec<u32>,
    records: Vec<Words>,
}

/// A record as it was read: about, and the bits of each tier.
type Words = [u64; 4];

impl Found {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Blocks from the prompt's first that somebody holds.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Everybody who holds a part of them, in the order of their first blocks.
    pub fn holders(&self) -> &[Held] {
        &self.holders
    }

    /// What they hold: for each block and holder, one span.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// One holder's part.
    pub fn held(&self, holder: HolderId) -> Option<&Held> {
        self.slot(holder).map(|slot| &self.holders[slot])
    }

    /// What is held from block `start` on: the spans that end after it.
    pub fn beyond(&self, start: u32) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(move |span| span.end > start)
    }

    #[inline]
    pub(crate) fn slot(&self, holder: HolderId) -> Option<usize> {
        let slot = *self.slots.get(holder.0 as usize)? as usize;
        (self.holders.get(slot)?.holder == holder).then_some(slot)
    }

    fn clear(&mut self) {
        self.blocks = 0;
        self.holders.clear();
        self.spans.clear();
    }

    /// The holder's entry, made if it is new.
    #[inline]
    fn entry(&mut self, holder: HolderId) -> usize {
        if let Some(slot) = self.slot(holder) {
            return slot;
        }
        let number = holder.0 as usize;
        if number >= self.slots.len() {
            self.slots.resize((number + 1).next_power_of_two(), 0);
        }
        let slot = self.holders.len();
        self.slots[number] = u32::try_from(slot).expect("there are fewer holders than 2^20");
        self.holders.push(Held {
            holder,
            prefix: [0; 3],
            fastest: [0; 3],
            blocks: 0,
            size: SizeClass::UNKNOWN,
            heat: 0,
            last_span: u32::MAX,
        });
        slot
    }

    /// Adds what one holder has of `count` blocks from `start` on.
    #[inline]
    fn add(&mut self, words: Words, start: u32, count: u32) {
        let [about, hbm, pinned, nvme] = words;
        let all = hbm | pinned | nvme;
        let Some(holder) = holder_of(about) else { return };
        let slot = self.entry(holder);
        let held = &mut self.holders[slot];
        held.size = size_of_record(about);
        held.heat = (about >> 32 & 63) as u8;
        held.blocks += all.count_ones();
        if held.prefix[2] == start {
            let whole = run_of_ones(all);
            let prefix = ones(whole);
            if held.prefix[0] == start {
                held.prefix[0] += run_of_ones(hbm);
            }
            if held.prefix[1] == start {
                held.prefix[1] += run_of_ones(hbm | pinned);
            }
            held.prefix[2] += whole;
            held.fastest[0] += (hbm & prefix).count_ones();
            held.fastest[1] += (pinned & !hbm & prefix).count_ones();
            held.fastest[2] += (nvme & !hbm & !pinned & prefix).count_ones();
        }
        let full = ones(count);
        if hbm == full {
            self.add_span(slot, Tier::Hbm, start, start + count);
            return;
        }
        let mut left = all;
        while left != 0 {
            let from = left.trailing_zeros();
            let (tier, bits) = if hbm >> from & 1 == 1 {
                (Tier::Hbm, hbm)
            } else if pinned >> from & 1 == 1 {
                (Tier::Pinned, pinned & !hbm)
            } else {
                (Tier::Nvme, nvme & !hbm & !pinned)
            };
            let length = run_of_ones(bits >> from);
            left &= !(ones(length) << from);
            self.add_span(slot, tier, start + from, start + from + length);
        }
    }

    #[inline]
    fn add_span(&mut self, slot: usize, tier: Tier, start: u32, end: u32) {
        let held = &mut self.holders[slot];
        if let Some(last) = self.spans.get_mut(held.last_span as usize)
            && last.end == start
            && last.tier == tier
        {
            last.end = end;
            return;
        }
        held.last_span = u32::try_from(self.spans.len()).expect("a prompt has fewer spans than 2^32");
        let held = u32::try_from(slot).expect("there are fewer holders than 2^20");
        self.spans.push(Span { held, tier, start, end });
    }
}

#[inline]
const fn run_of_ones(bits: u64) -> u32 {
    bits.trailing_ones()
}

/// So many ones, at most 64.
#[inline]
const fn ones(count: u32) -> u64 {
    if count == 0 { 0 } else { u64::MAX >> (64 - count) }
}

pub(crate) fn find(tables: &Tables, prompt: &[Key], found: &mut Found) {
    found.clear();
    let (mut start, mut readings) = (0, 0);
    while start < prompt.len() {
        if let Some(ahead) = prompt.get(start + AHEAD) {
            black_box(tables.directory.warm(ahead.hash()));
        }
        let Some((place, seen)) = tables.locate(prompt[start]) else { break };
        let run = tables.runs.at(place.run);
        let count = matched(tables, run, place, &prompt[start..]);
        read_records(tables, run, place.position, count, &mut found.records);
        if !run.is_unmoved(seen) {
            readings += 1;
            if readings == READINGS_MAX {
                break;
            }
            continue;
        }
        readings = 0;
        // A prompt of more blocks than 32 bits count is cut there.
        let Ok(first) = u32::try_from(start) else { break };
        let mut records = std::mem::take(&mut found.records);
        let mut union = 0;
        for words in &records {
            union |= words[1] | words[2] | words[3];
            found.add(*words, first, count);
        }
        records.clear();
        found.records = records;
        // The blocks live when the run was read, but their last holder may have gone since.
        let held = run_of_ones(union).min(count);
        found.blocks = first + held;
        if held < count {
            break;
        }
        start += count as usize;
    }
}

/// Blocks of the prompt that the run has from `place` on, all of them live; at least the first.
#[inline]
fn matched(tables: &Tables, run: &Run, place: Place, prompt: &[Key]) -> u32 {
    let live = run_of_ones(run.live.load(Ordering::Acquire) >> place.position);
    let most = live.min(u32::try_from(prompt.len()).unwrap_or(u32::MAX)).max(1);
    let is_here = |count: u32| tables.key(run, place.position + count) == Some(prompt[count as usize]);
    if most == 1 || is_here(most - 1) {
        return most;
    }
    // Keys are chained: where one differs, all after it do.
    let (mut same, mut other) = (0, most - 1);
    while same + 1 < other {
        let middle = same + (other - same) / 2;
        if is_here(middle) { same = middle } else { other = middle }
    }
    same + 1
}

/// Every record that has one of `count` blocks from `position` on, its bits moved to bit 0. A record that
/// changed hands while it was read is left out.
#[inline]
fn read_records(tables: &Tables, run: &Run, position: u32, count: u32, records: &mut Vec<Words>) {
    let mask = ones(count);
    records.clear();
    tables.each_record(run, |record| {
        let about = record[0].load(Ordering::Acquire);
        let bits = |word: usize| record[word].load(Ordering::Acquire) >> position & mask;
        let words = [about, bits(1), bits(2), bits(3)];
        let holder = holder_of(about);
        if words[1] | words[2] | words[3] != 0
            && holder.is_some()
            && holder_of(record[0].load(Ordering::Relaxed)) == holder
        {
            records.push(words);
        }
        Next::Go
    });
}
