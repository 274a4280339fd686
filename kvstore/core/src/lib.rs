//! Decides where KV blocks live. Never touches a clock, a file or a socket.
//!
//! The shell feeds [`Core::handle`] and drains [`Core::poll_effect`] until it
//! returns `None`. Given the same inputs in the same order the core returns the
//! same effects, so one seed replays a whole run.

mod api;
mod checksum;
mod identity;
mod ids;
mod units;

pub use api::{
    BlockHeader, Config, Done, Durability, Effect, Event, Fault, FoundBlock, Grant, Input, IoClass, Limit,
    Limits, Locality, MapAccess, MatchMode, MissReason, Notice, Refusal, Reply, Request, Residence,
    SealOutcome, Via,
};
pub use checksum::{Checksum, Checksummer, checksum};
pub use identity::{
    BLOCK_BYTES_MAX, BadManifest, KEY_BYTES_MAX, MANIFEST_TEXT_BYTES_MAX, SpaceKind, SpaceManifest,
    TenantKey, chain_key, chain_keys, tenant_id,
};
pub use ids::{
    BadId, BlockId, ChunkId, DeviceId, DiskFrame, Fence, FrameRef, LeaseId, OpId, RequestId, SessionId,
    SpaceId, TenantId,
};
pub use units::{BlockCount, ByteCount, GIB, KIB, MIB, Micros, Now, TokenCount};
