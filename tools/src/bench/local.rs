//! `bench local`: whole blocks between a client of this machine and its daemon.
//!
//! One client in this process against bare loops, in turn, round by round; then
//! one to four client processes; then requests that arrive at a fixed rate, so
//! that a slow answer does not hold back the next question.

mod bare;
pub(super) mod client;
mod grpc;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use terrace_client::{BlockId, Durability, Outcome, Session, Space, Verify, WriteOptions};

use super::{Line, Options, blocks, median, stand};
use client::{Job, Op};

pub(super) use grpc::serve_bare;

/// Payloads: of a small block, of a small model's, and of larger ones.
const SIZES: [u64; 5] = [64 << 10, blocks::MODEL_BLOCK_BYTES, 1 << 20, 2 << 20, 8 << 20];
/// Bytes of a round: more than the last-level cache.
const SET_BYTES: u64 = 64 << 20;
/// Bytes leased at once, as the client does by itself.
const BATCH_BYTES: u64 = 32 << 20;
/// Blocks of one request of a client process, at most.
const CLIENT_BLOCKS: u64 = 16;
/// Odd, so that a median is a round.
const ROUNDS: u32 = 9;
/// What a client gets of what a bare loop does.
const VERIFIED_BAR: f64 = 0.9;
const COPIED_BAR: f64 = 0.95;
const PUT_BAR: f64 = 0.85;
const CLIENTS: [u32; 3] = [1, 2, 4];
const CLIENT_TIME: Duration = Duration::from_millis(500);
/// Part of what one client did without a pause at which requests arrive.
const LOAD: f64 = 0.5;
/// Blocks that were sealed just now are being copied to the device; reads are measured after that.
const SETTLE: Duration = Duration::from_secs(2);
const WAIT: Duration = Duration::from_secs(10);
/// What is read stays that long, before everything else.
const RETAINED: Duration = Duration::from_secs(120);
const RETAIN_FIRST: u8 = 100;

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let daemon = stand::Daemon::start(dir.path(), "2GiB", "512MiB").await?;
    let session = blocks::session(&daemon.socket).await?;
    let isolated = blocks::session_of(&daemon.socket, stand::ISOLATED).await?;
    let mut lines = Vec::new();
    for bytes in SIZES {
        let known = lines.len();
        let space = blocks::space(&session, bytes).await?;
        let mut set = Set::new(bytes)?;
        let isolated_space = blocks::space(&isolated, bytes).await?;
        lines.extend(set.against_bare((&session, &space), (&isolated, &isolated_space)).await?);
        lines[known..].iter().for_each(Line::say);
        let known = lines.len();
        // Beside the sessions here, which have to hear when chunks are dropped that they have mapped.
        let (socket, bytes, count) = (daemon.socket.clone(), set.bytes, set.count());
        lines.extend(tokio::task::spawn_blocking(move || processes(socket, bytes, count)).await??);
        lines[known..].iter().for_each(Line::say);
    }
    lines.extend(grpc::run(&daemon).await?);
    Ok(lines)
}

/// Blocks of one size, and buffers for them.
struct Set {
    bytes: u64,
    block: usize,
    batch: usize,
    source: Vec<u8>,
    target: Vec<u8>,
    keys: Vec<[u8; 16]>,
}

impl Set {
    fn new(bytes: u64) -> anyhow::Result<Self> {
        let (block, count) = (usize::try_from(bytes)?, usize::try_from(SET_BYTES / bytes)?);
        // Not one repeated byte: a block must not pass for another.
        let source = (0..block * count).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
        let batch = usize::try_from(BATCH_BYTES / bytes)?;
        Ok(Self { bytes, block, batch, source, target: vec![1; block * count], keys: Vec::new() })
    }

    fn count(&self) -> usize {
        self.source.len() / self.block
    }

    fn gib(&self) -> f64 {
        self.source.len() as f64 / f64::from(1 << 30)
    }

    /// GiB/s of one go through all blocks.
    fn rate(&mut self, mut each: impl FnMut(&[u8], &mut [u8])) -> f64 {
        let began = Instant::now();
        for (source, target) in self.source.chunks(self.block).zip(self.target.chunks_mut(self.block)) {
            each(source, target);
        }
        let seconds = began.elapsed().as_secs_f64();
        std::hint::black_box(&mut self.target);
        self.gib() / seconds
    }

    /// Rate of the whole, and of filling alone.
    async fn put(&self, session: &Session, space: &Space) -> anyhow::Result<(f64, f64)> {
        let (began, mut filling) = (Instant::now(), Duration::ZERO);
        let mut parent = None;
        for (keys, payloads) in self.keys.chunks(self.batch).zip(self.source.chunks(self.batch * self.block))
        {
            filling += put_batch(session, space, keys, parent, payloads.chunks(self.block)).await?;
            parent = keys.last();
        }
        Ok((self.gib() / began.elapsed().as_secs_f64(), self.gib() / filling.as_secs_f64()))
    }

    async fn get(&mut self, session: &Session, space: &Space, verify: Verify) -> anyhow::Result<f64> {
        let began = Instant::now();
        let targets = self.target.chunks_mut(self.batch * self.block);
        for (keys, target) in self.keys.chunks(self.batch).zip(targets) {
            blocks::get(session, space, keys, target, verify).await?;
        }
        let rate = self.gib() / began.elapsed().as_secs_f64();
        ensure!(self.target == self.source, "what was got is not what was written");
        Ok(rate)
    }

    /// `isolated` is a tenant whose seals are copied.
    async fn against_bare(
        &mut self,
        (session, space): (&Session, &Space),
        isolated: (&Session, &Space),
    ) -> anyhow::Result<Vec<Line>> {
        let (mut puts, mut fills, mut put_bare) = (Vec::new(), Vec::new(), Vec::new());
        let mut puts_isolated = Vec::new();
        for round in 0..ROUNDS {
            self.keys = blocks::keys(chain_number(round), self.count());
            let (put, fill) = self.put(session, space).await?;
            puts.push(put);
            fills.push(fill);
            puts_isolated.push(self.put(isolated.0, isolated.1).await?.0);
            put_bare.push(self.rate(bare::checked).max(self.rate(bare::checked_streaming)));
        }
        // What is put from now on would push it out, for nothing else of it was ever used twice.
        let kept = session.retain(space, &self.keys, RETAINED, RETAIN_FIRST).await?;
        ensure!(kept as usize == self.count(), "only {kept} of {} blocks are kept for reading", self.count());
        tokio::time::sleep(SETTLE).await;
        let (mut verified, mut copied) = (Vec::new(), Vec::new());
        let (mut bare_verified, mut bare_copied, mut memcpy) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            self.target.fill(1);
            verified.push(self.get(session, space, Verify::Checksum).await?);
            bare_verified.push(self.rate(bare::checked).max(self.rate(bare::checked_streaming)));
            self.target.fill(1);
            copied.push(self.get(session, space, Verify::Fence).await?);
            bare_copied.push(self.rate(bare::streaming));
            memcpy.push(self.rate(|source, target| target.copy_from_slice(source)));
        }
        let name = |what: &str| format!("local_{}_{what}", self.bytes);
        let part = |what: &str, values: &[f64], bare: &[f64], bar| {
            Line::part_of(&name(what), median(values), median(bare), bar, "GiB/s")
        };
        Ok(vec![
            part("get_verified", &verified, &bare_verified, VERIFIED_BAR),
            part("get", &copied, &bare_copied, COPIED_BAR),
            part("put", &puts, &put_bare, PUT_BAR),
            Line::compared(&name("put_isolated"), median(&puts_isolated), median(&put_bare), "GiB/s"),
            Line::compared(&name("put_fill"), median(&fills), median(&put_bare), "GiB/s"),
            Line::plain(&name("memcpy"), median(&memcpy), "GiB/s"),
        ])
    }
}

/// Writes and seals blocks that nobody has written, the first of them the child of `parent`; answers how long filling
/// them took.
pub(super) async fn put_batch<'a>(
    session: &Session,
    space: &Space,
    keys: &[[u8; 16]],
    parent: Option<&[u8; 16]>,
    payloads: impl Iterator<Item = &'a [u8]>,
) -> anyhow::Result<Duration> {
    let options = WriteOptions { ttl: None, wait: WAIT };
    let mut lease = session.lease_write(space, keys, parent.map(|key| &key[..]), options).await?;
    let mut sums = Vec::with_capacity(keys.len());
    let began = Instant::now();
    for ((index, grant), payload) in (0u32..).zip(&mut lease.grants).zip(payloads) {
        let Outcome::Granted(block) = grant else {
            anyhow::bail!("block {index} of {} was not granted for writing: {grant:?}", keys.len());
        };
        sums.push((index, block.write_checked(payload)?));
    }
    let filled = began.elapsed();
    lease.seal_with(&sums, Durability::Readable).await?;
    lease.release().await?;
    Ok(filled)
}

/// Chains of this process, which no client process uses.
fn chain_number(round: u32) -> u32 {
    1 + round
}

/// Rates of one to four processes, and latencies of one that asks at a fixed rate.
fn processes(socket: PathBuf, block_bytes: u64, count: usize) -> anyhow::Result<Vec<Line>> {
    let job = Job {
        socket,
        block_bytes,
        op: Op::Get,
        chain: chain_number(ROUNDS - 1),
        count,
        batch: usize::try_from(CLIENT_BLOCKS.min(BATCH_BYTES / block_bytes))?,
        per_second: None,
        seconds: CLIENT_TIME.as_secs_f64(),
    };
    let mut lines = Vec::new();
    for op in [Op::GetVerified, Op::LeaseVerified, Op::Get, Op::Put, Op::Exists, Op::Lease] {
        for clients in CLIENTS {
            let report = client::together(&Job { op, ..job.clone() }, clients)?;
            let name = format!("local_{}_{}_clients_{clients}", block_bytes, op.label());
            lines.extend(report.lines(&name, op, block_bytes)?);
        }
    }
    let whole = Job { op: Op::Readable, batch: count, ..job.clone() };
    let name = format!("local_{}_readable", block_bytes);
    lines.extend(client::together(&whole, 1)?.lines(&name, Op::Readable, block_bytes)?);
    // The arrival of single blocks, at a rate that the same client can serve.
    for op in [Op::GetVerified, Op::Lease] {
        let one = Job { op, batch: 1, ..job.clone() };
        let most = client::together(&one, 1)?.per_second();
        let report = client::together(&Job { per_second: Some(most * LOAD), ..one }, 1)?;
        let quantiles = [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)];
        lines.extend(report.latencies(&format!("local_{}_{}_open", block_bytes, op.label()), &quantiles)?);
    }
    Ok(lines)
}

/// The identity that bare loops sum with; any does.
const BARE_BLOCK: BlockId = BlockId::from_bytes([7; 16]);
