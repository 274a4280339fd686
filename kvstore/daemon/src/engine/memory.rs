//! Effects that go to the pool's memory or to a device, by where their chunk is.

use std::sync::Arc;

use terrace_core::{BlockHeader, ByteCount, ChunkId, Done, Fault, Fence, FrameRef, Memory, OpId};
use terrace_media::{Access, MediaOp};

use super::{Engine, State};
use crate::hbm::Copying;

impl Engine {
    pub(super) fn create_chunk(
        &self,
        state: &mut State,
        op: OpId,
        memory: Memory,
        (chunk, access): (ChunkId, Access),
        (frame_bytes, frames): (ByteCount, u32),
    ) {
        match memory {
            Memory::Hbm(gpu) => self.hbm.create(op, gpu, (chunk, frame_bytes, frames), &self.finish),
            Memory::Pinned => {
                if !self.hbm.is_off() {
                    state.making.insert(op, chunk);
                }
                self.media.start(MediaOp::CreateChunk { op, chunk, access, frame_bytes, frames });
            }
        }
    }

    /// A chunk of the pool that was made just now is made known to the devices.
    pub(super) fn show_devices(&self, state: &mut State, op: OpId, outcome: &Result<Done, Fault>) {
        if let Some(chunk) = state.making.remove(&op)
            && *outcome == Ok(Done::ChunkCreated)
            && let Some(memory) = self.media.chunk(chunk)
        {
            self.hbm.register(&memory);
        }
    }

    pub(super) fn set_fence(&self, frame: FrameRef, fence: Fence) {
        if !self.hbm.set_fence(frame, fence) {
            self.media.set_fence(frame, fence);
        }
    }

    pub(super) fn copy(&self, op: OpId, source: FrameRef, target: FrameRef, expect: BlockHeader) {
        let end = |frame: FrameRef| (frame, self.media.chunk(frame.chunk));
        let copying = || Copying { op, source: end(source), target: end(target), expect };
        if self.hbm.is_off() || !self.hbm.copy(copying()) {
            self.media.start(MediaOp::Copy { op, source, target, expect });
        }
    }

    pub(super) fn drop_chunk(&self, op: OpId, chunk: ChunkId) {
        if self.hbm.drop_chunk(op, chunk) {
            return;
        }
        match self.media.chunk(chunk).filter(|_| !self.hbm.is_off()) {
            // Devices let go of it first: what they know keeps the memory.
            Some(memory) => {
                let media = Arc::clone(&self.media);
                let then = move || media.start(MediaOp::DropChunk { op, chunk });
                self.hbm.forget(&memory, Box::new(then));
            }
            None => self.media.start(MediaOp::DropChunk { op, chunk }),
        }
    }
}
