//! What each process of a run is started with.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::bail;
use terrace_planner::config::beside_this_program;
use terrace_planner::process::guarded;

use super::child::Child;
use super::{Options, ports};
use crate::daemon_config::DaemonConfig;
use crate::home::{Home, Running};

/// Our other programs, which lie next to this one.
pub(super) struct Programs {
    daemon: PathBuf,
    router: PathBuf,
    planner: PathBuf,
    worker: PathBuf,
}

impl Programs {
    /// # Errors
    /// When one is missing; says how to get it.
    pub(super) fn find() -> anyhow::Result<Self> {
        Ok(Self {
            daemon: beside_this_program("terraced")?,
            router: beside_this_program("terrace-router")?,
            planner: beside_this_program("terrace-planner")?,
            worker: beside_this_program("terrace-worker")?,
        })
    }
}

/// Everything that is decided before the first process starts.
pub(super) struct Plan {
    /// State directory.
    pub(super) home: PathBuf,
    /// Fewest prefill workers.
    pub(super) prefill: u32,
    /// Fewest decode workers.
    pub(super) decode: u32,
    /// Addresses and paths, as other commands will read them.
    pub(super) running: Running,
    programs: Programs,
    options: Options,
    front: SocketAddr,
    grpc: SocketAddr,
    daemon_metrics: SocketAddr,
    planner_metrics: SocketAddr,
}

impl Plan {
    /// # Errors
    /// When options contradict each other or no port is free.
    pub(super) fn new(
        options: &Options,
        home: &Home,
        programs: Programs,
        model: PathBuf,
    ) -> anyhow::Result<Self> {
        if options.decode == 0 {
            bail!("--decode is 0: at least one decode worker is needed to answer");
        }
        for (role, least, most) in [
            ("prefill", options.prefill, options.prefill_max),
            ("decode", options.decode, options.decode_max),
        ] {
            if most.is_some_and(|most| most < least) {
                bail!("--{role}-max is less than --{role}");
            }
        }
        let [grpc, daemon_metrics, planner_metrics, spare] = ports::free::<4>()?;
        let front = match options.port {
            0 => spare,
            port => SocketAddr::from(([127, 0, 0, 1], port)),
        };
        let running = Running {
            pid: std::process::id(),
            url: format!("http://{front}"),
            grpc: format!("http://{grpc}"),
            socket: home.socket()?,
            daemon_metrics: format!("http://{daemon_metrics}/metrics"),
            planner_metrics: format!("http://{planner_metrics}/metrics"),
            model,
            logs: home.path("logs"),
        };
        Ok(Self {
            home: home.dir.clone(),
            prefill: options.prefill,
            decode: options.decode,
            running,
            programs,
            options: options.clone(),
            front,
            grpc,
            daemon_metrics,
            planner_metrics,
        })
    }

    fn daemon_config_path(&self) -> PathBuf {
        self.home.join("config").join("terraced.toml")
    }

    /// Writes the daemon's configuration file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write_daemon_config(&self) -> anyhow::Result<()> {
        DaemonConfig {
            data_dir: &self.home.join("data"),
            socket: &self.running.socket,
            grpc: self.grpc,
            metrics: self.daemon_metrics,
            pinned_bytes: &self.options.pinned_bytes,
            nvme_bytes: &self.options.nvme_bytes,
        }
        .write(&self.daemon_config_path())
    }

    /// # Errors
    /// When its log file cannot be written.
    pub(super) fn daemon(&self, home: &Home) -> anyhow::Result<Child> {
        let mut command = guarded(&self.programs.daemon);
        command.arg("--config").arg(self.daemon_config_path());
        Ok(Child::new("terraced", command, home.log("terraced")?, false))
    }

    /// # Errors
    /// When its log file cannot be written.
    pub(super) fn router(&self, home: &Home) -> anyhow::Result<Child> {
        let mut command = guarded(&self.programs.router);
        command.arg("--listen").arg(self.front.to_string());
        command.args(["--grpc", &self.running.grpc]).arg("--socket").arg(&self.running.socket);
        Ok(Child::new("terrace-router", command, home.log("terrace-router")?, false))
    }

    /// # Errors
    /// When its log file cannot be written.
    pub(super) fn planner(&self, home: &Home) -> anyhow::Result<Child> {
        let options = &self.options;
        let mut command = guarded(&self.programs.planner);
        command.args(["--grpc", &self.running.grpc]).arg("--socket").arg(&self.running.socket);
        command.arg("--worker-bin").arg(&self.programs.worker).arg("--model").arg(&self.running.model);
        command.arg("--log-dir").arg(&self.running.logs);
        command.arg("--metrics-listen").arg(self.planner_metrics.to_string());
        let numbers = [
            ("--prefill-min", Some(options.prefill)),
            ("--prefill-max", options.prefill_max),
            ("--decode-min", Some(options.decode)),
            ("--decode-max", options.decode_max),
            ("--threads", options.threads),
        ];
        for (flag, number) in numbers {
            if let Some(number) = number {
                command.arg(flag).arg(number.to_string());
            }
        }
        Ok(Child::new("terrace-planner", command, home.log("terrace-planner")?, true))
    }
}
