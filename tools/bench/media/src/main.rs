//! Reads and writes of blocks through foyer's HybridCache on a directory, as one
//! JSON line a figure: what to hold beside the figures of `terrace bench media`.
//!
//! Values do not fit its memory, so gets come from the device; only hits are
//! counted. Inserts wait for the flusher every few values, because it drops
//! entries silently when it is behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, PsyncIoEngineConfig,
};

const MIB: usize = 1 << 20;
const CAPACITY: usize = 1024 * MIB;
/// Half of the capacity, so that nothing is evicted.
const FILLED: usize = CAPACITY / 2;
const BLOCKS: [usize; 2] = [368_640, 2 * MIB];
const DEPTHS: [usize; 4] = [1, 4, 16, 32];
const ROUNDS: usize = 5;
const GETS_BYTES: usize = 256 * MIB;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let dir = std::env::args().nth(1).context("usage: terrace-bench-foyer DIRECTORY (empty, on the device)")?;
    for bytes in BLOCKS {
        one_size(&format!("{dir}/foyer-{bytes}"), bytes).await?;
    }
    Ok(())
}

async fn one_size(dir: &str, bytes: usize) -> anyhow::Result<()> {
    let device = FsDeviceBuilder::new(dir).with_capacity(CAPACITY).with_direct(true).build()?;
    let engine = BlockEngineConfig::new(device)
        .with_block_size(64 * MIB)
        .with_buffer_pool_size(256 * MIB)
        .with_submit_queue_size_threshold(512 * MIB);
    let cache: HybridCache<u64, Vec<u8>> = HybridCacheBuilder::new()
        .memory(2 * bytes)
        .with_shards(1)
        .with_weighter(|_, value: &Vec<u8>| value.len())
        .storage()
        .with_io_engine_config(PsyncIoEngineConfig::new())
        .with_engine_config(engine)
        .build()
        .await?;
    let count = FILLED / bytes;
    let value: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect();
    let (began, cpu) = (Instant::now(), cpu_time());
    for key in 0..count {
        cache.storage_writer(key as u64).insert(value.clone());
        if key % 8 == 7 {
            cache.storage().wait().await;
        }
    }
    cache.storage().wait().await;
    report(bytes, "write", 8, count * bytes, began.elapsed(), cpu_time() - cpu);
    for depth in DEPTHS {
        let mut rates = Vec::new();
        for round in 0..ROUNDS {
            rates.push(gets(&cache, depth, count, bytes, round).await?);
        }
        rates.sort_by(|a, b| a.0.cmp(&b.0));
        let (took, cpu, moved) = rates[ROUNDS / 2];
        report(bytes, "read", depth, moved, took, cpu);
    }
    cache.close().await?;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

/// Reads by `depth` tasks; time, CPU time, bytes of hits.
async fn gets(
    cache: &HybridCache<u64, Vec<u8>>,
    depth: usize,
    count: usize,
    bytes: usize,
    round: usize,
) -> anyhow::Result<(Duration, Duration, usize)> {
    let left = Arc::new(AtomicU64::new((GETS_BYTES / bytes) as u64));
    let hits = Arc::new(AtomicU64::new(0));
    let (began, cpu) = (Instant::now(), cpu_time());
    let mut tasks = Vec::new();
    for task in 0..depth {
        let (cache, left, hits) = (cache.clone(), Arc::clone(&left), Arc::clone(&hits));
        let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul((round * 64 + task + 1) as u64);
        tasks.push(tokio::spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let found = cache.get(&(state % count as u64)).await?;
                hits.fetch_add(u64::from(found.is_some()), Ordering::Relaxed);
            }
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    let hits = hits.load(Ordering::Relaxed) as usize;
    ensure!(hits > 0, "nothing was hit: the entries were dropped");
    Ok((began.elapsed(), cpu_time() - cpu, hits * bytes))
}

fn report(bytes: usize, kind: &str, depth: usize, moved: usize, took: Duration, cpu: Duration) {
    let gib = moved as f64 / (1u64 << 30) as f64;
    let (rate, cpu) = (gib / took.as_secs_f64(), cpu.as_secs_f64() / gib);
    println!(r#"{{"name":"foyer_{bytes}_{kind}_{depth}","value":{rate:.3},"unit":"GiB/s"}}"#);
    println!(r#"{{"name":"foyer_{bytes}_{kind}_{depth}_cpu","value":{cpu:.3},"unit":"s/GiB"}}"#);
}

/// User and system time of this process, to 10 ms.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // `1234 (name, with anything in it) S 1 ...`; user and system ticks are the 12th and 13th after the name.
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * 10)
}
