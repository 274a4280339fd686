//! What the daemon says to media and hears from it. [`MediaOp`] mirrors the slow
//! effects of the core field by field.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use terrace_core::{
    BlockHeader, BlockId, ByteCount, ChunkId, DeviceId, DiskFrame, Done, Fault, FrameRef, IoClass, OpId,
    SpaceId, TenantId, UseStats, Via,
};

use crate::catalog::CatalogError;
use crate::device::{BlockIo, SelfTestLine};
use crate::memory::Access;

/// Called once for every operation that was started, from a thread of media,
/// never from inside [`crate::Media::start`].
pub type Complete = Box<dyn Fn(OpId, Result<Done, Fault>) + Send + Sync>;

/// Puts something (a fault injector) between media and a device.
pub type WrapDevice = Box<dyn Fn(DeviceId, Arc<dyn BlockIo>) -> Arc<dyn BlockIo> + Send>;

/// Where everything is and how large.
pub struct MediaConfig {
    /// Folder of the lock and the catalog. Made if it is not there.
    pub data_dir: PathBuf,
    /// The node that owns the devices. A device of another node is refused.
    pub node: [u8; 16],
    /// Size of a slot; a multiple of 2 MiB.
    pub chunk_bytes: ByteCount,
    /// The Nvme tier, by `DeviceId`.
    pub devices: Vec<DeviceConfig>,
    /// How devices are driven.
    pub backend: Backend,
    /// Bytes in flight on one device, over all classes. At least one I/O is always in flight.
    pub bytes_in_flight_max: ByteCount,
    /// Threads that copy and verify.
    pub checkers: u32,
    /// Test doubles; [`Hooks::default`] has none.
    pub hooks: Hooks,
}

/// One preallocated file or raw block device.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Its path. A file is made if it is not there.
    pub path: PathBuf,
    /// Chunk slots to be used.
    pub slots: u32,
}

/// Where tests reach in.
#[derive(Default)]
pub struct Hooks {
    /// Stands between media and each device.
    pub wrap_device: Option<WrapDevice>,
    /// While true, the catalog fails every write.
    pub catalog_fails: Arc<AtomicBool>,
    /// How long a device may take to sync; `None` is 30 seconds.
    pub sync_patience: Option<Duration>,
    /// How long a device may take to answer a read or write; `None` is 4 seconds.
    pub io_patience: Option<Duration>,
}

/// Which system calls carry device I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring if the kernel allows it, else `Pread`.
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// A pool of threads with `pread` and `pwrite`.
    Pread,
}

/// A slow operation. See the effect of the same name in the core.
#[derive(Debug)]
pub enum MediaOp {
    /// Makes a chunk or, with [`Access::Window`], a window.
    CreateChunk { op: OpId, chunk: ChunkId, access: Access, frame_bytes: ByteCount, frames: u32 },
    /// Seals a window against new writable mappings. [`Fault::StillMapped`] if another process can still
    /// write into it, or if the kernel cannot tell.
    CloseWindow { op: OpId, chunk: ChunkId },
    /// Closes a chunk. Done when no other process holds its pages;
    /// [`Fault::StillMapped`] after a patience of two seconds: then the bytes
    /// are part of [`MediaFacts::lingering`] until they are gone.
    DropChunk { op: OpId, chunk: ChunkId },
    /// Device to frame, verified.
    Read {
        op: OpId,
        source: DiskFrame,
        source_offset: u64,
        target: FrameRef,
        expect: BlockHeader,
        class: IoClass,
    },
    /// Frame to device.
    Write {
        op: OpId,
        source: FrameRef,
        target: DiskFrame,
        target_offset: u64,
        header: BlockHeader,
        via: Via,
        class: IoClass,
    },
    /// Writes a slot's chunk header and records it in the catalog.
    CarveSlot { op: OpId, device: DeviceId, slot: u32, space: SpaceId, frame_bytes: ByteCount },
    /// Syncs the devices of `put`, then one synced batch.
    Commit { op: OpId, put: Vec<(DiskFrame, BlockHeader, UseStats)>, delete: Vec<BlockId> },
    /// Raises the lowest valid generation in the superblocks, then deletes the older blocks from the catalog.
    ClearSpace { op: OpId, space: SpaceId, tenant: TenantId, generation: u64 },
    /// Compares a payload with its checksum.
    Verify { op: OpId, frame: FrameRef, expect: BlockHeader },
    /// Copies a payload and compares the copy.
    Copy { op: OpId, source: FrameRef, target: FrameRef, expect: BlockHeader },
    /// Device to a buffer of media's own, verified.
    Scrub { op: OpId, source: DiskFrame, source_offset: u64, expect: BlockHeader },
}

impl MediaOp {
    /// The operation's number.
    pub const fn op(&self) -> OpId {
        match self {
            Self::CreateChunk { op, .. }
            | Self::CloseWindow { op, .. }
            | Self::DropChunk { op, .. }
            | Self::Read { op, .. }
            | Self::Write { op, .. }
            | Self::CarveSlot { op, .. }
            | Self::Commit { op, .. }
            | Self::ClearSpace { op, .. }
            | Self::Verify { op, .. }
            | Self::Copy { op, .. }
            | Self::Scrub { op, .. } => *op,
        }
    }
}

/// A block on a device, from the catalog or from a header page. Headers of
/// generations that were cleared are never reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundHeader {
    /// Where.
    pub frame: DiskFrame,
    /// What.
    pub header: BlockHeader,
    /// How it was used, if the catalog knows.
    pub stats: UseStats,
}

/// How a slot is carved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carve {
    /// The device.
    pub device: DeviceId,
    /// The slot.
    pub slot: u32,
    /// The space whose blocks it holds.
    pub space: SpaceId,
    /// Header page and payload of one frame.
    pub frame_bytes: ByteCount,
}

/// What the catalog keeps of a space. The manifest is the daemon's encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceRecord {
    /// The space.
    pub space: SpaceId,
    /// Its tenant.
    pub tenant: TenantId,
    /// The tenant's name; at most 256 bytes.
    pub tenant_name: String,
    /// Lowest valid generation: what [`MediaOp::ClearSpace`] last said, or 1 and more by choice of the daemon.
    pub generation: u64,
    /// Encoded manifest; at most 3 KiB, so that it fits a chunk header page too.
    pub manifest: Vec<u8>,
}

/// What was there when the store was opened.
#[derive(Debug)]
pub struct OpenReport {
    /// This life of the daemon; greater than any before on the same devices or catalog.
    pub incarnation: u32,
    /// Spaces of the catalog. After a rebuild, more come with [`ScanPiece::space`].
    pub spaces: Vec<SpaceRecord>,
    /// Carved slots of the catalog.
    pub carves: Vec<Carve>,
    /// State of the catalog.
    pub catalog: CatalogState,
    /// The last life ended by [`crate::Media::close`].
    pub clean: bool,
    /// The catalog does not know all blocks: call [`crate::Media::scan`].
    pub scan_needed: bool,
    /// What an operator should know.
    pub notes: Vec<String>,
}

/// Which catalog we have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CatalogState {
    /// There was none.
    New,
    /// It was opened.
    Opened,
    /// It was damaged and has been moved to `moved_to`; a new one was begun.
    Damaged {
        /// What RocksDB or the decoder said.
        reason: String,
        /// Where the damaged one is.
        moved_to: PathBuf,
    },
}

/// One slot of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanPiece {
    /// The device.
    pub device: DeviceId,
    /// The slot.
    pub slot: u32,
    /// How it is carved; `None` if it holds no valid chunk header, and so no blocks.
    pub carve: Option<Carve>,
    /// The space, if the chunk header names its manifest.
    pub space: Option<SpaceRecord>,
    /// Its blocks, in the catalog by now.
    pub blocks: Vec<FoundHeader>,
}

/// A whole scan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanReport {
    /// Slots looked at.
    pub slots: u64,
    /// Blocks found.
    pub blocks: u64,
    /// Header pages that were neither empty nor valid.
    pub damaged: u64,
    /// Slots that could not be read.
    pub unreadable: u64,
    /// It came to its end; false after [`crate::Media::stop_scan`].
    pub complete: bool,
}

/// State of one device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceFacts {
    /// Its path.
    pub path: PathBuf,
    /// Identity from the superblock.
    pub uuid: [u8; 16],
    /// Slots in use.
    pub slots: u32,
    /// The backend that runs, and why.
    pub backend: String,
    /// False after a failed sync: it is read, and no longer written.
    pub writable: bool,
    /// Bytes read since the start.
    pub read_bytes: u64,
    /// Bytes written since the start.
    pub write_bytes: u64,
    /// I/Os that failed.
    pub errors: u64,
    /// Requests that wait or run.
    pub queued: u64,
    /// Of those that wait, how many of each class of [`IoClass::ALL`].
    pub waiting: [u64; 6],
    /// It is given work.
    pub usable: bool,
    /// False if the node has run without it since the start: nothing of it was touched.
    pub opened: bool,
    /// What is wrong with it; empty if nothing.
    pub condition: String,
    /// I/Os that it answered after the wait for them had been ended.
    pub late: u64,
    /// What it can do, as measured after the start; empty until then.
    pub self_test: Vec<SelfTestLine>,
    /// Why there is no more of that; empty if there is all.
    pub self_test_note: String,
}

/// What `info` and metrics show.
#[derive(Clone, Debug)]
pub struct MediaFacts {
    /// By `DeviceId`.
    pub devices: Vec<DeviceFacts>,
    /// Pages by kind label, in chunks.
    pub chunk_pages: Vec<(&'static str, u64)>,
    /// Memory of dropped chunks that other processes still hold.
    pub lingering: ByteCount,
    /// Memory made ahead for the next chunks.
    pub ready: ByteCount,
    /// More of it is yet to be made.
    pub preparing: bool,
    /// The catalog takes writes.
    pub catalog_usable: bool,
    /// Syncs of devices and catalog batches since the start: `(commits, batches)`.
    pub commits: (u64, u64),
    /// Notes of the devices and of memory.
    pub notes: Vec<String>,
}

/// Who has a lock, and what to do about it.
fn owner(pid: &str) -> String {
    if pid == std::process::id().to_string() {
        return "this daemon: two devices of the configuration are one file".to_owned();
    }
    format!("pid {pid}; stop that daemon, or choose another `data_dir` or device")
}

/// Opening or scanning failed.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// Another daemon runs here.
    #[error("{path} is already in use by {owner}", owner = owner(pid))]
    InUse {
        /// The directory or device.
        path: PathBuf,
        /// The owner, or "unknown".
        pid: String,
    },
    /// A file could not be used.
    #[error("{path}: cannot {action}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nothing is there, and no file is made.
    #[error(
        "{path} is not there; bring it back, or put an empty file (or a raw device that is all zero) there to begin anew"
    )]
    Gone {
        /// The device.
        path: PathBuf,
    },
    /// A device that cannot be opened, and of which nothing is known.
    #[error(
        "{error}. Nothing says that this node ever had a device there, so it does not start without it: correct the path, or take its `[[device]]` away"
    )]
    NewAndShut {
        /// Why it cannot be opened.
        error: Box<Self>,
    },
    /// A file or device holds something that is not ours.
    #[error("{path} is not empty and is no Terrace device; choose another path, or empty it yourself")]
    NotOurs {
        /// The device.
        path: PathBuf,
    },
    /// Both copies of the superblock are unreadable.
    #[error(
        "{path}: both copies of the superblock are damaged; restore it, or put an empty file in its place to begin anew"
    )]
    SuperblockDamaged {
        /// The device.
        path: PathBuf,
    },
    /// A device was made by a newer Terrace.
    #[error(
        "{path} has format {found}; this Terrace knows up to {known}: use a newer one. Nothing was changed"
    )]
    NewerFormat {
        /// The device.
        path: PathBuf,
        /// Its major format number.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A device belongs to another node.
    #[error(
        "{path} belongs to node {found}, this is node {ours}; use its own data directory, or another path"
    )]
    OtherNode {
        /// The device.
        path: PathBuf,
        /// Its node, in hexadecimal.
        found: String,
        /// Ours.
        ours: String,
    },
    /// A device was carved with another chunk size.
    #[error(
        "{path} was made with chunk_bytes = {found}, configured are {ours}; set `chunk_bytes` back, or use another path"
    )]
    OtherChunkBytes {
        /// The device.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// Ours.
        ours: u64,
    },
    /// A setting is out of range.
    #[error("{0}")]
    BadConfig(&'static str),
    /// The superblock's table is full.
    #[error("{path}: the table of cleared spaces is full ({limit} entries)")]
    TableFull {
        /// The device.
        path: PathBuf,
        /// Its entries.
        limit: usize,
    },
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}
