//! Two shards on two threads against one: what they do together for each unit
//! of time, over what one does while the other sleeps. Time in which a thread
//! waited for a core is left out, so the bar means two cores; what the clock on
//! the wall says is printed as well.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use terrace_core::{Locality, Policy};

use super::clock::Stretch;
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
    alone: Vec<Rate>,
    together: Vec<Rate>,
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    /// For each second on a core.
    core: f64,
    /// For each second.
    wall: f64,
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
    let speedup = |of: fn(&Rate) -> f64| {
        let over = |rates: &Rates, round: usize| of(&rates.together[round]) / of(&rates.alone[round]);
        median(&(0..ROUNDS).map(|round| over(&first, round) + over(&second, round)).collect::<Vec<_>>())
    };
    #[expect(clippy::cast_precision_loss, reason = "200 is 200")]
    let blocks = CHAIN_BLOCKS as f64;
    let rate = |rates: &[Rate]| blocks * median(&rates.iter().map(|rate| rate.core).collect::<Vec<_>>());
    Ok(vec![
        Line::plain("table_one_thread", rate(&first.alone), "blocks/s"),
        Line::plain("table_two_threads", rate(&first.together) + rate(&second.together), "blocks/s"),
        Line::speedup("table_two_threads_over_one", speedup(|rate| rate.core), SPEEDUP_MIN),
        Line::plain("table_two_threads_over_one_wall", speedup(|rate| rate.wall), "times"),
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
    /// Writes a chain and reads a recent one, in turn.
    fn run_for(&mut self, span: Duration) -> anyhow::Result<Rate> {
        let stretch = Stretch::begin();
        let mut chains = 0u32;
        while stretch.elapsed() < span {
            self.shard.write(self.chains)?;
            self.chains += 1;
            let back = mix(self.chains) % (self.held / 2);
            self.shard.read(self.chains - 1 - back, Look::First).context("reading")?;
            chains += 2;
        }
        let wall = f64::from(chains) / stretch.elapsed().as_secs_f64();
        Ok(Rate { core: wall / stretch.share(), wall })
    }
}
