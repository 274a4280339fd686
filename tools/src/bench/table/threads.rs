//! Two shards on two threads against one: what they do together for each unit
//! of time, over what one does while the other sleeps.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use terrace_core::{Locality, Policy};

use super::shard::{CHAIN_BLOCKS, Look, Shape, Shard, mix};
use super::{BLOCK_BYTES, BLOCKS};
use crate::bench::{Line, median};

const SPEEDUP_MIN: f64 = 1.6;
/// Rounds of one, the other, and both.
const ROUNDS: usize = 15;
/// Time of each of the three.
const SPAN: Duration = Duration::from_millis(100);

/// Chains per second of one thread, alone and with the other, by round.
#[derive(Debug, Default)]
struct Rates {
    alone: Vec<f64>,
    together: Vec<f64>,
}

pub(super) fn run() -> anyhow::Result<Vec<Line>> {
    let barrier = Barrier::new(2);
    let (first, second) = thread::scope(|scope| {
        let first = scope.spawn(|| work(0, &barrier));
        let second = scope.spawn(|| work(1, &barrier));
        (first.join(), second.join())
    });
    let panicked = |_| anyhow!("a thread of the bench panicked");
    let (first, second) = (first.map_err(panicked)??, second.map_err(panicked)??);
    let speedups: Vec<f64> = (0..ROUNDS)
        .map(|round| {
            first.together[round] / first.alone[round] + second.together[round] / second.alone[round]
        })
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "200 is 200")]
    let blocks = CHAIN_BLOCKS as f64;
    let alone = median(&first.alone) * blocks;
    let together = median(&first.together) * blocks + median(&second.together) * blocks;
    Ok(vec![
        Line::plain("table_one_thread", alone, "blocks/s"),
        Line::plain("table_two_threads", together, "blocks/s"),
        Line::speedup("table_two_threads_over_one", median(&speedups), SPEEDUP_MIN),
    ])
}

/// One thread: a shard of half the blocks, made where it is used. Half of what it does is to write.
fn work(number: usize, barrier: &Barrier) -> anyhow::Result<Rates> {
    let prepared = prepare();
    let mut rates = Rates::default();
    let mut failed = prepared.as_ref().err().map(|error| format!("{error:#}"));
    let mut load = prepared.ok();
    // Whatever happens, both threads come to every barrier.
    for _ in 0..ROUNDS {
        for turn in 0..3 {
            barrier.wait();
            if turn != 2 && turn != number {
                continue;
            }
            let Some(running) = &mut load else { continue };
            match running.run_for(SPAN) {
                Ok(rate) if turn == 2 => rates.together.push(rate),
                Ok(rate) => rates.alone.push(rate),
                Err(error) => {
                    failed = Some(format!("{error:#}"));
                    load = None;
                }
            }
        }
    }
    match failed {
        Some(error) => Err(anyhow!(error).context("a shard on a thread of its own")),
        None => Ok(rates),
    }
}

/// A full shard and what was written to it.
struct Load {
    shard: Shard,
    chains: u64,
    held: u64,
}

fn prepare() -> anyhow::Result<Load> {
    let shape = Shape {
        blocks: BLOCKS / 2,
        block_bytes: BLOCK_BYTES,
        locality: Locality::Streamed,
        policy: Policy::Duel,
    };
    let mut shard = Shard::new(shape)?;
    let held = shard.capacity() / CHAIN_BLOCKS as u64;
    for number in 0..held {
        shard.write(number)?;
    }
    Ok(Load { shard, chains: held, held })
}

impl Load {
    /// Writes a chain and reads a recent one, in turn; chains per second.
    fn run_for(&mut self, span: Duration) -> anyhow::Result<f64> {
        let began = Instant::now();
        let mut count = 0u32;
        while began.elapsed() < span {
            self.shard.write(self.chains)?;
            self.chains += 1;
            let back = mix(self.chains) % (self.held / 2);
            self.shard.read(self.chains - 1 - back, Look::First).context("reading")?;
            count += 2;
        }
        Ok(f64::from(count) / began.elapsed().as_secs_f64())
    }
}
