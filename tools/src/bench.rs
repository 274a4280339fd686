//! `bench`: figures with their bars, each suite on temporary state of its own.
//!
//! Every line has a value, and a ratio in which higher is better; where there
//! is a bar, the ratio must reach it. Runs that are compared are interleaved,
//! and medians are reported.

mod ask;
mod blocks;
mod catalog;
mod control;
mod eviction;
mod fair;
mod hbm;
mod index;
mod local;
mod media;
mod prompt;
mod restart;
mod route;
mod settle;
mod stand;
mod table;
mod ttft;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::model;
use crate::output::{self, Format};

/// What to measure.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Which figures
    #[arg(value_enum)]
    suite: Suite,
    /// Exit with 1 when a bar is missed
    #[arg(long)]
    check: bool,
    /// Model, a GGUF file [default: SmolLM2-135M, fetched once]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Directory for the temporary state; it should lie on the device to be measured
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Device of `hbm`: cuda:0 for example; host-only runs it over host memory, which says nothing of a device
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Block sizes of `local` [default: 64 KiB to 8 MiB]
    #[arg(long, value_delimiter = ',')]
    block_bytes: Vec<u64>,
    /// Directory of recorded traffic, for eviction, admission, route and index
    #[arg(long, env = "TERRACE_TRACES", default_value = "../shared/traces")]
    traces: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Time to first token of a 1,000-token prompt, first and second time
    Ttft,
    /// Everything killed and started again: cached prompts, time to serve
    Restart,
    /// Prefill and decode tokens per second of one worker on two threads
    Worker,
    /// Latency of leases and look-ups against a bare echo over a Unix socket, and beside a flood
    Lease,
    /// Put and get of five sizes by one to four processes, against bare loops in the same run
    Local,
    /// One client process of `local`
    #[value(hide = true)]
    LocalClient,
    /// The bare stream of `local`
    #[value(hide = true)]
    LocalBareGrpc,
    /// The residency table: time and memory for each block, and two threads against one
    Table,
    /// The router's index: stores, removals, look-ups alone and beside a writer, and memory for each entry
    Index,
    /// Device reads and writes against a bare io_uring loop and fio; write amplification
    Media,
    /// A start with a million blocks, commits, and the rebuild of a lost catalog
    Catalog,
    /// Hits on recorded traffic: the default policy against least recently used
    Eviction,
    /// A lease of 128 blocks in device memory by another process: no byte moves
    Hbm,
    /// The reading process of `hbm`
    #[value(hide = true)]
    HbmClient,
    /// Bytes written to Nvme on recorded traffic: learned admission against writing all
    Admission,
    /// Simulated time to first token: the router's placement against block-count cost; its overhead
    Route,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    /// What it is.
    name: String,
    /// How much.
    value: f64,
    /// Of what.
    unit: &'static str,
    /// What the value is compared with, in its unit.
    limit: Option<f64>,
    /// How good it is; higher is better.
    ratio: Option<f64>,
    /// What the ratio must reach.
    bar: Option<f64>,
    /// Whether it does.
    ok: bool,
}

impl Line {
    /// A figure without a bar.
    pub(crate) fn plain(name: &str, value: f64, unit: &'static str) -> Self {
        Self { name: name.to_owned(), value, unit, limit: None, ratio: None, bar: None, ok: true }
    }

    /// A figure that must be at most `limit`.
    pub(crate) fn at_most(name: &str, value: f64, limit: f64, unit: &'static str) -> Self {
        let ratio = limit / value.max(f64::MIN_POSITIVE);
        Self {
            limit: Some(limit),
            ratio: Some(ratio),
            bar: Some(1.0),
            ok: ratio >= 1.0,
            ..Self::plain(name, value, unit)
        }
    }

    /// A figure that must be at least `limit`.
    pub(crate) fn at_least(name: &str, value: f64, limit: f64, unit: &'static str) -> Self {
        let ratio = value / limit;
        Self {
            limit: Some(limit),
            ratio: Some(ratio),
            bar: Some(1.0),
            ok: ratio >= 1.0,
            ..Self::plain(name, value, unit)
        }
    }

    /// A cost beside another of the same run, without a bar.
    pub(crate) fn cost(name: &str, value: f64, limit: f64, unit: &'static str) -> Self {
        let ratio = limit / value.max(f64::MIN_POSITIVE);
        Self { limit: Some(limit), ratio: Some(ratio), ..Self::plain(name, value, unit) }
    }

    /// How many times faster; must reach `bar`.
    pub(crate) fn speedup(name: &str, ratio: f64, bar: f64) -> Self {
        Self { ratio: Some(ratio), bar: Some(bar), ok: ratio >= bar, ..Self::plain(name, ratio, "times") }
    }

    /// A figure that must be at least `bar` times another of the same run.
    pub(crate) fn part_of(name: &str, value: f64, limit: f64, bar: f64, unit: &'static str) -> Self {
        let ratio = value / limit;
        let ok = ratio >= bar;
        Self { limit: Some(limit), ratio: Some(ratio), bar: Some(bar), ok, ..Self::plain(name, value, unit) }
    }

    /// The same of rounds that were run in turn: the median of the rounds' own ratios, so that a machine that
    /// grows slower from round to round moves neither side.
    pub(crate) fn part_of_rounds(
        name: &str,
        values: &[f64],
        limits: &[f64],
        bar: f64,
        unit: &'static str,
    ) -> Self {
        let ratios: Vec<f64> = values.iter().zip(limits).map(|(value, limit)| value / limit).collect();
        let ratio = median(&ratios);
        let whole = Self::part_of(name, median(values), median(limits), bar, unit);
        Self { ratio: Some(ratio), ok: ratio >= bar, ..whole }
    }

    /// Says it on standard error, while the others are still measured.
    pub(crate) fn say(&self) {
        let compared = match (self.limit, self.ratio) {
            (Some(limit), Some(ratio)) => format!(" ({limit:.4}: {ratio:.3})"),
            _ => String::new(),
        };
        eprintln!("{} {:.4} {}{compared}", self.name, self.value, self.unit);
    }

    /// A figure beside another of the same run, without a bar.
    pub(crate) fn compared(name: &str, value: f64, limit: f64, unit: &'static str) -> Self {
        Self { limit: Some(limit), ratio: Some(value / limit), ..Self::plain(name, value, unit) }
    }
}

/// Runs a suite and prints its figures.
///
/// # Errors
/// When something could not be measured.
pub(crate) async fn run(options: Options, format: Format) -> anyhow::Result<ExitCode> {
    let lines = match options.suite {
        Suite::Ttft => ttft::run(&options).await?,
        Suite::Restart => restart::run(&options).await?,
        Suite::Worker => worker::run(&options)?,
        Suite::Lease => control::run(&options).await?,
        Suite::Hbm => hbm::run(&options).await?,
        Suite::HbmClient => return hbm::serve().await.map(|()| ExitCode::SUCCESS),
        Suite::Eviction => eviction::eviction(&options.traces)?,
        Suite::Admission => eviction::admission(&options.traces)?,
        Suite::Route => route::run(&options.traces)?,
        Suite::Local => local::run(&options).await?,
        Suite::LocalClient => return local::client::serve().await.map(|()| ExitCode::SUCCESS),
        Suite::LocalBareGrpc => return local::serve_bare().await.map(|()| ExitCode::SUCCESS),
        Suite::Table => table::run()?,
        Suite::Index => index::run(&options.traces)?,
        Suite::Media => media::run(&options).await?,
        Suite::Catalog => catalog::run(&options).await?,
    };
    match format {
        Format::Json => {
            for line in &lines {
                println!("{}", serde_json::to_string(line)?);
            }
        }
        Format::Table => print(&lines),
    }
    let missed = lines.iter().filter(|line| !line.ok).count();
    if missed > 0 {
        eprintln!("terrace: {missed} of {} figures miss their bar", lines.len());
    }
    Ok(if options.check && missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(lines: &[Line]) {
    let mut table = output::table(&["FIGURE", ">VALUE", "UNIT", ">LIMIT", ">RATIO", ">BAR", ""]);
    let number = |value: Option<f64>| value.map_or(String::new(), significant);
    for line in lines {
        table.add_row([
            line.name.clone(),
            significant(line.value),
            line.unit.to_owned(),
            number(line.limit),
            number(line.ratio),
            number(line.bar),
            if line.bar.is_none() {
                ""
            } else if line.ok {
                "ok"
            } else {
                "MISSED"
            }
            .to_owned(),
        ]);
    }
    output::print(&table);
}

/// The model to measure with.
fn model_path(options: &Options) -> anyhow::Result<PathBuf> {
    match &options.model {
        Some(path) => {
            Ok(path.canonicalize().with_context(|| format!("cannot find the model {}", path.display()))?)
        }
        None => model::fetch(),
    }
}

/// About three significant digits.
fn significant(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The middle of some figures; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => (sorted[even / 2 - 1] + sorted[even / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bar compared the wrong way round would pass every regression.
    #[test]
    fn bars_are_judged_the_right_way_round() {
        assert!(Line::at_most("a", 1.0, 2.0, "s").ok);
        assert!(!Line::at_most("a", 3.0, 2.0, "s").ok);
        assert!(Line::at_least("a", 3.0, 2.0, "s").ok);
        assert!(!Line::at_least("a", 1.0, 2.0, "s").ok);
        assert!(!Line::speedup("a", 9.9, 10.0).ok);
        assert!(Line::compared("a", 1.0, 100.0, "s").ok);
    }

    /// The median of an even number of runs lies between the two middle ones.
    #[test]
    fn rounds_are_compared_one_by_one() {
        // Twice as slow from round to round, and always nine tenths of the other.
        let line = Line::part_of_rounds("rate", &[0.9, 3.6, 1.8], &[1.0, 4.0, 2.0], 0.95, "GiB/s");
        assert!((line.ratio.unwrap() - 0.9).abs() < 1e-9 && !line.ok, "{line:?}");
        let line = Line::part_of_rounds("rate", &[1.0, 1.0, 4.0], &[1.0, 2.0, 2.0], 0.95, "GiB/s");
        assert_eq!((line.value, line.limit, line.ratio, line.ok), (1.0, Some(2.0), Some(1.0), true));
    }

    #[test]
    fn medians_are_medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
