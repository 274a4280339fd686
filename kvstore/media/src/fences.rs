//! The fences of one chunk: a memfd of one word a frame, which only the daemon
//! can write.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{self, AtomicU64, Ordering};

use terrace_core::{ByteCount, Fence};

use crate::memfd::{Mapping, memfd, reopen, seal, truncate};
use crate::memory::PAGE_BYTES;

/// Fences of a chunk, wherever its data is. Dropped: unmapped and closed; who maps them keeps them as they are.
#[derive(Debug)]
pub struct FencePages {
    memory: OwnedFd,
    mapping: Mapping,
    frames: u32,
}

impl FencePages {
    /// Fences of 1.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create(frames: u32) -> io::Result<Self> {
        let bytes = (u64::from(frames) * 8).next_multiple_of(PAGE_BYTES);
        let memory = memfd("terrace-fences", 0)?;
        truncate(memory.as_fd(), bytes)?;
        let mapping = Mapping::new(memory.as_fd(), bytes)?;
        let fences = Self { memory, mapping, frames };
        (0..frames).for_each(|index| fences.set(index, Fence::new(1)));
        seal(fences.memory.as_fd(), libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
        Ok(fences)
    }

    /// A new read-only descriptor.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn share(&self) -> io::Result<OwnedFd> {
        reopen(self.memory.as_fd(), libc::O_RDONLY).or_else(|_| self.memory.try_clone())
    }

    /// Length of the memory.
    pub fn bytes(&self) -> ByteCount {
        ByteCount::new(self.mapping.bytes)
    }

    /// Stores a fence. Whoever sees a byte that this thread stores later, and then
    /// looks at the fence, sees this one or a later one.
    ///
    /// # Panics
    /// If there is no such frame.
    pub fn set(&self, index: u32, fence: Fence) {
        self.cell(index).store(fence.get(), Ordering::Release);
        // A release store keeps what was before it before it, and lets what comes after it pass: this does not.
        atomic::fence(Ordering::Release);
    }

    /// Loads a fence, acquire order.
    ///
    /// # Panics
    /// If there is no such frame.
    pub fn fence(&self, index: u32) -> Fence {
        Fence::new(self.cell(index).load(Ordering::Acquire))
    }

    fn cell(&self, index: u32) -> &AtomicU64 {
        assert!(index < self.frames, "fence {index} of a chunk of {} frames", self.frames);
        // SAFETY: the mapping holds `frames` aligned u64 and lives as long as self; other processes can only
        // load from it, because the memory is sealed against writable mappings.
        unsafe { &*self.mapping.base.as_ptr().cast::<AtomicU64>().add(index as usize) }
    }
}
