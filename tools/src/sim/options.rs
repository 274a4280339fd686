//! The command line of `sim store`, checked.

use std::path::PathBuf;

use anyhow::{bail, ensure};
use clap::{Args, ValueEnum};
use terrace_core::{Admission, ByteCount, HEADER_PAGE_BYTES, Policy};

use super::node::{DeviceModel, Hardware};
use super::profile::{Profile, ReplayOptions, check_rates};
use super::serve::Service;
use super::size::Size;
use super::trace::Trace;

/// Shares of the distinct blocks, in percent, that a sweep visits when none are named.
pub(crate) const SWEEP_PERCENT: [f64; 9] = [0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0];
/// Chunks are huge pages; those of the Pinned tier are at least this long in a real node.
const CHUNK_BYTES_MIN: u64 = 64 << 20;
/// A chunk's length is a multiple of a huge page.
const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Frames of a chunk, when nobody says: enough that little is stranded.
const FRAMES_PER_CHUNK: u64 = 16;
/// Chunks of a tier at least: a tier is whole chunks, and its size should not be rounded much.
const CHUNKS_MIN: u64 = 64;
/// Frames that eviction keeps free for new blocks, as `terraced` does; fewer in a small tier.
pub(crate) const FRAMES_READY: u32 = 32;
/// Most frames of a tier.
const FRAMES_MAX: u64 = 1 << 31;
/// Most prefill workers of a node or a cluster.
pub(crate) const WORKERS_MAX: u32 = 4096;
/// Bytes a second that memory copies.
const MEMORY_RATE: f64 = 10e9;

/// Replay a trace against a simulated node
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Traces: JSON lines, plain or zstd
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Size of the Pinned tier: bytes (256GiB) or a share of the trace's distinct blocks (3%)
    #[arg(long, default_value = "5%")]
    pub(crate) pinned: Size,
    /// Size of the Nvme tier, all devices together; 0 is none
    #[arg(long, default_value = "0")]
    pub(crate) nvme: Size,
    /// Try several sizes of a tier, separated by commas [default: 0.1% to 50%]
    #[arg(long, value_delimiter = ',', num_args = 0.., value_name = "SIZES")]
    pub(crate) sweep: Option<Vec<Size>>,
    /// The tier that a sweep changes
    #[arg(long, value_enum, default_value_t = SweepTier::Pinned)]
    pub(crate) sweep_tier: SweepTier,
    /// What is evicted first; several are replayed one after another
    #[arg(long, value_enum, value_delimiter = ',', default_value = "duel")]
    pub(crate) policy: Vec<PolicyName>,
    /// Which sealed blocks are copied to Nvme
    #[arg(long, value_enum, default_value_t = AdmissionName::Learned)]
    pub(crate) admission: AdmissionName,
    /// Most bytes that learned admission writes in a day
    #[arg(long, value_name = "SIZE")]
    pub(crate) write_budget: Option<Size>,
    /// A node with workers, devices and time, or the plain model that policies are compared by
    #[arg(long, value_enum, default_value_t = Model::Node)]
    pub(crate) model: Model,
    #[command(flatten)]
    pub(crate) replay: ReplayOptions,
    /// Measured seconds of prefilling a token, instead of FLOPs
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["flops_linear", "flops_quadratic", "flops_rate"])]
    pub(crate) seconds_per_token: Option<f64>,
    /// Prefill workers of the node
    #[arg(long, default_value_t = 4)]
    pub(crate) workers: u32,
    /// Tokens a second of one answer: decides when the next turn of a session can come
    #[arg(long, value_name = "TOKENS", default_value_t = 40.0)]
    pub(crate) decode_rate: f64,
    /// GiB a second from Pinned to one worker
    #[arg(long, value_name = "GIB", default_value_t = 93.0)]
    pub(crate) link_rate: f64,
    /// Devices of the Nvme tier
    #[arg(long, default_value_t = 4)]
    pub(crate) devices: u16,
    /// GiB a second that one device reads
    #[arg(long, value_name = "GIB", default_value_t = 6.0)]
    pub(crate) device_read: f64,
    /// GiB a second that one device writes
    #[arg(long, value_name = "GIB", default_value_t = 3.0)]
    pub(crate) device_write: f64,
    /// Microseconds that a device adds to every transfer
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100)]
    pub(crate) device_latency: u64,
    /// Bytes of a chunk; a tier is whole chunks [default: small enough for the tiers' sizes]
    #[arg(long, value_name = "SIZE")]
    pub(crate) chunk_bytes: Option<Size>,
    /// A turn comes when the one before it was answered, plus its think time [default: if the trace names sessions]
    #[arg(long, conflicts_with = "open_loop")]
    pub(crate) closed_loop: bool,
    /// Requests come when they were recorded, whatever became of those before
    #[arg(long)]
    pub(crate) open_loop: bool,
    /// Arrivals come this many times as fast as they were recorded
    #[arg(long, default_value_t = 1.0)]
    pub(crate) speed: f64,
    /// Replays at one time [default: one a core]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Plot hit ratios and times to first token into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// A policy on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyName {
    /// Follows whichever of lru and learned lately saved more
    Duel,
    /// Least expected seconds saved per byte
    Learned,
    /// Least recently used leaf
    Lru,
    /// Small and main queue with a ghost queue
    S3fifo,
    /// Oldest
    Fifo,
}

impl PolicyName {
    /// As the core knows it.
    pub(crate) fn policy(self) -> Policy {
        match self {
            PolicyName::Duel => Policy::Duel,
            PolicyName::Learned => Policy::Learned,
            PolicyName::Lru => Policy::Lru,
            PolicyName::S3fifo => Policy::S3Fifo,
            PolicyName::Fifo => Policy::Fifo,
        }
    }
}

/// An admission rule on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AdmissionName {
    /// Every block
    All,
    /// Those that are likely enough to come back
    Learned,
}

/// A way to replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Model {
    /// Workers, devices, links and time
    Node,
    /// One tier, no time
    Reference,
}

/// A tier whose size a sweep changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SweepTier {
    /// Host memory
    Pinned,
    /// Devices
    Nvme,
}

impl Options {
    /// Everything that clap cannot check.
    ///
    /// # Errors
    /// With what is wrong and what is allowed.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.replay.check()?;
        let seconds = self.seconds_per_token.unwrap_or(1.0);
        ensure!(
            seconds.is_finite() && seconds > 0.0,
            "--seconds-per-token is {seconds}: it must be more than 0"
        );
        self.profile().check()?;
        check_rates(&[
            ("--decode-rate", self.decode_rate),
            ("--link-rate", self.link_rate),
            ("--device-read", self.device_read),
            ("--device-write", self.device_write),
            ("--speed", self.speed),
        ])?;
        ensure!(
            (1..=WORKERS_MAX).contains(&self.workers),
            "--workers is {}: allowed are 1 to {WORKERS_MAX}",
            self.workers
        );
        ensure!(self.device_latency <= 60_000_000, "--device-latency is more than a minute");
        ensure!(self.threads != Some(0), "--threads is 0: it must be 1 or more");
        let nvme =
            self.nvme != Size::Bytes(0) || (self.sweep.is_some() && self.sweep_tier == SweepTier::Nvme);
        ensure!(!nvme || self.devices > 0, "--devices is 0: an Nvme tier needs at least one");
        if self.model == Model::Reference && nvme {
            bail!("the reference model has one tier: leave out --nvme, or use --model node");
        }
        for (name, size) in [("--chunk-bytes", self.chunk_bytes), ("--write-budget", self.write_budget)] {
            if let Some(Size::Share(_)) = size {
                bail!("{name} is a share: write it in bytes, for example 64MiB");
            }
        }
        Ok(())
    }

    /// Pinned and Nvme sizes to replay. Of those that nobody named, the ones that hold a block of this trace.
    pub(crate) fn sizes(&self, trace: &Trace) -> Vec<(Size, Size)> {
        let Some(sweep) = &self.sweep else { return vec![(self.pinned, self.nvme)] };
        let table = SWEEP_PERCENT.iter().map(|percent| Size::Share(percent / 100.0));
        let sizes: Vec<Size> = if sweep.is_empty() {
            table.filter(|size| size.frames(1, trace.distinct()) > 0).collect()
        } else {
            sweep.clone()
        };
        sizes
            .into_iter()
            .map(|size| match self.sweep_tier {
                SweepTier::Pinned => (size, self.nvme),
                SweepTier::Nvme => (self.pinned, size),
            })
            .collect()
    }

    /// The model that workers run.
    pub(crate) fn profile(&self) -> Profile {
        let profile = self.replay.profile();
        match self.seconds_per_token {
            Some(seconds) => Profile { linear: seconds, quadratic: 0.0, rate: 1.0, ..profile },
            None => profile,
        }
    }

    /// How requests come and are served.
    pub(crate) fn service(&self, trace: &Trace) -> Service {
        Service {
            workers: self.workers,
            link_rate: self.link_rate * GIB,
            decode_rate: self.decode_rate,
            closed_loop: self.closed_loop || (trace.has_sessions && !self.open_loop),
            speed: self.speed,
            profile: self.profile(),
        }
    }

    /// The node that a trace is replayed against.
    ///
    /// # Errors
    /// When a tier is too large, or smaller than a block.
    pub(crate) fn hardware(
        &self,
        trace: &Trace,
        sizes: (Size, Size),
        policy: Policy,
    ) -> anyhow::Result<Hardware> {
        let block_bytes = u64::from(trace.tokens_per_block) * self.replay.bytes_per_token;
        let frame_bytes = block_bytes + HEADER_PAGE_BYTES;
        let pinned = frames("--pinned", sizes.0, frame_bytes, trace)?;
        let nvme = frames("--nvme", sizes.1, frame_bytes, trace)?;
        ensure!(pinned > 0, "a Pinned tier of {} holds no block of {block_bytes} bytes", sizes.0);
        let smallest = if nvme > 0 { pinned.min(nvme / u64::from(self.devices)) } else { pinned };
        let per_chunk = (smallest / CHUNKS_MIN).clamp(1, FRAMES_PER_CHUNK);
        let chunk_bytes = match self.chunk_bytes {
            Some(Size::Bytes(bytes)) => bytes,
            Some(Size::Share(_)) | None => (per_chunk * frame_bytes + HEADER_PAGE_BYTES)
                .max(if per_chunk == FRAMES_PER_CHUNK { CHUNK_BYTES_MIN } else { 0 })
                .next_multiple_of(HUGE_PAGE_BYTES),
        };
        ensure!(
            chunk_bytes >= frame_bytes + HEADER_PAGE_BYTES && chunk_bytes.is_multiple_of(HUGE_PAGE_BYTES),
            "--chunk-bytes {chunk_bytes}: it must be a multiple of 2 MiB and hold a block of {frame_bytes} bytes"
        );
        let chunks = |frames: u64, per_chunk: u64| (frames + per_chunk / 2) / per_chunk.max(1);
        let slots = chunks(
            nvme.div_ceil(u64::from(self.devices.max(1))),
            (chunk_bytes - HEADER_PAGE_BYTES) / frame_bytes,
        );
        let device_slots =
            if nvme == 0 { Vec::new() } else { vec![u32::try_from(slots.max(1))?; self.devices.into()] };
        Ok(Hardware {
            block_bytes,
            chunk_bytes,
            pinned_chunks: chunks(pinned, chunk_bytes / frame_bytes).max(1),
            device_slots,
            device: DeviceModel {
                read_rate: self.device_read * GIB,
                write_rate: self.device_write * GIB,
                latency: self.device_latency,
            },
            memory_rate: MEMORY_RATE,
            block_tokens: trace.tokens_per_block,
            frames_ready: u32::try_from(pinned / 8).unwrap_or(u32::MAX).min(FRAMES_READY),
            clients: self.workers,
            blocks_per_request: trace.longest(),
            patience: 30_000_000,
            policy,
            admission: self.admission(),
            cost: self.profile().block_cost(trace.tokens_per_block),
        })
    }

    fn admission(&self) -> Admission {
        match self.admission {
            AdmissionName::All => Admission::All,
            AdmissionName::Learned => Admission::Learned {
                bytes_per_day: match self.write_budget {
                    Some(Size::Bytes(bytes)) => Some(ByteCount::new(bytes)),
                    Some(Size::Share(_)) | None => None,
                },
            },
        }
    }
}

/// Bytes of a GiB, for rates.
const GIB: f64 = 1_073_741_824.0;

/// Frames of a tier.
///
/// # Errors
/// When there are more than a core can number.
pub(crate) fn frames(name: &str, size: Size, frame_bytes: u64, trace: &Trace) -> anyhow::Result<u64> {
    let frames = size.frames(frame_bytes, trace.distinct());
    ensure!(
        frames <= FRAMES_MAX,
        "{name} {size} is {frames} blocks; the limit is {FRAMES_MAX}: replay a smaller tier"
    );
    Ok(frames)
}
