//! The command line of `sim route`, checked.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use clap::Args;

use super::cluster::{Setting, speed_for};
use super::policy::Policy;
use crate::sim::options::WORKERS_MAX;
use crate::sim::profile::{ReplayOptions, check_rates};
use crate::sim::size::Size;
use crate::sim::trace::Trace;

const GB: f64 = 1e9;
const SESSIONS_MAX: f64 = 64.0;

/// Replay a trace against workers behind a router
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Traces: JSON lines, plain or zstd
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Who serves the next prompt; several are replayed one after another
    #[arg(long, value_enum, value_delimiter = ',', default_value = "least-load,blocks1,blocks2,estimate")]
    pub(crate) policy: Vec<Policy>,
    /// Prefill workers
    #[arg(long, default_value_t = 16)]
    pub(crate) workers: u32,
    /// Memory of each worker: bytes (1TB) or a share of the trace's distinct blocks
    #[arg(long, default_value = "1TB")]
    pub(crate) private: Size,
    /// Memory that all workers share; 0 is none
    #[arg(long, default_value = "0")]
    pub(crate) pool: Size,
    /// GB a second from a worker's own memory
    #[arg(long, value_name = "GB", default_value_t = 100.0)]
    pub(crate) private_rate: f64,
    /// GB a second from the pool to a worker
    #[arg(long, value_name = "GB", default_value_t = 40.0)]
    pub(crate) pool_rate: f64,
    /// Seconds after which the router learns what a worker has, 0 to 5 or more; several are replayed
    #[arg(long, value_delimiter = ',', value_name = "SECONDS", default_value = "0")]
    pub(crate) event_delay: Vec<f64>,
    /// Arrivals come this many times as fast as they were recorded
    #[arg(long, conflicts_with = "utilisation")]
    pub(crate) speed: Option<f64>,
    /// The same, so that workers with one endless memory would be busy for this share of the time
    #[arg(long, value_name = "SHARE")]
    pub(crate) utilisation: Option<f64>,
    /// A turn comes when the one before it was answered, plus its think time [default: if the trace names sessions]
    #[arg(long, conflicts_with = "open_loop")]
    pub(crate) closed_loop: bool,
    /// Requests come when they were recorded, whatever became of those before
    #[arg(long)]
    pub(crate) open_loop: bool,
    /// Sessions start at this share of their recorded start; closed loop only
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub(crate) starts: f64,
    /// So many times the recorded sessions, each with blocks of its own and another start; closed loop only
    #[arg(long, value_name = "TIMES", default_value_t = 1.0)]
    pub(crate) sessions: f64,
    /// Tokens a second of one answer
    #[arg(long, value_name = "TOKENS", default_value_t = 40.0)]
    pub(crate) decode_rate: f64,
    /// How freely `estimate` chooses between near equals
    #[arg(long, default_value_t = 0.001)]
    pub(crate) temperature: f64,
    /// Of all draws
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) replay: ReplayOptions,
    /// Replays at one time [default: one a core]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Plot times to first token into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

impl Options {
    /// Everything that clap cannot check.
    ///
    /// # Errors
    /// With what is wrong and what is allowed.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.replay.check()?;
        self.replay.profile().check()?;
        check_rates(&[
            ("--private-rate", self.private_rate),
            ("--pool-rate", self.pool_rate),
            ("--speed", self.speed.unwrap_or(1.0)),
            ("--utilisation", self.utilisation.unwrap_or(1.0)),
            ("--starts", self.starts),
            ("--decode-rate", self.decode_rate),
        ])?;
        let temperature = self.temperature;
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "--temperature is {temperature}: it must be 0 or more"
        );
        for delay in &self.event_delay {
            ensure!(
                (0.0..=3600.0).contains(delay),
                "--event-delay is {delay}: allowed are 0 to 3600 seconds"
            );
        }
        ensure!(
            (1..=WORKERS_MAX).contains(&self.workers),
            "--workers is {}: allowed are 1 to {WORKERS_MAX}",
            self.workers
        );
        ensure!(self.threads != Some(0), "--threads is 0: it must be 1 or more");
        let sessions = self.sessions;
        ensure!(
            sessions > 0.0 && sessions <= SESSIONS_MAX,
            "--sessions is {sessions}: it must be more than 0 and at most {SESSIONS_MAX}"
        );
        if sessions.total_cmp(&1.0).is_ne() && self.open_loop {
            bail!("--sessions adds sessions, which --open-loop takes apart: use --speed");
        }
        if self.starts < 1.0 && self.open_loop {
            bail!("--starts moves sessions, which --open-loop takes apart: use --speed");
        }
        Ok(())
    }

    /// The trace that is replayed.
    ///
    /// # Errors
    /// When it cannot be read, or has no sessions to add to.
    pub(crate) fn trace(&self, file: &Path) -> anyhow::Result<Trace> {
        let trace = self.replay.trace(file)?;
        if self.sessions.total_cmp(&1.0).is_eq() { Ok(trace) } else { trace.with_sessions(self.sessions) }
    }

    /// The cluster and its traffic; the delay comes with each replay.
    ///
    /// # Errors
    /// When a size is too large to count.
    pub(crate) fn setting(&self, trace: &Trace) -> anyhow::Result<Setting> {
        let profile = self.replay.profile();
        let block_bytes = u64::from(trace.tokens_per_block) * profile.bytes_per_token;
        let closed_loop = self.closed_loop || (trace.has_sessions && !self.open_loop);
        let by_load = |share| speed_for(trace, self.workers, &profile, share);
        // No more blocks than there are can be kept.
        let blocks =
            |size: Size| usize::try_from(size.frames(block_bytes, trace.distinct()).min(trace.distinct()));
        Ok(Setting {
            workers: self.workers,
            private_blocks: blocks(self.private)?,
            pool_blocks: blocks(self.pool)?,
            private_rate: self.private_rate * GB,
            pool_rate: self.pool_rate * GB,
            delay: 0,
            decode_rate: self.decode_rate,
            closed_loop,
            speed: self.speed.or(self.utilisation.map(by_load)).unwrap_or(1.0),
            starts: self.starts,
            temperature: self.temperature,
            seed: self.seed,
            profile,
        })
    }
}
