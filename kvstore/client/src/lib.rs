//! The library that engines, workers, routers and tools link to use `terraced`.
//!
//! A [`Session`] speaks to the daemon of this node over its Unix socket and maps
//! blocks into this process, or over gRPC where there is no socket. Blocks are
//! leased: a [`ReadBlock`] shows sealed bytes in place and says with
//! [`ReadBlock::is_valid`] whether they were still the granted ones; a
//! [`WriteBlock`] is a frame to compute in, published by [`WriteLease::seal`].
//!
//! Where the daemon owns memory of a GPU, a session that was given the device
//! ([`Session::add_device`]) leases blocks there too: [`DeviceBlock`] and
//! [`DeviceWriteBlock`] name device memory that this process has mapped.
//!
//! Promises: guards keep their lease alive and end it when dropped; after the
//! daemon's death old guards can still be touched but are never valid again;
//! nothing here waits without a deadline or a way to be told to stop.
//! Leaves to others: what the bytes mean.
#![warn(missing_docs)]

pub mod blocking;
pub mod signals;

mod again;
mod channel;
mod chunks;
mod connector;
mod convert;
mod device;
mod device_read;
mod device_write;
mod early;
mod error;
mod get;
mod grants;
mod grpc;
mod keeper;
mod keyed;
mod lane;
mod lease;
mod places;
mod put;
mod questions;
mod read;
mod session;
mod space;
mod status;
mod stream;
mod transfer;
mod write;

/// The wire messages, for streams that hand them through.
pub use terrace_proto::v1 as wire;
pub use tonic::Code;

pub use channel::{Admin, admin, channel};
pub use connector::Connector;
pub use device_read::{DeviceBlock, DeviceReadLease, Leased};
pub use device_write::{DeviceWriteBlock, DeviceWriteLease, Reserved};
pub use error::ClientError;
pub use get::{BlockTarget, GetOptions, Verify};
pub use lease::Outcome;
pub use questions::{BlockMatch, Match, Prefetched};
pub use read::{BadBlock, ReadBlock, ReadLease, ReadOptions, Stale};
pub use session::{Session, Target, Transport};
pub use space::Space;
pub use stream::{EventStream, SnapshotStream};
pub use terrace_lane::{BadManifestWire, manifest_from_wire, manifest_to_wire};
pub use write::{WriteBlock, WriteLease, WriteOptions};

pub use terrace_core::{
    BlockId, Checksum, ComputeCost, Durability, MatchMode, MissReason, Purpose, SealOutcome, SpaceId,
    SpaceKind, SpaceManifest,
};
pub use terrace_lane::{SharedBytes, TargetMemory};
