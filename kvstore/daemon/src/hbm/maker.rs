//! The thread of a device that makes and drops chunks and registers host memory:
//! the driver takes milliseconds for each. Between these it looks whether the
//! device is still there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use terrace_core::{ByteCount, ChunkId, Done, Fault, Fence, FrameRef, GpuId, OpId};
use terrace_gpudirect::{Device, DeviceError, HostBytes, Pinned, copy_out};

use super::chunk::HbmChunk;
use super::landing::Landing;
use super::{Finish, Table};

/// How often a device that nobody uses is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A payload is read out in milliseconds. A device that takes longer has other troubles, and chunks to be made.
const READ_WITHIN: Duration = Duration::from_secs(1);

/// Runs what it holds when its last copy goes.
pub(crate) struct Last(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Last {
    pub(crate) fn new(then: Box<dyn FnOnce() + Send>) -> Self {
        Self(Mutex::new(Some(then)))
    }
}

impl Drop for Last {
    fn drop(&mut self) {
        if let Some(then) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            then();
        }
    }
}

/// A frame's payload and its fence; or why the device did not give it.
pub(crate) type Snapshot = Result<(Vec<u8>, Fence), DeviceError>;

/// What the thread is asked to do, in order.
pub(crate) enum Wish {
    Create { op: OpId, chunk: ChunkId, frame_bytes: ByteCount, frames: u32 },
    Drop { op: OpId, chunk: ChunkId },
    Read { frame: FrameRef, length: ByteCount, answer: Sender<Option<Snapshot>> },
    Register(HostBytes),
    Forget(HostBytes, Arc<Last>),
    Stop,
}

pub(crate) struct Maker {
    pub(crate) gpu: GpuId,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pinned: Arc<Pinned>,
    pub(crate) table: Arc<Table>,
    pub(crate) landing: Arc<Landing>,
    pub(crate) finish: Finish,
    /// Chunks that are alive on the device.
    pub(crate) alive: Arc<AtomicU64>,
}

impl Maker {
    pub(crate) fn run(&self, wishes: &Receiver<Wish>) {
        let mut complained = false;
        loop {
            self.landing.watch();
            match wishes.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = self.count() {
                        self.landing.note(&error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) | Ok(Wish::Stop) => return,
                Ok(Wish::Create { op, chunk, frame_bytes, frames }) => {
                    let outcome = self.create(chunk, frame_bytes, frames);
                    // A device that is lost has told so by its answer.
                    let _ = self.count();
                    (self.finish)(op, outcome);
                }
                Ok(Wish::Drop { op, chunk }) => {
                    let outcome = self.drop_chunk(chunk);
                    let _ = self.count();
                    (self.finish)(op, outcome);
                }
                Ok(Wish::Read { frame, length, answer }) => {
                    // Whoever asked may have gone.
                    let _ = answer.send(self.read(frame, length));
                }
                Ok(Wish::Register(memory)) => {
                    let added = self.pinned.add(&memory);
                    if let Some(error) = added.why
                        && !std::mem::replace(&mut complained, true)
                    {
                        tracing::warn!(gpu = %self.gpu, %error, "host memory cannot be registered with a device; copies take the slower way");
                    }
                }
                Ok(Wish::Forget(memory, last)) => {
                    self.pinned.remove(&memory);
                    drop(memory);
                    drop(last);
                }
            }
        }
    }

    fn count(&self) -> Result<(), DeviceError> {
        self.alive.store(self.device.room()?.chunks, Ordering::Relaxed);
        Ok(())
    }

    fn create(&self, id: ChunkId, frame_bytes: ByteCount, frames: u32) -> Result<Done, Fault> {
        let bytes = ByteCount::new(frame_bytes.get().saturating_mul(frames.into()));
        let made = self.device.create(bytes).and_then(|memory| {
            HbmChunk::new(self.gpu, memory, frame_bytes, frames)
                .map_err(|error| DeviceError::Driver { call: "memory for fences", detail: error.to_string() })
        });
        match made {
            Ok(chunk) => {
                self.table.insert(id, chunk);
                Ok(Done::ChunkCreated)
            }
            Err(error) => {
                tracing::warn!(gpu = %self.gpu, chunk = %id, %error, "no chunk on a device");
                self.landing.note(&error);
                Err(Fault::NoMemory)
            }
        }
    }

    /// A frame's payload as it is now; `None` if its chunk is gone. On this thread, because a chunk that somebody
    /// reads cannot be dropped. The fence is that after the read: a frame that changed meanwhile has a younger one.
    fn read(&self, frame: FrameRef, length: ByteCount) -> Option<Snapshot> {
        let held = self.table.find(frame.chunk)?;
        let payload = held.payload(frame.index, length).and_then(|source| {
            let mut bytes = vec![0; usize::try_from(length.get()).unwrap_or(0)];
            copy_out(&*self.device, &source, &mut bytes, READ_WITHIN).map(|()| bytes)
        });
        Some(payload.map(|bytes| (bytes, held.fences.fence(frame.index))))
    }

    /// The memory goes when nobody maps it any more, here or elsewhere. What other processes keep is missing on the
    /// device, and nobody else gets it.
    fn drop_chunk(&self, id: ChunkId) -> Result<Done, Fault> {
        let Some(chunk) = self.table.remove(id) else { return Ok(Done::Plain) };
        match Arc::try_unwrap(chunk).map(|chunk| Arc::try_unwrap(chunk.into_memory())) {
            Ok(Ok(memory)) => {
                drop(memory);
                Ok(Done::Plain)
            }
            // A lost device never said that it is done with it. It is kept by whoever waits for that.
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(gpu = %self.gpu, chunk = %id, "a dropped chunk is still used on its device");
                Err(Fault::StillMapped)
            }
        }
    }
}
