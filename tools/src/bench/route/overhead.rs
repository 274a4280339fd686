//! What a request pays to be placed: hashing its tokens, asking the index, and
//! weighing the workers, at a fixed rate of arrivals on one core.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Context;
use terrace_core::{TokenCount, chain_keys};
use terrace_index::{Found, HolderId, Index, Key, Limits, TierSet};
use terrace_router::place::rate::Prefill;
use terrace_router::place::source::{Link, Run, Tier, View};
use terrace_router::place::{self, Candidate, Decodes, Ties};

use crate::bench::Line;
use crate::bench::table::clock::Stretch;

const PROMPT_TOKENS: u32 = 8000;
const BLOCK_TOKENS: u32 = 16;
const WORKERS: u32 = 100;
/// Different prompts; each worker holds some of each.
const PROMPTS: u32 = 20;
/// Requests a second, and for how long.
const RATE: u32 = 500;
const SECONDS: u32 = 10;
/// Milliseconds that 99 of 100 requests must not exceed.
const LIMIT_MS: f64 = 1.0;

/// Times from the arrival of a request to its placement, what waits before it included.
///
/// # Errors
/// When the index refuses a worker.
pub(super) fn run() -> anyhow::Result<Vec<Line>> {
    let prompts: Vec<Vec<u32>> = (0..PROMPTS).map(prompt).collect();
    let index = filled(&prompts)?;
    let mut found = Found::new();
    let gap = Duration::from_secs(1) / RATE;
    let (mut whole, mut hash, mut find, mut weigh) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let begin = Instant::now();
    for number in 0..RATE * SECONDS {
        // Asleep, as a router is: its caches are others' in the meantime.
        std::thread::sleep((begin + gap * number).saturating_duration_since(Instant::now()));
        let tokens = &prompts[(number % PROMPTS) as usize];
        let stretch = Stretch::begin();
        let keys = chain_keys(tokens, TokenCount::new(BLOCK_TOKENS));
        let keys: Vec<Key> = keys.into_iter().map(Key::from_bytes).collect();
        let hashed = stretch.elapsed();
        index.find(&keys, &mut found);
        let asked = stretch.elapsed();
        black_box(placed(&found));
        let end = stretch.elapsed();
        whole.push(end.mul_f64(stretch.share()));
        hash.push(hashed);
        find.push(asked - hashed);
        weigh.push(end - asked);
    }
    let answers = queued(&whole, gap);
    let plain = |name: &str, times: Vec<Duration>| Line::plain(name, rank(times, 50), "ms");
    let lines = vec![
        Line::at_most("place 8,000 tokens at 500/s: p99", rank(answers.clone(), 99), LIMIT_MS, "ms"),
        plain("place 8,000 tokens at 500/s: p50", answers),
        plain("of that, hashing: p50", hash),
        plain("of that, the index: p50", find),
        plain("of that, weighing 100 workers: p50", weigh),
    ];
    lines.iter().for_each(Line::say);
    Ok(lines)
}

/// Answers of one core that is asked at a fixed rate and needs so long each time. Times in which the
/// machine's other work had the core are not in it.
fn queued(needed: &[Duration], gap: Duration) -> Vec<Duration> {
    let mut behind = Duration::ZERO;
    let answer = |needed: &Duration| {
        let answer = behind + *needed;
        behind = answer.saturating_sub(gap);
        answer
    };
    needed.iter().map(answer).collect()
}

fn prompt(number: u32) -> Vec<u32> {
    let mix = |n: u32| n.wrapping_mul(0x9e37_79b9) >> 15;
    // The first 512 tokens are the same for all, as a system prompt is.
    (0..PROMPT_TOKENS).map(|at| if at < 512 { mix(at) } else { mix(at ^ (number + 1) << 16) }).collect()
}

/// 100 workers, of every prompt as much as their number says: some 6,000 blocks each.
fn filled(prompts: &[Vec<u32>]) -> anyhow::Result<Index> {
    let index = Index::new(Limits { holders: WORKERS, bytes: 1 << 30 });
    for tokens in prompts {
        let keys: Vec<Key> =
            chain_keys(tokens, TokenCount::new(BLOCK_TOKENS)).into_iter().map(Key::from_bytes).collect();
        for worker in 0..WORKERS {
            let held = keys.len() * (worker as usize % 4 + 1) / 4;
            let stored = index.store(HolderId(worker), TierSet::PINNED, None, &keys[..held]);
            stored.context("the index refuses a worker")?;
        }
    }
    Ok(index)
}

fn placed(found: &Found) -> Option<place::Plan> {
    let mut views = Vec::with_capacity(WORKERS as usize);
    let mut workers = Vec::with_capacity(WORKERS as usize);
    for worker in 0..WORKERS {
        let blocks = found.held(HolderId(worker)).map_or(0, |held| held.prefix[2]);
        let link = Link {
            holder: worker,
            tier: Tier::Pinned,
            latency_seconds: 1e-4,
            seconds_per_token: 3e-6,
            queued_seconds: 0.0,
        };
        let run = Run { link: 0, begin: 0, end: u64::from(blocks) * u64::from(BLOCK_TOKENS) };
        views.push(View { links: vec![link], runs: vec![run] });
        workers.push(Candidate {
            view: worker as usize,
            space: 0,
            queued_seconds: f64::from(worker % 7) * 0.1,
            pending_tokens: 0,
            requests: worker % 5,
            requests_max: 0,
            decodes: Decodes::Here,
            prefill: Prefill::of_rate(10_000.0),
            decode_rate: 40.0,
        });
    }
    place::choose(PROMPT_TOKENS.into(), &views, &[], &workers, Ties::First)
}

/// Nearest rank, in milliseconds.
fn rank(mut times: Vec<Duration>, percent: usize) -> f64 {
    times.sort_unstable();
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times.get(rank - 1).map_or(f64::NAN, Duration::as_secs_f64) * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that come while others are placed must wait for them, or a slow placement would look quick.
    #[test]
    fn a_late_core_makes_others_wait() {
        let ms = Duration::from_millis;
        let answers = queued(&[ms(1), ms(5), ms(1), ms(1), ms(1)], ms(2));
        assert_eq!(answers, [ms(1), ms(5), ms(4), ms(3), ms(2)]);
    }
}
