//! Why a request is not granted, in sentences that say what to do.

use crate::ids::{ChunkId, GpuId, LeaseId};

/// Which limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `Limits::blocks`.
    Blocks,
    /// `Limits::spaces`.
    Spaces,
    /// `Limits::sessions`.
    Sessions,
    /// `Limits::leases_per_session`.
    Leases,
    /// `Limits::leases_per_tenant`.
    LeasesOfTenant,
    /// `Limits::leased_bytes_per_tenant`.
    LeasedBytes,
    /// `Limits::leased_bytes_per_session`.
    LeasedBytesOfSession,
    /// The last chunk could not be made: the machine has no memory or no descriptors for it.
    Memory,
    /// `Config::pinned_bytes`: the pool has all of its chunks, and what is in them is in use.
    Pool,
    /// `Limits::requests_waiting`.
    RequestsWaiting,
    /// `Limits::requests_waiting_per_session`.
    RequestsWaitingOfSession,
    /// `Limits::requests_waiting_per_tenant`.
    RequestsWaitingOfTenant,
}

/// A request that can never be granted as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The session is not open.
    #[error("this session is not open; open one and try again")]
    UnknownSession,
    /// The space is not known to this tenant.
    #[error("unknown space; call OpenSpace in this session first")]
    UnknownSpace,
    /// More blocks than one request may name.
    #[error("{found} blocks in one request; the limit is {limit}; split the request")]
    TooManyBlocks {
        /// Blocks in the request.
        found: u32,
        /// The limit.
        limit: u32,
    },
    /// The lease is of an earlier life of the daemon.
    #[error("lease {lease} is of an earlier life of the daemon; lease again")]
    EarlierIncarnation {
        /// The lease.
        lease: LeaseId,
    },
    /// The lease belongs to another session, or never was. The two are not told apart.
    #[error("lease {lease} is not a live lease of this session")]
    NotYourLease {
        /// The lease.
        lease: LeaseId,
    },
    /// A read lease was used to write or the other way round.
    #[error("lease {lease} is of the other kind (read or write)")]
    WrongKind {
        /// The lease.
        lease: LeaseId,
    },
    /// A position outside the lease.
    #[error("index {index} is outside the lease's {blocks} blocks")]
    BadIndex {
        /// The position.
        index: u32,
        /// Blocks of the lease.
        blocks: u32,
    },
    /// A position that one seal names more than once.
    #[error("index {index} is named twice in one seal; name each block once")]
    IndexTwice {
        /// The position.
        index: u32,
    },
    /// A sealed length that is not the space's.
    #[error("block {index} is {found} bytes long; this space's blocks have {expected}")]
    WrongLength {
        /// Position in the lease.
        index: u32,
        /// Length that was given.
        found: u64,
        /// The space's block length.
        expected: u64,
    },
    /// A request id was used before with other content.
    #[error("request id {repeat} was used before for another request; choose a new one")]
    RepeatDiffers {
        /// The client's request id.
        repeat: u64,
    },
    /// A chunk that this session may not map or hand back.
    #[error("chunk {chunk} is not one that this session may map")]
    NotYourChunk {
        /// The chunk.
        chunk: ChunkId,
    },
    /// A chunk of this session's own that was dropped, with all that was granted in it.
    #[error("chunk {chunk} is gone; lease again")]
    ChunkGone { chunk: ChunkId },
    /// The space was cleared while the lease was held.
    #[error("the space was cleared; open it again")]
    Cleared,
    /// The window still has frames that a live lease may be filling.
    #[error("chunk {chunk} has frames that are being written; seal or abort them, then hand it back")]
    WindowBusy {
        /// The chunk.
        chunk: ChunkId,
    },
    /// No frame of this space fits into a chunk.
    #[error(
        "a block of {block_bytes} bytes does not fit a chunk of {chunk_bytes}; raise `chunk_bytes` to at least {needed}"
    )]
    BlockTooLarge {
        /// The space's block length.
        block_bytes: u64,
        /// The configured chunk length.
        chunk_bytes: u64,
        /// The smallest chunk length that would do.
        needed: u64,
    },
    /// A device that is not of this node's Hbm tier.
    #[error("device {gpu} of the Hbm tier is not configured; see `terrace info`")]
    UnknownGpu {
        /// The device.
        gpu: GpuId,
    },
    /// Nothing can be persisted now.
    #[error("the catalog takes no writes now; see `terrace info`")]
    Degraded,
    /// A clear that could not be made durable.
    #[error(
        "the blocks are gone, but no device could record that, and a restart could bring them back; it is tried again until one does: see `terrace info` for what is wrong with the devices"
    )]
    NotRecorded,
}
