//! What routing by one policy did, as numbers, as JSON, as a table and as plots.

use serde_json::{Value, json};

use super::policy::Policy;
use crate::chart::{Corner, Plot, Series};
use crate::output;
use crate::sim::report::{float, percent, ratio};
use crate::sim::trace::Ask;

/// Points of a distribution that are drawn.
const POINTS: u32 = 200;

/// The findings of one replay. Equal inputs give equal findings.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    /// Tokens of all prompts.
    pub(crate) tokens: u64,
    /// Of these, loaded from the worker's own memory.
    pub(crate) private_tokens: u64,
    /// Of these, loaded from the pool.
    pub(crate) pool_tokens: u64,
    /// Seconds that workers computed.
    pub(crate) compute_seconds: f64,
    /// Seconds that workers loaded.
    pub(crate) load_seconds: f64,
    /// Microseconds until the last event.
    pub(crate) simulated: u64,
    /// Time to first token of each request in microseconds, sorted at the end.
    pub(crate) first_tokens: Vec<u64>,
    /// Estimated over actual time to first token, in thousandths, sorted at the end.
    pub(crate) estimates: Vec<u64>,
}

impl Outcome {
    /// A worker began with a request.
    pub(super) fn served(&mut self, ask: &Ask, private: u64, pool: u64, load: f64, compute: f64) {
        self.tokens += ask.input;
        self.private_tokens += private;
        self.pool_tokens += pool;
        self.load_seconds += load;
        self.compute_seconds += compute;
    }

    /// Its first token came.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a ratio of times that are not negative, far below 2^52 thousandths"
    )]
    pub(super) fn first_token(&mut self, took: u64, estimate: Option<f64>) {
        self.first_tokens.push(took);
        let share = estimate.map(|estimate| estimate * 1e9 / float(took.max(1)));
        self.estimates.extend(share.map(|share| share.round() as u64));
    }

    pub(super) fn finish(mut self, now: u64) -> Self {
        self.simulated = now;
        self.first_tokens.sort_unstable();
        self.estimates.sort_unstable();
        self
    }

    /// Mean time to first token in seconds.
    pub(crate) fn mean(&self) -> f64 {
        float(self.first_tokens.iter().sum()) / float(self.first_tokens.len().max(1) as u64) / 1e6
    }

    /// Time to first token in seconds that `percent` of the requests did not exceed.
    pub(crate) fn at(&self, percent: u32) -> f64 {
        float(rank(&self.first_tokens, percent)) / 1e6
    }

    /// Share of the tokens that were loaded.
    pub(crate) fn hits(&self) -> f64 {
        ratio(self.private_tokens + self.pool_tokens, self.tokens)
    }
}

/// Nearest rank; 0 of nothing.
fn rank(sorted: &[u64], percent: u32) -> u64 {
    let rank = (sorted.len() * percent as usize).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0)
}

/// Which replay it was.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// The trace.
    pub(crate) trace: String,
    /// Who served what.
    pub(crate) policy: Policy,
    /// Workers.
    pub(crate) workers: u32,
    /// Seconds after which the router learned what a worker has.
    pub(crate) delay: f64,
    /// Whether there was a pool.
    pub(crate) has_pool: bool,
    /// Speed of the replay.
    pub(crate) speed: f64,
    /// What it found.
    pub(crate) outcome: Outcome,
    /// Seconds that the replay itself took.
    pub(crate) wall_seconds: f64,
}

impl Run {
    fn memory(&self) -> &'static str {
        if self.has_pool { "pool" } else { "private" }
    }

    /// Share of the time that workers were busy.
    fn utilisation(&self) -> f64 {
        let outcome = &self.outcome;
        let seconds = float(outcome.simulated).max(1.0) / 1e6 * f64::from(self.workers);
        (outcome.compute_seconds + outcome.load_seconds) / seconds
    }

    /// Everything, for programs.
    pub(crate) fn json(&self) -> Value {
        let outcome = &self.outcome;
        json!({
            "trace": self.trace,
            "policy": self.policy.name(),
            "memory": self.memory(),
            "workers": self.workers,
            "event_delay_seconds": self.delay,
            "speed": self.speed,
            "requests": outcome.first_tokens.len(),
            "tokens": outcome.tokens,
            "tokens_private": outcome.private_tokens,
            "tokens_pool": outcome.pool_tokens,
            "token_hit_ratio": outcome.hits(),
            "compute_seconds": outcome.compute_seconds,
            "load_seconds": outcome.load_seconds,
            "utilisation": self.utilisation(),
            "ttft_mean_seconds": outcome.mean(),
            "ttft_p50_seconds": outcome.at(50),
            "ttft_p90_seconds": outcome.at(90),
            "ttft_p99_seconds": outcome.at(99),
            "estimate_ratio_p5": (!outcome.estimates.is_empty()).then(|| float(rank(&outcome.estimates, 5)) / 1e3),
            "estimate_ratio_p50": (!outcome.estimates.is_empty()).then(|| float(rank(&outcome.estimates, 50)) / 1e3),
            "estimate_ratio_p95": (!outcome.estimates.is_empty()).then(|| float(rank(&outcome.estimates, 95)) / 1e3),
            "simulated_seconds": float(outcome.simulated) / 1e6,
            "wall_seconds": self.wall_seconds,
        })
    }
}

/// Prints runs, one line each, in a table for each trace.
pub(crate) fn print(runs: &[Run]) {
    // Traces have long names: each stands above its table, so that a line fits into 80 columns.
    for runs in runs.chunk_by(|a, b| a.trace == b.trace) {
        println!("{}, {} memory, {} workers", runs[0].trace, runs[0].memory(), runs[0].workers);
        print_one(runs);
    }
}

fn print_one(runs: &[Run]) {
    let mut table = output::table(&["POLICY", ">DELAY", ">HITS", ">BUSY", ">TTFT", ">P50", ">P90", ">P99"]);
    for run in runs {
        let outcome = &run.outcome;
        table.add_row([
            run.policy.name().to_owned(),
            format!("{} s", run.delay),
            percent(outcome.hits()),
            percent(run.utilisation()),
            format!("{:.2} s", outcome.mean()),
            format!("{:.2}", outcome.at(50)),
            format!("{:.2}", outcome.at(90)),
            format!("{:.2}", outcome.at(99)),
        ]);
    }
    output::print(&table);
}

/// For each trace the times to first token of each run, and the mean by delay when there are several.
pub(crate) fn plots(runs: &[Run]) -> Vec<Plot> {
    let mut plots = Vec::new();
    let mut traces: Vec<&str> = runs.iter().map(|run| run.trace.as_str()).collect();
    traces.dedup();
    for trace in traces {
        let of_trace: Vec<&Run> = runs.iter().filter(|run| run.trace == trace).collect();
        plots.push(distribution(trace, &of_trace));
        plots.extend(by_delay(trace, &of_trace));
    }
    plots
}

fn distribution(trace: &str, runs: &[&Run]) -> Plot {
    let line = |run: &&Run| {
        let ranks = (1..=POINTS).map(|point| (point, run.outcome.first_tokens.len()));
        let points = ranks.map(|(point, count)| {
            let place = (count * point as usize).div_ceil(POINTS as usize).max(1) - 1;
            let time = run.outcome.first_tokens.get(place).copied().unwrap_or(0);
            (float(time) / 1e6, f64::from(point) * 100.0 / f64::from(POINTS))
        });
        Series { name: format!("{}, {} s", run.policy.name(), run.delay), points: points.collect() }
    };
    Plot {
        title: format!("{trace}: time to first token"),
        x: "seconds",
        y: "% of requests",
        series: runs.iter().map(line).collect(),
        legend: Corner::UpperLeft,
        marked: false,
    }
}

fn by_delay(trace: &str, runs: &[&Run]) -> Option<Plot> {
    let mut series: Vec<Series> = Vec::new();
    for run in runs {
        let point = (run.delay, run.outcome.mean());
        match series.iter_mut().find(|series| series.name == run.policy.name()) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name: run.policy.name().to_owned(), points: vec![point] }),
        }
    }
    let several = series.iter().any(|line| line.points.iter().filter(|point| point.0 > 0.0).count() > 1);
    several.then(|| Plot {
        title: format!("{trace}: late events"),
        x: "seconds until the router knows",
        y: "mean seconds to first token",
        series,
        legend: Corner::UpperLeft,
        marked: true,
    })
}
