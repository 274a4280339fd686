//! A whole node, or a daemon alone, in a temporary directory.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tempfile::TempDir;
use terrace_planner::config::beside_this_program;
use terrace_planner::process::{Ask, guarded, signal};
use terrace_proto::v1::{InfoRequest, Tier};

use super::Options;
use crate::daemon_config::DaemonConfig;
use crate::home::Running;
use crate::up::{ports, ready};

/// The tenant of a daemon alone whose windows are adopted.
pub(super) const ADOPTING: &str = "default";
/// The one whose blocks are copied when they are sealed.
pub(super) const ISOLATED: &str = "isolated";
/// Longest wait for a process to get ready or to go.
const TIME_MAX: Duration = Duration::from_secs(120);

/// A directory of ours, removed at the end.
///
/// # Errors
/// When it cannot be made.
pub(super) fn temp_dir(options: &Options) -> anyhow::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("terrace-bench-");
    let made = match &options.dir {
        Some(dir) => builder.tempdir_in(dir),
        None => builder.tempdir(),
    };
    made.context("cannot make a temporary directory; choose one by --dir")
}

/// A running `terrace up`. Dropped, it is killed.
pub(super) struct Node {
    up: Child,
    /// Its addresses.
    pub(super) running: Running,
}

impl Node {
    /// Starts one on `home` and waits until it says `ready`.
    ///
    /// # Errors
    /// When it does not get ready.
    pub(super) fn start(home: &Path, model: &Path, extra: &[&str]) -> anyhow::Result<Self> {
        let mut command = guarded(&std::env::current_exe()?);
        command.arg("up").arg("--home").arg(home).arg("--model").arg(model).args(["--port", "0"]).args(extra);
        command.env_remove("TERRACE_HOME").env_remove("TERRACE_ENDPOINT");
        let mut up =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start terrace up")?;
        let stdout = up.stdout.take().context("a piped stdout is there")?;
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let is_ready = lines.by_ref().any(|line| {
            let is_ready = line.starts_with("ready: ");
            said.push(line);
            is_ready
        });
        if !is_ready {
            up.wait()?;
            bail!("terrace up did not get ready:\n{}", said.join("\n"));
        }
        // It must not block on a full pipe later.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { up, running: Running::read(home)? })
    }

    /// kill -9 of every process at once; returns when all are gone.
    ///
    /// # Errors
    /// When one does not go.
    pub(super) fn kill_everything(mut self) -> anyhow::Result<()> {
        let pids = descendants(self.up.id())?;
        pids.iter().for_each(|pid| signal(*pid, Ask::Die));
        self.up.wait()?;
        let began = Instant::now();
        while pids.iter().any(|pid| alive(*pid)) {
            if began.elapsed() > TIME_MAX {
                bail!("processes {pids:?} do not die");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The process id of a child of `terrace up` by its program's name.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn pid_of(&self, program: &str) -> anyhow::Result<u32> {
        let found = descendants(self.up.id())?.into_iter().find(|pid| name_of(*pid) == program);
        found.with_context(|| format!("no process of {program}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        signal(self.up.id(), Ask::Die);
        // Its children die with it; a failed wait means it is gone already.
        self.up.wait().map(|_| ()).unwrap_or_default();
    }
}

/// A daemon alone. Dropped, it is killed.
pub(super) struct Daemon {
    process: Child,
    dir: PathBuf,
    config: PathBuf,
    /// Its gRPC address.
    pub(super) grpc: String,
    /// Its metrics page.
    pub(super) metrics: String,
    /// Its lane socket.
    pub(super) socket: PathBuf,
}

impl Daemon {
    /// Starts one on `dir` and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub(super) async fn start(dir: &Path, pinned_bytes: &str, nvme_bytes: &str) -> anyhow::Result<Self> {
        Self::start_with(dir, pinned_bytes, nvme_bytes, "").await
    }

    /// As [`Self::start`], with more lines of its configuration.
    ///
    /// # Errors
    /// As there.
    pub(super) async fn start_with(
        dir: &Path,
        pinned_bytes: &str,
        nvme_bytes: &str,
        more: &str,
    ) -> anyhow::Result<Self> {
        let [grpc, metrics]: [SocketAddr; 2] = ports::free()?;
        let config = dir.join("terraced.toml");
        let socket = dir.join("lane.sock");
        let data_dir = dir.join("data");
        std::fs::create_dir_all(&data_dir)?;
        DaemonConfig { data_dir: &data_dir, socket: &socket, grpc, metrics, pinned_bytes, nvme_bytes }
            .write(&config)?;
        let mut text = std::fs::read_to_string(&config)?;
        text.push_str(&format!(
            "[[tenant]]\nname = \"{ADOPTING}\"\n[[tenant]]\nname = \"{ISOLATED}\"\nwindows = \"isolated\"\n{more}"
        ));
        std::fs::write(&config, text)?;
        let process = spawn(dir, &config)?;
        let (grpc, metrics) = (format!("http://{grpc}"), format!("http://{metrics}/metrics"));
        let mut daemon = Self { process, dir: dir.to_owned(), config, grpc, metrics, socket };
        daemon.wait_ready().await?;
        Ok(daemon)
    }

    /// Returns when it has measured its devices, which it does after its start, beside its first work.
    ///
    /// # Errors
    /// When it has not within half a minute.
    pub(super) async fn measured(&self) -> anyhow::Result<()> {
        const LOOKS: u32 = 300;
        const PAUSE: Duration = Duration::from_millis(100);
        let mut client = terrace_client::admin(&self.grpc).await?;
        for _ in 0..LOOKS {
            let tiers = client.info(InfoRequest {}).await?.into_inner().tiers;
            let mut devices = tiers.iter().filter(|tier| tier.tier() == Tier::Nvme);
            if devices.all(|device| !device.self_test.is_empty()) {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        bail!("the daemon's self-test of its devices has not ended in {:?}", PAUSE * LOOKS)
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// kill -9.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        signal(self.process.id(), Ask::Die);
        self.process.wait()?;
        Ok(())
    }

    /// Starts it again after [`Self::kill`], without waiting.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn spawn_again(&mut self) -> anyhow::Result<()> {
        self.process = spawn(&self.dir, &self.config)?;
        Ok(())
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let mut probe = std::pin::pin!(ready::daemon(&self.grpc));
        let began = Instant::now();
        loop {
            tokio::select! {
                _ = &mut probe => return Ok(()),
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            if self.process.try_wait()?.is_some() || began.elapsed() > TIME_MAX {
                let log = std::fs::read_to_string(self.dir.join("terraced.log")).unwrap_or_default();
                bail!("terraced did not get ready:\n{log}");
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill().unwrap_or_default();
    }
}

fn spawn(dir: &Path, config: &Path) -> anyhow::Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("terraced.log"))?;
    let mut command: Command = guarded(&beside_this_program("terraced")?);
    command.arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().context("cannot start terraced")
}

/// A process and everything below it.
fn descendants(root: u32) -> anyhow::Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        parents.extend(stat(pid).map(|(parent, _)| (pid, parent)));
    }
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    Ok(found)
}

/// Parent and state of a process.
fn stat(pid: u32) -> Option<(u32, char)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut rest = text.rsplit_once(") ")?.1.split(' ');
    let state = rest.next()?.chars().next()?;
    Some((rest.next()?.parse().ok()?, state))
}

fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, state)| state != 'Z')
}

fn name_of(pid: u32) -> String {
    let target = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
