//! `bench eviction` and `bench admission`: the live core on recorded traffic.
//!
//! Nothing is timed but the policy code itself: hits and bytes are the same on
//! every machine.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use terrace_core::policy::{Costs, Replay};
use terrace_core::{Admission, BlockCount, BlockId, HEADER_PAGE_BYTES, Policy, TokenCount};

use super::{Line, median};
use crate::sim::node::{DeviceModel, Hardware};
use crate::sim::options::{FRAMES_READY, SWEEP_PERCENT};
use crate::sim::profile::Profile;
use crate::sim::report::{Outcome, float};
use crate::sim::serve::{self, Service};
use crate::sim::size::Size;
use crate::sim::trace::Trace;
use crate::sim::{parallel, reference};

/// Most points that the default policy may be below least recently used.
const POINTS_BELOW_LRU_MAX: f64 = 0.3;
/// Most points that a replay may differ from one by another simulator.
const POINTS_FROM_REFERENCE_MAX: f64 = 0.3;
/// Replays whose rate is taken.
const RATE_ROUNDS: u32 = 5;
/// Millions of block references a second that the policy code must take.
const RATE_MIN: f64 = 2.0;
/// Shares of the distinct blocks that Pinned holds beside an Nvme tier of 20 %. What a block is worth
/// shows while it is in memory: a small Pinned gives admission little to go by, and has no bar.
const PINNED_PERCENT: f64 = 15.0;
const PINNED_PERCENT_SMALL: f64 = 2.0;
/// Bytes of a GiB.
const GIB: f64 = 1_073_741_824.0;

/// A trace, and what is expected of it.
struct Case {
    /// Name of its file, without `.jsonl.zst`.
    file: &'static str,
    /// Token hits of least recently used in percent, by another simulator, at [`SWEEP_PERCENT`].
    lru: [f64; SWEEP_PERCENT.len()],
    /// Share in percent, and the token hits that the default policy must reach there.
    bars: [(f64, f64); 2],
}

const CONVERSATION: Case = Case {
    file: "mooncake_conversation",
    lru: [4.3, 4.3, 5.3, 8.1, 12.8, 20.0, 28.4, 35.2, 37.0],
    bars: [(1.0, 10.0), (3.0, 16.5)],
};

const AGENTIC: Case = Case {
    file: "weka_agentic_512",
    lru: [3.1, 13.4, 57.4, 83.9, 91.0, 94.2, 95.9, 96.0, 96.0],
    bars: [(0.3, 24.0), (1.0, 61.0)],
};

/// Token hits and saved seconds at every size of the reference table.
///
/// # Errors
/// When a trace is missing or damaged.
pub(super) fn eviction(traces: &Path) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for case in [CONVERSATION, AGENTIC] {
        let trace = read(traces, case.file)?;
        let jobs: Vec<(Policy, f64)> = [Policy::Lru, Policy::Duel]
            .into_iter()
            .flat_map(|policy| SWEEP_PERCENT.into_iter().map(move |percent| (policy, percent)))
            .collect();
        let replay = |&(policy, percent): &(Policy, f64)| {
            let frames = Size::Share(percent / 100.0).frames(1, trace.distinct());
            reference::replay(&trace, frames, policy, &Profile::REFERENCE, &ProgressBar::hidden())
        };
        let outcomes = parallel::in_order(&jobs, parallel::cores(), replay);
        let (lru, duel) = outcomes.split_at(SWEEP_PERCENT.len());
        lines.extend(compare(&case, lru, duel));
        lines.push(rate(&case, &trace));
    }
    Ok(lines)
}

/// How many block references a second the policy code takes, lists and both shadows, on one thread
/// at a size of 1 %: the median of several replays.
fn rate(case: &Case, trace: &Trace) -> Line {
    let frames = Size::Share(0.01).frames(1, trace.distinct());
    let costs = Costs {
        block_tokens: TokenCount::new(trace.tokens_per_block),
        linear: Profile::REFERENCE.linear,
        quadratic: Profile::REFERENCE.quadratic,
    };
    let prompts: Vec<Vec<BlockId>> = trace.asks.iter().map(|ask| trace.blocks(ask)).collect();
    let references: u64 = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let mut rates = Vec::new();
    for _ in 0..RATE_ROUNDS {
        let capacity = BlockCount::new(u32::try_from(frames).unwrap_or(u32::MAX));
        let mut replay = Replay::new(Policy::Duel, capacity, costs);
        let began = Instant::now();
        for prompt in &prompts {
            std::hint::black_box(replay.request(prompt));
        }
        rates.push(float(references) / 1e6 / began.elapsed().as_secs_f64());
    }
    let name = format!("{}: references by the policy code", case.file);
    Line::at_least(&name, median(&rates), RATE_MIN, "M/s")
}

fn compare(case: &Case, lru: &[Outcome], duel: &[Outcome]) -> Vec<Line> {
    let mut lines = Vec::new();
    let (mut tokens_below, mut seconds_below, mut from_reference) = (0.0f64, 0.0f64, 0.0f64);
    for (place, percent) in SWEEP_PERCENT.into_iter().enumerate() {
        let (plain, best) = (lru[place].token_ratio() * 100.0, duel[place].token_ratio() * 100.0);
        let name = format!("{} at {percent} %: token hits", case.file);
        lines.push(match case.bars.iter().find(|bar| bar.0 == percent) {
            Some(&(_, bar)) => Line::at_least(&name, best, bar, "%"),
            None => Line::compared(&name, best, plain, "%"),
        });
        tokens_below = tokens_below.max(plain - best);
        seconds_below = seconds_below.max((lru[place].saved_ratio() - duel[place].saved_ratio()) * 100.0);
        from_reference = from_reference.max((plain - case.lru[place]).abs());
    }
    let points = |what: &str, value: f64, limit: f64| {
        Line::at_most(&format!("{}: {what}", case.file), value.max(0.01), limit, "points")
    };
    lines.push(points("token hits below lru, worst size", tokens_below, POINTS_BELOW_LRU_MAX));
    lines.push(points("saved seconds below lru, worst size", seconds_below, POINTS_BELOW_LRU_MAX));
    lines.push(points(
        "lru from the reference results, worst size",
        from_reference,
        POINTS_FROM_REFERENCE_MAX,
    ));
    lines
}

/// Bytes written and hits of a node with an Nvme tier of 20 %.
///
/// # Errors
/// When the trace is missing or damaged.
pub(super) fn admission(traces: &Path) -> anyhow::Result<Vec<Line>> {
    let trace = read(traces, CONVERSATION.file)?;
    let rules = [Admission::All, Admission::Learned { bytes_per_day: None }];
    let mut lines = Vec::new();
    for pinned in [PINNED_PERCENT, PINNED_PERCENT_SMALL] {
        let replay = |&rule: &Admission| {
            serve::replay(&trace, node(&trace, rule, pinned), service(), &ProgressBar::hidden())
        };
        let outcomes = parallel::in_order(&rules, parallel::cores(), replay);
        let [all, learned] = &outcomes[..] else { bail!("two replays have two outcomes") };
        let share = float(learned.traffic.bytes_written) / float(all.traffic.bytes_written) * 100.0;
        let (plain, best) = (all.token_ratio() * 100.0, learned.token_ratio() * 100.0);
        let name = |what: &str| format!("Pinned {pinned} %: {what}");
        lines.push(Line::plain(&name("hits, writing all"), plain, "%"));
        lines.push(Line::plain(&name("GiB, writing all"), float(all.traffic.bytes_written) / GIB, "GiB"));
        lines.push(Line::compared(&name("hits, learned"), best, plain, "%"));
        if pinned == PINNED_PERCENT {
            lines.push(Line::at_most(&name("share of the bytes, learned"), share, 50.0, "%"));
            lines.push(Line::at_most(&name("hits lost, learned"), (plain - best).max(0.01), 1.0, "points"));
        } else {
            lines.push(Line::compared(&name("share of the bytes, learned"), share, 100.0, "%"));
            lines.push(Line::plain(&name("hits lost, learned"), plain - best, "points"));
        }
    }
    Ok(lines)
}

/// Pinned holds this share of the distinct blocks, Nvme 20 % of them on four devices.
fn node(trace: &Trace, admission: Admission, pinned_percent: f64) -> Hardware {
    let block_bytes = u64::from(trace.tokens_per_block) * Profile::REFERENCE.bytes_per_token;
    let frames = |percent: f64| Size::Share(percent / 100.0).frames(1, trace.distinct());
    let per_chunk = 16;
    let chunk_bytes = per_chunk * (block_bytes + HEADER_PAGE_BYTES) + HEADER_PAGE_BYTES;
    let slots = u32::try_from(frames(20.0) / (4 * per_chunk)).unwrap_or(u32::MAX);
    Hardware {
        block_bytes,
        chunk_bytes,
        pinned_chunks: frames(pinned_percent) / per_chunk,
        device_slots: vec![slots; 4],
        device: DeviceModel { read_rate: 6.0 * GIB, write_rate: 3.0 * GIB, latency: 100 },
        memory_rate: 10.0 * GIB,
        block_tokens: trace.tokens_per_block,
        frames_ready: FRAMES_READY,
        clients: service().workers,
        blocks_per_request: trace.longest(),
        patience: 30_000_000,
        policy: Policy::Duel,
        admission,
        cost: Profile::REFERENCE.block_cost(trace.tokens_per_block),
    }
}

/// Eight workers, so that the hour of traffic is served in an hour.
fn service() -> Service {
    Service {
        workers: 8,
        link_rate: 93.0 * GIB,
        decode_rate: 40.0,
        closed_loop: false,
        speed: 1.0,
        profile: Profile::REFERENCE,
    }
}

fn read(traces: &Path, file: &str) -> anyhow::Result<Trace> {
    let path = traces.join(format!("{file}.jsonl.zst"));
    if !path.is_file() {
        bail!(
            "{} is missing: give the folder with mooncake_conversation.jsonl.zst (Mooncake's FAST'25 trace release) \
             and weka_agentic_512.jsonl.zst (WEKA's kv-cache-tester, merged on one time line) by --traces or \
             TERRACE_TRACES",
            path.display()
        );
    }
    Trace::read(&path, None, Some(512)).with_context(|| format!("cannot use {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(hits: u64, saved_seconds: f64) -> Outcome {
        let mut outcome = Outcome { tokens: 1000, seconds: 100.0, saved_seconds, ..Outcome::default() };
        outcome.token_hits.pinned = hits;
        outcome
    }

    /// A loss at one size must not hide behind gains at the others.
    #[test]
    fn the_worst_size_is_judged() {
        let lru = CONVERSATION.lru.map(|percent| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a small positive number"
            )]
            let hits = (percent * 10.0).round() as u64;
            outcome(hits, percent)
        });
        let mut duel = lru.clone();
        duel[2] = outcome(110, 11.0);
        duel[4] = outcome(170, 17.0);
        assert!(compare(&CONVERSATION, &lru, &duel).iter().all(|line| line.ok));
        duel[7] = outcome(352 - 4, 35.2);
        let missed: Vec<String> = compare(&CONVERSATION, &lru, &duel)
            .into_iter()
            .filter(|line| !line.ok)
            .map(|line| line.name)
            .collect();
        assert_eq!(missed, ["mooncake_conversation: token hits below lru, worst size"]);
        duel[7] = outcome(352, 34.8);
        assert!(
            compare(&CONVERSATION, &lru, &duel).iter().any(|line| line.name.contains("saved") && !line.ok)
        );
    }

    /// Somebody without the traces must learn where they come from, not see a failed figure.
    #[test]
    fn a_missing_trace_says_where_it_comes_from() {
        let error = eviction(Path::new("no-such-folder")).unwrap_err().to_string();
        assert!(error.contains("Mooncake") && error.contains("--traces"), "{error}");
        assert!(admission(Path::new("no-such-folder")).is_err());
    }
}
