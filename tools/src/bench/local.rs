//! `bench local`: whole blocks between a client of this machine and its daemon.
//!
//! One client in this process against bare loops, in turn, round by round; then
//! one to four client processes; then requests that arrive at a fixed rate, so
//! that a slow answer does not hold back the next question.

mod bare;
pub(super) mod client;
mod grpc;

use std::num::NonZero;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use terrace_client::{BlockId, Durability, Outcome, SealOutcome, Session, Space, Verify, WriteOptions};

use super::{Line, Options, blocks, median, settle, stand};
use bare::{Frames, Loop};
use client::{Job, Op};

pub(super) use grpc::serve_bare;

/// Payloads: of a small block, of a small model's, and of larger ones.
const SIZES: [u64; 5] = [64 << 10, blocks::MODEL_BLOCK_BYTES, 1 << 20, 2 << 20, 8 << 20];
/// Bytes of a round: more than the last-level cache of most processors.
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
/// Chains of the blocks that fill the pool at first.
const WARM_CHAIN: u32 = 1 << 20;
const CLIENTS: [u32; 3] = [1, 2, 4];
const CLIENT_TIME: Duration = Duration::from_millis(500);
/// Part of what one client did without a pause at which requests arrive.
const LOAD: f64 = 0.5;
/// Work before a measurement that follows a pause.
const BUSY_BEFORE: Duration = Duration::from_millis(50);
/// Filling alone is measured in fewer.
const FILL_ROUNDS: u32 = 3;
/// The pool's, all of which is written once before anything is measured: a host finds a guest's memory at its first use.
const POOL_BYTES: u64 = 2 << 30;
const WAIT: Duration = Duration::from_secs(10);
/// What is read stays that long, before everything else.
const RETAINED: Duration = Duration::from_secs(120);
const RETAIN_FIRST: u8 = 100;

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let sizes = if options.block_bytes.is_empty() { &SIZES[..] } else { &options.block_bytes[..] };
    for bytes in sizes {
        let measurable = (1..=BATCH_BYTES).contains(bytes);
        ensure!(
            measurable,
            "--block-bytes {bytes}: give 1 to {BATCH_BYTES} bytes, which is what is leased at once"
        );
    }
    let dir = stand::temp_dir(options)?;
    let daemon = stand::Daemon::start(dir.path(), &POOL_BYTES.to_string(), "512MiB").await?;
    daemon.measured().await?;
    let clients = Clients::connect(&daemon.socket).await?;
    warm(&clients.alone).await?;
    let mut lines = Vec::new();
    let mut frames = Frames::new(usize::try_from(POOL_BYTES)?).context("no memory as long as the pool")?;
    for &bytes in sizes {
        let known = lines.len();
        let mut set = Set::new(bytes)?;
        let (users, metrics) = (clients.users(bytes).await?, &daemon.metrics);
        lines.extend(set.puts_against_bare(&users, metrics, &mut frames).await?);
        lines.extend(set.gets_against_bare(&users, metrics, &frames).await?);
        lines.extend(set.sustained(&users).await?);
        lines[known..].iter().for_each(Line::say);
        let known = lines.len();
        settle::settled(&daemon.metrics).await?;
        // Beside the sessions here, which have to hear when chunks are dropped that they have mapped.
        let (socket, bytes, read, count) = (daemon.socket.clone(), set.bytes, set.read, set.count());
        lines.extend(tokio::task::spawn_blocking(move || processes(socket, bytes, read, count)).await??);
        lines[known..].iter().for_each(Line::say);
    }
    lines.extend(grpc::run(&daemon).await?);
    Ok(lines)
}

/// The sessions here.
struct Clients {
    /// Copies by the thread that calls.
    alone: Session,
    /// Copies as clients do by themselves.
    usual: Session,
    /// Of a tenant whose seals are copied; copies by the thread that calls.
    isolated: Session,
}

/// The same, with a space of one size.
struct Users<'a> {
    alone: User<'a>,
    usual: User<'a>,
    isolated: User<'a>,
}

struct User<'a> {
    session: &'a Session,
    space: Space,
}

impl Clients {
    async fn connect(socket: &Path) -> anyhow::Result<Self> {
        const ONE: Option<NonZero<usize>> = NonZero::new(1);
        Ok(Self {
            alone: blocks::session_of(socket, stand::ADOPTING, ONE).await?,
            usual: blocks::session_of(socket, stand::ADOPTING, None).await?,
            isolated: blocks::session_of(socket, stand::ISOLATED, ONE).await?,
        })
    }

    async fn users(&self, block_bytes: u64) -> anyhow::Result<Users<'_>> {
        Ok(Users {
            alone: User::of(&self.alone, block_bytes).await?,
            usual: User::of(&self.usual, block_bytes).await?,
            isolated: User::of(&self.isolated, block_bytes).await?,
        })
    }
}

impl<'a> User<'a> {
    async fn of(session: &'a Session, block_bytes: u64) -> anyhow::Result<Self> {
        Ok(Self { session, space: blocks::space(session, block_bytes).await? })
    }
}

/// Bytes that begin with a page, as the memory of engines does.
struct Pages {
    memory: Vec<u8>,
    start: usize,
}

impl Pages {
    fn of(length: usize, byte: impl Fn(usize) -> u8) -> Self {
        const PAGE: usize = 4096;
        let mut memory = vec![0; length + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        memory[start..start + length].iter_mut().enumerate().for_each(|(at, place)| *place = byte(at));
        memory.truncate(start + length);
        Self { memory, start }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

const CHECKED: [Loop; 3] = [bare::checked, bare::checked_streaming, bare::checked_ahead];
const COPIED: [Loop; 2] = [bare::streaming, bare::streaming_ahead];

/// Rates of the loops that do the same in other ways.
struct Bare {
    loops: Vec<(Loop, Vec<f64>)>,
}

impl Bare {
    fn of(loops: &[Loop]) -> Self {
        Self { loops: loops.iter().map(|each| (*each, Vec::new())).collect() }
    }

    /// Each once, at its rate by `measure`.
    fn round(&mut self, mut measure: impl FnMut(Loop) -> f64) {
        for (each, rates) in &mut self.loops {
            rates.push(measure(*each));
        }
    }

    /// Of the quickest.
    fn best(&self) -> f64 {
        self.loops.iter().map(|(_, rates)| median(rates)).fold(0.0, f64::max)
    }
}

/// Blocks of one size, and buffers for them.
struct Set {
    bytes: u64,
    block: usize,
    batch: usize,
    source: Pages,
    /// The same bytes, to be compared with: a source that was looked at just now would be quicker to copy than blocks.
    written: Pages,
    target: Pages,
    /// What lies in the target before each go.
    blank: Pages,
    keys: Vec<[u8; 16]>,
    /// Of this process; no client process uses it.
    chain: u32,
    /// The chain that is read.
    read: u32,
    /// Of the quickest bare loop beside puts.
    put_limit: f64,
}

impl Set {
    fn new(bytes: u64) -> anyhow::Result<Self> {
        let (block, count) = (usize::try_from(bytes)?, usize::try_from(SET_BYTES / bytes)?);
        // Not one repeated byte: a block must not pass for another.
        let byte = |at: usize| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[3];
        let (source, written) = (Pages::of(block * count, byte), Pages::of(block * count, byte));
        let [target, blank] = [(); 2].map(|()| Pages::of(block * count, |_| 1));
        let batch = usize::try_from(BATCH_BYTES / bytes)?;
        let keys = Vec::new();
        Ok(Self {
            bytes,
            block,
            batch,
            source,
            written,
            target,
            blank,
            keys,
            chain: 0,
            read: 0,
            put_limit: 0.0,
        })
    }

    fn count(&self) -> usize {
        self.source.len() / self.block
    }

    fn gib(&self) -> f64 {
        self.source.len() as f64 / f64::from(1 << 30)
    }

    /// Leaves nothing of sources, blocks and targets in a cache that is no larger than these: a target that lies there is
    /// in the way of copies past it, and after a copy through it more than after others.
    fn cool(&mut self) {
        const LINE: usize = 64;
        let seen = self.written.iter().step_by(LINE).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        std::hint::black_box(seen);
        bare::streaming(&self.blank, &mut self.target, &self.blank);
    }

    /// Rate of a loop from the client's memory into frames.
    fn bare_put(&mut self, frames: &mut Frames, each: Loop) -> f64 {
        self.cool();
        let sources: Vec<&[u8]> = self.source.chunks(self.block).collect();
        let mut targets = frames.oldest(self.block, sources.len());
        self.gib() / seconds(&sources, &mut targets, each)
    }

    /// Rate of a loop into the client's memory: from frames, or from blocks without a gap.
    fn bare_get(&mut self, frames: Option<&Frames>, each: Loop) -> f64 {
        self.cool();
        let gib = self.gib();
        let mut targets: Vec<&mut [u8]> = self.target.chunks_mut(self.block).collect();
        let sources = frames
            .map_or_else(|| self.source.chunks(self.block).collect(), |frames| frames.first(self.block));
        gib / seconds(&sources[..targets.len()], &mut targets, each)
    }

    /// Rate of a put as users put.
    async fn put(&self, user: &User<'_>) -> anyhow::Result<f64> {
        let User { session, space } = user;
        let began = Instant::now();
        let payloads: Vec<&[u8]> = self.source.chunks(self.block).collect();
        let sealed = session.write(space, &self.keys, None, &payloads, Durability::Readable).await?;
        let rate = self.gib() / began.elapsed().as_secs_f64();
        let good = sealed.iter().all(|outcome| *outcome == SealOutcome::Sealed);
        ensure!(good, "not every block was sealed: {sealed:?}");
        Ok(rate)
    }

    /// Rate of filling alone.
    async fn fill(&self, user: &User<'_>) -> anyhow::Result<f64> {
        let User { session, space } = user;
        let (mut filling, mut parent) = (Duration::ZERO, None);
        for (keys, payloads) in self.keys.chunks(self.batch).zip(self.source.chunks(self.batch * self.block))
        {
            filling += put_batch(session, space, keys, parent, payloads.chunks(self.block)).await?;
            parent = keys.last();
        }
        Ok(self.gib() / filling.as_secs_f64())
    }

    async fn get(&mut self, user: &User<'_>, verify: Verify) -> anyhow::Result<f64> {
        let User { session, space } = user;
        let began = Instant::now();
        let targets = self.target.chunks_mut(self.batch * self.block);
        for (keys, target) in self.keys.chunks(self.batch).zip(targets) {
            blocks::get(session, space, keys, target, verify).await?;
        }
        let rate = self.gib() / began.elapsed().as_secs_f64();
        ensure!(*self.target == *self.written, "what was got is not what was written");
        Ok(rate)
    }

    fn name(&self, what: &str) -> String {
        format!("local_{}_{what}", self.bytes)
    }

    /// The next set of blocks that nobody has written.
    fn renew(&mut self) {
        self.chain += 1;
        self.keys = blocks::keys(self.chain, self.count());
    }

    /// Until the daemon has nothing left to do of what was put before. A processor that was idle meanwhile copies a fifth
    /// slower for tens of milliseconds: this one is as busy before a put as it is before a bare loop.
    async fn settle(&mut self, metrics: &str) -> anyhow::Result<()> {
        settle::settled(metrics).await?;
        let began = Instant::now();
        while began.elapsed() < BUSY_BEFORE {
            self.cool();
        }
        Ok(())
    }

    /// Bursts: each begins when the daemon has nothing left to do of the one before.
    async fn puts_against_bare(
        &mut self,
        users: &Users<'_>,
        metrics: &str,
        frames: &mut Frames,
    ) -> anyhow::Result<Vec<Line>> {
        let (mut puts, mut puts_alone, mut puts_isolated) = (Vec::new(), Vec::new(), Vec::new());
        let (mut fills, mut bare) = (Vec::new(), Bare::of(&CHECKED));
        // As the pool's were by the clients before.
        frames.write_all();
        for round in 0..ROUNDS {
            self.renew();
            self.settle(metrics).await?;
            puts_isolated.push(self.put(&users.isolated).await?);
            self.renew();
            self.settle(metrics).await?;
            puts.push(self.put(&users.usual).await?);
            self.renew();
            if round < FILL_ROUNDS {
                self.settle(metrics).await?;
                fills.push(self.fill(&users.alone).await?);
                self.renew();
            }
            bare.round(|each| self.bare_put(frames, each));
            self.settle(metrics).await?;
            puts_alone.push(self.put(&users.alone).await?);
        }
        // What is put from now on would push it out, for nothing else of it was ever used twice.
        let User { session, space } = &users.alone;
        let kept = session.retain(space, &self.keys, RETAINED, RETAIN_FIRST).await?;
        ensure!(kept as usize == self.count(), "only {kept} of {} blocks are kept for reading", self.count());
        (self.read, self.put_limit) = (self.chain, bare.best());
        let compared = |what: &str, values: &[f64]| {
            Line::compared(&self.name(what), median(values), self.put_limit, "GiB/s")
        };
        Ok(vec![
            Line::part_of(&self.name("put"), median(&puts), self.put_limit, PUT_BAR, "GiB/s"),
            compared("put_one_thread", &puts_alone),
            compared("put_isolated", &puts_isolated),
            compared("put_fill", &fills),
        ])
    }

    async fn gets_against_bare(
        &mut self,
        users: &Users<'_>,
        metrics: &str,
        frames: &Frames,
    ) -> anyhow::Result<Vec<Line>> {
        self.settle(metrics).await?;
        let (mut verified, mut verified_alone) = (Vec::new(), Vec::new());
        let (mut copied, mut copied_alone) = (Vec::new(), Vec::new());
        let (mut bare_verified, mut bare_copied) = (Bare::of(&CHECKED), Bare::of(&COPIED));
        let (mut ranges, mut memcpy) = (Bare::of(&COPIED), Vec::new());
        for _ in 0..ROUNDS {
            self.cool();
            verified.push(self.get(&users.usual, Verify::Checksum).await?);
            self.cool();
            verified_alone.push(self.get(&users.alone, Verify::Checksum).await?);
            bare_verified.round(|each| self.bare_get(Some(frames), each));
            self.cool();
            copied.push(self.get(&users.usual, Verify::Fence).await?);
            self.cool();
            copied_alone.push(self.get(&users.alone, Verify::Fence).await?);
            bare_copied.round(|each| self.bare_get(Some(frames), each));
            ranges.round(|each| self.bare_get(None, each));
            memcpy.push(self.bare_get(None, |source, target, _| target.copy_from_slice(source)));
        }
        let part = |what: &str, values: &[f64], bare: &Bare, bar| {
            Line::part_of(&self.name(what), median(values), bare.best(), bar, "GiB/s")
        };
        let compared = |what: &str, values: &[f64], bare: &Bare| {
            Line::compared(&self.name(what), median(values), bare.best(), "GiB/s")
        };
        Ok(vec![
            part("get_verified", &verified, &bare_verified, VERIFIED_BAR),
            part("get", &copied, &bare_copied, COPIED_BAR),
            compared("get_verified_one_thread", &verified_alone, &bare_verified),
            compared("get_one_thread", &copied_alone, &bare_copied),
            Line::plain(&self.name("copy_without_gaps"), ranges.best(), "GiB/s"),
            Line::plain(&self.name("memcpy"), median(&memcpy), "GiB/s"),
        ])
    }

    /// Puts without a pause: of a pool that is full, each of which has to make room for the next.
    async fn sustained(&mut self, users: &Users<'_>) -> anyhow::Result<Vec<Line>> {
        let mut lines = Vec::new();
        let all = [(&users.usual, "put_sustained"), (&users.isolated, "put_isolated_sustained")];
        for (user, what) in all {
            let mut rates = Vec::new();
            for _ in 0..ROUNDS {
                self.renew();
                rates.push(self.put(user).await?);
            }
            lines.push(Line::compared(&self.name(what), median(&rates), self.put_limit, "GiB/s"));
        }
        Ok(lines)
    }
}

/// Of one go through all blocks.
fn seconds(sources: &[&[u8]], targets: &mut [&mut [u8]], each: Loop) -> f64 {
    let nexts = sources[1..].iter().chain(sources.first());
    let began = Instant::now();
    for ((source, target), next) in sources.iter().zip(&mut *targets).zip(nexts) {
        each(source, target, next);
    }
    let seconds = began.elapsed().as_secs_f64();
    std::hint::black_box(targets);
    seconds
}

/// Fills the pool once.
async fn warm(session: &Session) -> anyhow::Result<()> {
    let bytes = 1 << 20;
    let user = User::of(session, bytes).await?;
    let mut set = Set::new(bytes)?;
    // Of no size that is measured.
    set.chain = WARM_CHAIN;
    for _ in 0..=POOL_BYTES / SET_BYTES {
        set.renew();
        set.put(&user).await?;
    }
    Ok(())
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

/// Rates of one to four processes, and latencies of one that asks at a fixed rate.
fn processes(socket: PathBuf, block_bytes: u64, chain: u32, count: usize) -> anyhow::Result<Vec<Line>> {
    let job = Job {
        socket,
        block_bytes,
        op: Op::Get,
        chain,
        count,
        batch: usize::try_from(CLIENT_BLOCKS.min(BATCH_BYTES / block_bytes))?,
        per_second: None,
        seconds: CLIENT_TIME.as_secs_f64(),
    };
    let mut lines = Vec::new();
    let measure = |op: Op, lines: &mut Vec<Line>| -> anyhow::Result<()> {
        for clients in CLIENTS {
            let report = client::together(&Job { op, ..job.clone() }, clients)?;
            let name = format!("local_{}_{}_clients_{clients}", block_bytes, op.label());
            lines.extend(report.lines(&name, op, block_bytes)?);
        }
        Ok(())
    };
    for op in [Op::GetVerified, Op::LeaseVerified, Op::Get, Op::Exists, Op::Lease] {
        measure(op, &mut lines)?;
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
    // Last, for what is put pushes out what is read.
    measure(Op::Put, &mut lines)?;
    Ok(lines)
}

/// The identity that bare loops sum with; any does.
const BARE_BLOCK: BlockId = BlockId::from_bytes([7; 16]);
