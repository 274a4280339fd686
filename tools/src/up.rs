//! `up`: the daemon, the router, and the planner with its workers, in the
//! foreground, in one process group.
//!
//! Every process dies with this one, whatever way it goes. One that dies alone
//! is started again with growing pauses; the reason is printed.

mod child;
pub(crate) mod ports;
pub(crate) mod ready;
mod settings;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use terrace_planner::process::Ask;
use terrace_worker::gguf::Gguf;
use terrace_worker::model::ModelError;
use terrace_worker::tokenizer::Tokenizer;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::home::{self, Home, Running};
use crate::model;

use child::{Child, Died};
use settings::Plan;

/// Time between two looks at the children.
const LOOK: Duration = Duration::from_millis(50);
/// Longest wait for everything to answer.
const READY_TIME_MAX: Duration = Duration::from_secs(120);
/// Longest time workers and router get to finish what they have.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(13);
/// Longest time the daemon gets to make everything durable.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(12);
/// A child that dies this often before everything is ready will not get ready.
const STARTS_MAX: u32 = 3;

/// What to run.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Port of the front door; 0 takes any
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Model, a GGUF file [default: SmolLM2-135M, fetched once]
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
    /// Prefill workers at least
    #[arg(long, default_value_t = 1)]
    pub(crate) prefill: u32,
    /// Decode workers at least
    #[arg(long, default_value_t = 1)]
    pub(crate) decode: u32,
    /// Prefill workers at most [default: as at least]
    #[arg(long)]
    pub(crate) prefill_max: Option<u32>,
    /// Decode workers at most [default: as at least]
    #[arg(long)]
    pub(crate) decode_max: Option<u32>,
    /// Size of the pool in memory, for example 4GiB, or auto
    #[arg(long, default_value = "auto")]
    pub(crate) pinned_bytes: String,
    /// Size of the store on disk, for example 20GiB, or auto
    #[arg(long, default_value = "auto")]
    pub(crate) nvme_bytes: String,
    /// Threads of one worker [default: the worker chooses]
    #[arg(long)]
    pub(crate) threads: Option<u32>,
}

/// Runs until Ctrl-C or SIGTERM.
///
/// # Errors
/// When it cannot start; says what to do.
pub(crate) async fn run(options: Options, home: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let mut stops = Stops::new()?;
    let dir = home.unwrap_or_else(|| home::DEFAULT.into());
    let programs = settings::Programs::find()?;
    ports::check_front_door(options.port)?;
    let home = Home::open(&dir)?;
    let model = match &options.model {
        Some(path) => check_model(path)?,
        None => model::fetch()?,
    };
    let plan = Plan::new(&options, &home, programs, model)?;
    plan.write_daemon_config()?;
    let mut children = [plan.daemon(&home)?, plan.router(&home)?, plan.planner(&home)?];
    let started = start(&plan, &mut children, &mut stops).await;
    let result = match started {
        Ok(Started::Ready) => {
            home.publish(&plan.running)?;
            greet(&plan.running);
            watch(&mut children, &mut stops).await;
            Ok(())
        }
        Ok(Started::Stopped) => Ok(()),
        Err(error) => Err(error),
    };
    home.unpublish();
    stop(&mut children, &mut stops).await;
    result.map(|()| ExitCode::SUCCESS)
}

/// SIGINT and SIGTERM, which both mean: stop.
struct Stops {
    interrupt: Signal,
    terminate: Signal,
}

impl Stops {
    fn new() -> anyhow::Result<Self> {
        let interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        Ok(Self { interrupt, terminate })
    }

    /// Waits for the next one. Cancel-safe.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A file that no worker can use is better refused here than by every worker.
fn check_model(path: &Path) -> anyhow::Result<PathBuf> {
    let found = path.canonicalize().with_context(|| format!("cannot find the model {}", path.display()))?;
    if !found.is_file() {
        bail!("{} is no file: --model takes a GGUF file", path.display());
    }
    let cannot = || format!("cannot use the model {}", path.display());
    let file = Gguf::open(&found).with_context(cannot)?;
    let architecture = file.architecture().with_context(cannot)?;
    if architecture != "llama" {
        let found = ModelError::Architecture { found: architecture.to_owned() };
        return Err(found).with_context(cannot);
    }
    Tokenizer::from_gguf(&file).with_context(cannot)?;
    Ok(found)
}

enum Started {
    Ready,
    Stopped,
}

/// The daemon first, since all others talk to it; then the rest at once.
async fn start(plan: &Plan, children: &mut [Child; 3], stops: &mut Stops) -> anyhow::Result<Started> {
    let began = Instant::now();
    println!("starting terraced (state in {})", plan.home.display());
    let probe = ready::daemon(&plan.running.grpc);
    let Some(what) = until(probe, &mut children[..1], began, stops).await? else {
        return Ok(Started::Stopped);
    };
    println!("terraced answers after {:.1} s: {what}", began.elapsed().as_secs_f64());
    println!(
        "starting the router, and the planner with {} prefill and {} decode workers",
        plan.prefill, plan.decode
    );
    let probe = ready::front(&plan.running);
    let Some(what) = until(probe, &mut children[..], began, stops).await? else {
        return Ok(Started::Stopped);
    };
    println!("everything answers after {:.1} s: {what}", began.elapsed().as_secs_f64());
    Ok(Started::Ready)
}

/// Keeps `children` running until `probe` answers. `None` when asked to stop.
async fn until(
    probe: impl Future<Output = String>,
    children: &mut [Child],
    began: Instant,
    stops: &mut Stops,
) -> anyhow::Result<Option<String>> {
    let mut probe = std::pin::pin!(probe);
    loop {
        for child in children.iter_mut() {
            child.keep()?;
            if let Some(died) = child.look() {
                print_death(child, &died);
                if died.deaths >= STARTS_MAX {
                    bail!("{} does not start; the end of its log is above", child.name);
                }
            }
        }
        if began.elapsed() > READY_TIME_MAX {
            bail!("not ready after {} s; see the logs", READY_TIME_MAX.as_secs());
        }
        tokio::select! {
            what = &mut probe => return Ok(Some(what)),
            () = stops.next() => return Ok(None),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn print_death(child: &Child, died: &Died) {
    println!("{} {}; starting it again in {:.1} s", child.name, died.how, died.pause.as_secs_f64());
    for line in child.log_tail() {
        println!("  {line}");
    }
}

fn greet(running: &Running) {
    println!();
    println!("front door   {}/v1 (OpenAI-compatible)", running.url);
    println!("daemon       {} (gRPC), {} (lane)", running.grpc, running.socket.display());
    println!("metrics      {}/metrics, {}, {}", running.url, running.daemon_metrics, running.planner_metrics);
    println!("model        {}", running.model.display());
    println!("logs         {}", running.logs.display());
    println!();
    println!("try:");
    println!(
        "curl -N {}/v1/chat/completions -H 'Content-Type: application/json' -d '{{\"messages\": [{{\"role\": \"user\", \
         \"content\": \"What is the capital of France?\"}}], \"stream\": true}}'",
        running.url
    );
    println!();
    println!("ready: {}", running.url);
}

/// Keeps everything running until asked to stop.
async fn watch(children: &mut [Child; 3], stops: &mut Stops) {
    loop {
        for child in children.iter_mut() {
            if let Err(error) = child.keep() {
                println!("{error:#}");
            }
            if let Some(died) = child.look() {
                print_death(child, &died);
            }
        }
        tokio::select! {
            () = stops.next() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Router and planner first, so that workers drain while the daemon still takes
/// their blocks; then the daemon. A second signal kills.
async fn stop(children: &mut [Child; 3], stops: &mut Stops) {
    println!("stopping: workers finish, the daemon makes everything durable (Ctrl-C again kills)");
    let [daemon, front @ ..] = children;
    if !finish(front, DRAIN_TIME_MAX, stops).await
        || !finish(std::slice::from_mut(daemon), FLUSH_TIME_MAX, stops).await
    {
        println!("killing what is left");
        for child in children.iter_mut() {
            child.signal(Ask::Die);
            child.wait();
        }
        return;
    }
    println!("stopped");
}

/// Asks `children` to stop; answers whether they did, in time and undisturbed.
async fn finish(children: &mut [Child], time_max: Duration, stops: &mut Stops) -> bool {
    for child in children.iter_mut() {
        child.signal(Ask::Stop);
    }
    let began = Instant::now();
    while children.iter_mut().any(|child| child.look().is_none() && child.runs()) {
        if began.elapsed() > time_max {
            return false;
        }
        tokio::select! {
            () = stops.next() => return false,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    true
}
