//! A chunk on a device, with its fences in host memory.

use std::sync::Arc;

use terrace_core::{ByteCount, GpuId};
use terrace_gpudirect::{Chunk, DeviceBytes, DeviceError};
use terrace_media::{FencePages, PAGE_BYTES};

/// See the module. Carved as chunks of Pinned are: each frame has a page for a header and then the payload.
#[derive(Debug)]
pub(crate) struct HbmChunk {
    pub(crate) gpu: GpuId,
    pub(crate) fences: FencePages,
    memory: Arc<Chunk>,
    frame_bytes: u64,
    frames: u32,
}

impl HbmChunk {
    pub(crate) fn new(
        gpu: GpuId,
        memory: Arc<Chunk>,
        frame_bytes: ByteCount,
        frames: u32,
    ) -> std::io::Result<Self> {
        let fences = FencePages::create(frames)?;
        Ok(Self { gpu, fences, memory, frame_bytes: frame_bytes.get(), frames })
    }

    /// The memory, to be exported.
    pub(crate) fn memory(&self) -> &Arc<Chunk> {
        &self.memory
    }

    /// Takes the memory out of its chunk.
    pub(crate) fn into_memory(self) -> Arc<Chunk> {
        self.memory
    }

    /// A payload of this length in a frame.
    pub(crate) fn payload(&self, index: u32, length: ByteCount) -> Result<DeviceBytes, DeviceError> {
        if index >= self.frames || length.get() > self.frame_bytes - PAGE_BYTES {
            return Err(DeviceError::BadJob { detail: "a payload outside of its frame" });
        }
        let offset = u64::from(index) * self.frame_bytes + PAGE_BYTES;
        DeviceBytes::new(Arc::clone(&self.memory), offset, length)
    }
}
