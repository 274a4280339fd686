//! Media on a file of its own, filled with blocks, and driven as the daemon
//! drives it: the completion of one operation starts the next.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use terrace_core::{
    BlockHeader, BlockId, ByteCount, ChunkId, DeviceId, DiskFrame, Done, Fault, FrameRef, IoClass, MIB, OpId,
    SpaceId, TenantId, Via, checksum, frame_bytes,
};
use terrace_media::bare::{BareLoop, BareOp, cpu_time};
use terrace_media::{Access, Backend, ChunkMemory, DeviceConfig, Hooks, Media, MediaConfig, MediaOp};

/// Size of a slot, as the daemon's default.
const SLOT_BYTES: u64 = 64 * MIB;
/// Slots: 1 GiB, more than any cache of a device would take for a hit.
const SLOTS: u32 = 16;
/// Blocks that media is asked for at once, the daemon's default of `reads_in_flight`;
/// what the device does not have yet waits in front of it.
const ASKED: usize = 64;
/// Blocks of a prompt that lie behind each other.
const PROMPT_BLOCKS: usize = 16;
/// Where there are few frames, this part of the depth more than the device has, and one: a disk may complete its whole queue
/// at once, and what has arrived is looked at in less time than the disk needs for so many.
const LOOKED_AT_PART: usize = 4;
/// Bytes of the frames in memory. Several times the largest cache: where the device is a thread of a host, blocks that
/// are read into the same few frames again and again never leave its cache.
const MEMORY_BYTES: u64 = 512 * MIB;
/// Odd, so that a median is a round.
const CHECKSUM_ROUNDS: usize = 9;
const TIME_MAX: Duration = Duration::from_secs(60);
const CHUNK: ChunkId = ChunkId::new(1);
const DEVICE: DeviceId = DeviceId::new(0);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Device to memory.
    Read,
    /// Memory to device.
    Write,
}

/// Which frames are used in turn, and which blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// All frames, as a full pool does, and blocks in no order.
    Scattered,
    /// All frames; blocks as prompts have them, so many behind each other as they were written.
    Prompts,
    /// Blocks in no order, and few frames: as many as fio has buffers, and some for what is being looked at.
    Few,
}

impl Kind {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    /// The same without anything of ours.
    pub(super) fn bare(self) -> BareOp {
        match self {
            Self::Read => BareOp::Read,
            Self::Write => BareOp::Write,
        }
    }
}

/// One block on the device.
#[derive(Clone, Copy)]
struct Place {
    frame: DiskFrame,
    offset: u64,
    header: BlockHeader,
}

/// Media and what is on it.
pub(super) struct Rig {
    media: Arc<Media>,
    memory: Arc<ChunkMemory>,
    answers: Receiver<(OpId, Result<Done, Fault>)>,
    pump: Arc<Pump>,
    path: PathBuf,
    payload: u64,
    frame: u64,
    frames: u32,
    places: Vec<Place>,
    op_last: u64,
}

/// Starts the next operation when one ends.
struct Pump {
    media: OnceLock<Weak<Media>>,
    driving: AtomicBool,
    state: Mutex<Drive>,
    loose: Sender<(OpId, Result<Done, Fault>)>,
}

struct Drive {
    kind: Kind,
    queue: Vec<Place>,
    running: usize,
    /// Frames that nothing uses, the one that has rested longest first.
    free: VecDeque<u32>,
    /// Frames by the operations that use them, which are numbered from `first`.
    frames: Vec<u32>,
    first: u64,
    failed: Option<Fault>,
    ended: Option<Sender<Instant>>,
}

impl Rig {
    /// Makes a device in `dir` and fills it.
    pub(super) fn new(dir: &Path, payload: u64) -> anyhow::Result<Self> {
        let home = dir.join(payload.to_string());
        let path = home.join("nvme0.dat");
        std::fs::create_dir_all(&home)?;
        let frame = frame_bytes(ByteCount::new(payload)).context("a block of that size has no frame")?;
        let frames = u32::try_from(MEMORY_BYTES / frame.get())?;
        ensure!(frames as usize >= ASKED, "blocks of {payload} bytes leave too few frames");
        let (loose, answers) = channel();
        let drive = Drive {
            kind: Kind::Read,
            queue: Vec::new(),
            running: 0,
            free: VecDeque::new(),
            frames: Vec::new(),
            first: 0,
            failed: None,
            ended: None,
        };
        let pump = Arc::new(Pump {
            media: OnceLock::new(),
            driving: AtomicBool::new(false),
            state: Mutex::new(drive),
            loose,
        });
        let config = MediaConfig {
            data_dir: home.join("data"),
            node: [1; 16],
            chunk_bytes: ByteCount::new(SLOT_BYTES),
            devices: vec![DeviceConfig { path: path.clone(), slots: SLOTS }],
            backend: Backend::IoUring,
            bytes_in_flight_max: ByteCount::new(SLOT_BYTES),
            checkers: std::thread::available_parallelism()
                .map_or(2, |cores| u32::try_from(cores.get().min(4)).unwrap_or(4)),
            hooks: Hooks::default(),
        };
        let told = Arc::clone(&pump);
        let (media, _) = Media::open(config, Box::new(move |op, outcome| told.completed(op, outcome)))?;
        let media = Arc::new(media);
        ensure!(pump.media.set(Arc::downgrade(&media)).is_ok(), "the pump belongs to one media");
        let created = MediaOp::CreateChunk {
            op: OpId::new(1),
            chunk: CHUNK,
            access: Access::Pool,
            frame_bytes: frame,
            frames,
        };
        media.start(created);
        let (_, made) = answers.recv_timeout(TIME_MAX)?;
        ensure!(made.is_ok(), "no memory for {frames} frames: {made:?}");
        let memory = media.chunk(CHUNK).context("the chunk was made")?;
        let mut rig = Self {
            media,
            memory,
            answers,
            pump,
            path,
            payload,
            frame: frame.get(),
            frames,
            places: Vec::new(),
            op_last: 1,
        };
        rig.fill()?;
        Ok(rig)
    }

    fn op(&mut self) -> OpId {
        self.op_last += 1;
        OpId::new(self.op_last)
    }

    /// Every frame, in memory and on the device, holds the same block: whatever is
    /// written is right, and whatever is read can be checked.
    fn fill(&mut self) -> anyhow::Result<()> {
        let bytes: Vec<u8> = (0..self.payload).map(|at| byte(at.wrapping_mul(0x9e37_79b9) >> 11)).collect();
        for index in 0..self.frames {
            self.memory.copy_in(index, 0, &bytes)?;
        }
        let block = BlockId::from_bytes([5; 16]);
        let header = BlockHeader {
            block,
            space: SpaceId::from_bytes([3; 16]),
            tenant: TenantId::from_bytes([4; 16]),
            parent: None,
            length: ByteCount::new(self.payload),
            checksum: checksum(block, 1, &bytes),
            generation: 1,
            write_sequence: 1,
        };
        let frame_bytes = ByteCount::new(self.frame);
        for slot in 0..SLOTS {
            let op = self.op();
            self.media.start(MediaOp::CarveSlot {
                op,
                device: DEVICE,
                slot,
                space: SpaceId::from_bytes([3; 16]),
                frame_bytes,
            });
            let (_, carved) = self.answers.recv_timeout(TIME_MAX)?;
            ensure!(carved.is_ok(), "a slot could not be carved: {carved:?}");
            for index in 0.. {
                let frame = DiskFrame { device: DEVICE, slot, index };
                let Some(offset) = self.media.frame_offset(frame, frame_bytes) else { break };
                self.places.push(Place { frame, offset, header });
            }
        }
        let all = self.places.clone();
        self.drive((Kind::Write, Pattern::Scattered), 16, all)?;
        Ok(())
    }

    /// Places in an order that differs from round to round.
    fn some(&self, pattern: Pattern, count: usize, round: usize) -> Vec<Place> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(round as u64 + 1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let run = if pattern == Pattern::Prompts { PROMPT_BLOCKS } else { 1 };
        let starts = (self.places.len() - run + 1) as u64;
        let mut places = Vec::with_capacity(count + run);
        while places.len() < count {
            let start = usize::try_from(next() % starts).unwrap_or(0);
            places.extend_from_slice(&self.places[start..start + run]);
        }
        places.truncate(count);
        places
    }

    /// Seconds of `count` blocks, and CPU seconds of the whole process for a block.
    pub(super) fn media(
        &mut self,
        what: (Kind, Pattern),
        depth: usize,
        count: usize,
        round: usize,
    ) -> anyhow::Result<(f64, f64)> {
        let queue = self.some(what.1, count, round);
        let moved = super::float(queue.len() as u64);
        let before = cpu_time().as_secs_f64();
        let seconds = self.drive(what, depth, queue)?;
        Ok((seconds, (cpu_time().as_secs_f64() - before) / moved))
    }

    fn drive(
        &mut self,
        (kind, pattern): (Kind, Pattern),
        depth: usize,
        mut queue: Vec<Place>,
    ) -> anyhow::Result<f64> {
        queue.reverse();
        let (ended, end) = channel();
        let count = queue.len();
        let first = self.op_last + 1;
        self.op_last += count as u64;
        let (frames, asked) = match pattern {
            Pattern::Scattered | Pattern::Prompts => (self.frames, ASKED),
            Pattern::Few => {
                let few = depth + depth / LOOKED_AT_PART + 1;
                (u32::try_from(few)?, few)
            }
        };
        {
            let mut state = self.pump.lock();
            *state = Drive {
                kind,
                queue,
                running: 0,
                free: (0..frames).collect(),
                frames: Vec::new(),
                first,
                failed: None,
                ended: Some(ended),
            };
        }
        self.media.set_bytes_in_flight_max(ByteCount::new(self.frame * depth as u64));
        self.pump.driving.store(true, Ordering::SeqCst);
        let began = Instant::now();
        for _ in 0..asked {
            self.pump.next();
        }
        let finished = end.recv_timeout(TIME_MAX).context("an operation was never answered")?;
        self.pump.driving.store(false, Ordering::SeqCst);
        if let Some(fault) = self.pump.lock().failed {
            bail!("a {} failed: {fault}", kind.label());
        }
        Ok(finished.duration_since(began).as_secs_f64())
    }

    /// The same of a bare loop for as many blocks at the same places.
    pub(super) fn bare(
        &mut self,
        (op, pattern): (BareOp, Pattern),
        depth: usize,
        count: usize,
        round: usize,
    ) -> anyhow::Result<(f64, f64)> {
        let offsets: Vec<u64> = self.some(pattern, count, round).iter().map(|place| place.offset).collect();
        let frames: Vec<(usize, u32)> = (0..self.frames).map(|frame| (0, frame)).collect();
        let expect = self.places[0].header;
        let mut ring = BareLoop::new(&self.path, vec![Arc::clone(&self.memory)])?;
        let before = cpu_time().as_secs_f64();
        let took = ring.run(op, &offsets, u32::try_from(self.frame)?, &frames, depth, &expect)?;
        let cpu = (cpu_time().as_secs_f64() - before) / super::float(offsets.len() as u64);
        Ok((took.as_secs_f64(), cpu))
    }

    /// CPU seconds a GiB of the checksum by itself, of blocks that just came from
    /// the device: the median of some rounds.
    pub(super) fn checksum_seconds_per_gib(&mut self) -> anyhow::Result<f64> {
        let mut rounds = Vec::new();
        for round in 0..CHECKSUM_ROUNDS {
            self.bare((BareOp::Read, Pattern::Scattered), 4, self.frames as usize, round)?;
            let before = cpu_time();
            for index in 0..self.frames {
                let header = self.places[index as usize].header;
                ensure!(self.memory.verify(index, &header)?, "frame {index} holds other bytes");
            }
            rounds.push((cpu_time() - before).as_secs_f64());
        }
        let bytes = super::float(self.payload * u64::from(self.frames));
        Ok(super::median(&rounds) / (bytes / super::float(terrace_core::GIB)))
    }

    /// Header page and payload.
    pub(super) fn frame_bytes(&self) -> u64 {
        self.frame
    }

    /// The device's file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// First byte of the first block, and how many bytes behind it belong to slots.
    pub(super) fn span(&self) -> (u64, u64) {
        let start = self.places.first().map_or(0, |place| place.offset);
        (start, SLOT_BYTES * u64::from(SLOTS) - SLOT_BYTES / 2)
    }

    /// What memory it got.
    pub(super) fn pages(&self) -> &'static str {
        self.memory.pages().label()
    }
}

impl Pump {
    fn lock(&self) -> std::sync::MutexGuard<'_, Drive> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn completed(&self, op: OpId, outcome: Result<Done, Fault>) {
        if !self.driving.load(Ordering::SeqCst) {
            // Of the set-up, which waits for each.
            let _ = self.loose.send((op, outcome));
            return;
        }
        {
            let mut state = self.lock();
            state.running -= 1;
            state.failed = state.failed.or(outcome.err());
            let place = usize::try_from(op.get() - state.first).ok();
            let frame = place.and_then(|place| state.frames.get(place).copied());
            state.free.extend(frame);
        }
        self.next();
    }

    /// Starts the next operation, or says that all have ended.
    fn next(&self) {
        let Some(media) = self.media.get().and_then(Weak::upgrade) else { return };
        let mut state = self.lock();
        let next = if state.failed.is_none() { state.queue.pop() } else { None };
        let Some(place) = next else {
            if state.running == 0
                && let Some(ended) = state.ended.take()
            {
                let _ = ended.send(Instant::now());
            }
            return;
        };
        let target = state.free.pop_front().expect("there are more frames than blocks are asked for at once");
        let op = OpId::new(state.first + state.frames.len() as u64);
        state.frames.push(target);
        state.running += 1;
        let kind = state.kind;
        drop(state);
        let memory = FrameRef { chunk: CHUNK, index: target };
        let class = IoClass::PrefillFetch;
        media.start(match kind {
            Kind::Read => MediaOp::Read {
                op,
                source: place.frame,
                source_offset: place.offset,
                target: memory,
                expect: place.header,
                class,
            },
            Kind::Write => MediaOp::Write {
                op,
                source: memory,
                target: place.frame,
                target_offset: place.offset,
                header: place.header,
                via: Via::Direct,
                class,
            },
        });
    }
}

fn byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}
