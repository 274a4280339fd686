//! What a planner is told: flags, or a TOML file with the same names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use serde::Deserialize;

use crate::local::WorkerSettings;
use crate::size::{Bounds, Policy};

/// Most workers of one role.
const WORKERS_MAX: u32 = 256;

/// Starts and stops prefill and decode workers as load comes and goes.
#[derive(Clone, Debug, Default, Parser, Deserialize)]
#[command(name = "terrace-planner", version)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct Options {
    /// TOML file with the long names below, `_` for `-`; flags win
    #[arg(long)]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// The daemon's gRPC address [default: http://127.0.0.1:7070]
    #[arg(long, env = "TERRACE_ENDPOINT")]
    pub grpc: Option<String>,
    /// The daemon's lane socket; workers without it use gRPC
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// The terrace-worker program [default: next to this one]
    #[arg(long)]
    pub worker_bin: Option<PathBuf>,
    /// Model file for the workers
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Tenant to act for
    #[arg(long)]
    pub tenant: Option<String>,
    /// The tenant's secret
    #[arg(long, env = "TERRACE_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Threads of one worker
    #[arg(long)]
    pub threads: Option<u32>,
    /// Requests that one worker takes at once
    #[arg(long)]
    pub requests: Option<u32>,
    /// Fewest prefill workers [default: 1]
    #[arg(long)]
    pub prefill_min: Option<u32>,
    /// Most prefill workers [default: the fewest]
    #[arg(long)]
    pub prefill_max: Option<u32>,
    /// Fewest decode workers [default: 1]
    #[arg(long)]
    pub decode_min: Option<u32>,
    /// Most decode workers [default: the fewest]
    #[arg(long)]
    pub decode_max: Option<u32>,
    /// Waiting prompt tokens should be computed within this time, in ms [default: 2000]
    #[arg(long)]
    pub target_ms: Option<u64>,
    /// A need must last this long before it counts, in ms [default: 500]
    #[arg(long)]
    pub hold_ms: Option<u64>,
    /// No growth for this long after a change, in ms [default: 5000]
    #[arg(long)]
    pub settle_ms: Option<u64>,
    /// A worker goes when not needed for this long, in ms [default: 60000]
    #[arg(long)]
    pub quiet_ms: Option<u64>,
    /// Directory for one log file a worker [default: logs go to stderr]
    #[arg(long)]
    pub log_dir: Option<PathBuf>,
    /// Address of /metrics and /healthz [default: 127.0.0.1:9470]
    #[arg(long)]
    pub metrics_listen: Option<SocketAddr>,
}

/// Checked settings of a planner.
#[derive(Clone, Debug)]
pub struct Config {
    /// The daemon's gRPC address.
    pub grpc: String,
    /// What it aims for.
    pub policy: Policy,
    /// What every worker is started with.
    pub workers: WorkerSettings,
    /// Address of `/metrics` and `/healthz`.
    pub metrics_listen: SocketAddr,
}

impl Options {
    /// Fills what no flag gave from the file that `--config` names.
    ///
    /// # Errors
    /// When the file cannot be read or has an unknown key.
    pub fn with_file(self) -> anyhow::Result<Self> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let file: Self = toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))?;
        Ok(Self {
            config: self.config,
            grpc: self.grpc.or(file.grpc),
            socket: self.socket.or(file.socket),
            worker_bin: self.worker_bin.or(file.worker_bin),
            model: self.model.or(file.model),
            tenant: self.tenant.or(file.tenant),
            token: self.token.or(file.token),
            threads: self.threads.or(file.threads),
            requests: self.requests.or(file.requests),
            prefill_min: self.prefill_min.or(file.prefill_min),
            prefill_max: self.prefill_max.or(file.prefill_max),
            decode_min: self.decode_min.or(file.decode_min),
            decode_max: self.decode_max.or(file.decode_max),
            target_ms: self.target_ms.or(file.target_ms),
            hold_ms: self.hold_ms.or(file.hold_ms),
            settle_ms: self.settle_ms.or(file.settle_ms),
            quiet_ms: self.quiet_ms.or(file.quiet_ms),
            log_dir: self.log_dir.or(file.log_dir),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
        })
    }

    /// Checks the options and applies defaults.
    ///
    /// # Errors
    /// Naming the option and what is allowed.
    pub fn check(self) -> anyhow::Result<Config> {
        let prefill = bounds("prefill", self.prefill_min, self.prefill_max)?;
        let decode = bounds("decode", self.decode_min, self.decode_max)?;
        for (name, number) in [("threads", self.threads), ("requests", self.requests)] {
            if number == Some(0) {
                bail!("--{name} is 0: it must be at least 1");
            }
        }
        let ms = |value: Option<u64>, default| Duration::from_millis(value.unwrap_or(default));
        let policy = Policy {
            prefill,
            decode,
            target: ms(self.target_ms, 2_000),
            hold: ms(self.hold_ms, 500),
            settle: ms(self.settle_ms, 5_000),
            quiet: ms(self.quiet_ms, 60_000),
            rate_assumed: 300.0,
        };
        if policy.target.is_zero() {
            bail!("--target-ms is 0: it must be at least 1");
        }
        let grpc = self.grpc.unwrap_or_else(|| "http://127.0.0.1:7070".to_owned());
        let program = self.worker_bin.map_or_else(|| beside_this_program("terrace-worker"), Ok)?;
        let workers = WorkerSettings {
            program,
            model: self.model,
            grpc: grpc.clone(),
            socket: self.socket,
            tenant: self.tenant,
            token: self.token,
            threads: self.threads,
            requests: self.requests,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            log_dir: self.log_dir,
        };
        let metrics_listen = self.metrics_listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 9470)));
        Ok(Config { grpc, policy, workers, metrics_listen })
    }
}

fn bounds(role: &str, min: Option<u32>, max: Option<u32>) -> anyhow::Result<Bounds> {
    let min = min.unwrap_or(1);
    let max = max.unwrap_or(min);
    if max < min {
        bail!("--{role}-max is {max}, less than --{role}-min, which is {min}");
    }
    if max > WORKERS_MAX {
        bail!("--{role}-max is {max}: at most {WORKERS_MAX} workers of a role are allowed");
    }
    Ok(Bounds { min, max })
}

/// The path of another of our programs, which lies in the same directory as this one.
///
/// # Errors
/// When it is not there; says how to get it.
pub fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    let path = own.parent().unwrap_or(Path::new(".")).join(name);
    if !path.is_file() {
        bail!("{} is missing: `cargo build --release -p {name}` builds it", path.display());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(args: &[&str]) -> Options {
        Options::try_parse_from(std::iter::once(&"terrace-planner").chain(args)).unwrap()
    }

    /// Bounds that contradict each other would make the sizing panic: they must be refused by name.
    #[test]
    fn upside_down_bounds_are_refused() {
        let error = options(&["--prefill-min=3", "--prefill-max=2"]).check().unwrap_err().to_string();
        assert!(error.contains("--prefill-max is 2"), "{error}");
        assert!(options(&["--decode-max=100000"]).check().is_err());
        assert!(options(&["--threads=0"]).check().is_err());
    }

    /// A typo in a file must not be ignored, and a flag must win over the file.
    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("planner.toml");
        std::fs::write(&path, "prefill_min = 2\ndecode_min = 3\nmetrics_listen = \"127.0.0.1:1\"\n").unwrap();
        let config = format!("--config={}", path.display());
        let merged = options(&[&config, "--decode-min=1"]).with_file().unwrap();
        assert_eq!((merged.prefill_min, merged.decode_min), (Some(2), Some(1)));
        std::fs::write(&path, "prefil_min = 2\n").unwrap();
        let error = format!("{:#}", options(&[&config]).with_file().unwrap_err());
        assert!(error.contains("prefil_min"), "{error}");
    }
}
