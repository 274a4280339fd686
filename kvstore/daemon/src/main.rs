//! The program: arguments, logs, signals.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, Signal as Kill, getpid, getrlimit, kill_process, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use terrace_media::LargePages;
use terraced::{Config, Daemon, UseGds};

/// The residency table is used at random places.
#[global_allocator]
static ALLOCATOR: LargePages = LargePages;

/// The Terrace daemon: owns the memory that holds KV blocks on this node.
#[derive(Parser)]
#[command(name = "terraced", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Configuration file (TOML); keys are in docs/user-guide.md
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Looks at the configuration
    Config {
        #[command(subcommand)]
        action: ConfigAction,
    },
}

#[derive(Subcommand)]
enum ConfigAction {
    /// Checks a file and shows what would be used
    Check {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The first message says it all: what is wrong, where, and what to do.
            let _ = writeln!(std::io::stderr(), "terraced: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    terrace_lane::keep_freed_memory();
    if let Some(Command::Config { action: ConfigAction::Check { config } }) = arguments.command {
        let config = Config::read(&config)?;
        writeln!(std::io::stdout(), "{}\nok", config.summary())?;
        return Ok(());
    }
    let path = arguments
        .config
        .context("--config FILE is missing; the shortest file is one line: data_dir = \"...\"")?;
    let config = Config::read(&path)?;
    let filter =
        match std::env::var("RUST_LOG") {
            Ok(filter) => EnvFilter::try_new(filter)
                .map_err(|error| anyhow!("environment variable RUST_LOG: {error}"))?,
            Err(_) => EnvFilter::try_new(&config.log)
                .map_err(|error| anyhow!("configuration key `log`: {error}"))?,
        };
    if config.hbm.iter().any(|device| !matches!(device.gds, UseGds::Off)) {
        // Before there are threads. cuFile would write its log where the daemon was started.
        if let Err(error) = terrace_gpudirect::log_to(&config.data_dir) {
            let _ = writeln!(std::io::stderr(), "terraced: cuFile is not used: {error}");
        }
    }
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    if let Err(error) = allow_files() {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("terraced")
        .build()
        .context("cannot start threads")?;
    runtime.block_on(run(config))?;
    // What still runs on blocking threads must not delay the end: all is persisted.
    runtime.shutdown_background();
    Ok(())
}

/// Takes as many open files as it may: each chunk of the pool is some, and a shell allows few.
fn allow_files() -> rustix::io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut signals = Signals {
        terminate: signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?,
        interrupt: signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?,
    };
    let mut starting = pin!(Daemon::start(config, terrace_media::Hooks::default()));
    let daemon = tokio::select! {
        started = &mut starting => {
            let daemon = started?;
            signals.next().await;
            tracing::info!("stopping; a second signal ends at once");
            daemon
        }
        () = signals.next() => {
            tracing::info!("stopping when the start is through; a second signal ends at once");
            tokio::select! {
                started = &mut starting => started?,
                () = signals.next() => end_at_once(),
            }
        }
    };
    tokio::select! {
        () = daemon.stop() => {}
        () = signals.next() => end_at_once(),
    }
    Ok(())
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// As a kill: leaving by `exit` would run the destructors of RocksDB under its own threads.
fn end_at_once() -> ! {
    // Nobody but the kernel could refuse.
    let _ = kill_process(getpid(), Kill::KILL);
    std::process::abort()
}
