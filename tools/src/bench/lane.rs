//! `bench lease` and `bench local`: a client of this machine and its daemon.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use hdrhistogram::Histogram;
use terrace_client::ReadOptions;
use terrace_core::MatchMode;

use super::blocks::{self, MODEL_BLOCK_BYTES};
use super::{Line, Options, median, stand};

/// Blocks of one lease.
const LEASE_BLOCKS: usize = 64;
/// Leases to warm up with.
const LEASES_WARM: u32 = 200;
/// Leases measured.
const LEASES: u32 = 5_000;
/// Requests that a flooding client has under way.
const FLOOD_REQUESTS: usize = 192;
/// Rounds of put, memcpy and get.
const ROUNDS: u32 = 9;

/// Latency of a lease of 64 resident blocks, and of lease and release together.
pub(super) async fn lease(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let daemon = stand::Daemon::start(dir.path(), "512MiB", "512MiB").await?;
    let session = blocks::session(&daemon.socket).await?;
    let space = blocks::space(&session, MODEL_BLOCK_BYTES).await?;
    let keys = blocks::keys(1, LEASE_BLOCKS);
    let payload = vec![7; usize::try_from(MODEL_BLOCK_BYTES)?];
    blocks::put(&session, &space, &keys, &payload).await?;
    let read = ReadOptions::default();
    let measure = async || -> anyhow::Result<_> {
        let mut leases = Histogram::<u64>::new(3)?;
        let mut pairs = Histogram::<u64>::new(3)?;
        for round in 0..LEASES_WARM + LEASES {
            let began = Instant::now();
            let lease = session.lease_read(&space, &keys, read).await?;
            let leased = began.elapsed();
            anyhow::ensure!(lease.prefix() == LEASE_BLOCKS, "only {} blocks were granted", lease.prefix());
            lease.release().await?;
            if round >= LEASES_WARM {
                leases.record(u64::try_from(leased.as_nanos())?)?;
                pairs.record(u64::try_from(began.elapsed().as_nanos())?)?;
            }
        }
        Ok((leases, pairs))
    };
    let (leases, pairs) = measure().await?;
    let burners = Burners::start(std::thread::available_parallelism()?.get());
    let (busy, _) = measure().await?;
    drop(burners);
    let flood = Flood::start(&daemon.socket);
    let (flooded, _) = measure().await?;
    let asked = flood.stop()?;
    eprintln!("lease: beside a flood of {asked} requests of {LEASE_BLOCKS} blocks");
    let us = |histogram: &Histogram<u64>, quantile| {
        let nanos = u32::try_from(histogram.value_at_quantile(quantile)).unwrap_or(u32::MAX);
        f64::from(nanos) / 1e3
    };
    Ok(vec![
        Line::plain("lease_64_p50", us(&leases, 0.5), "us"),
        Line::plain("lease_64_p99", us(&leases, 0.99), "us"),
        Line::plain("lease_and_release_64_p50", us(&pairs, 0.5), "us"),
        Line::plain("lease_and_release_64_p99", us(&pairs, 0.99), "us"),
        Line::at_most("fair_p99", us(&flooded, 0.99), 2.0 * us(&leases, 0.99), "us"),
        Line::cost("fair_p99_busy_cores", us(&flooded, 0.99), us(&busy, 0.99), "us"),
    ])
}

/// Threads that ask for nothing but processor time, as many as there are cores: what a flood costs others by that alone.
struct Burners(Arc<AtomicBool>);

impl Burners {
    fn start(threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..threads {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(stop)
    }
}

impl Drop for Burners {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A client that has as many requests under way as its library allows, on a thread of its own.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<anyhow::Result<u64>>,
}

impl Flood {
    fn start(socket: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (socket, stopped) = (socket.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(flood(&socket, &stopped))
        });
        Self { stop, thread }
    }

    /// Ends it; answers how much it has asked.
    fn stop(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the flood panicked"))?
    }
}

async fn flood(socket: &Path, stop: &Arc<AtomicBool>) -> anyhow::Result<u64> {
    let session = blocks::session(socket).await?;
    let space = Arc::new(blocks::space(&session, MODEL_BLOCK_BYTES).await?);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..FLOOD_REQUESTS {
        let (session, space, stop) = (session.clone(), Arc::clone(&space), Arc::clone(stop));
        tasks.spawn(async move {
            let keys = blocks::keys(1, LEASE_BLOCKS);
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

/// Put and get of model-sized blocks against memcpy of the same bytes.
pub(super) async fn local(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let daemon = stand::Daemon::start(dir.path(), "2GiB", "512MiB").await?;
    let session = blocks::session(&daemon.socket).await?;
    let space = blocks::space(&session, MODEL_BLOCK_BYTES).await?;
    let isolated = blocks::session_of(&daemon.socket, stand::ISOLATED).await?;
    let isolated_space = blocks::space(&isolated, MODEL_BLOCK_BYTES).await?;
    let block = usize::try_from(MODEL_BLOCK_BYTES)?;
    let source = vec![7u8; block * LEASE_BLOCKS];
    let mut target = vec![1u8; block * LEASE_BLOCKS];
    let gib = f64::from(u32::try_from(source.len() >> 10)?) / f64::from(1 << 20);
    let (mut puts, mut gets, mut copies, mut puts_isolated) = (vec![], vec![], vec![], vec![]);
    for round in 0..ROUNDS {
        let keys = blocks::keys(100 + round, LEASE_BLOCKS);
        let began = Instant::now();
        blocks::put(&session, &space, &keys, &source[..block]).await?;
        puts.push(gib / began.elapsed().as_secs_f64());

        let began = Instant::now();
        blocks::put(&isolated, &isolated_space, &keys, &source[..block]).await?;
        puts_isolated.push(gib / began.elapsed().as_secs_f64());

        let began = Instant::now();
        target.copy_from_slice(&source);
        copies.push(gib / began.elapsed().as_secs_f64());
        std::hint::black_box(&mut target);

        let began = Instant::now();
        let mut places = target.chunks_exact_mut(block);
        blocks::read(&session, &space, &keys, |block| {
            let place = places.next().unwrap_or_default();
            Ok(block.read_into(place)?)
        })
        .await?;
        gets.push(gib / began.elapsed().as_secs_f64());
    }
    let copy = median(&copies);
    Ok(vec![
        Line::plain("local_memcpy", copy, "GiB/s"),
        Line::compared("local_put", median(&puts), copy, "GiB/s"),
        Line::compared("local_put_isolated", median(&puts_isolated), copy, "GiB/s"),
        Line::compared("local_get", median(&gets), copy, "GiB/s"),
    ])
}
