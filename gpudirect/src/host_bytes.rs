//! Host memory that a device copies to and from: a pointer, a length, and what
//! keeps them valid. Other processes and the device may store into it at any
//! moment, so there is never a reference to its bytes.

use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use terrace_core::ByteCount;

use crate::error::DeviceError;

/// A piece of host memory, readable and writable. Keeps the mapping alive.
#[derive(Clone)]
pub struct HostBytes {
    start: NonNull<u8>,
    length: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is only used by copies that tolerate concurrent writers;
// the memory stays mapped while `owner` lives, on whatever thread.
unsafe impl Send for HostBytes {}
// SAFETY: as above; `&HostBytes` offers copies only.
unsafe impl Sync for HostBytes {}

impl fmt::Debug for HostBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBytes").field("length", &self.length).finish_non_exhaustive()
    }
}

/// Anonymous pages. Unmapped when dropped.
struct Pages {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the pages are nobody else's, and go when this value does.
unsafe impl Send for Pages {}
// SAFETY: nothing is offered through a shared reference.
unsafe impl Sync for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; views keep this value alive, so there are none any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

impl HostBytes {
    /// A view of `length` bytes from `start`.
    ///
    /// # Safety
    /// The bytes must be mapped readable and writable for as long as `owner` (or a
    /// clone of it) lives, the memory behind them must not shrink, and no Rust
    /// reference to them may be used while a view lives.
    pub unsafe fn from_raw(owner: Arc<dyn Any + Send + Sync>, start: NonNull<u8>, length: usize) -> Self {
        Self { start, length, owner }
    }

    /// Fresh memory of zeros, from the start of a page.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn anonymous(bytes: ByteCount) -> io::Result<Self> {
        let length = usize::try_from(bytes.get()).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start: NonNull<u8> =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        // SAFETY: the range was just mapped; advice changes no byte, and its failure costs speed alone.
        unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
        Ok(Self { start, length, owner: Arc::new(Pages { start, length }) })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The first byte, valid for [`HostBytes::len`] bytes while a view lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its address as a number, for comparisons.
    pub fn address(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`].
    pub fn part(&self, offset: u64, bytes: ByteCount) -> Result<Self, DeviceError> {
        let range = range(self.length as u64, offset, bytes.get())?;
        // SAFETY: `range` was checked against the length, so the pointer stays inside or one past its end.
        let start = unsafe { self.start.add(range.start) };
        Ok(Self { start, length: range.end - range.start, owner: Arc::clone(&self.owner) })
    }

    /// Copies everything out.
    ///
    /// # Panics
    /// If `target` has another length.
    pub fn copy_to(&self, target: &mut [u8]) {
        assert_eq!(target.len(), self.length, "source and target of a copy have one length");
        // SAFETY: the source is mapped while `owner` lives and has the target's length. A concurrent store makes
        // the bytes arbitrary, which u8 allows; `target` is the caller's alone, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr(), target.as_mut_ptr(), self.length) };
    }

    /// Copies everything in.
    ///
    /// # Panics
    /// If `source` has another length.
    pub fn copy_from(&self, source: &[u8]) {
        assert_eq!(source.len(), self.length, "source and target of a copy have one length");
        // SAFETY: as in `copy_to`, the other way.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.start.as_ptr(), self.length) };
    }
}

/// The range of a part, checked against its whole.
pub(crate) fn range(length: u64, offset: u64, bytes: u64) -> Result<std::ops::Range<usize>, DeviceError> {
    let end = offset.checked_add(bytes);
    let outside = DeviceError::OutOfBounds { offset, end: end.unwrap_or(u64::MAX), length };
    let end = end.filter(|end| *end <= length).ok_or_else(|| outside.clone())?;
    match (usize::try_from(offset), usize::try_from(end)) {
        (Ok(start), Ok(end)) => Ok(start..end),
        (Err(_), _) | (_, Err(_)) => Err(outside),
    }
}
