//! `bench catalog`: how long a start takes with a million blocks, what a commit
//! costs, and how fast a lost catalog is rebuilt from the header pages.
//!
//! The million entries are written by the catalog's own writer and name frames
//! of a real device; what they name is not read, because a start does not. The
//! scan reads blocks that were written for it, and is compared with a bare loop
//! over the same pages in the same run.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use terrace_core::{
    BlockHeader, BlockId, ByteCount, Checksum, ChunkId, DeviceId, DiskFrame, Done, Fault, FrameRef, IoClass,
    MIB, OpId, SpaceId, TenantId, UseStats, Via, checksum, tenant_id,
};
use terrace_media::inspect::OfflineDevice;
use terrace_media::{
    Access, Backend, Carve, DeviceConfig, Hooks, Media, MediaConfig, MediaOp, OpenReport, SpaceRecord,
    strided_reads,
};
use terrace_proto::v1::InfoRequest;

use super::{Line, Options, blocks, median, stand};

/// Blocks of the start.
const BLOCKS: u64 = 1_000_000;
/// Their payload: the least, so that the device is small.
const BLOCK_BYTES: u64 = 4096;
/// Size of their device.
const DEVICE_BYTES: &str = "7936MiB";
const CHUNK_BYTES: u64 = 64 * MIB;
const PAGE: u64 = 4096;
/// Puts in one commit, as many as the core puts into one.
const COMMIT: u64 = 1024;
/// Single commits that wait together.
const COMMITS_WAITING: u64 = 4096;
/// Longest start, in seconds.
const OPEN_SECONDS_MAX: f64 = 2.0;
/// Blocks of the scan, and their payload.
const SCAN_SLOTS: u32 = 32;
const SCAN_BLOCK_BYTES: u64 = 61_440;
const SCAN_FRAME_BYTES: u64 = SCAN_BLOCK_BYTES + PAGE;
/// Writes in flight while they are written.
const WRITES: u64 = 16;
/// Reads in flight of the bare loop; the best counts.
const DEPTHS: [u32; 3] = [32, 64, 128];
/// Least share of the bare loop's rate.
const SCAN_SHARE_MIN: f64 = 0.5;
const ROUNDS: usize = 3;
const TIME_MAX: Duration = Duration::from_secs(120);

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let mut lines = starts(options).await?;
    lines.extend(scans(options)?);
    Ok(lines)
}

/// Media without a core: operations are answered into a channel.
struct Store {
    media: Media,
    answers: Receiver<(OpId, Result<Done, Fault>)>,
    op_last: u64,
}

impl Store {
    fn open(dir: &Path, node: [u8; 16], slots: u32) -> anyhow::Result<(Self, OpenReport)> {
        let (sender, answers) = channel();
        let config = MediaConfig {
            data_dir: dir.to_owned(),
            node,
            chunk_bytes: ByteCount::new(CHUNK_BYTES),
            devices: vec![DeviceConfig { path: dir.join("nvme0.dat"), slots }],
            backend: Backend::Auto,
            bytes_in_flight_max: ByteCount::new(16 * MIB),
            checkers: 2,
            hooks: Hooks::default(),
        };
        let complete = Box::new(move |op, outcome| drop(sender.send((op, outcome))));
        let (media, report) = Media::open(config, complete)?;
        Ok((Self { media, answers, op_last: 0 }, report))
    }

    fn start(&mut self, make: impl FnOnce(OpId) -> MediaOp) {
        self.op_last += 1;
        self.media.start(make(OpId::new(self.op_last)));
    }

    fn answered(&self) -> anyhow::Result<()> {
        let (op, outcome) = self.answers.recv_timeout(TIME_MAX).context("media does not answer")?;
        outcome.map(drop).with_context(|| format!("operation {op} failed"))
    }

    fn carve(&mut self, carve: Carve) -> anyhow::Result<()> {
        let Carve { device, slot, space, frame_bytes } = carve;
        self.start(|op| MediaOp::CarveSlot { op, device, slot, space, frame_bytes });
        self.answered()
    }
}

/// What is the same in all blocks of one space.
#[derive(Clone, Copy)]
struct Kind {
    space: SpaceId,
    tenant: TenantId,
    generation: u64,
    block_bytes: u64,
}

impl Kind {
    fn frames_per_slot(self) -> u64 {
        (CHUNK_BYTES - PAGE) / (PAGE + self.block_bytes)
    }

    /// Ids are uniform, like real ones; each block is the child of the one before it, 64 in a row.
    fn header(self, number: u64, payload: Option<&[u8]>) -> BlockHeader {
        let block = block_id(number);
        let sum = payload.map(|payload| checksum(block, self.generation, payload));
        BlockHeader {
            block,
            space: self.space,
            tenant: self.tenant,
            parent: (!number.is_multiple_of(64)).then(|| block_id(number - 1)),
            length: ByteCount::new(self.block_bytes),
            checksum: sum.unwrap_or(Checksum::new(number)),
            generation: self.generation,
            write_sequence: number + 1,
        }
    }

    fn frame(self, number: u64) -> anyhow::Result<DiskFrame> {
        let slot = u32::try_from(number / self.frames_per_slot())?;
        let index = u32::try_from(number % self.frames_per_slot())?;
        Ok(DiskFrame { device: DeviceId::new(0), slot, index })
    }

    fn put(self, number: u64) -> anyhow::Result<(DiskFrame, BlockHeader, UseStats)> {
        let stats = UseStats { depth: u32::try_from(number % 64)?, turn: 1, uses: 0 };
        Ok((self.frame(number)?, self.header(number, None), stats))
    }

    fn carve(self, slot: u32) -> Carve {
        let frame_bytes = ByteCount::new(PAGE + self.block_bytes);
        Carve { device: DeviceId::new(0), slot, space: self.space, frame_bytes }
    }
}

/// Uniform bits that are the same in every run.
fn block_id(number: u64) -> BlockId {
    let mut bytes = [0; 16];
    for (half, seed) in bytes.chunks_exact_mut(8).zip([1u64, 2]) {
        let mut bits = (number.wrapping_mul(2).wrapping_add(seed)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        half.copy_from_slice(&(bits ^ (bits >> 31)).to_le_bytes());
    }
    BlockId::from_bytes(bytes)
}

/// Real daemons on a catalog of a million blocks.
async fn starts(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let mut daemon = stand::Daemon::start(dir.path(), "256MiB", DEVICE_BYTES).await?;
    let session = blocks::session(&daemon.socket).await?;
    let space = blocks::space(&session, BLOCK_BYTES).await?;
    let space_id = space.id();
    drop(session);
    daemon.kill()?;
    let data_dir = dir.path().join("data");
    let mut lines = fill(&data_dir, space_id)?;
    let (mut ready, mut own, mut open, mut walk) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (opened, walked) = read_through(&data_dir)?;
        open.push(opened);
        walk.push(walked);
        let began = Instant::now();
        daemon.spawn_again()?;
        let mut admin = loop {
            match terrace_client::admin(&daemon.grpc).await {
                Ok(admin) => break admin,
                Err(error) => ensure!(began.elapsed() < TIME_MAX, "the daemon does not come back: {error:#}"),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        let info = admin.info(InfoRequest {}).await?.into_inner();
        ready.push(began.elapsed().as_secs_f64());
        own.push(Duration::from_millis(info.ready_ms).as_secs_f64());
        let restored = info.counters.get("terrace_restored_total").copied().unwrap_or(0);
        ensure!(restored == BLOCKS, "{restored} of {BLOCKS} blocks are known after the start");
        daemon.kill()?;
    }
    lines.extend([
        Line::plain("catalog_1m_open", median(&open), "s"),
        Line::plain("catalog_1m_walk", median(&walk), "s"),
        Line::plain("catalog_1m_ready", median(&own), "s"),
        Line::at_most("catalog_1m_serves", median(&ready), OPEN_SECONDS_MAX, "s"),
    ]);
    Ok(lines)
}

/// The catalog of a data directory alone: seconds to open it, and to read it through.
fn read_through(data_dir: &Path) -> anyhow::Result<(f64, f64)> {
    let (node, slots) = identity(data_dir)?;
    let began = Instant::now();
    let (store, _) = Store::open(data_dir, node, slots)?;
    let opened = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let blocks = store.media.blocks(1024, &mut |found| drop(std::hint::black_box(found)))?;
    ensure!(blocks == BLOCKS, "{blocks} of {BLOCKS} blocks are in the catalog");
    Ok((opened, began.elapsed().as_secs_f64()))
}

fn identity(data_dir: &Path) -> anyhow::Result<([u8; 16], u32)> {
    let device = OfflineDevice::open(&data_dir.join("nvme0.dat"))?;
    let facts = device.superblock.as_ref().context("the daemon left no superblock")?;
    Ok((facts.node, facts.slots))
}

/// Writes the entries, and says what commits cost.
fn fill(data_dir: &Path, space: SpaceId) -> anyhow::Result<Vec<Line>> {
    let (node, slots) = identity(data_dir)?;
    let (mut store, report) = Store::open(data_dir, node, slots)?;
    let record =
        report.spaces.iter().find(|record| record.space == space).context("the space was not kept")?;
    let (tenant, generation) = (record.tenant, record.generation);
    let kind = Kind { space, tenant, generation, block_bytes: BLOCK_BYTES };
    ensure!(kind.frames_per_slot() * u64::from(slots) >= BLOCKS, "{slots} slots are too few");
    for slot in 0..u32::try_from(BLOCKS.div_ceil(kind.frames_per_slot()))? {
        store.carve(kind.carve(slot))?;
    }
    let mut single = Vec::new();
    for number in 0..256 {
        let put = vec![kind.put(number)?];
        let began = Instant::now();
        store.start(|op| MediaOp::Commit { op, put, delete: vec![] });
        store.answered()?;
        single.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let (commits, batches) = store.media.facts().commits;
    let began = Instant::now();
    for number in 0..COMMITS_WAITING {
        let put = vec![kind.put(number)?];
        store.start(|op| MediaOp::Commit { op, put, delete: vec![] });
    }
    (0..COMMITS_WAITING).try_for_each(|_| store.answered())?;
    let grouped = float(COMMITS_WAITING) / began.elapsed().as_secs_f64();
    let (commits_after, batches_after) = store.media.facts().commits;
    let group = float(commits_after - commits) / float((batches_after - batches).max(1));
    let began = Instant::now();
    let mut next = 0;
    while next < BLOCKS {
        let end = (next + COMMIT).min(BLOCKS);
        let put = (next..end).map(|number| kind.put(number)).collect::<anyhow::Result<Vec<_>>>()?;
        store.start(|op| MediaOp::Commit { op, put, delete: vec![] });
        store.answered()?;
        next = end;
    }
    let filled = float(BLOCKS) / began.elapsed().as_secs_f64();
    store.media.close()?;
    Ok(vec![
        Line::plain("catalog_commit", median(&single), "ms"),
        Line::plain("catalog_commits_waiting", grouped, "1/s"),
        Line::plain("catalog_commits_per_batch", group, "commits"),
        Line::plain("catalog_fill", filled, "blocks/s"),
    ])
}

/// A device full of blocks whose catalog is lost, again and again.
fn scans(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let node = [7; 16];
    let tenant = tenant_id("default");
    let space = SpaceId::from_bytes([9; 16]);
    let kind = Kind { space, tenant, generation: 1, block_bytes: SCAN_BLOCK_BYTES };
    let count = kind.frames_per_slot() * u64::from(SCAN_SLOTS);
    let offsets = write_blocks(dir.path(), node, kind, count)?;
    let device = dir.path().join("nvme0.dat");
    let lose = || std::fs::remove_dir_all(dir.path().join("catalog")).context("cannot lose the catalog");
    let (mut bare, mut scanned, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut best: f64 = 0.0;
        for depth in DEPTHS {
            let took = strided_reads(&device, &offsets, depth).context("the bare loop failed")?;
            best = best.max(float(offsets.len() as u64) / took.as_secs_f64());
        }
        lose()?;
        let (store, report) = Store::open(dir.path(), node, SCAN_SLOTS)?;
        ensure!(report.scan_needed, "a lost catalog asks for no scan");
        let began = Instant::now();
        let found = store.media.scan(&mut |_| {})?;
        let rate = float(found.blocks) / began.elapsed().as_secs_f64();
        ensure!((found.blocks, found.damaged) == (count, 0), "the scan found {found:?}");
        bare.push(best);
        scanned.push(rate);
        ratios.push(rate / best);
    }
    lose()?;
    let (alone, meanwhile, reads) = serve_meanwhile(dir.path(), node, kind, count)?;
    let ratio = median(&ratios);
    Ok(vec![
        Line::plain("catalog_strided_4k_bare", median(&bare), "1/s"),
        Line {
            limit: Some(median(&bare)),
            ratio: Some(ratio),
            bar: Some(SCAN_SHARE_MIN),
            ok: ratio >= SCAN_SHARE_MIN,
            ..Line::plain("catalog_scan", median(&scanned), "1/s")
        },
        Line::plain("catalog_read_alone", alone, "ms"),
        Line::plain("catalog_read_during_scan", meanwhile, "ms"),
        Line::plain("catalog_reads_during_scan", float(reads), "reads"),
    ])
}

/// Fills a device; returns where the header pages lie.
fn write_blocks(dir: &Path, node: [u8; 16], kind: Kind, count: u64) -> anyhow::Result<Vec<u64>> {
    let (mut store, _) = Store::open(dir, node, SCAN_SLOTS)?;
    store.media.put_space(SpaceRecord {
        space: kind.space,
        tenant: kind.tenant,
        tenant_name: "default".to_owned(),
        generation: kind.generation,
        manifest: vec![1],
    })?;
    for slot in 0..SCAN_SLOTS {
        store.carve(kind.carve(slot))?;
    }
    make_chunk(&mut store)?;
    let memory = store.media.chunk(ChunkId::new(1)).context("the chunk was made")?;
    let mut payload = vec![0u8; usize::try_from(SCAN_BLOCK_BYTES)?];
    let mut offsets = Vec::with_capacity(usize::try_from(count)?);
    for first in (0..count).step_by(usize::try_from(WRITES)?) {
        let group = first..(first + WRITES).min(count);
        for number in group.clone() {
            payload[..8].copy_from_slice(&number.to_le_bytes());
            let index = u32::try_from(number % WRITES)?;
            if memory.copy_in(index, 0, &payload).is_err() {
                bail!("a payload does not fit its frame");
            }
            let (header, target) = (kind.header(number, Some(&payload)), kind.frame(number)?);
            let target_offset = offset(&store, target)?;
            offsets.push(target_offset);
            let source = FrameRef { chunk: ChunkId::new(1), index };
            let (via, class) = (Via::Direct, IoClass::Persistence);
            store.start(|op| MediaOp::Write { op, source, target, target_offset, header, via, class });
        }
        group.into_iter().try_for_each(|_| store.answered())?;
    }
    store.start(|op| MediaOp::Commit { op, put: vec![], delete: vec![] });
    store.answered()?;
    drop(memory);
    Ok(offsets)
}

fn make_chunk(store: &mut Store) -> anyhow::Result<()> {
    let (chunk, access, frames) = (ChunkId::new(1), Access::Pool, u32::try_from(WRITES)?);
    let frame_bytes = ByteCount::new(SCAN_FRAME_BYTES);
    store.start(|op| MediaOp::CreateChunk { op, chunk, access, frame_bytes, frames });
    store.answered()
}

fn offset(store: &Store, frame: DiskFrame) -> anyhow::Result<u64> {
    store.media.frame_offset(frame, ByteCount::new(SCAN_FRAME_BYTES)).context("there is no such frame")
}

/// Median milliseconds of a block's read when nothing else happens and while a scan runs, and how many
/// reads there were in that time.
fn serve_meanwhile(dir: &Path, node: [u8; 16], kind: Kind, count: u64) -> anyhow::Result<(f64, f64, u64)> {
    let (mut store, _) = Store::open(dir, node, SCAN_SLOTS)?;
    make_chunk(&mut store)?;
    let mut payload = vec![0u8; usize::try_from(SCAN_BLOCK_BYTES)?];
    let mut read = |store: &Media, answers: &Receiver<(OpId, Result<Done, Fault>)>, round: u64| {
        let number = round.wrapping_mul(7919) % count;
        payload[..8].copy_from_slice(&number.to_le_bytes());
        let (expect, source) = (kind.header(number, Some(&payload)), kind.frame(number)?);
        let source_offset =
            store.frame_offset(source, ByteCount::new(SCAN_FRAME_BYTES)).context("there is no such frame")?;
        let (target, class) = (FrameRef { chunk: ChunkId::new(1), index: 0 }, IoClass::DecodeFetch);
        let op = OpId::new(1_000_000 + round);
        let began = Instant::now();
        store.start(MediaOp::Read { op, source, source_offset, target, expect, class });
        let (_, outcome) = answers.recv_timeout(TIME_MAX).context("media does not answer")?;
        outcome.context("a block was not read")?;
        anyhow::Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    let alone =
        (0..500).map(|round| read(&store.media, &store.answers, round)).collect::<Result<Vec<_>, _>>()?;
    let Store { media, answers, .. } = store;
    let mut meanwhile = Vec::new();
    std::thread::scope(|scope| {
        let scan = scope.spawn(|| media.scan(&mut |_| {}));
        let mut round = 500;
        while !scan.is_finished() {
            meanwhile.push(read(&media, &answers, round)?);
            round += 1;
        }
        match scan.join() {
            Ok(outcome) => outcome.map(drop).context("the scan failed"),
            Err(_) => bail!("the scan panicked"),
        }
    })?;
    Ok((median(&alone), median(&meanwhile), meanwhile.len() as u64))
}

/// Exact below 2^53.
#[allow(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}
