//! `bench restart`: what a crash costs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use terrace_client::{Admin, Session, admin};
use terrace_planner::process::{Ask, signal};
use terrace_proto::v1::{FlushRequest, InfoRequest, Tier};

use super::{Line, Options, ask, blocks, median, prompt, stand};

/// Tokens of a prompt.
const PROMPT_TOKENS: usize = 1000;
/// Prompts, each with a beginning of its own.
const PROMPTS: u64 = 3;
/// Tokens to generate.
const ANSWER_TOKENS: u32 = 24;
/// Time between the last answer and the kill.
const PAUSE: Duration = Duration::from_secs(1);
/// How many times faster than cold the first answer after the restart must begin.
const SPEEDUP_MIN: f64 = 10.0;
/// Blocks on disk for the start of a full daemon.
const FULL_BLOCKS: usize = 10_000;
/// Their payload: small, so that the filling is quick; the count is what matters.
const FULL_BLOCK_BYTES: u64 = 64 << 10;
/// Blocks of one write lease while filling.
const FILL_BLOCKS: usize = 100;
/// Longest time from the start of a full daemon to its first block served, in seconds.
const SERVE_SECONDS_MAX: f64 = 2.0;
/// Payload of the blocks that fill a pool.
const POOL_BLOCK_BYTES: u64 = 4 << 20;
/// Of those, in one write lease.
const POOL_FILL_BLOCKS: usize = 16;
/// Size of the store under a full pool, so that what is filled is mostly not written.
const POOL_NVME_BYTES: &str = "512MiB";
/// Longest wait for anything to answer again.
const TIME_MAX: Duration = Duration::from_secs(120);

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let mut lines = everything(options).await?;
    lines.extend(full_daemon(options).await?);
    lines.extend(daemon_alone(options).await?);
    Ok(lines)
}

/// kill -9 of every process a second after the answer, then the same prompts.
async fn everything(options: &Options) -> anyhow::Result<Vec<Line>> {
    let model = super::model_path(options)?;
    let home = stand::temp_dir(options)?;
    let client = ask::client()?;
    let seed = prompt::fresh_seed();
    let prompts = (0..PROMPTS).map(|round| prompt::tokens(&model, seed + round, PROMPT_TOKENS));
    let prompts: Vec<_> = prompts.collect::<Result<_, _>>()?;
    let warm_up = prompt::tokens(&model, 1, 64)?;

    let node = stand::Node::start(home.path(), &model, &[])?;
    ask::ask(&client, &node.running.url, &warm_up, 2).await?;
    let mut before = Vec::new();
    for tokens in &prompts {
        before.push(ask::ask(&client, &node.running.url, tokens, ANSWER_TOKENS).await?);
    }
    tokio::time::sleep(PAUSE).await;
    node.kill_everything()?;

    let began = Instant::now();
    let node = stand::Node::start(home.path(), &model, &[])?;
    let ready = began.elapsed();
    let (mut ratios, mut first, mut identical) = (Vec::new(), Vec::new(), 0u32);
    for (tokens, cold) in prompts.iter().zip(&before) {
        let warm = ask::ask(&client, &node.running.url, tokens, ANSWER_TOKENS).await?;
        ratios.push(cold.first.as_secs_f64() / warm.first.as_secs_f64());
        first.push(warm.first.as_secs_f64() * 1e3);
        identical += u32::from(warm.text == cold.text);
    }
    let cold: Vec<_> = before.iter().map(|answer| answer.first.as_secs_f64() * 1e3).collect();
    let share = f64::from(identical) / f64::from(u32::try_from(prompts.len())?);
    Ok(vec![
        Line::plain("restart_ttft_cold", median(&cold), "ms"),
        Line::plain("restart_ttft_after", median(&first), "ms"),
        Line::speedup("restart_speedup", median(&ratios), SPEEDUP_MIN),
        Line::at_least("restart_identical_texts", share, 1.0, "share"),
        Line::plain("restart_ready", ready.as_secs_f64(), "s"),
    ])
}

/// A daemon with 10,000 blocks on disk, killed: time until it serves one of them.
async fn full_daemon(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let mut daemon = stand::Daemon::start(dir.path(), "1GiB", "2GiB").await?;
    let session = blocks::session(&daemon.socket).await?;
    let space = blocks::space(&session, FULL_BLOCK_BYTES).await?;
    let payload = vec![7; usize::try_from(FULL_BLOCK_BYTES)?];
    for chain in 0..u32::try_from(FULL_BLOCKS / FILL_BLOCKS)? {
        blocks::put(&session, &space, &blocks::keys(chain, FILL_BLOCKS), &payload).await?;
    }
    let mut client: Admin = admin(&daemon.grpc).await?;
    let flushed = client.flush(FlushRequest {}).await?.into_inner();
    ensure!(flushed.failed == 0, "{} blocks could not be made durable", flushed.failed);
    drop(session);
    daemon.kill()?;

    let began = Instant::now();
    daemon.spawn_again()?;
    let session = loop {
        match blocks::session(&daemon.socket).await {
            Ok(session) => break session,
            Err(error) => ensure!(began.elapsed() < TIME_MAX, "the daemon does not come back: {error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let space = blocks::space(&session, FULL_BLOCK_BYTES).await?;
    let last = blocks::keys(u32::try_from(FULL_BLOCKS / FILL_BLOCKS)? - 1, FILL_BLOCKS);
    blocks::read(&session, &space, &last, |block| Ok(block.verify()?)).await?;
    let served = began.elapsed().as_secs_f64();
    Ok(vec![Line::at_most("restart_serves_10000_blocks", served, SERVE_SECONDS_MAX, "s")])
}

/// kill -9 of the daemon alone with a full pool of 80 % of the memory that was
/// available, mapped by its workers and by a client: time until the next
/// request is answered, and until one comes from the cache again.
async fn daemon_alone(options: &Options) -> anyhow::Result<Vec<Line>> {
    let model = super::model_path(options)?;
    let home = stand::temp_dir(options)?;
    let client = ask::client()?;
    let pool = (memory_available()? / 10 * 8) >> 20;
    let node = stand::Node::start(
        home.path(),
        &model,
        &["--pinned-bytes", &format!("{pool}MiB"), "--nvme-bytes", POOL_NVME_BYTES],
    )?;
    let url = node.running.url.clone();
    let tokens = prompt::tokens(&model, prompt::fresh_seed() + PROMPTS, PROMPT_TOKENS)?;
    let before = ask::ask(&client, &url, &tokens, ANSWER_TOKENS).await?;
    let session = fill(&node.running.socket, pool << 20).await?;
    let mut info: Admin = admin(&node.running.grpc).await?;
    let tiers = info.info(InfoRequest {}).await?.into_inner().tiers;
    let populated =
        tiers.iter().find(|tier| tier.tier() == Tier::Pinned).map_or(0, |tier| tier.populated_bytes);
    tokio::time::sleep(PAUSE).await;
    signal(node.pid_of("terraced")?, Ask::Die);
    let killed = Instant::now();
    drop(session);
    let answered = until_answered(&client, &url, &tokens, &before.text, 0).await?;
    let cached = until_answered(&client, &url, &tokens, &before.text, 900).await?;
    Ok(vec![
        Line::plain("restart_pool", f64::from(u32::try_from(pool)?) / 1024.0, "GiB"),
        Line::plain("restart_pool_populated", f64::from(u32::try_from(populated >> 20)?) / 1024.0, "GiB"),
        Line::plain("restart_daemon_next_answer", (answered - killed).as_secs_f64(), "s"),
        Line::plain("restart_daemon_cached_again", (cached - killed).as_secs_f64(), "s"),
    ])
}

/// Fills a pool with blocks. The session keeps its mappings.
async fn fill(socket: &Path, pool_bytes: u64) -> anyhow::Result<Session> {
    let session = blocks::session(socket).await?;
    let space = blocks::space(&session, POOL_BLOCK_BYTES).await?;
    let payload = vec![7; usize::try_from(POOL_BLOCK_BYTES)?];
    let leases = pool_bytes / (POOL_BLOCK_BYTES * u64::try_from(POOL_FILL_BLOCKS)?);
    for chain in 0..u32::try_from(leases)? {
        let keys = blocks::keys(chain, POOL_FILL_BLOCKS);
        // A pool that is full for the moment is what we want.
        if let Err(error) = blocks::put(&session, &space, &keys, &payload).await {
            eprintln!("filling ended at {chain} of {leases} chunks: {error:#}");
            break;
        }
    }
    Ok(session)
}

/// When the same prompt is answered with the same text and at least this much from the cache.
async fn until_answered(
    client: &reqwest::Client,
    url: &str,
    tokens: &[u32],
    text: &str,
    cached_min: u64,
) -> anyhow::Result<Instant> {
    let began = Instant::now();
    loop {
        match ask::ask(client, url, tokens, ANSWER_TOKENS).await {
            Ok(answer) => {
                ensure!(answer.text == text, "the answer changed: {text:?} became {:?}", answer.text);
                if answer.cached_tokens >= cached_min {
                    return Ok(Instant::now());
                }
            }
            Err(error) if began.elapsed() > TIME_MAX => return Err(error),
            Err(_) => {}
        }
        ensure!(began.elapsed() < TIME_MAX, "the cache did not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn memory_available() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 =
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("no MemAvailable")?;
    Ok(kib << 10)
}
