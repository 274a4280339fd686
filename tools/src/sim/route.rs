//! `sim route`: replays traces against workers behind a router, with the index
//! and the placement that the router runs, and with others to compare.

pub(crate) mod cluster;
mod directory;
mod memory;
pub(crate) mod options;
pub(crate) mod policy;
pub(crate) mod report;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use indicatif::ProgressBar;

use self::cluster::{Setting, replay};
use self::options::Options;
use self::policy::Policy;
use self::report::Run;
use super::parallel;
use super::trace::Trace;
use crate::chart;
use crate::output::Format;

/// Replays and prints.
///
/// # Errors
/// When a trace cannot be read, an option contradicts another, or a file cannot be written.
pub(crate) fn run(options: &Options, format: Format) -> anyhow::Result<ExitCode> {
    options.check()?;
    let mut runs = Vec::new();
    for file in &options.files {
        let trace = options.trace(file)?;
        let setting = options.setting(&trace)?;
        let jobs = jobs(&options.policy, &options.event_delay);
        let progress = super::store::progress_bar(jobs.len() * trace.asks.len());
        let threads = options.threads.unwrap_or_else(parallel::cores);
        runs.extend(replay_all(&trace, setting, &jobs, threads, &progress));
        progress.finish_and_clear();
    }
    match format {
        Format::Json => {
            for run in &runs {
                println!("{}", run.json());
            }
        }
        Format::Table => report::print(&runs),
    }
    if let Some(path) = &options.svg {
        let drawing = chart::draw(&report::plots(&runs))?;
        std::fs::write(path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Every policy at every delay.
fn jobs(policies: &[Policy], delays: &[f64]) -> Vec<(Policy, f64)> {
    policies.iter().flat_map(|&policy| delays.iter().map(move |&delay| (policy, delay))).collect()
}

/// Replays in the order of the jobs, several at a time.
pub(crate) fn replay_all(
    trace: &Trace,
    setting: Setting,
    jobs: &[(Policy, f64)],
    threads: usize,
    progress: &ProgressBar,
) -> Vec<Run> {
    parallel::in_order(jobs, threads, |&(policy, delay)| {
        let began = Instant::now();
        let setting = Setting { delay: cluster::micros(delay), ..setting };
        Run {
            trace: trace.name.clone(),
            policy,
            workers: setting.workers,
            delay,
            has_pool: setting.pool_blocks > 0,
            speed: setting.speed,
            outcome: replay(trace, setting, policy, progress),
            wall_seconds: began.elapsed().as_secs_f64(),
        }
    })
}
