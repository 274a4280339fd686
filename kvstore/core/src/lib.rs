//! Decides where KV blocks live. Never touches a clock, a file or a socket.
//!
//! The shell feeds [`Core::handle`] and drains [`Core::poll_effect`] until it
//! returns `None`. Given the same inputs in the same order the core returns the
//! same effects, so one seed replays a whole run.

mod api;
mod arrivals;
mod check;
mod check_gpus;
mod checksum;
mod clear;
mod core;
mod cost;
mod curves;
mod demote;
mod evict;
mod gpu_config;
mod hbm;
mod identity;
mod ids;
mod intake;
mod leases;
mod memory;
mod persist;
pub mod policy;
mod quota;
mod reading;
mod requests;
mod residence;
mod restore;
mod scrub;
mod state;
mod units;
mod urgency;
mod view;
mod waiting;
mod windows;
mod writing;

pub use crate::core::Core;
pub use api::{
    Admission, BlockHeader, Config, Done, Durability, Effect, Event, Fault, FoundBlock, Grant, Input,
    IoClass, Limit, Limits, Locality, MapAccess, MatchMode, MissReason, Notice, Policy, Purpose, Refusal,
    Reply, Request, Residence, Scrub, SealOutcome, UseStats, Via,
};
pub use checksum::{
    CHECKSUM_POLYNOMIAL, Checksum, Checksummer, JOINED_BYTES, JOINED_DOUBLINGS_MAX, checksum,
};
pub use cost::ComputeCost;
pub use curves::{CurvePoint, CurveTier, CurveView};
pub use gpu_config::{GpuConfig, HbmReads};
pub use identity::{
    BLOCK_BYTES_MAX, BadManifest, KEY_BYTES_MAX, MANIFEST_TEXT_BYTES_MAX, SpaceKind, SpaceManifest,
    TenantKey, chain_key, chain_keys, tenant_id,
};
pub use ids::{
    BadId, BlockId, ChunkId, ClientId, DeviceId, DiskFrame, Fence, FrameRef, GPUS_MAX, GpuId, GpuSet,
    LeaseId, Memory, OpId, RequestId, SessionId, SpaceId, TenantId,
};
pub use scrub::ScrubView;
pub use state::chunk::FrameCounts;
pub use state::disk::DATA_START;
pub use state::space::{HEADER_PAGE_BYTES, frame_bytes};
pub use units::{BlockCount, ByteCount, GIB, KIB, MIB, Micros, Now, TokenCount};
pub use view::{
    BlockView, Counters, DeviceView, GpuView, HbmCopyView, LeaseView, PinnedView, SnapshotEntry, SpaceView,
    TierViews,
};
