//! `bench route`: how soon the router's placement answers on recorded traffic,
//! beside block-count cost, and what placing a prompt costs.
//!
//! The times to first token are simulated: they are the same on every machine.
//! Only the overhead is measured.

mod overhead;

use std::path::Path;

use anyhow::{Context, ensure};
use indicatif::ProgressBar;

use super::Line;
use crate::sim::parallel;
use crate::sim::profile::Profile;
use crate::sim::route::cluster::{Setting, speed_for};
use crate::sim::route::policy::Policy;
use crate::sim::route::replay_all;
use crate::sim::route::report::Run;
use crate::sim::trace::Trace;

const WORKERS: u32 = 16;
/// Bytes of each worker's memory, when there is no pool and beside one.
const PRIVATE_BYTES: u64 = 1_000_000_000_000;
const PRIVATE_BYTES_POOLED: u64 = 180_000_000_000;
const PRIVATE_RATE: f64 = 100e9;
const POOL_RATE: f64 = 40e9;
/// Share of the time that workers with one endless memory would be busy.
const UTILISATION: f64 = 0.6;
/// Events may be so many seconds late.
const DELAYS: [f64; 2] = [0.0, 1.0];
/// As the router draws between equals by default.
const TEMPERATURE: f64 = 0.001;
const POLICIES: [Policy; 7] = [
    Policy::RoundRobin,
    Policy::LeastLoad,
    Policy::Blocks1,
    Policy::Blocks2,
    Policy::Dynamo,
    Policy::Estimate,
    Policy::Ideal,
];

/// How the traffic of a trace comes.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// As recorded, but so fast that workers are busy.
    Open,
    /// Turn after turn, so many times as fast as recorded; so many times the sessions start at a share of their times.
    Closed { sessions: f64, starts: f64, speed: f64 },
}

/// A trace, and how many times sooner than by the better block-count cost the first token must come, by delay.
struct Case {
    name: &'static str,
    file: &'static str,
    tokens_per_block: u32,
    load: Load,
    bars: [Option<f64>; 2],
}

const CASES: [Case; 4] = [
    Case {
        name: "conversation",
        file: "mooncake_conversation",
        tokens_per_block: 512,
        load: Load::Open,
        bars: [Some(1.0 / 0.75), Some(1.0 / 0.8)],
    },
    // 344 sessions that start within 4.7 hours: workers are busy for a twentieth of the time, and no placement can be
    // three times as quick.
    Case {
        name: "agentic",
        file: "weka_agentic_512",
        tokens_per_block: 512,
        load: Load::Closed { sessions: 1.0, starts: 0.39, speed: 1.0 },
        bars: [None, None],
    },
    // As many as bring round-robin and least load to what was published for them.
    Case {
        name: "agentic, 2.25 times the sessions",
        file: "weka_agentic_512",
        tokens_per_block: 512,
        load: Load::Closed { sessions: 2.25, starts: 0.39, speed: 1.0 },
        bars: [Some(3.0), Some(2.0)],
    },
    Case {
        name: "lmcache agents",
        file: "lmcache_agent_64",
        tokens_per_block: 64,
        load: Load::Closed { sessions: 1.0, starts: 1.0, speed: 10.0 },
        bars: [None, None],
    },
];

/// Everything.
///
/// # Errors
/// When a trace is missing or damaged.
pub(super) fn run(traces: &Path) -> anyhow::Result<Vec<Line>> {
    let mut lines = overhead::run()?;
    for case in CASES {
        let path = traces.join(format!("{}.jsonl.zst", case.file));
        ensure!(
            path.is_file(),
            "{} is missing: name its folder by --traces or TERRACE_TRACES",
            path.display()
        );
        let trace = Trace::read(&path, None, Some(case.tokens_per_block))
            .with_context(|| format!("cannot use {}", path.display()))?;
        let trace = match case.load {
            Load::Closed { sessions, .. } if sessions > 1.0 => trace.with_sessions(sessions)?,
            Load::Closed { .. } | Load::Open => trace,
        };
        for pool in [false, true] {
            let begin = lines.len();
            lines.extend(compare(&case, &trace, pool));
            lines[begin..].iter().for_each(Line::say);
        }
    }
    Ok(lines)
}

fn setting(case: &Case, trace: &Trace, pool: bool) -> Setting {
    let profile = Profile::REFERENCE;
    let block_bytes = u64::from(trace.tokens_per_block) * profile.bytes_per_token;
    let blocks =
        |bytes: u64| usize::try_from((bytes / block_bytes).min(trace.distinct())).unwrap_or(usize::MAX);
    let rest = (PRIVATE_BYTES - PRIVATE_BYTES_POOLED) * u64::from(WORKERS);
    let (closed_loop, starts, speed) = match case.load {
        Load::Open => (false, 1.0, speed_for(trace, WORKERS, &profile, UTILISATION)),
        Load::Closed { starts, speed, .. } => (true, starts, speed),
    };
    Setting {
        workers: WORKERS,
        private_blocks: blocks(if pool { PRIVATE_BYTES_POOLED } else { PRIVATE_BYTES }),
        pool_blocks: if pool { blocks(rest) } else { 0 },
        private_rate: PRIVATE_RATE,
        pool_rate: POOL_RATE,
        delay: 0,
        decode_rate: 40.0,
        closed_loop,
        speed,
        starts,
        temperature: TEMPERATURE,
        seed: 1,
        profile,
    }
}

/// Every policy at every delay; the bars are for workers without a pool.
fn compare(case: &Case, trace: &Trace, pool: bool) -> Vec<Line> {
    let jobs: Vec<(Policy, f64)> =
        DELAYS.iter().flat_map(|&delay| POLICIES.map(|policy| (policy, delay))).collect();
    let hidden = ProgressBar::hidden();
    let runs = replay_all(trace, setting(case, trace, pool), &jobs, parallel::cores(), &hidden);
    let mut lines = Vec::new();
    for (delay, bar) in DELAYS.into_iter().zip(case.bars) {
        let at = |policy: Policy| {
            let is_it = |run: &&Run| run.policy == policy && run.delay.total_cmp(&delay).is_eq();
            runs.iter().find(is_it).map_or(f64::NAN, |run| run.outcome.mean())
        };
        let counted = at(Policy::Blocks1).min(at(Policy::Blocks2));
        let memory = if pool { "pool" } else { "private" };
        let name = |what: &str| format!("{}, {memory}, events {delay} s late: {what}", case.name);
        let estimated = at(Policy::Estimate);
        lines.push(match bar.filter(|_| !pool) {
            Some(bar) => Line::at_most(&name("mean time to first token"), estimated, counted / bar, "s"),
            None => Line::cost(&name("mean time to first token"), estimated, counted, "s"),
        });
        for policy in POLICIES.into_iter().filter(|&policy| policy != Policy::Estimate) {
            lines.push(Line::plain(&name(policy.name()), at(policy), "s"));
        }
    }
    lines
}
