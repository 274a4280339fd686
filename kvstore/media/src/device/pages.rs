//! Page-aligned buffers of our own, for header pages and bounce copies.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Mutex;

use crate::memory::{HUGE_PAGE_BYTES, PAGE_BYTES};

/// Whole pages, aligned for O_DIRECT.
#[derive(Debug)]
pub struct AlignedPages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the pages are owned like a Vec's.
unsafe impl Send for AlignedPages {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedPages {}

impl AlignedPages {
    /// Zeroed pages that hold at least `bytes`, on huge pages if they are long enough.
    ///
    /// # Panics
    /// If `bytes` is beyond the address space.
    pub fn new(bytes: u64) -> Self {
        let huge = bytes >= HUGE_PAGE_BYTES;
        let align =
            usize::try_from(if huge { HUGE_PAGE_BYTES } else { PAGE_BYTES }).expect("fits an address");
        let length = usize::try_from(bytes.max(1).next_multiple_of(PAGE_BYTES))
            .expect("callers ask for no more than a frame or a superblock");
        let layout = Layout::from_size_align(length, align).expect("a power of two and a sane size");
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc(layout) };
        let Some(base) = NonNull::new(raw) else { handle_alloc_error(layout) };
        if huge {
            // Scattered pages halve the speed of the disk. A refusal costs no more than that.
            // SAFETY: a range of our own; the advice changes no content.
            unsafe { libc::madvise(raw.cast(), length, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the whole allocation, initialised here.
        unsafe { raw.write_bytes(0, length) };
        Self { base, layout }
    }

    /// Length in bytes, a multiple of 4096.
    pub fn bytes(&self) -> u64 {
        self.layout.size() as u64
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: our own initialised allocation.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.layout.size()) }
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and we are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl Drop for AlignedPages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

// SAFETY: the allocation stays where it is when the value moves, and all of it is initialised.
unsafe impl tokio_uring::buf::IoBuf for AlignedPages {
    fn stable_ptr(&self) -> *const u8 {
        self.base.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.layout.size()
    }

    fn bytes_total(&self) -> usize {
        self.layout.size()
    }
}

// SAFETY: as above; there is nothing to remember about initialised bytes.
unsafe impl tokio_uring::buf::IoBufMut for AlignedPages {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.base.as_ptr()
    }

    unsafe fn set_init(&mut self, _position: usize) {}
}

/// Bounce buffers that wait to be used again: a fresh one costs page faults.
#[derive(Debug)]
pub(crate) struct PagePool {
    free: Mutex<Vec<AlignedPages>>,
    keep: usize,
}

impl PagePool {
    /// Keeps at most this many.
    pub(crate) fn new(keep: usize) -> Self {
        Self { free: Mutex::new(Vec::new()), keep }
    }

    /// Pages of at least this length; their old content is still there.
    pub(crate) fn take(&self, bytes: u64) -> AlignedPages {
        let found = {
            let mut free = self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            free.iter().position(|pages| pages.bytes() >= bytes).map(|position| free.swap_remove(position))
        };
        found.unwrap_or_else(|| AlignedPages::new(bytes))
    }

    /// Takes pages back.
    pub(crate) fn give(&self, pages: AlignedPages) {
        let mut free = self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if free.len() < self.keep {
            free.push(pages);
        }
    }
}
