//! Measures the block pool of NVIDIA Dynamo (`kvbm-logical`) under the load of `terrace bench table`, and puts the
//! figures of both side by side. `tools/bench/table` runs it.
//!
//! The pool is used as its documentation says, in the way that suits it best: a chain of 200 is allocated and
//! registered in one call each, hashes are ready before the clock starts, and there is no frequency sketch unless the
//! backend needs one.

mod clock;
mod compare;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kvbm_logical::manager::FrequencyTrackingCapacity;
use kvbm_logical::{BlockManager, BlockRegistry, CompleteBlock, SequenceHash};

use clock::Stretch;

/// Blocks of one chain, which is one request.
const CHAIN_BLOCKS: usize = 200;
/// Chains that fill the pool: a million blocks.
const CHAINS: u64 = 5_000;
/// Chains read, drawn at random.
const CHAINS_READ: u64 = 3_600;
/// Tokens of a block.
const BLOCK_TOKENS: usize = 16;

/// The tier that the pool's blocks are of.
#[derive(Clone)]
struct Host;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["measure", backend] => measure(backend),
        ["compare", ours, peer] => compare::run(ours, peer),
        _ => bail!("usage: table-peer measure lru|multi_lru|lineage, or table-peer compare OURS PEER"),
    }
}

/// Prints the figures of one backend, one JSON object a line.
fn measure(backend: &str) -> anyhow::Result<()> {
    let before = resident_bytes()?;
    let pool = pool(backend)?;
    let register = write_all(&pool, 0)?;
    let bytes = resident_bytes()?.saturating_sub(before);
    let replace = write_all(&pool, CHAINS)?;
    compare::print("register", backend, register, "ns/block")?;
    compare::print("replace", backend, replace, "ns/block")?;
    compare::print("match_release", backend, read(&pool)?, "ns/block")?;
    compare::print("bytes", backend, bytes as f64 / (CHAINS as usize * CHAIN_BLOCKS) as f64, "B/block")
}

/// Nanoseconds of a core for each block of so many chains.
fn nanos(time: Duration, stretch: &Stretch, chains: u64) -> f64 {
    stretch.share() * time.as_secs_f64() * 1e9 / (chains as usize * CHAIN_BLOCKS) as f64
}

/// Writes as many chains as fill the pool; nanoseconds per block.
fn write_all(pool: &BlockManager<Host>, first: u64) -> anyhow::Result<f64> {
    let (mut took, stretch) = (Duration::ZERO, Stretch::begin());
    for number in first..first + CHAINS {
        took += write(pool, number)?;
    }
    Ok(nanos(took, &stretch, CHAINS))
}

fn pool(backend: &str) -> anyhow::Result<BlockManager<Host>> {
    let registry = BlockRegistry::builder();
    let builder =
        BlockManager::<Host>::builder().block_count(CHAINS as usize * CHAIN_BLOCKS).block_size(BLOCK_TOKENS);
    let builder = match backend {
        "lru" => builder.registry(registry.build()).with_lru_backend(),
        "multi_lru" => {
            let tracker = FrequencyTrackingCapacity::Medium.create_tracker();
            builder.registry(registry.frequency_tracker(tracker).build()).with_multi_lru_backend()
        }
        "lineage" => builder.registry(registry.build()).with_lineage_backend(),
        other => bail!("unknown backend {other}; there are lru, multi_lru and lineage"),
    };
    builder.build().context("the pool cannot be built")
}

/// Allocates (evicting in a full pool), stages, registers and lets go of a chain.
fn write(pool: &BlockManager<Host>, number: u64) -> anyhow::Result<Duration> {
    let hashes = chain(number);
    let began = Instant::now();
    let blocks = pool.allocate_blocks(hashes.len()).context("the pool gives no blocks")?;
    let mut staged: Vec<CompleteBlock<Host>> = Vec::with_capacity(blocks.len());
    for (block, hash) in blocks.into_iter().zip(&hashes) {
        staged.push(block.stage(*hash, BLOCK_TOKENS).ok().context("a block is not staged")?);
    }
    let registered = pool.register_blocks(staged);
    ensure!(
        registered.len() == hashes.len(),
        "{} of {} blocks are registered",
        registered.len(),
        hashes.len()
    );
    drop(registered);
    Ok(began.elapsed())
}

/// Matches chains drawn at random among the newer ones and lets go of them; nanoseconds per block of those that were
/// whole. A backend may protect what is used often, but the newest chains must mostly be there.
fn read(pool: &BlockManager<Host>) -> anyhow::Result<f64> {
    let (mut draw, mut took, mut whole) = (1, Duration::ZERO, 0);
    let stretch = Stretch::begin();
    for _ in 0..CHAINS_READ {
        draw = mix(draw);
        let hashes = chain(2 * CHAINS - 1 - draw % (CHAINS * 9 / 10));
        let began = Instant::now();
        let matched = pool.match_blocks(&hashes);
        let count = matched.len();
        drop(matched);
        let time = began.elapsed();
        if count == hashes.len() {
            took += time;
            whole += 1;
        }
    }
    ensure!(whole > CHAINS_READ / 4, "only {whole} of {CHAINS_READ} chains are whole");
    Ok(nanos(took, &stretch, whole))
}

/// The hashes of a chain, each with the one before it.
fn chain(number: u64) -> Vec<SequenceHash> {
    let mut parent = None;
    (0..CHAIN_BLOCKS as u64)
        .map(|position| {
            let hash = mix(number << 16 | position);
            let lineage = SequenceHash::new(hash, parent, position);
            parent = Some(hash);
            lineage
        })
        .collect()
}

/// SplitMix64, as in `terrace bench table`.
fn mix(number: u64) -> u64 {
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The resident set of this process, summed up over all mappings.
fn resident_bytes() -> anyhow::Result<u64> {
    let path = "/proc/self/smaps_rollup";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib =
        line.and_then(|rest| rest.trim().strip_suffix(" kB")).with_context(|| format!("no Rss in {path}"))?;
    Ok(kib.parse::<u64>().with_context(|| format!("{path}: Rss is {kib}"))? * 1024)
}
