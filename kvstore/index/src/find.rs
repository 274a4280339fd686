//! What is held of a prompt: for each holder its longest prefix by tier, and every span it has.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use crate::ids::{HolderId, Key, SizeClass, Tier};
use crate::run::{
    EXTENT_RECORDS, Next, Place, RECORD_WORDS, RUN_BLOCKS, Run, Tables, chain_of, holder_of, size_of_record,
};

/// Readings before a run that was reused meanwhile counts as gone.
const READINGS_MAX: usize = 4;
/// Runs that are looked up together.
const AHEAD: usize = 32;

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
        let full = ones(count);
        if hbm == full {
            held.blocks += count;
            held.fastest[0] += if held.prefix[2] == start { count } else { 0 };
            held.prefix.iter_mut().filter(|prefix| **prefix == start).for_each(|prefix| *prefix += count);
            self.add_span(slot, Tier::Hbm, start, start + count);
            return;
        }
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

/// Fills `found`. Starts again if something was reused under its eyes; where that goes on, the prompt is
/// cut before it, so this ends whatever a writer does.
pub(crate) fn find(tables: &Tables, mut prompt: &[Key], found: &mut Found) {
    let mut readings = 0;
    while let Err(moved) = read(tables, prompt, found) {
        readings += 1;
        if readings >= READINGS_MAX {
            prompt = &prompt[..moved];
        }
    }
}

/// One reading. Fails with the block at which a run changed hands.
fn read(tables: &Tables, prompt: &[Key], found: &mut Found) -> Result<(), usize> {
    found.clear();
    let mut ahead = Ahead { count: 0, at: 0, places: [(0, Place::of(0)); AHEAD] };
    let mut start = 0;
    while start < prompt.len() {
        let (next, guess) = (ahead.next(start), || tables.guess(prompt[start]));
        let (hint, trust) =
            next.map_or_else(|| (guess(), Trust::Nothing), |place| (Some(place), Trust::Chain));
        let known = hint.and_then(|place| {
            let run = tables.runs.at(place.run);
            let seen = run.fence.load(Ordering::Acquire);
            let count = matched(tables, run, place.position, &prompt[start..], trust);
            (count > 0).then_some((run, place, seen, count))
        });
        let (run, place, seen, count) = match known {
            Some(known) => known,
            None => {
                // What a prompt goes on with is found behind the block before it, or begins a run.
                let inner = || if start == 0 { tables.locate_inner(prompt[start]) } else { None };
                let Some((place, seen)) = tables.locate(prompt[start]).or_else(inner) else { break };
                let run = tables.runs.at(place.run);
                (
                    run,
                    place,
                    seen,
                    matched(tables, run, place.position, &prompt[start..], Trust::Chain).max(1),
                )
            }
        };
        // Not where the prompt leaves the run before its end: it goes on elsewhere.
        if (next.is_none() || known.is_none()) && place.position + count == RUN_BLOCKS {
            ahead.look(tables, prompt.len(), (start, place));
        }
        let Some(count) = take(tables, run, (place.position, seen), (start, count), found)? else { break };
        start += count;
    }
    Ok(())
}

/// Adds what a run's holders have of `count` blocks from `start` on; none where nobody has all of them,
/// and the prompt ends for everybody.
#[inline]
fn take(
    tables: &Tables,
    run: &Run,
    (position, seen): (u32, u32),
    (start, count): (usize, u32),
    found: &mut Found,
) -> Result<Option<usize>, usize> {
    // A prompt of more blocks than 32 bits count is cut there.
    let Ok(first) = u32::try_from(start) else { return Ok(None) };
    let (mask, mut union) = (ones(count), 0);
    tables.each_record(run, |record| {
        let about = record[0].load(Ordering::Acquire);
        let bits = |word: usize| record[word].load(Ordering::Acquire) >> position & mask;
        let words = [about, bits(1), bits(2), bits(3)];
        let held = words[1] | words[2] | words[3];
        // A record that changed hands while it was read is left out.
        if held != 0 && holder_of(record[0].load(Ordering::Relaxed)) == holder_of(about) {
            union |= held;
            found.add(words, first, count);
        }
        Next::Go
    });
    if !run.is_unmoved(seen) {
        return Err(start);
    }
    // The blocks lived when the run was read, but their last holder may have gone since.
    let held = run_of_ones(union).min(count);
    found.blocks = first + held;
    Ok((held == count).then_some(count as usize))
}

/// Where the runs of a prompt probably are, as each names the one that goes on from it. What is there is
/// loaded side by side, so that cache misses overlap; nothing of it is trusted before keys were compared.
struct Ahead {
    count: usize,
    /// The place that is used next.
    at: usize,
    /// A block of the prompt, and where it may be.
    places: [(usize, Place); AHEAD],
}

impl Ahead {
    #[inline]
    fn next(&mut self, start: usize) -> Option<Place> {
        let (block, place) = *self.places[..self.count].get(self.at)?;
        self.at += 1;
        (block == start).then_some(place)
    }

    /// Follows the runs from a known place on.
    fn look(&mut self, tables: &Tables, blocks: usize, (mut start, mut place): (usize, Place)) {
        (self.count, self.at) = (0, 1);
        let mut words = [(0, 0, 0); AHEAD];
        while self.count < AHEAD && start < blocks {
            let run = tables.runs.at(place.run);
            let (records, holders) = chain_of(run.chain.load(Ordering::Acquire));
            // The last of them that the first extent can have.
            let word = (holders.clamp(1, EXTENT_RECORDS) as usize - 1) * RECORD_WORDS;
            words[self.count] = (place.run, records, word);
            self.places[self.count] = (start, place);
            self.count += 1;
            let next = run.next.load(Ordering::Acquire);
            if next == 0 {
                break;
            }
            start += (RUN_BLOCKS - place.position) as usize;
            place = Place { run: next, position: 0 };
        }
        let loaded = words[..self.count].iter().fold(0, |sum, (run, records, record)| {
            let last = tables.runs.at(*run).last[0].load(Ordering::Relaxed);
            sum ^ last ^ tables.pool.load(*records, 0) ^ tables.pool.load(*records, *record)
        });
        black_box(loaded);
    }
}

/// What is known of a place before its keys are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// If the prompt goes on in this run, it does so from this position on.
    Chain,
    Nothing,
}

/// Blocks of the prompt that the run has from a position on, all of them live.
#[inline]
fn matched(tables: &Tables, run: &Run, position: u32, prompt: &[Key], trust: Trust) -> u32 {
    let all = run.live.load(Ordering::Acquire);
    let live = run_of_ones(all >> position);
    let most = live.min(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
    let is_here = |count: u32| tables.key(run, position + count) == Some(prompt[count as usize]);
    if most == 0 {
        return 0;
    }
    // Keys are chained: where one is equal, all before it are, and where one differs, all after it do. A block that
    // is just being added may be the last one already, so this says nothing of positions.
    let is_last = trust == Trust::Chain && all >> (position + most - 1) == 1;
    if is_last && run.ends_with(prompt[most as usize - 1]) || is_here(most - 1) {
        return most;
    }
    if !is_here(0) {
        return 0;
    }
    let (mut same, mut other) = (0, most - 1);
    while same + 1 < other {
        let middle = same + (other - same) / 2;
        if is_here(middle) { same = middle } else { other = middle }
    }
    same + 1
}
