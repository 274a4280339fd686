//! The loops that the lane is compared with, and memory for them.

use std::hint::black_box;

use memmap2::{Advice, MmapMut};
use terrace_lane::bare;

use super::BARE_BLOCK;

#[allow(clippy::cast_possible_truncation, reason = "a page is shorter than any address space")]
const HEADER_BYTES: usize = terrace_core::HEADER_PAGE_BYTES as usize;

/// Copies a block into a place for it, with the block that is copied next.
pub(super) type Loop = fn(&[u8], &mut [u8], &[u8]);

/// Copies and sums in one pass.
pub(super) fn checked(source: &[u8], target: &mut [u8], _: &[u8]) {
    black_box(bare::copy_and_checksum(source, target, BARE_BLOCK));
}

/// The same, past the cache.
pub(super) fn checked_streaming(source: &[u8], target: &mut [u8], _: &[u8]) {
    black_box(bare::copy_streaming_and_checksum(source, target, BARE_BLOCK, None));
}

/// The same, with the source fetched ahead.
pub(super) fn checked_ahead(source: &[u8], target: &mut [u8], next: &[u8]) {
    black_box(bare::copy_streaming_and_checksum(source, target, BARE_BLOCK, Some(next)));
}

/// Copies past the cache.
pub(super) fn streaming(source: &[u8], target: &mut [u8], _: &[u8]) {
    bare::copy_streaming(source, target, None);
}

/// The same, with the source fetched ahead.
pub(super) fn streaming_ahead(source: &[u8], target: &mut [u8], next: &[u8]) {
    bare::copy_streaming(source, target, Some(next));
}

/// Ordinary memory as long as a pool, with blocks as they lie in a pool's frames: each behind a page of its own.
pub(super) struct Frames {
    memory: MmapMut,
    /// Where the next blocks are stored.
    next: usize,
}

impl Frames {
    /// # Errors
    /// When the kernel has not so much.
    pub(super) fn new(bytes: usize) -> std::io::Result<Self> {
        let mut memory = MmapMut::map_anon(bytes)?;
        // Where the kernel has no large pages, small ones do.
        let _advice = memory.advise(Advice::HugePage);
        memory.fill(1);
        Ok(Self { memory, next: 0 })
    }

    /// Uses all of it once: a host takes longer for what its guest did not touch for some seconds.
    pub(super) fn write_all(&mut self) {
        self.memory.fill(2);
    }

    /// The first blocks, for reading: the same ones each time.
    pub(super) fn first(&self, block: usize) -> Vec<&[u8]> {
        self.memory.chunks_exact(HEADER_BYTES + block).map(|frame| &frame[HEADER_BYTES..]).collect()
    }

    /// Places for so many blocks which were not used for as long as is possible.
    pub(super) fn oldest(&mut self, block: usize, count: usize) -> Vec<&mut [u8]> {
        let frame = HEADER_BYTES + block;
        if self.next + count * frame > self.memory.len() {
            self.next = 0;
        }
        let begin = self.next;
        self.next += count * frame;
        let frames = self.memory[begin..self.next].chunks_exact_mut(frame);
        frames.map(|frame| &mut frame[HEADER_BYTES..]).collect()
    }
}
