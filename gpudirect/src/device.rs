//! What the Hbm tier needs of a device: chunks that other processes can map,
//! host memory that the device reaches at full speed, and copies that run while
//! the caller does something else.
//!
//! Promises: memory that a copy touches lives until the device has let go of it,
//! whatever became of the caller. Leaves to others: which block goes where (the
//! core), queues, deadlines and classes ([`crate::Copies`]).
//!
//! Device memory cannot be write-protected. Whoever imports a chunk can change
//! its bytes for as long as it keeps the mapping. So a chunk belongs to one
//! tenant for its whole life, and is replaced ([`Device::replace`]), never reused.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use terrace_core::{ByteCount, IoClass};

use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::span::{Direction, Piece};

/// One device. Calls may take as long as the driver does (milliseconds for
/// chunks and registrations), so they belong on threads that may wait; `start`
/// and [`Mark::ended`] only put work into queues and look at them.
pub trait Device: Debug + Send + Sync {
    /// What was opened. Does not change.
    fn info(&self) -> &DeviceInfo;

    /// What is taken and what is left. Stale at once.
    ///
    /// # Errors
    /// What the driver says.
    fn room(&self) -> Result<Room, DeviceError>;

    /// Makes a chunk of at least `bytes`, mapped here, all zeros. It is an
    /// allocation of its own: descriptors of it reach nothing else.
    ///
    /// # Errors
    /// [`DeviceError::NoMemory`], or what the driver says; nothing is left behind.
    fn create(&self, bytes: ByteCount) -> Result<Arc<Chunk>, DeviceError>;

    /// Maps a chunk of another process. `bytes` is what its [`Chunk::bytes`] says.
    /// The memory lives while anybody maps it, the other process or not.
    ///
    /// # Errors
    /// [`DeviceError::BadDescriptor`], or what the driver says. The descriptor is closed.
    fn import(&self, descriptor: OwnedFd, bytes: ByteCount) -> Result<Arc<Chunk>, DeviceError>;

    /// Lets the device reach host memory at full speed while the answer lives.
    /// Takes tens of milliseconds for a chunk. What is not registered can be
    /// copied all the same, more slowly.
    ///
    /// # Errors
    /// What the driver says, for example that no memory may be locked.
    fn register(&self, bytes: HostBytes) -> Result<Registered, DeviceError>;

    /// Starts a batch of copies in the order of its lane, and does not wait. The
    /// mark keeps the memory of all pieces.
    ///
    /// # Errors
    /// What the driver says. Then none of the batch is under way any more, unless
    /// it is [`DeviceError::Lost`]: then [`Device::shut`] must end it.
    fn start(&self, lane: Lane, pieces: Arc<[Piece]>) -> Result<Box<dyn Mark>, DeviceError>;

    /// Ends everything, so that the device touches neither chunks nor host memory
    /// any more, even a lost one. Only then is memory of copies that never ended
    /// free. May hang with the driver: call it on a thread that may.
    ///
    /// # Errors
    /// What the driver says. Then memory stays held.
    fn shut(&self) -> Result<(), DeviceError>;

    /// Makes this thread one from which foreign libraries may use the device.
    ///
    /// # Errors
    /// What the driver says.
    fn bind_thread(&self) -> Result<(), DeviceError>;

    /// Whether copies between its chunks and those of `other` need no way through the host. Both lie on this machine.
    fn reaches(&self, other: &DeviceInfo) -> bool;

    /// Frees a chunk and makes another of its length: what must happen before
    /// memory changes its tenant. Other processes may still hold the old memory;
    /// they keep it, and it is missing in [`Room::free`], until they let go.
    ///
    /// # Errors
    /// [`DeviceError::InUse`] with the chunk; [`DeviceError::NoMemory`] and others
    /// without it, since it is freed by then.
    fn replace(&self, chunk: Arc<Chunk>) -> Result<Arc<Chunk>, Kept> {
        let bytes = chunk.bytes();
        match Arc::try_unwrap(chunk) {
            Ok(chunk) => drop(chunk),
            Err(chunk) => {
                let users = Arc::strong_count(&chunk) as u64 - 1;
                return Err(Kept { chunk: Some(chunk), error: DeviceError::InUse { users } });
            }
        }
        self.create(bytes).map_err(|error| Kept { chunk: None, error })
    }
}

/// A chunk that was not replaced.
#[derive(Debug)]
pub struct Kept {
    /// The old chunk, unless it is freed.
    pub chunk: Option<Arc<Chunk>>,
    /// Why there is no new one.
    pub error: DeviceError,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number for the driver. Differs between processes that see different devices: compare `uuid`.
    pub ordinal: u32,
    /// What it stands for.
    pub kind: DeviceKind,
    /// For example "NVIDIA H200".
    pub name: String,
    /// The same in every process and after every restart.
    pub uuid: [u8; 16],
    /// Memory in all.
    pub bytes: ByteCount,
    /// Of the driver, as it numbers itself: 13000 is CUDA 13.0. Zero without a driver.
    pub driver_version: u32,
    /// Major and minor number; zeros for a stand-in.
    pub compute_capability: (u32, u32),
    /// Chunks are multiples of it.
    pub granularity: ByteCount,
    /// Whether other hardware (drives, network cards) may be told to reach chunks.
    pub rdma_capable: bool,
}

/// A device, or what is plainly none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A CUDA device.
    Cuda,
    /// Host memory that stands in for one, because somebody asked for it by name.
    HostOnly,
}

impl DeviceKind {
    /// For `info` and configuration.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::HostOnly => "host-only",
        }
    }
}

/// What is taken of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that nobody has, on the whole device.
    pub free: ByteCount,
    /// Bytes in all.
    pub total: ByteCount,
    /// Chunks made here that are alive.
    pub chunks: u64,
    /// Their bytes.
    pub chunk_bytes: ByteCount,
    /// Chunks of other processes that are mapped here.
    pub imports: u64,
    /// Slices of host memory that are registered.
    pub registrations: u64,
    /// Batches that were started and have not been seen to end.
    pub flights: u64,
}

/// Device memory: an allocation of its own, mapped in this process. Dropping it
/// unmaps and frees, after every copy that uses it.
#[derive(Debug)]
pub struct Chunk {
    kind: DeviceKind,
    device: u32,
    address: u64,
    bytes: ByteCount,
    memory: Box<dyn ChunkMemory>,
}

/// What stands behind a chunk. Dropping it unmaps and frees.
pub trait ChunkMemory: Debug + Send + Sync {
    /// A descriptor that another process can import.
    ///
    /// # Errors
    /// What the driver says.
    fn export(&self) -> Result<OwnedFd, DeviceError>;
}

impl Chunk {
    /// A chunk of an implementation.
    pub(crate) fn new(of: &DeviceInfo, address: u64, bytes: ByteCount, memory: Box<dyn ChunkMemory>) -> Self {
        Self { kind: of.kind, device: of.ordinal, address, bytes, memory }
    }

    /// What its device stands for.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Ordinal of its device, in this process.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Where the device finds it. For kernels and foreign libraries of this
    /// process, and only while the chunk lives.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its mapped length: what was asked for, rounded up to the granularity.
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// A descriptor for another process. It can write what it imports.
    ///
    /// # Errors
    /// What the driver says.
    pub fn export(&self) -> Result<OwnedFd, DeviceError> {
        self.memory.export()
    }
}

/// Host memory that a device reaches at full speed, until it is dropped.
#[derive(Debug)]
pub struct Registered {
    // Dropped first: the registration ends before the memory can go.
    _guard: Box<dyn Registration>,
    bytes: HostBytes,
}

/// What stands behind [`Registered`]. Dropping it ends the registration.
pub trait Registration: Debug + Send + Sync {}

impl Registered {
    pub(crate) fn new(bytes: HostBytes, guard: Box<dyn Registration>) -> Self {
        Self { _guard: guard, bytes }
    }

    /// What is registered.
    pub fn bytes(&self) -> &HostBytes {
        &self.bytes
    }
}

/// Where a batch queues: copies of one lane run in the order of their starts,
/// those of different lanes side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lane {
    /// Which way.
    pub direction: Direction,
    /// Who waits for it.
    pub class: IoClass,
}

/// The end of a batch. Dropping it before the end leaks what the batch touches:
/// nobody can say when the device will be done.
pub trait Mark: Debug + Send {
    /// Whether all of the batch is done. Does not wait.
    ///
    /// # Errors
    /// The batch failed; [`DeviceError::Lost`] if the device did.
    fn ended(&mut self) -> Result<bool, DeviceError>;
}
