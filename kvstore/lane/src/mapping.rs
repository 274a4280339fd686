//! A client's mapping of one chunk: its data and its fences.
//!
//! The daemon owns the memory. We may touch it for as long as it is mapped, even
//! after the daemon is gone, because a memfd sealed against shrinking cannot
//! lose pages under us. Children do not inherit the mapping.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer, Fence};

use crate::crew::{Called, Start};
use crate::error::MapError;
use crate::fold::{self, Way};
use crate::shared::{SharedBytes, sum_parts};
use crate::syscall;

const FENCE_BYTES: usize = size_of::<u64>();
// What is mapped in one call: a call takes microseconds, whatever its length. Reserved huge pages are mapped one by one.
const GRANULE_BYTES: usize = 256 << 10;
// What begins here can be mapped by pages of this size, where the memory has them.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// How the data is mapped. Fences are always read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A chunk of the pool or somebody else's window.
    Read,
    /// This session's own open window.
    Write,
}

/// One mapped chunk. Unmapped when dropped: keep it in an `Arc` that every view holds.
pub struct Mapping {
    data: Region,
    fences: FenceMapping,
    writing: Mutex<Writing>,
    ahead: Ahead,
}

/// Which granules of a mapping have their pages in the page table, as far as somebody saw to it: a bit each.
struct Ahead {
    granule: usize,
    granules: Box<[AtomicU64]>,
}

impl Ahead {
    fn of(length: usize, page: usize) -> Self {
        let granule = page.max(GRANULE_BYTES);
        let words = length.div_ceil(granule).div_ceil(u64::BITS as usize);
        Self { granule, granules: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether this is the first time that somebody asks.
    fn is_new(&self, granule: usize) -> bool {
        let (word, bit) = (&self.granules[granule / u64::BITS as usize], 1 << (granule % u64::BITS as usize));
        word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    fn forget(&self) {
        self.granules.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// A chunk's fences alone, for data that something else than the kernel maps: device memory.
/// Children do not inherit it.
pub struct FenceMapping(Region);

impl fmt::Debug for FenceMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FenceMapping").field("fences", &self.count()).finish()
    }
}

impl FenceMapping {
    /// Maps a chunk's fences, read-only. The descriptor is closed.
    ///
    /// # Errors
    /// Memory that is shorter than announced or could shrink, or what the kernel says.
    pub fn map(fences: OwnedFd, bytes: ByteCount) -> Result<Self, MapError> {
        Region::map("fences", fences.as_fd(), bytes, libc::PROT_READ).map(Self)
    }

    fn count(&self) -> usize {
        self.0.length / FENCE_BYTES
    }

    /// The fence of a frame now (load acquire); `None` outside the fence pages.
    pub fn fence(&self, frame: u32) -> Option<Fence> {
        let index = frame as usize;
        if index >= self.count() {
            return None;
        }
        // SAFETY: the index is inside the mapped fence pages, which are page
        // aligned and live as long as self. The daemon stores to these words as
        // atomics of the same size; we only load.
        let word = unsafe { AtomicU64::from_ptr(self.0.start.as_ptr().cast::<u64>().add(index)) };
        Some(Fence::new(u64::from_le(word.load(Ordering::Acquire))))
    }
}

/// Whether and by how many the data is being written.
#[derive(Debug)]
enum Writing {
    Denied,
    /// `read_only` is an opening of the same memory that cannot write; `None` where there is no /proc.
    Allowed {
        views: usize,
        read_only: Option<OwnedFd>,
    },
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("bytes", &self.data.length)
            .field("fences", &self.fences.count())
            .field("writable", &self.is_writable())
            .finish()
    }
}

impl Mapping {
    /// Maps a chunk's data and fences. The descriptors are closed: a mapping does not need them.
    ///
    /// # Errors
    /// Memory that is shorter than announced or could shrink, or what the kernel says.
    pub fn map(
        data: OwnedFd,
        bytes: ByteCount,
        fences: OwnedFd,
        fence_bytes: ByteCount,
        access: Access,
    ) -> Result<Arc<Self>, MapError> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        let fences = FenceMapping::map(fences, fence_bytes)?;
        let writing = match access {
            Access::Read => Writing::Denied,
            Access::Write => {
                Writing::Allowed { views: 0, read_only: syscall::reopen_read_only(data.as_fd()).ok() }
            }
        };
        let page = syscall::page_bytes(data.as_fd());
        let data = Region::map("data", data.as_fd(), bytes, protection)?;
        let ahead = Ahead::of(data.length, page);
        Ok(Arc::new(Self { data, fences, writing: Mutex::new(writing), ahead }))
    }

    /// Length of the data.
    pub fn bytes(&self) -> ByteCount {
        ByteCount::new(self.data.length as u64)
    }

    /// Whether stores into the data are possible.
    pub fn is_writable(&self) -> bool {
        matches!(*self.writing(), Writing::Allowed { .. })
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fence of a frame now (load acquire); `None` outside the fence pages.
    pub fn fence(&self, frame: u32) -> Option<Fence> {
        self.fences.fence(frame)
    }

    /// Whether so many bytes from `offset` are inside the chunk.
    #[inline]
    pub fn holds(&self, offset: u64, length: ByteCount) -> bool {
        self.data.part(offset, length).is_some()
    }

    /// A readable view of `length` bytes from `offset`; `None` if that is not inside the chunk.
    pub fn view(self: &Arc<Self>, offset: u64, length: ByteCount) -> Option<SharedBytes> {
        Arc::clone(self).into_view(offset, length)
    }

    /// The same, which takes the caller's reference over.
    pub fn into_view(self: Arc<Self>, offset: u64, length: ByteCount) -> Option<SharedBytes> {
        let (start, length) = self.data.part(offset, length)?;
        let owner: Arc<dyn Any + Send + Sync> = self;
        // SAFETY: the range is inside the mapping, which lives as long as the owner.
        Some(unsafe { SharedBytes::from_raw(owner, start, length) })
    }

    /// A writable view; `None` if it is not inside the chunk or the chunk is not
    /// writable. While one lives, write permission stays.
    pub fn view_mut(self: &Arc<Self>, offset: u64, length: ByteCount) -> Option<SharedBytesMut> {
        let bytes = self.view(offset, length)?;
        match &mut *self.writing() {
            Writing::Denied => return None,
            Writing::Allowed { views, .. } => *views += 1,
        }
        Some(SharedBytesMut { bytes, mapping: Arc::clone(self) })
    }

    /// Drops the permission to write for good. The range is mapped anew from an
    /// opening that cannot write, so that the kernel counts this process among
    /// the readers and no `mprotect` brings the permission back. Views stay good.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while a writable view lives, or what the
    /// kernel says. The permission is then still there, and the window must not
    /// be handed back.
    pub fn drop_write(&self) -> io::Result<()> {
        let mut writing = self.writing();
        match &*writing {
            Writing::Denied => return Ok(()),
            Writing::Allowed { views: 0, read_only } => match read_only {
                Some(memory) => self.data.map_again(memory.as_fd())?,
                // The daemon sees that this process could write again, and does not use the window.
                None => self.data.protect()?,
            },
            Writing::Allowed { .. } => return Err(io::ErrorKind::ResourceBusy.into()),
        }
        self.ahead.forget();
        *writing = Writing::Denied;
        Ok(())
    }

    /// Maps all pages, as [`Self::map_ahead`] does.
    pub fn populate(&self) {
        self.map_ahead(self.data.start.as_ptr(), self.data.length);
    }

    /// Maps the pages between two addresses, where each sixteen of them would cost a fault of their own: a MiB takes 82
    /// us so, which took 238. They are there already. Populated as if for reading, they can be written where the mapping
    /// allows it, for the kernel watches no writes to this memory. Pages that are mapped take half as long again, so
    /// that each place is mapped once.
    pub(crate) fn map_ahead(&self, start: *const u8, length: usize) {
        let Some(offset) = start.addr().checked_sub(self.data.start.addr().get()) else { return };
        let end = offset.saturating_add(length).min(self.data.length);
        let bytes = self.ahead.granule;
        for granule in offset / bytes..end.div_ceil(bytes) {
            if self.ahead.is_new(granule) {
                self.data.populate(granule * bytes, bytes);
            }
        }
    }
}

/// A piece of this session's own window that may be written while this lives.
#[derive(Debug)]
pub struct SharedBytesMut {
    bytes: SharedBytes,
    mapping: Arc<Mapping>,
}

impl SharedBytesMut {
    /// The same bytes for reading.
    pub fn bytes(&self) -> &SharedBytes {
        &self.bytes
    }

    /// The first byte. Stores through it are allowed while this view lives, and
    /// fault once write permission was dropped after it.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.bytes.as_ptr().cast_mut()
    }

    /// Whole blocks are copied past the cache, however short: for whoever copies many, and looks at none of them soon.
    pub fn go_past_the_cache(&mut self) {
        self.bytes.go_past_the_cache();
    }

    /// Copies of whole blocks are whole for other threads than the caller's only after [`crate::drain`].
    pub fn drain_later(&mut self) {
        self.bytes.drain_later();
    }

    /// Copies `source` in, from `offset` on. Two copies into one place at once
    /// leave any mix of the two.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn copy_from(&self, offset: usize, source: &[u8]) {
        let inside = offset.checked_add(source.len()).is_some_and(|end| end <= self.bytes.len());
        assert!(inside, "a part lies inside its whole");
        // SAFETY: the target range was just checked, stays mapped while the
        // mapping lives and writable while this view does; `source` is ordinary
        // memory, so the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), self.as_mut_ptr().add(offset), source.len());
        }
    }

    /// Copies a whole block in and computes the checksum of `source`, in one pass over it, in parts by those that are called
    /// where it is long enough.
    ///
    /// # Panics
    /// If `source` has another length.
    pub fn copy_from_and_checksum(
        &self,
        source: &[u8],
        block: BlockId,
        generation: u64,
        called: Called,
    ) -> Checksum {
        assert_eq!(source.len(), self.bytes.len(), "source and target of a copy have one length");
        self.bytes.map_ahead();
        let begun = Checksummer::new(block, ByteCount::new(source.len() as u64), generation);
        let target = Start(self.as_mut_ptr());
        // To fetch the source ahead costs a tenth beside these stores, and more where blocks are short.
        let way = || Way::alone(self.bytes.stores());
        let sum = sum_parts(source.len(), called, begun, |offset, length, summer| {
            // SAFETY: the block stays mapped and writable while this view lives and has the source's length; `source` is
            // ordinary memory, so the two do not overlap.
            unsafe {
                let (source, target) = (source.as_ptr().add(offset), target.at(offset));
                fold::copy_and_sum_by(source, target, length, way(), summer);
            }
        });
        self.bytes.copied();
        sum
    }
}

impl Drop for SharedBytesMut {
    fn drop(&mut self) {
        match &mut *self.mapping.writing() {
            // Permission cannot go while a view lives.
            Writing::Denied => unreachable!("a writable view outlived its permission"),
            Writing::Allowed { views, .. } => *views -= 1,
        }
    }
}

/// A mapped range, unmapped on drop.
struct Region {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a region is an address range of the process, valid on every thread;
// what is stored there is reached only through atomics and raw copies.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(
        what: &'static str,
        memory: BorrowedFd<'_>,
        bytes: ByteCount,
        protection: i32,
    ) -> Result<Self, MapError> {
        let announced = bytes.get();
        let length = usize::try_from(announced)
            .ok()
            .filter(|length| *length > 0 && *length <= isize::MAX.unsigned_abs())
            .ok_or(MapError::BadLength { announced })?;
        let kernel = |source| MapError::Kernel { what, source };
        let (found, sealed) = syscall::memory_facts(memory).map_err(kernel)?;
        if found < announced {
            return Err(MapError::TooSmall { what, announced, found });
        }
        if !sealed {
            return Err(MapError::NotSealed { what });
        }
        let wish = syscall::place_of(length, HUGE_PAGE_BYTES);
        // SAFETY: a new shared mapping at an address of the kernel's choice: where something lies at the one that is
        // wished for, it takes another.
        let start = unsafe {
            libc::mmap(
                wish,
                length,
                protection,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                memory.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(kernel(io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast::<u8>()).expect("the kernel does not map page zero unasked");
        let region = Self { start, length };
        region.keep_from_children().map_err(kernel)?;
        Ok(region)
    }

    /// The same memory in the same place, from a read-only opening.
    fn map_again(&self, memory: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: the range is exactly our own mapping, and the memory the one that is mapped there: whoever reads
        // through a view finds the same bytes before and after. The kernel puts one in the other's place in one step.
        let start = unsafe {
            libc::mmap(
                self.start.as_ptr().cast(),
                self.length,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
                memory.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.keep_from_children()
    }

    fn protect(&self) -> io::Result<()> {
        // SAFETY: the range is exactly our own mapping; who may still store through a view is the caller's business.
        match unsafe { libc::mprotect(self.start.as_ptr().cast(), self.length, libc::PROT_READ) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A kernel that does not know the advice, or has no memory, refuses; then the pages fault in one by one.
    fn populate(&self, offset: usize, length: usize) {
        let Some(rest) = self.length.checked_sub(offset) else { return };
        // SAFETY: the range is inside our own mapping.
        let _refused = unsafe {
            let start = self.start.as_ptr().add(offset);
            libc::madvise(start.cast(), length.min(rest), libc::MADV_POPULATE_READ)
        };
    }

    fn keep_from_children(&self) -> io::Result<()> {
        // SAFETY: the range is our own mapping; the advice changes what a fork inherits, nothing else.
        match unsafe { libc::madvise(self.start.as_ptr().cast(), self.length, libc::MADV_DONTFORK) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn part(&self, offset: u64, length: ByteCount) -> Option<(NonNull<u8>, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let length = usize::try_from(length.get()).ok()?;
        if offset.checked_add(length)? > self.length {
            return None;
        }
        // SAFETY: `offset` was just checked against the mapping's length.
        Some((unsafe { self.start.add(offset) }, length))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us and every view of it held the
        // mapping alive, so nobody can use it any more.
        let answer = unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert_eq!(answer, 0, "unmapping our own range cannot fail");
    }
}

#[cfg(test)]
mod tests;
