//! The core's whole surface: what it is told ([`Input`]) and what it asks for
//! ([`Effect`]).
//!
//! The shell calls [`crate::Core::handle`] with an input and then performs every
//! effect of [`crate::Core::poll_effect`] **in order, before the next input**.
//! "Performs" means starts: slow effects name an [`OpId`] and are answered by
//! [`Input::OpDone`]. [`Effect::SetFences`] is performed at once: when the shell
//! starts any later effect, readers already see the new fence.

mod refusal;

use std::sync::Arc;

use crate::checksum::Checksum;
use crate::cost::ComputeCost;
use crate::gpu_config::GpuConfig;
use crate::ids::{
    BlockId, ChunkId, ClientId, DeviceId, DiskFrame, Fence, FrameRef, GpuId, GpuSet, LeaseId, Memory, OpId,
    RequestId, SessionId, SpaceId, TenantId,
};
use crate::units::{ByteCount, Micros, Now, TokenCount};

pub use refusal::{Limit, Refusal};

/// Sizes and limits. Built in one place by the shell; every limit is present.
#[derive(Clone, Debug)]
pub struct Config {
    /// Life of the daemon; the high 32 bits of every lease id.
    pub incarnation: u32,
    /// Most memory in Pinned chunks, windows and replaced windows included.
    pub pinned_bytes: ByteCount,
    /// Size of a Pinned chunk and of a device's chunk slot. A multiple of 2 MiB.
    pub chunk_bytes: ByteCount,
    /// Chunk slots of each device of the Nvme tier, by `DeviceId`.
    pub device_slots: Vec<u32>,
    /// The devices of the Hbm tier, by `GpuId`; at most [`crate::GPUS_MAX`].
    pub hbm: Vec<GpuConfig>,
    /// Longest a sealed block waits until it is written to Nvme.
    pub persist_delay: Micros,
    /// A window without a write lease or a seal for this long is recalled.
    pub window_idle: Micros,
    /// A recalled window that is not handed back for this long is replaced.
    pub window_recall_max: Micros,
    /// Free memory (in whole chunks) that reclaiming keeps ready for windows.
    pub chunks_ready_min: u32,
    /// Frames that eviction keeps free in a full pool, in the space that was written last.
    /// New blocks come in there and then compete with the old ones for the rest.
    pub frames_ready_min: u32,
    /// What each tier evicts first.
    pub policy: Policy,
    /// Which sealed blocks are copied to Nvme.
    pub admission: Admission,
    /// Limits.
    pub limits: Limits,
}

/// How a tier chooses what to evict. All take leaves only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Follows whichever of `Lru` and `Learned` lately saved more seconds, by shadows of both.
    Duel,
    /// Least expected seconds saved per byte and time, learned by class and age.
    Learned,
    /// Least recently used.
    Lru,
    /// Small and main queue, with a ghost queue.
    S3Fifo,
    /// Oldest first.
    Fifo,
}

/// Which sealed blocks are copied to Nvme.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Every one.
    All,
    /// Those that are likely enough to come back, within a budget of written bytes.
    Learned {
        /// Bytes that may be written in a day; `None` is as many as pay off.
        bytes_per_day: Option<ByteCount>,
    },
}

/// What a block's past says about its future. Kept in the catalog beside the
/// block, so that a restart does not forget it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UseStats {
    /// Blocks before it in its prefix; saturates.
    pub depth: u32,
    /// Requests that had extended its prefix when it was sealed: turns of a conversation; saturates.
    pub turn: u8,
    /// Times that it was used since it was sealed; saturates.
    pub uses: u8,
}

/// Past a limit the answer is `Throttled`, never growth.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Blocks known, over all tiers and tenants.
    pub blocks: u32,
    /// Spaces known.
    pub spaces: u32,
    /// Sessions open.
    pub sessions: u32,
    /// Live leases of one session.
    pub leases_per_session: u32,
    /// Live leases of one tenant's sessions together.
    pub leases_per_tenant: u32,
    /// Blocks in one request.
    pub blocks_per_request: u32,
    /// Pinned bytes that one tenant may hold by leases and open windows.
    pub leased_bytes_per_tenant: ByteCount,
    /// The same of one session.
    pub leased_bytes_per_session: ByteCount,
    /// Longest time that a lease may be held, however often it is renewed. A streamed write has no such end: the
    /// daemon itself holds it.
    pub lease_hold_max: Micros,
    /// Longest time to live of a lease.
    pub lease_ttl_max: Micros,
    /// Time to live when the client does not say.
    pub lease_ttl_default: Micros,
    /// Requests that wait for an operation.
    pub requests_waiting: u32,
    /// Of them, those of one session.
    pub requests_waiting_per_session: u32,
    /// Of them, those of one tenant.
    pub requests_waiting_per_tenant: u32,
    /// Device reads in flight.
    pub reads_in_flight: u32,
    /// Device writes in flight (persistence and demotion).
    pub writes_in_flight: u32,
    /// Answers remembered per session, for repeats: so many to leases, and as many others.
    pub replies_remembered: u32,
    /// Share of the node's Nvme and Pinned capacity that may be retained for one tenant.
    pub retained_percent: u32,
}

/// What happened outside.
#[derive(Debug)]
pub enum Input {
    /// A client connected.
    SessionOpened { session: SessionId, tenant: TenantId, locality: Locality },
    /// A session that was just opened goes on for a client that had another before: that one ends, if it has not yet,
    /// and what it was answered is remembered here.
    SessionResumed { session: SessionId, client: ClientId },
    /// Its connection or its process ended.
    SessionClosed { session: SessionId },
    /// The shell validated a manifest or read one from the catalog. Idempotent.
    SpaceKnown {
        space: SpaceId,
        tenant: TenantId,
        block_bytes: ByteCount,
        block_tokens: TokenCount,
        generation: u64,
    },
    /// What computing a space's blocks costs, by somebody who knows the model.
    /// Calibrated by what is seen from then on.
    SpaceCost { space: SpaceId, cost: ComputeCost },
    /// A client asks. Answered by exactly one [`Effect::Reply`] with the same
    /// request id, unless the session closes first.
    Request { session: SessionId, request: RequestId, op: Request },
    /// An effect that named this operation ended. Operations end exactly once.
    OpDone { op: OpId, outcome: Result<Done, Fault> },
    /// Sealed blocks found on a device at start, from the catalog or a scan of
    /// headers. Slots that are not yet scanned hold [`Input::SlotsUnscanned`].
    BlocksFound { blocks: Vec<FoundBlock> },
    /// The same from the catalog, before anybody is served, in any order: nothing
    /// is published. [`Input::Restored`] follows the last of them.
    BlocksRestored { blocks: Vec<FoundBlock> },
    /// The catalog is read.
    Restored,
    /// These slots may hold blocks that are not known yet: do not allocate from them.
    SlotsUnscanned { device: DeviceId, slots: Vec<u32> },
    /// A scan of these slots is complete, and all it found was told before.
    SlotsScanned { device: DeviceId, slots: Vec<u32> },
    /// A slot that is carved for a space already, found at start.
    SlotCarved { device: DeviceId, slot: u32, space: SpaceId, frame_bytes: ByteCount },
    /// Memory for Pinned chunks is or is not to be had; `bytes` may now exist in all.
    MemoryLimit { bytes: ByteCount },
    /// A device is gone or back. Blocks that only it holds become misses.
    DeviceState { device: DeviceId, usable: bool },
    /// The same of a device of Hbm. What is in flight on it still ends exactly once.
    GpuState { gpu: GpuId, usable: bool },
    /// Nothing may be persisted (the catalog failed), or all is well again.
    Degraded { degraded: bool },
    /// How copies on devices are to be read again, and when.
    Scrub(Scrub),
    /// The deadline of [`crate::Core::next_deadline`] has passed.
    Tick,
}

/// When copies on devices are read again, and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scrub {
    /// Passes that begin by themselves, once a day at most; 0 is none.
    Rate { bytes_per_second: ByteCount },
    /// A pass begins now, in place of one that runs.
    Start { bytes_per_second: ByteCount },
    /// The pass that runs ends here.
    Stop,
}

/// How a session moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locality {
    /// Maps chunks and windows. What it seals is served from its windows, which are adopted.
    Local,
    /// Maps chunks and windows of its own, which nobody else maps: what it seals is copied into the daemon's chunks.
    Isolated,
    /// Sends and receives bytes through the daemon, which fills and reads the
    /// frames itself: write leases are granted in the daemon's own chunks.
    Streamed,
}

/// A block that survived on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundBlock {
    /// Its identity.
    pub block: BlockId,
    /// Its space, which is known.
    pub space: SpaceId,
    /// The block before it.
    pub parent: Option<BlockId>,
    /// Its payload.
    pub length: ByteCount,
    /// Its checksum.
    pub checksum: Checksum,
    /// Where it is.
    pub frame: DiskFrame,
    /// Of two copies of one block the higher number is kept.
    pub write_sequence: u64,
    /// How it was used before; nothing is known of what a scan found.
    pub stats: UseStats,
}

/// What a client asks. Block ids are derived from keys by the shell.
#[derive(Clone, Debug)]
pub enum Request {
    /// `Exists` and `Match`: answers [`Reply::Matched`]. Never waits.
    Match { blocks: Vec<BlockId>, mode: MatchMode },
    /// Pins blocks.
    LeaseRead {
        /// Client's request id, for repeats. `None`: nobody repeats it, and its answer is not remembered.
        repeat: Option<u64>,
        blocks: Vec<BlockId>,
        ttl: Option<Micros>,
        /// Answer at this time at the latest, even if promotions are under way.
        answer_by: Now,
        purpose: Purpose,
        /// Where to bring them. What is not there in time is granted where it is.
        want: Memory,
    },
    /// Reserves frames. Each block is the child of the one before it.
    LeaseWrite {
        repeat: Option<u64>,
        space: SpaceId,
        blocks: Vec<BlockId>,
        parent: Option<BlockId>,
        ttl: Option<Micros>,
        /// Where to write them. Sessions that do not map memory of others write in Pinned.
        want: Memory,
    },
    /// Publishes written blocks: (position in the lease, length, checksum).
    Seal {
        repeat: Option<u64>,
        lease: LeaseId,
        blocks: Vec<(u32, ByteCount, Checksum)>,
        durability: Durability,
    },
    /// Moves a deadline.
    Renew { lease: LeaseId, ttl: Option<Micros> },
    /// Ends leases.
    Release { leases: Vec<LeaseId> },
    /// Gives back unwritten frames; no index means all.
    Abort { lease: LeaseId, indexes: Vec<u32> },
    /// Marks blocks as used. `reads` says how often each was read without a lease, if it says anything.
    Touch { blocks: Vec<BlockId>, reads: Vec<u32> },
    /// Starts promotions.
    Prefetch { blocks: Vec<BlockId>, want: Memory },
    /// Keeps blocks longer.
    Retain { blocks: Vec<BlockId>, ttl: Micros, priority: u8 },
    /// Drops every block of a space, durably.
    Clear { repeat: Option<u64>, space: SpaceId },
    /// A client hands a window back: it has dropped its write permission.
    ReturnWindow { chunk: ChunkId },
    /// Is this session entitled to map the chunk, and how?
    MapChunk { chunk: ChunkId },
    /// Persists everything sealed before this request.
    Flush,
    /// The engine beside a device needs so much of its memory until it says otherwise or its session ends. In place
    /// of what it said before. Answered when the memory is free, or by then with what is.
    Shrink { gpu: GpuId, bytes: ByteCount, answer_by: Now },
}

/// Who waits for a read lease; says how urgent its device reads are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// A prefill: it can compute while it waits.
    #[default]
    Prefill,
    /// A decode that cannot produce its next token.
    Decode,
}

/// How keys are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatchMode {
    /// Stop at the first absent key.
    Prefix,
    /// Look at each key by itself.
    Set,
}

/// When a seal is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// As soon as the block can be read.
    Readable,
    /// When it would survive a power cut.
    Durable,
}

/// Outcomes. None of them is an error, except those in [`Refusal`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// One entry a block looked at: `None` is absent.
    Matched { blocks: Vec<Option<Residence>> },
    /// Read or write lease. `lease` is `None` when nothing was granted.
    Leased { lease: Option<LeaseId>, ttl: Micros, blocks: Vec<Grant> },
    /// One entry a block of the request.
    Sealed { outcomes: Vec<SealOutcome> },
    /// The lease goes on.
    Renewed { ttl: Micros },
    /// How many leases were live.
    Released { count: u32 },
    /// How many frames were given back.
    Aborted { count: u32 },
    /// How many blocks were present.
    Touched { count: u32 },
    /// Promotions started, blocks resident already.
    Prefetched { started: u32, resident: u32 },
    /// How many blocks are retained.
    Retained { count: u32 },
    /// The space is empty, durably.
    Cleared { generation: u64, blocks: u64 },
    /// The window was taken back with this many blocks.
    WindowReturned { blocks: u32 },
    /// The session may map the chunk.
    MayMap { chunk: ChunkId, access: MapAccess },
    /// Blocks written, blocks that could not be.
    Flushed { blocks: u64, failed: u64 },
    /// Of the device's configured memory the daemon leaves so much free: to all engines that asked, and less than
    /// they did where a lower bound, leases or windows are in the way.
    Shrunk { free: ByteCount },
    /// Over a limit: back off and ask again.
    Throttled(Limit),
    /// The request was wrong; nothing changed.
    Refused(Refusal),
}

/// Tiers that hold a block now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residence {
    /// Sealed in Pinned.
    pub pinned: bool,
    /// Sealed in Nvme.
    pub nvme: bool,
    /// Devices of Hbm on which it is sealed.
    pub hbm: GpuSet,
}

impl Residence {
    /// Whether a memory holds it.
    pub fn is_in(self, memory: Memory) -> bool {
        match memory {
            Memory::Pinned => self.pinned,
            Memory::Hbm(gpu) => self.hbm.contains(gpu),
        }
    }

    /// Whether it is readable in place anywhere.
    pub fn is_in_memory(self) -> bool {
        self.pinned || !self.hbm.is_empty()
    }
}

/// What became of one block of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Pinned or reserved.
    Granted {
        block: BlockId,
        frame: FrameRef,
        fence: Fence,
        offset: u64,
        length: ByteCount,
        checksum: Option<Checksum>,
        /// Where the frame is.
        memory: Memory,
    },
    /// Being brought in, not in time.
    Promoting,
    /// Not to be had.
    Missing(MissReason),
    /// Over a limit.
    Throttled,
    /// Write lease of a sealed block: nothing to do.
    Exists,
}

/// Why a block cannot be had now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissReason {
    /// No tier holds it.
    Unknown,
    /// Somebody is still writing it.
    Filling,
    /// A copy was damaged and has been dropped.
    Checksum,
    /// The device failed.
    Device,
    /// Recomputing is estimated to be quicker.
    CheaperToRecompute,
}

/// What became of one sealed block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealOutcome {
    /// Published.
    Sealed,
    /// The same bytes were there; this copy was dropped.
    Already,
    /// Other bytes were there; refused and counted.
    Conflict,
    /// The lease no longer covers the block.
    Lost,
    /// Published, but it could not be made durable.
    NotDurable,
}

/// How a session may map a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapAccess {
    /// Read-only.
    Read,
    /// The session's own open window.
    Write,
}

/// What the shell must do next, in order.
#[derive(Debug)]
pub enum Effect {
    /// Answer a request. The shell drops it if the session is gone. Shared with what is remembered for repeats.
    Reply { session: SessionId, request: RequestId, reply: Arc<Reply> },
    /// The session has ended by another of its client: close its connection.
    EndSession { session: SessionId },
    /// Tell a session something it did not ask for.
    Notify { session: SessionId, notice: Notice },
    /// Make a chunk: memfd, populate, map, seal; of a device: allocate, and export when a session maps it. `owner` is the session that may write (a window).
    /// Done: [`Done::ChunkCreated`].
    CreateChunk {
        op: OpId,
        chunk: ChunkId,
        tenant: TenantId,
        owner: Option<SessionId>,
        frame_bytes: ByteCount,
        frames: u32,
        memory: Memory,
    },
    /// The owner handed the window back: forbid new writable mappings, and find out who has old ones.
    /// Done ([`Done::Plain`]) when nobody but the daemon can write into it: it is an ordinary chunk of the
    /// pool from then on. Somebody can, or the kernel cannot tell: [`Fault::StillMapped`].
    CloseWindow { op: OpId, chunk: ChunkId },
    /// Close the chunk and give its memory back. Nothing is in flight on it.
    /// Done ([`Done::Plain`]) when the kernel has the pages back, or when the
    /// shell gave up waiting for a foreign mapping: then [`Fault::StillMapped`],
    /// and a later [`Input::MemoryLimit`] says what is left. `mappers`: sessions that may have it mapped, to be told.
    DropChunk { op: OpId, chunk: ChunkId, mappers: Vec<SessionId> },
    /// Store fences in the fence page, release order, at once. Before all other effects of an input.
    SetFences { fences: Vec<(FrameRef, Fence)> },
    /// Read header page and payload from a device into a frame; compare
    /// the header with `expect` and the payload with its checksum.
    /// Done: [`Done::Plain`].
    Read {
        op: OpId,
        source: DiskFrame,
        source_offset: u64,
        target: FrameRef,
        expect: BlockHeader,
        class: IoClass,
    },
    /// A read is more urgent than was said. Nothing is answered; too late is no harm.
    Promote { op: OpId, device: DeviceId, class: IoClass },
    /// Nobody wants a read any more. If the device does not have it yet, it ends
    /// with [`Fault::NotStarted`]; else it goes on. Its own answer is its only one.
    Cancel { op: OpId, device: DeviceId },
    /// Write header page and payload to a device. From a window that is still
    /// open (`Via::Bounce`) the shell copies first and compares the checksum.
    /// Done: [`Done::Plain`] when the device has answered; not yet durable.
    Write {
        op: OpId,
        source: FrameRef,
        target: DiskFrame,
        target_offset: u64,
        header: BlockHeader,
        via: Via,
        class: IoClass,
    },
    /// Write a slot's chunk header, so that a scan knows how it is carved. Done: [`Done::Plain`].
    CarveSlot { op: OpId, device: DeviceId, slot: u32, space: SpaceId, frame_bytes: ByteCount },
    /// Make durable: sync the devices of `put`, then apply puts and deletes in one
    /// synced batch. The shell groups what waits. Done: [`Done::Plain`].
    Commit { op: OpId, put: Vec<(DiskFrame, BlockHeader, UseStats)>, delete: Vec<BlockId> },
    /// Raise a space's lowest valid generation in the superblock, then delete its
    /// blocks from the catalog. Done: [`Done::Plain`].
    ClearSpace { op: OpId, space: SpaceId, tenant: TenantId, generation: u64 },
    /// Compare a frame's payload with its checksum. Done: [`Done::Plain`].
    Verify { op: OpId, frame: FrameRef, expect: BlockHeader },
    /// Copy a payload between frames, of whatever memory each is, and compare the bytes with their checksum. When
    /// it ends, no device touches either frame any more, whatever the outcome. Done: [`Done::Plain`].
    /// [`Fault::Checksum`]: the source is damaged.
    Copy { op: OpId, source: FrameRef, target: FrameRef, expect: BlockHeader },
    /// Read header page and payload of a copy into a buffer of the shell, and compare them as for
    /// [`Effect::Read`], with [`IoClass::Scrub`]. Done: [`Done::Plain`].
    Scrub { op: OpId, source: DiskFrame, source_offset: u64, expect: BlockHeader },
    /// Publish in the tenants' event streams, in this order. After all other effects of an input.
    Publish { events: Vec<(TenantId, Event)> },
}

/// All that a frame's header page says, but for its own checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// The block.
    pub block: BlockId,
    /// Its space.
    pub space: SpaceId,
    /// Its tenant.
    pub tenant: TenantId,
    /// The block before it.
    pub parent: Option<BlockId>,
    /// Payload length.
    pub length: ByteCount,
    /// Payload checksum.
    pub checksum: Checksum,
    /// The space's generation when it was sealed.
    pub generation: u64,
    /// Grows with every write to any device of the node.
    pub write_sequence: u64,
}

/// How bytes of a write leave memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// Straight from the frame.
    Direct,
    /// Copied and verified first: a client may still be able to write.
    Bounce,
}

/// Who shares a device, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IoClass {
    /// A decode waits for the block.
    DecodeFetch,
    /// A prefill waits for the block.
    PrefillFetch,
    /// Memory is needed.
    Demotion,
    /// A hint.
    Prefetch,
    /// Write-behind.
    Persistence,
    /// Verification of cold blocks.
    Scrub,
}

impl IoClass {
    /// Every class, most urgent first.
    pub const ALL: [Self; 6] = [
        Self::DecodeFetch,
        Self::PrefillFetch,
        Self::Demotion,
        Self::Prefetch,
        Self::Persistence,
        Self::Scrub,
    ];

    /// For metrics and tables.
    pub const fn label(self) -> &'static str {
        match self {
            Self::DecodeFetch => "decode_fetch",
            Self::PrefillFetch => "prefill_fetch",
            Self::Demotion => "demotion",
            Self::Prefetch => "prefetch",
            Self::Persistence => "persistence",
            Self::Scrub => "scrub",
        }
    }
}

impl Purpose {
    /// The class of device reads for it.
    pub const fn class(self) -> IoClass {
        match self {
            Self::Decode => IoClass::DecodeFetch,
            Self::Prefill => IoClass::PrefillFetch,
        }
    }
}

/// A slow effect that ended well.
#[derive(Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing more to say.
    Plain,
    /// The chunk exists and may be used. Every fence in its page is 1.
    ChunkCreated,
}

/// A slow effect that ended badly. The core decides what that means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The device reported a failure.
    #[error("device error")]
    Device,
    /// It was taken back before the device had it: nothing was read or written.
    #[error("not started")]
    NotStarted,
    /// No room on the device.
    #[error("no space left on the device")]
    NoSpace,
    /// Header or payload do not match.
    #[error("checksum or header mismatch")]
    Checksum,
    /// No memory for a chunk now.
    #[error("no memory")]
    NoMemory,
    /// Somebody else still has a dropped chunk's pages, or can write into a window that was handed back.
    #[error("still mapped by another process")]
    StillMapped,
    /// The catalog failed.
    #[error("catalog error")]
    Catalog,
}

/// Said to a session unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A lease was ended by the daemon.
    LeaseRevoked { lease: LeaseId, reason: &'static str },
    /// Hand this window back.
    WindowRecalled { chunk: ChunkId },
    /// This window is the session's next one. Nothing is granted in it yet: the time to map it.
    WindowOpened { chunk: ChunkId, space: SpaceId },
    /// A block that this session sealed failed its first verification.
    SealRejected { space: SpaceId, block: BlockId },
    /// Unmap this chunk. Said by the shell, as it drops it.
    ChunkDropped { chunk: ChunkId },
}

/// What happened to a block, for the tenant's event stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A first copy became readable.
    Sealed { space: SpaceId, block: BlockId, parent: Option<BlockId>, length: ByteCount, tiers: Residence },
    /// The set of tiers changed and is not empty.
    Moved { space: SpaceId, block: BlockId, tiers: Residence },
    /// The last copy is gone.
    Evicted { space: SpaceId, block: BlockId },
    /// Every block of the space is gone.
    Cleared { space: SpaceId },
}
