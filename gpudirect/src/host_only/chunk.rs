//! Memory of the stand-in: memfds, mapped shared, and what counts them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Counts, Shared};
use crate::device::ChunkMemory;
use crate::error::DeviceError;

/// Takes itself off a count when it is dropped.
#[derive(Debug)]
pub(super) struct Counted {
    shared: Arc<Shared>,
    off: fn(&mut Counts, u64),
    bytes: u64,
}

impl Counted {
    pub(super) fn made(shared: Arc<Shared>, bytes: u64) -> Self {
        let off = |counts: &mut Counts, bytes| {
            counts.chunks -= 1;
            counts.chunk_bytes -= bytes;
        };
        Self { shared, off, bytes }
    }

    pub(super) fn imported(shared: Arc<Shared>) -> Self {
        Self { shared, off: |counts, _| counts.imports -= 1, bytes: 0 }
    }

    pub(super) fn registered(shared: Arc<Shared>) -> Self {
        Self { shared, off: |counts, _| counts.registrations -= 1, bytes: 0 }
    }

    pub(super) fn flying(shared: Arc<Shared>) -> Self {
        Self { shared, off: |counts, _| counts.flights -= 1, bytes: 0 }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.off)(&mut self.shared.lock().counts, self.bytes);
    }
}

/// A mapping of a memfd.
#[derive(Debug)]
pub(super) struct MemfdChunk {
    start: NonNull<u8>,
    length: usize,
    descriptor: OwnedFd,
    // Dropped last: memory counts until it is unmapped.
    _counted: Counted,
}

// SAFETY: the pointer is used by copies alone, which tolerate other writers; the
// mapping goes with the value.
unsafe impl Send for MemfdChunk {}
// SAFETY: as above; a shared reference offers the address and a descriptor.
unsafe impl Sync for MemfdChunk {}

fn system(call: &'static str) -> DeviceError {
    DeviceError::Driver { call, detail: io::Error::last_os_error().to_string() }
}

/// A memfd of zeros.
pub(super) fn memfd(bytes: u64) -> Result<OwnedFd, DeviceError> {
    let length = libc::off_t::try_from(bytes).map_err(|_| DeviceError::NoMemory { bytes })?;
    // SAFETY: the name ends with a zero; the answer is checked.
    let raw = unsafe {
        libc::memfd_create(c"terrace-host-only".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    };
    if raw < 0 {
        return Err(system("memfd_create"));
    }
    // SAFETY: a fresh descriptor that nobody else has.
    let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: a call on our own descriptor.
    if unsafe { libc::ftruncate(descriptor.as_raw_fd(), length) } != 0 {
        return Err(system("ftruncate"));
    }
    // A chunk that shrank under a mapping would end whoever touches it.
    // SAFETY: a call on our own descriptor.
    if unsafe {
        libc::fcntl(descriptor.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
    } != 0
    {
        return Err(system("F_ADD_SEALS"));
    }
    Ok(descriptor)
}

/// Whether a descriptor is a chunk of this length that cannot shrink.
pub(super) fn check(descriptor: &OwnedFd, bytes: u64) -> Result<(), DeviceError> {
    let bad = |detail: String| DeviceError::BadDescriptor { detail };
    // SAFETY: a question about a descriptor that we own.
    let seals = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(bad("it is no memory that keeps its size".to_owned()));
    }
    // SAFETY: all-zero bytes are a valid `stat`.
    let mut facts: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the one struct that it is given.
    if unsafe { libc::fstat(descriptor.as_raw_fd(), &raw mut facts) } != 0 {
        return Err(bad(io::Error::last_os_error().to_string()));
    }
    if u64::try_from(facts.st_size) != Ok(bytes) {
        return Err(bad(format!("it has {} bytes, not {bytes}", facts.st_size)));
    }
    Ok(())
}

impl MemfdChunk {
    pub(super) fn map(descriptor: OwnedFd, bytes: u64, counted: Counted) -> Result<Self, DeviceError> {
        let length = usize::try_from(bytes).map_err(|_| DeviceError::NoMemory { bytes })?;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                descriptor.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(system("mmap"));
        }
        let start = NonNull::new(start.cast()).ok_or(DeviceError::NoMemory { bytes })?;
        Ok(Self { start, length, descriptor, _counted: counted })
    }

    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }
}

impl ChunkMemory for MemfdChunk {
    fn export(&self) -> Result<OwnedFd, DeviceError> {
        self.descriptor
            .try_clone()
            .map_err(|error| DeviceError::Driver { call: "dup", detail: error.to_string() })
    }
}

impl Drop for MemfdChunk {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; whoever copies keeps the chunk.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
