//! `bench table`: the residency table on one thread and on two, and the memory it takes.
//!
//! A million resident blocks in chains of 200, written and read at random
//! places, so that caches help as little as they do in a node. A bare table in
//! the same run says what any table costs on this machine. Time in which a
//! thread waited for a core is left out.

mod bare;
pub(super) mod clock;
mod memory;
mod shard;
mod threads;

use std::time::{Duration, Instant};

use anyhow::ensure;
use terrace_core::{Locality, Policy};

use super::blocks::MODEL_BLOCK_BYTES;
use super::{Line, median};
use bare::Bare;
use clock::Stretch;
use shard::{CHAIN_BLOCKS, Look, Shape, Shard, chain, mix};

/// Resident blocks.
const BLOCKS: u64 = 1_000_000;
/// Payload of a block: 8,192 share a chunk. The table never sees the bytes.
const BLOCK_BYTES: u64 = 4096;
/// Rounds of writing. Together they replace every block once.
const WRITE_ROUNDS: u64 = 10;
/// Rounds of reading.
const READ_ROUNDS: u64 = 9;
/// Chains read in a round.
const CHAINS_READ: u64 = 400;
/// Of the chains drawn, in percent, that must be whole. Older ones may have lost blocks to eviction.
const WHOLE_MIN: usize = 25;

const WRITE_NANOS_MAX: f64 = 300.0;
const READ_NANOS_MAX: f64 = 100.0;

/// One way to use the table, with its figures by round, in nanoseconds per block.
struct Variant {
    name: &'static str,
    /// Its figures have bars.
    barred: bool,
    shard: Shard,
    /// Chains written so far.
    chains: u64,
    /// Every number that is read from it is drawn from this one.
    draw: u64,
    register: f64,
    write: Vec<WriteNanos>,
    read: Vec<ReadNanos>,
}

#[derive(Clone, Copy, Debug)]
struct WriteNanos {
    reserve: f64,
    seal: f64,
    release: f64,
}

#[derive(Clone, Copy, Debug)]
struct ReadNanos {
    matched: f64,
    lease: f64,
    lease_cold: f64,
    release: f64,
}

pub(super) fn run() -> anyhow::Result<Vec<Line>> {
    // First, while this process holds nothing else.
    let mut lines = memory::run()?;
    let mut variants = [
        Variant::new("", true, BLOCK_BYTES, Locality::Streamed, Policy::Duel)?,
        Variant::new("_window", true, BLOCK_BYTES, Locality::Local, Policy::Duel)?,
        Variant::new("_lru", false, BLOCK_BYTES, Locality::Streamed, Policy::Lru)?,
        Variant::new("_368640", false, MODEL_BLOCK_BYTES, Locality::Streamed, Policy::Duel)?,
    ];
    let mut bare = bare::filled(variants[0].shard.capacity())?;
    let chains = variants[0].shard.capacity() / CHAIN_BLOCKS as u64;
    let (mut bare_write, mut bare_read) = (Vec::new(), Vec::new());
    for round in 0..WRITE_ROUNDS {
        let each = chains / WRITE_ROUNDS;
        for variant in &mut variants {
            variant.write_round(each)?;
        }
        bare_write.push(write_bare(&mut bare, chains + round * each, each));
    }
    for _ in 0..READ_ROUNDS {
        for variant in &mut variants {
            variant.read_round()?;
        }
        bare_read.push(read_bare(&mut bare, variants[0].draw, chains));
    }
    let bare = (median(&bare_write), median(&bare_read));
    for variant in &variants {
        variant.report(bare, &mut lines);
    }
    lines.push(Line::plain("table_bare_replace", bare.0, "ns/block"));
    lines.push(Line::plain("table_bare_match", bare.1, "ns/block"));
    drop(variants);
    lines.extend(threads::run()?);
    Ok(lines)
}

impl Variant {
    /// A full table.
    fn new(
        name: &'static str,
        barred: bool,
        block_bytes: u64,
        locality: Locality,
        policy: Policy,
    ) -> anyhow::Result<Self> {
        let shard = Shard::new(Shape { blocks: BLOCKS, block_bytes, locality, policy })?;
        let chains = shard.capacity() / CHAIN_BLOCKS as u64;
        let mut variant = Self {
            name,
            barred,
            shard,
            chains: 0,
            draw: 1,
            register: 0.0,
            write: Vec::new(),
            read: Vec::new(),
        };
        let filled = variant.write_chains(chains)?;
        variant.register = filled.reserve + filled.seal + filled.release;
        Ok(variant)
    }

    fn write_chains(&mut self, count: u64) -> anyhow::Result<WriteNanos> {
        let (mut reserve, mut seal, mut release) = Default::default();
        let stretch = Stretch::begin();
        for _ in 0..count {
            let took = self.shard.write(self.chains)?;
            self.chains += 1;
            reserve += took.reserve;
            seal += took.seal;
            release += took.release;
        }
        let (share, chains) = (stretch.share(), usize::try_from(count)?);
        Ok(WriteNanos {
            reserve: share * per_block(reserve, chains),
            seal: share * per_block(seal, chains),
            release: share * per_block(release, chains),
        })
    }

    /// Replaces a share of the table.
    fn write_round(&mut self, chains: u64) -> anyhow::Result<()> {
        let before = self.shard.evicted();
        let took = self.write_chains(chains)?;
        self.write.push(took);
        let evicted = self.shard.evicted() - before;
        let written = chains * CHAIN_BLOCKS as u64;
        // Windows are evicted by the chunk.
        ensure!(evicted > written / 2, "{evicted} blocks were evicted for {written} new ones");
        Ok(())
    }

    /// Reads chains at random: every other one is looked up first.
    fn read_round(&mut self) -> anyhow::Result<()> {
        let recent = BLOCKS / CHAIN_BLOCKS as u64 * 9 / 10;
        let (mut matched, mut lease, mut lease_cold, mut release) = <[_; 4]>::default().into();
        let (mut looked, mut cold, mut released) = (0, 0, 0);
        let stretch = Stretch::begin();
        for turn in 0..CHAINS_READ {
            self.draw = mix(self.draw);
            let number = self.chains - 1 - self.draw % recent;
            let look = if turn % 2 == 0 { Look::First } else { Look::Never };
            let took = self.shard.read(number, look)?;
            if let Some(time) = took.release {
                release += time;
                released += 1;
            }
            match took.matched {
                _ if !took.whole => {}
                Some(time) => {
                    matched += time;
                    lease += took.lease;
                    looked += 1;
                }
                None => {
                    lease_cold += took.lease;
                    cold += 1;
                }
            }
        }
        let share = stretch.share();
        let enough = usize::try_from(CHAINS_READ)? / 2 * WHOLE_MIN / 100;
        ensure!(
            looked >= enough && cold >= enough,
            "only {} of {CHAINS_READ} chains are whole",
            looked + cold
        );
        self.read.push(ReadNanos {
            matched: share * per_block(matched, looked),
            lease: share * per_block(lease, looked),
            lease_cold: share * per_block(lease_cold, cold),
            release: share * per_block(release, released),
        });
        Ok(())
    }

    fn report(&self, bare: (f64, f64), lines: &mut Vec<Line>) {
        let name = |figure: &str| format!("table_{figure}{}", self.name);
        let plain = |figure: &str, value: f64| Line::plain(&name(figure), value, "ns/block");
        let write = |part: fn(&WriteNanos) -> f64| median(&self.write.iter().map(part).collect::<Vec<_>>());
        let read = |part: fn(&ReadNanos) -> f64| median(&self.read.iter().map(part).collect::<Vec<_>>());
        let replace = write(|nanos| nanos.reserve + nanos.seal + nanos.release);
        let match_lease = read(|nanos| nanos.matched + nanos.lease);
        let judged = if self.barred { Line::at_most } else { Line::cost };
        lines.extend([
            judged(&name("replace"), replace, WRITE_NANOS_MAX, "ns/block"),
            judged(&name("match_lease"), match_lease, READ_NANOS_MAX, "ns/block"),
            plain("lease_release", read(|nanos| nanos.lease_cold + nanos.release)),
        ]);
        if !self.barred {
            return;
        }
        lines.extend([
            Line::cost(&name("replace_to_bare"), replace, bare.0, "ns/block"),
            Line::cost(&name("read_to_bare"), match_lease, bare.1, "ns/block"),
            plain("register", self.register),
            plain("replace_reserve", write(|nanos| nanos.reserve)),
            plain("replace_seal", write(|nanos| nanos.seal)),
            plain("replace_release", write(|nanos| nanos.release)),
            plain("match", read(|nanos| nanos.matched)),
            plain("lease_after_match", read(|nanos| nanos.lease)),
            plain("lease", read(|nanos| nanos.lease_cold)),
            plain("release", read(|nanos| nanos.release)),
            plain("read_release", read(|nanos| nanos.matched + nanos.lease + nanos.release)),
        ]);
    }
}

/// Nanoseconds for each block of so many chains; 0 of none.
fn per_block(time: Duration, chains: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a count far below 2^52")]
    let blocks = (chains * CHAIN_BLOCKS).max(1) as f64;
    time.as_secs_f64() * 1e9 / blocks
}

fn write_bare(bare: &mut Bare, first: u64, chains: u64) -> f64 {
    let (mut took, mut count) = (Duration::ZERO, 0);
    let stretch = Stretch::begin();
    for number in first..first + chains {
        let blocks = chain(number);
        let began = Instant::now();
        bare.write(&blocks);
        took += began.elapsed();
        count += 1;
    }
    stretch.share() * per_block(took, count)
}

/// Reads chains drawn from `draw` among the first `chains` after those that were replaced.
fn read_bare(bare: &mut Bare, draw: u64, chains: u64) -> f64 {
    let (mut draw, mut took, mut count) = (draw, Duration::ZERO, 0);
    let stretch = Stretch::begin();
    for _ in 0..CHAINS_READ {
        draw = mix(draw);
        let blocks = chain(chains + draw % (chains * 9 / 10));
        let began = Instant::now();
        let found = bare.read(&blocks);
        took += began.elapsed();
        assert!(found == CHAIN_BLOCKS, "chains that were just written are there");
        count += 1;
    }
    stretch.share() * per_block(took, count)
}
