//! One supervised child process.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use terrace_planner::local::describe;
use terrace_planner::process::{self, Ask};

/// First pause before a dead child is started again.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// A child that ran this long is healthy: its next death starts the pauses over.
const HEALTHY: Duration = Duration::from_secs(30);
/// How much of a log's end is shown.
const TAIL_BYTES: u64 = 2048;
/// How many lines of it.
const TAIL_LINES: usize = 6;

/// A child that is kept running.
pub(super) struct Child {
    /// Program name.
    pub(super) name: &'static str,
    command: Command,
    log: PathBuf,
    /// Prefix its stdout with its name and print it.
    relay: bool,
    running: Option<(std::process::Child, Instant)>,
    start_at: Instant,
    deaths: u32,
}

/// How a child died.
pub(super) struct Died {
    /// As a clause.
    pub(super) how: String,
    /// Time until it is started again.
    pub(super) pause: Duration,
    /// Deaths in a row without a healthy run, this one included.
    pub(super) deaths: u32,
}

impl Child {
    /// Not started yet. `command` must be guarded.
    pub(super) fn new(name: &'static str, mut command: Command, log: (PathBuf, File), relay: bool) -> Self {
        let (log, file) = log;
        // Logs are files.
        command.env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(if relay { Stdio::piped() } else { Stdio::null() }).stderr(file);
        Self { name, command, log, relay, running: None, start_at: Instant::now(), deaths: 0 }
    }

    /// Starts it when it does not run and its pause is over.
    ///
    /// # Errors
    /// When it cannot be spawned.
    pub(super) fn keep(&mut self) -> anyhow::Result<()> {
        if self.running.is_some() || Instant::now() < self.start_at {
            return Ok(());
        }
        let mut child = self.command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        if self.relay
            && let Some(stdout) = child.stdout.take()
        {
            let name = self.name;
            // Ends when the child closes its stdout.
            std::thread::spawn(move || {
                BufReader::new(stdout)
                    .lines()
                    .map_while(Result::ok)
                    .for_each(|line| println!("{name}: {line}"));
            });
        }
        self.running = Some((child, Instant::now()));
        Ok(())
    }

    /// Whether it runs, as far as the last look told.
    pub(super) fn runs(&self) -> bool {
        self.running.is_some()
    }

    /// Answers once when it has died since the last look.
    pub(super) fn look(&mut self) -> Option<Died> {
        let (child, since) = self.running.as_mut()?;
        let status = child.try_wait().ok()??;
        let how = format!("(pid {}) {}", child.id(), describe(status));
        if since.elapsed() >= HEALTHY {
            self.deaths = 0;
        }
        let pause = PAUSE_MIN.saturating_mul(1 << self.deaths.min(8)).min(PAUSE_MAX);
        self.deaths = self.deaths.saturating_add(1);
        self.running = None;
        self.start_at = Instant::now() + pause;
        Some(Died { how, pause, deaths: self.deaths })
    }

    /// Signals it when it runs.
    pub(super) fn signal(&self, ask: Ask) {
        if let Some((child, _)) = &self.running {
            process::signal(child.id(), ask);
        }
    }

    /// Waits until it is gone.
    pub(super) fn wait(&mut self) {
        if let Some((mut child, _)) = self.running.take() {
            child.wait().map(|_| ()).unwrap_or_default();
        }
    }

    /// The last lines of its log.
    pub(super) fn log_tail(&self) -> Vec<String> {
        let read = || {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(bytes)
        };
        let bytes = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
    }
}
