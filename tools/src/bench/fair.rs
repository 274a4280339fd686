//! `fair_p99` of `bench lease`: what a client that floods the daemon costs one that
//! asks now and then.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::anyhow;
use hdrhistogram::Histogram;
use terrace_client::MatchMode;

use super::control::{self, BLOCK_BYTES, Case};
use super::{Line, blocks, median};

/// Requests that the flood has under way, about as many as a session may.
const FLOOD_REQUESTS: usize = 192;
/// Quiet, busy and flooded take turns so often.
const ROUNDS: usize = 5;
const QUESTIONS: u32 = 1_000;

/// The p99 beside a flood, against twice the quiet p99, and against the p99 beside
/// threads that only burn processor time, which is no daemon's to give.
pub(super) async fn run(socket: &Path, keys: &[[u8; 16]], case: Case) -> anyhow::Result<Vec<Line>> {
    let session = blocks::session(socket).await?;
    let space = blocks::space(&session, BLOCK_BYTES).await?;
    let p99 = async || {
        let mut taken = Histogram::new(3)?;
        control::ask(&session, &space, keys, case, 1, QUESTIONS, &mut taken).await?;
        anyhow::Ok(control::us(&taken, 0.99))
    };
    let (mut quiet, mut busy, mut flooded, mut asked) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..ROUNDS {
        quiet.push(p99().await?);
        let burners = Beside::burners(std::thread::available_parallelism()?.get());
        busy.push(p99().await?);
        burners.stop()?;
        let flood = Beside::flood(socket, keys);
        flooded.push(p99().await?);
        asked += flood.stop()?;
    }
    eprintln!("fair: beside a flood of {asked} requests of {} blocks", keys.len());
    let [quiet, busy, flooded] = [quiet, busy, flooded].map(|rounds| median(&rounds));
    Ok(vec![
        Line::plain("fair_quiet_p99", quiet, "us"),
        Line::cost("fair_p99_beside_busy_cores", flooded, busy, "us"),
        Line::at_most("fair_p99", flooded, 2.0 * quiet, "us"),
    ])
}

/// Threads beside those that are measured.
struct Beside {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<u64>>>,
}

impl Beside {
    fn burners(count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                Ok(0)
            })
        });
        Self { threads: threads.collect(), stop }
    }

    fn flood(socket: &Path, keys: &[[u8; 16]]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (socket, keys, stopped) = (socket.to_owned(), keys.to_vec(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(flood(&socket, &keys, &stopped))
        });
        Self { threads: vec![thread], stop }
    }

    /// Ends them; answers how much they asked.
    fn stop(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let asked = self.threads.into_iter().map(|thread| {
            thread.join().map_err(|_| anyhow!("a thread beside the measured ones panicked"))?
        });
        asked.sum()
    }
}

async fn flood(socket: &Path, keys: &[[u8; 16]], stop: &Arc<AtomicBool>) -> anyhow::Result<u64> {
    let session = blocks::session(socket).await?;
    let space = Arc::new(blocks::space(&session, BLOCK_BYTES).await?);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..FLOOD_REQUESTS {
        let (session, space, stop) = (session.clone(), Arc::clone(&space), Arc::clone(stop));
        let keys = keys.to_vec();
        tasks.spawn(async move {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                session.exists(&[&space], &keys, MatchMode::Set).await?;
                asked += 1;
            }
            anyhow::Ok(asked)
        });
    }
    let mut asked = 0;
    while let Some(done) = tasks.join_next().await {
        asked += done??;
    }
    Ok(asked)
}
