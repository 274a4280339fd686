//! An allocator that puts large tables on huge pages.
//!
//! A residency table of a million blocks is some 150 MiB that is used at random
//! places: on pages of 4 KiB most of these uses miss the translation cache, too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{self, NonNull};

/// Of the smallest huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// From this size on an allocation has pages of its own: more than any buffer of a request.
const LARGE_BYTES: usize = 8 << 20;

/// The system's allocator, but for large allocations: these begin at a huge page, are made of huge pages where the
/// kernel has them to give (`/sys/kernel/mm/transparent_hugepage/enabled` is not `never`), and grow without being
/// copied.
///
/// For programs that hold a [`terrace_core::Core`], as their `#[global_allocator]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct LargePages;

// SAFETY: what is large depends on the layout alone, which is the same when memory is asked for and given back; such
// memory is a mapping of its own, at least as long and as aligned as the layout says. All other goes to the system.
unsafe impl GlobalAlloc for LargePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match pages(layout) {
            Some(length) => map(length),
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match pages(layout) {
            // Fresh pages are zero.
            Some(length) => map(length),
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        match pages(layout) {
            Some(length) => unmap(memory, length),
            // SAFETY: the caller's promise.
            None => unsafe { System.dealloc(memory, layout) },
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, old: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is good for this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(bytes, old.align()) };
        let (before, after) = (pages(old), pages(new));
        if before.is_none() && after.is_none() {
            // SAFETY: the caller's promise.
            return unsafe { System.realloc(memory, old, bytes) };
        }
        if before == after {
            return memory;
        }
        // SAFETY: the caller's promise.
        let moved = unsafe { self.alloc(new) };
        if moved.is_null() {
            return moved;
        }
        if let (Some(before), Some(after)) = (before, after)
            && before < after
        {
            // The pages themselves move, over the beginning of the new mapping, which nobody has used yet.
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: both are whole mappings of ours, of these lengths at least, that do not overlap.
            let there =
                unsafe { libc::mremap(memory.cast(), before, before, flags, moved.cast::<libc::c_void>()) };
            if there != libc::MAP_FAILED {
                return moved;
            }
        }
        // SAFETY: both are at least so long, and the new one is nobody else's.
        unsafe { ptr::copy_nonoverlapping(memory, moved, old.size().min(bytes)) };
        // SAFETY: the caller's promise.
        unsafe { self.dealloc(memory, old) };
        moved
    }
}

/// Length of the mapping that a layout gets; `None`: it is the system's.
fn pages(layout: Layout) -> Option<usize> {
    let large = layout.size() >= LARGE_BYTES && layout.align() <= HUGE_PAGE_BYTES;
    large.then(|| layout.size().checked_next_multiple_of(HUGE_PAGE_BYTES)).flatten()
}

/// New memory that begins at a huge page; null if there is none.
fn map(length: usize) -> *mut u8 {
    // One page more, so that there is a beginning of one in it; what is outside is given back.
    let Some(whole) = length.checked_add(HUGE_PAGE_BYTES) else { return ptr::null_mut() };
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a mapping at a place that the kernel chooses touches nothing that exists.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), whole, access, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return ptr::null_mut();
    }
    let mapped = mapped.cast::<u8>();
    let before = mapped.align_offset(HUGE_PAGE_BYTES);
    let memory = mapped.wrapping_add(before);
    unmap(mapped, before);
    unmap(memory.wrapping_add(length), HUGE_PAGE_BYTES - before);
    // SAFETY: the mapping is ours. Refused where the kernel has no huge pages: then these are small ones.
    unsafe { libc::madvise(memory.cast(), length, libc::MADV_HUGEPAGE) };
    memory
}

/// Gives back whole pages of a mapping of ours, which nothing refers to any more.
fn unmap(memory: *mut u8, length: usize) {
    if let (Some(memory), true) = (NonNull::new(memory), length > 0) {
        // SAFETY: see above. It can fail only by splitting a mapping beyond the kernel's limit of them: then the
        // memory stays mapped, and unused.
        unsafe { libc::munmap(memory.as_ptr().cast(), length) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn mark(size: usize, place: usize) -> u8 {
        (size ^ place).to_le_bytes()[0]
    }

    /// Bytes could be lost or stay mapped when memory becomes large, grows, shrinks, and is no longer large.
    #[test]
    fn bytes_stay_and_memory_goes_back() {
        let sizes =
            [1 << 10, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, 3 * LARGE_BYTES, LARGE_BYTES, 5000];
        let mut layout = Layout::from_size_align(100, 64).unwrap();
        // SAFETY: each layout is the one that the memory was asked for with.
        unsafe {
            let mut memory = LargePages.alloc(layout);
            for size in sizes {
                let kept = layout.size().min(size);
                for place in [0, kept / 2, kept - 1] {
                    memory.add(place).write(mark(size, place));
                }
                memory = LargePages.realloc(memory, layout, size);
                layout = Layout::from_size_align(size, 64).unwrap();
                for place in [0, kept / 2, kept - 1] {
                    assert_eq!(memory.add(place).read(), mark(size, place), "{place} of {size}");
                }
                memory.add(size - 1).write(1);
                assert_eq!(memory.align_offset(if size < LARGE_BYTES { 64 } else { HUGE_PAGE_BYTES }), 0);
            }
            LargePages.dealloc(memory, layout);
        }
    }

    /// Every grown table could leave its old pages behind.
    #[test]
    fn nothing_stays_mapped() {
        let lines = || fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        let before = lines();
        for _ in 0..1_000 {
            // SAFETY: each layout is the one that the memory was asked for with.
            unsafe {
                let small = Layout::from_size_align(LARGE_BYTES, 8).unwrap();
                let large = Layout::from_size_align(2 * LARGE_BYTES, 8).unwrap();
                let memory = LargePages.alloc_zeroed(small);
                let memory = LargePages.realloc(memory, small, large.size());
                assert_eq!(memory.add(LARGE_BYTES + 7).read(), 0);
                LargePages.dealloc(memory, large);
            }
        }
        assert!(lines() < before + 100, "{} mappings, {before} before", lines());
    }
}
