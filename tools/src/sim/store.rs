//! `sim store`: replays traces, and prints what a node of that size would do.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use terrace_core::{HEADER_PAGE_BYTES, Policy};

use super::options::{Model, Options, frames};
use super::report::{Run, print_all};
use super::size::Size;
use super::trace::Trace;
use super::{parallel, plot, reference, serve};
use crate::output::Format;

/// One replay to be done.
#[derive(Clone, Copy, Debug)]
struct Job {
    policy: Policy,
    pinned: Size,
    nvme: Size,
}

/// Replays and prints.
///
/// # Errors
/// When a trace cannot be read, an option contradicts another, or a file cannot be written.
pub(crate) fn run(options: &Options, format: Format) -> anyhow::Result<ExitCode> {
    options.check()?;
    let mut runs = Vec::new();
    for file in &options.files {
        let trace = options.replay.trace(file)?;
        runs.extend(replay_all(options, &trace)?);
    }
    match format {
        Format::Json => {
            for run in &runs {
                println!("{}", run.json());
            }
        }
        Format::Table => match &runs[..] {
            [one] => one.print(),
            several => print_all(several),
        },
    }
    if let Some(path) = &options.svg {
        let drawing = plot::runs(&runs)?;
        std::fs::write(path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Every policy at every size, several at a time, in the order of the command line.
fn replay_all(options: &Options, trace: &Trace) -> anyhow::Result<Vec<Run>> {
    let mut jobs = Vec::new();
    for policy in &options.policy {
        for (pinned, nvme) in options.sizes(trace) {
            let job = Job { policy: policy.policy(), pinned, nvme };
            // Wrong sizes are found before the first replay.
            options.hardware(trace, (pinned, nvme), job.policy)?;
            jobs.push(job);
        }
    }
    let progress = progress_bar(jobs.len() * trace.asks.len());
    let threads = options.threads.unwrap_or_else(parallel::cores);
    let runs = parallel::in_order(&jobs, threads, |job| replay(options, trace, job, &progress));
    progress.finish_and_clear();
    runs.into_iter().collect()
}

fn replay(options: &Options, trace: &Trace, job: &Job, progress: &ProgressBar) -> anyhow::Result<Run> {
    let profile = options.profile();
    let frame_bytes = u64::from(trace.tokens_per_block) * options.replay.bytes_per_token + HEADER_PAGE_BYTES;
    let begin = Instant::now();
    let (model, pinned_frames, nvme_frames, outcome) = match options.model {
        Model::Reference => {
            let frames = frames("--pinned", job.pinned, frame_bytes, trace)?;
            ("reference", frames, 0, reference::replay(trace, frames, job.policy, &profile, progress))
        }
        Model::Node => {
            let hardware = options.hardware(trace, (job.pinned, job.nvme), job.policy)?;
            let (pinned, nvme) = (hardware.pinned_frames(), hardware.nvme_frames());
            ("node", pinned, nvme, serve::replay(trace, hardware, options.service(trace), progress))
        }
    };
    Ok(Run {
        trace: trace.name.clone(),
        model,
        policy: job.policy,
        pinned_name: job.pinned.to_string(),
        nvme_name: job.nvme.to_string(),
        pinned_frames,
        nvme_frames,
        frame_bytes,
        distinct: trace.distinct(),
        outcome,
        wall_seconds: begin.elapsed().as_secs_f64(),
    })
}

/// On standard error, and only when that is a terminal.
pub(crate) fn progress_bar(requests: usize) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} requests, {per_sec}, {eta} left");
    ProgressBar::new(requests as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests;
