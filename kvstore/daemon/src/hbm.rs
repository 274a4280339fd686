//! The devices of the Hbm tier: performs the core's effects that touch one.
//!
//! Promises: every operation ends exactly once, and only when no device touches
//! its frames any more; bytes that came from somewhere else are compared with
//! their checksum before anybody is told of them; a device that is not there, or
//! is lost, is told to the core and holds up nobody else. Leaves to others: what
//! goes where (the core), copies and chunks themselves (gpudirect).

mod chunk;
mod direct;
mod gpu;
mod landing;
mod maker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use terrace_core::{
    BlockHeader, ByteCount, ChunkId, DeviceId, Done, Fault, Fence, FrameRef, GpuConfig, GpuId, GpuSet,
    HbmReads, OpId,
};
use terrace_gpudirect::{Device, DeviceError, DeviceInfo};
use terrace_media::ChunkMemory;

use crate::config::HbmDevice;

pub(crate) use chunk::HbmChunk;
pub(crate) use gpu::Activity;
use gpu::Gpu;
use landing::{Place, Transfer};
use maker::Snapshot;

/// Copies to and from one device at one time: enough to fill a link with blocks of some hundred KiB.
const COPIES_IN_FLIGHT: u32 = 64;

/// Opens a device by its configuration.
pub type OpenDevice = Arc<dyn Fn(&HbmDevice) -> Result<Arc<dyn Device>, DeviceError> + Send + Sync>;
/// Where the end of an operation goes.
pub(crate) type Finish = Arc<dyn Fn(OpId, Result<Done, Fault>) + Send + Sync>;
/// Who is told that a device is lost.
pub(crate) type TellLost = Arc<dyn Fn(GpuId) + Send + Sync>;

/// Chunks of all devices.
#[derive(Default)]
pub(crate) struct Table(RwLock<BTreeMap<ChunkId, Arc<HbmChunk>>>);

impl Table {
    fn find(&self, chunk: ChunkId) -> Option<Arc<HbmChunk>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&chunk).cloned()
    }

    fn insert(&self, id: ChunkId, chunk: HbmChunk) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(chunk));
    }

    fn remove(&self, chunk: ChunkId) -> Option<Arc<HbmChunk>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&chunk)
    }
}

/// See the module.
pub struct Hbm {
    slots: Vec<Slot>,
    table: Arc<Table>,
}

/// One configured device, there or not. Its place is its number.
struct Slot {
    config: HbmDevice,
    gpu: Result<Gpu, DeviceError>,
}

/// Both ends of a copy and the chunks behind them.
pub(crate) struct Copying {
    pub(crate) op: OpId,
    pub(crate) source: (FrameRef, Option<Arc<ChunkMemory>>),
    pub(crate) target: (FrameRef, Option<Arc<ChunkMemory>>),
    pub(crate) expect: BlockHeader,
}

impl Hbm {
    /// Opens what is configured. A device that cannot be opened keeps its number, and is off. Takes seconds.
    pub(crate) fn open(
        configured: &[HbmDevice],
        files: (&Path, &[PathBuf]),
        open: &OpenDevice,
        finish: &Finish,
        lost: &TellLost,
    ) -> Self {
        let table = Arc::new(Table::default());
        let slots = configured.iter().zip(0_u16..).map(|(config, number)| {
            let id = GpuId::new(number);
            let opened = open(config).and_then(|device| {
                let tell = Arc::clone(lost);
                let mut gpu = Gpu::start(
                    id,
                    device,
                    config.bytes,
                    Arc::clone(&table),
                    finish,
                    Arc::new(move || tell(id)),
                )?;
                gpu.use_files(config.gds, files);
                Ok(gpu)
            });
            match &opened {
                Ok(gpu) => tracing::info!(device = %config.name, number, "{}", gpu.describe()),
                Err(error) => {
                    tracing::error!(device = %config.name, number, %error, "a device of the Hbm tier is off");
                }
            }
            Slot { config: config.clone(), gpu: opened }
        });
        Self { slots: slots.collect(), table }
    }

    /// What the core must know.
    pub(crate) fn core_configs(&self) -> Vec<GpuConfig> {
        self.slots.iter().map(|slot| self.core_config(slot)).collect()
    }

    fn core_config(&self, slot: &Slot) -> GpuConfig {
        let reaches = |other: &Slot| match (&slot.gpu, &other.gpu) {
            (Ok(gpu), Ok(other)) => gpu.device().reaches(other.device().info()),
            (Err(_), _) | (_, Err(_)) => false,
        };
        let numbers = (0_u16..).map(GpuId::new);
        let peers = self.slots.iter().zip(numbers).filter(|(other, _)| reaches(other));
        GpuConfig {
            bytes: slot.config.bytes,
            bytes_min: slot.config.bytes_min,
            reads: match &slot.gpu {
                Ok(gpu) if gpu.reads_files() => HbmReads::Direct,
                Ok(_) | Err(_) => HbmReads::ThroughPinned,
            },
            peers: peers.fold(GpuSet::NONE, |peers, (_, id)| peers.with(id)),
            copies_in_flight: COPIES_IN_FLIGHT,
        }
    }

    /// Devices that are configured and could not be opened.
    pub(crate) fn absent(&self) -> Vec<GpuId> {
        let numbers = (0_u16..).map(GpuId::new);
        self.slots.iter().zip(numbers).filter(|(slot, _)| slot.gpu.is_err()).map(|(_, id)| id).collect()
    }

    /// Why devices that are configured are off, a sentence each.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let complaint = |slot: &Slot| {
            let error = slot.gpu.as_ref().err()?;
            Some(format!("{} of the Hbm tier is off: {error}", slot.config.name))
        };
        self.slots.iter().filter_map(complaint).collect()
    }

    /// Whether nothing is configured.
    pub(crate) fn is_off(&self) -> bool {
        self.slots.is_empty()
    }

    /// A device, by its number; `None` where it was never opened.
    pub(crate) fn info(&self, gpu: GpuId) -> Option<&DeviceInfo> {
        self.opened(gpu).map(|gpu| gpu.device().info())
    }

    /// Its name in the configuration.
    pub(crate) fn name(&self, gpu: GpuId) -> String {
        self.slots.get(usize::from(gpu.get())).map(|slot| slot.config.name.to_string()).unwrap_or_default()
    }

    /// Bytes of it that the daemon may take.
    pub(crate) fn bytes(&self, gpu: GpuId) -> ByteCount {
        self.slots.get(usize::from(gpu.get())).map_or(ByteCount::new(0), |slot| slot.config.bytes)
    }

    /// Why it is off, or what it is.
    pub(crate) fn note(&self, gpu: GpuId) -> String {
        match self.slots.get(usize::from(gpu.get())).map(|slot| &slot.gpu) {
            None => String::new(),
            Some(Err(error)) => format!("off: {error}"),
            Some(Ok(gpu)) => gpu.note(),
        }
    }

    /// What it does now.
    pub(crate) fn activity(&self, gpu: GpuId) -> Option<Activity> {
        self.opened(gpu).map(Gpu::activity)
    }

    fn opened(&self, gpu: GpuId) -> Option<&Gpu> {
        self.slots.get(usize::from(gpu.get()))?.gpu.as_ref().ok()
    }

    fn running(&self) -> impl Iterator<Item = &Gpu> {
        self.slots.iter().filter_map(|slot| slot.gpu.as_ref().ok())
    }

    /// A chunk of a device; `None` if it is none, or was dropped.
    pub(crate) fn chunk(&self, chunk: ChunkId) -> Option<Arc<HbmChunk>> {
        self.table.find(chunk)
    }

    /// Makes a chunk.
    pub(crate) fn create(&self, op: OpId, gpu: GpuId, made: (ChunkId, ByteCount, u32), finish: &Finish) {
        match self.opened(gpu) {
            Some(gpu) => gpu.create(op, made),
            // The core was told at the start that it is off, and asks no more.
            None => refuse(finish, op),
        }
    }

    /// Drops a chunk. False: it is none of a device.
    pub(crate) fn drop_chunk(&self, op: OpId, chunk: ChunkId) -> bool {
        let Some(held) = self.table.find(chunk) else { return false };
        let Some(gpu) = self.opened(held.gpu) else { return false };
        gpu.drop_chunk(op, chunk);
        true
    }

    /// A client vouched that it writes no more. False: it is no window of a device.
    pub(crate) fn close_window(&self, op: OpId, chunk: ChunkId) -> bool {
        let Some(gpu) = self.table.find(chunk).and_then(|held| self.opened(held.gpu)) else { return false };
        gpu.answer(op, Ok(Done::Plain));
        true
    }

    /// Stores a fence at once. False: the frame is not on a device.
    pub(crate) fn set_fence(&self, frame: FrameRef, fence: Fence) -> bool {
        let table = self.table.0.read().unwrap_or_else(PoisonError::into_inner);
        let found = table.get(&frame.chunk);
        if let Some(held) = found {
            held.fences.set(frame.index, fence);
        }
        found.is_some()
    }

    /// Compares a frame on a device with its checksum. False: it is not on a device.
    pub(crate) fn verify(&self, op: OpId, frame: FrameRef, expect: BlockHeader) -> bool {
        let Some(held) = self.table.find(frame.chunk) else { return false };
        let Some(gpu) = self.opened(held.gpu) else { return false };
        gpu.verify(op, Place::Device(held, frame.index), expect);
        true
    }

    /// Starts a read from a file into a device's frame. False: the frame is not on a device.
    pub(crate) fn read(
        &self,
        op: OpId,
        source: (DeviceId, u64),
        target: FrameRef,
        expect: BlockHeader,
    ) -> bool {
        let Some(held) = self.table.find(target.chunk) else { return false };
        let Some(gpu) = self.opened(held.gpu) else { return false };
        gpu.read(op, source, Place::Device(held, target.index), expect);
        true
    }

    /// Starts a copy that has an end on a device. False: it has none.
    pub(crate) fn copy(&self, copying: Copying) -> bool {
        let Copying { op, source, target, expect } = copying;
        let place = |(frame, memory): (FrameRef, Option<Arc<ChunkMemory>>)| match self.table.find(frame.chunk)
        {
            Some(held) => Some(Place::Device(held, frame.index)),
            None => memory.map(|memory| Place::Host(memory, frame.index)),
        };
        let (Some(source), Some(target)) = (place(source), place(target)) else { return false };
        // A device reads what it has and writes what comes to it: the target's does the work, if there is one.
        let works = target.gpu().or(source.gpu()).and_then(|gpu| self.opened(gpu));
        let (Some(works), from) = (works, source.gpu()) else { return false };
        let direct = match (from.and_then(|gpu| self.opened(gpu)), target.gpu()) {
            (Some(from), Some(_)) => works.device().reaches(from.device().info()),
            (None, _) | (_, None) => true,
        };
        let transfer = Transfer { op, source, target, expect };
        match from.and_then(|gpu| self.opened(gpu)).filter(|_| !direct) {
            Some(from) => from.send_through_host(transfer, works),
            None => works.transfer(transfer),
        }
        true
    }

    /// The bytes of a frame on a device and its fence after they were read; `None` if it is gone. Waits, some seconds
    /// at worst.
    pub(crate) fn snapshot(&self, gpu: GpuId, frame: FrameRef, length: ByteCount) -> Option<Snapshot> {
        self.opened(gpu)?.snapshot(frame, length)
    }

    /// Host memory that was made for the pool: devices learn it, each in its own time.
    pub(crate) fn register(&self, memory: &Arc<ChunkMemory>) {
        self.running().for_each(|gpu| gpu.register(memory.host_bytes()));
    }

    /// Host memory that goes: `then` runs when no device knows it any more.
    pub(crate) fn forget(&self, memory: &Arc<ChunkMemory>, then: Box<dyn FnOnce() + Send>) {
        let last = Arc::new(maker::Last::new(then));
        self.running().for_each(|gpu| gpu.forget(memory.host_bytes(), Arc::clone(&last)));
    }
}

/// Answers from another thread: whoever asks holds the lock that the answer takes.
fn refuse(finish: &Finish, op: OpId) {
    let finish = Arc::clone(finish);
    let spawned = std::thread::Builder::new()
        .name("hbm-refuse".to_owned())
        .spawn(move || finish(op, Err(Fault::NoMemory)));
    if let Err(error) = spawned {
        tracing::error!(%op, %error, "an operation on an absent device cannot be answered");
    }
}
