//! Memory chunks, NVMe devices and the catalog: everything that holds block
//! bytes on one node, or remembers where they are.
//!
//! [`Media`] performs the slow effects of the core on threads of its own and
//! answers by a callback. It decides nothing: which frame, when, and whether at
//! all is the core's business. Bytes that come from a device are checked
//! against their header page and checksum before anybody is told of them.

mod api;
pub mod bare;
mod catalog;
mod chunks;
mod commit;
mod device;
mod entry;
mod facts;
mod faults;
mod fences;
mod find;
#[cfg(test)]
mod golden;
mod header;
pub mod inspect;
mod known;
mod large_pages;
mod media;
mod memfd;
mod memory;
mod open;
mod record;
mod scan;
mod scrub;
mod side;
mod slots;
mod strided;
mod superblock;
mod work;

pub use api::{
    Backend, Carve, CatalogState, Complete, DeviceConfig, DeviceFacts, FoundHeader, Hooks, MediaConfig,
    MediaError, MediaFacts, MediaOp, OpenReport, ScanPiece, ScanReport, SpaceRecord, WrapDevice,
};
pub use catalog::CatalogError;
pub use device::{
    AlignedPages, BlockIo, Device, DeviceChanged, IoBuffer, IoDone, IoFacts, IoOp, IoRequest, SelfTestLine,
};
pub use facts::{MemoryFacts, memory_available, memory_facts};
pub use faults::{FaultyDevice, Injected, SlowDevice, VolatileDevice, Weather, cut_power};
pub use fences::FencePages;
pub use header::{
    BadHeader, MANIFEST_BYTES_MAX, SlotHeader, TENANT_NAME_BYTES_MAX, decode_header, encode_header,
};
pub use large_pages::LargePages;
pub use media::Media;
pub use memory::{Access, ChunkMemory, Holders, OutsideFrame, PAGE_BYTES, PageKind, Retired};
pub use strided::strided_reads;
pub use superblock::{CopyState, DATA_START, SuperblockFacts};
