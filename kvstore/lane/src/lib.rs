//! The shared-memory lane: how block bytes and control messages move between
//! `terraced` and a process on the same node.
//!
//! Promises: nothing that arrives can panic or make us allocate more than
//! [`terrace_proto::MESSAGE_BYTES_MAX`]; a descriptor that arrives is either
//! handed to the caller or closed; shared memory is never behind a Rust
//! reference. Leaves to others: what the messages mean (the daemon), when a
//! frame may be read or written (fences and leases, checked by the client).

pub mod bare;
pub mod fold;

mod copy;
mod crew;
mod error;
mod frame;
mod heap;
mod manifest;
mod mapping;
mod names;
mod packed;
mod processor;
mod shared;
mod socket;
mod syscall;
mod target;
mod varint;

pub use copy::drain;
pub use crew::{COPY_THREADS_MAX, Called, SHARED_BYTES_MIN, share};
pub use error::{LaneError, MapError};
pub use frame::{DESCRIPTORS_WAITING_MAX, LaneMessage, LaneReader, LaneWriter, Received, Writable};
pub use heap::keep_freed_memory;
pub use manifest::{BadManifestWire, manifest_from_wire, manifest_to_wire};
pub use mapping::{Access, FenceMapping, Mapping, SharedBytesMut};
pub use names::block_ids;
pub use packed::{PACKED_GRANT_BYTES, PackedGrant};
pub use processor::{Yields, leave_processor, processor};
pub use shared::{SharedBytes, WeakBytes};
pub use socket::{Admits, LaneConnection, LaneServer, PeerCredentials, ProcessEnd, SOCKET_PATH_BYTES_MAX};
pub use target::TargetMemory;
pub use varint::varint;
