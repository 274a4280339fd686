//! How the C library's allocator deals with memory that is given back to it.

/// What a heap keeps at its end; there are a few heaps a processor.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: libc::c_int = 8 << 20;
/// Larger pieces are mapped from the kernel one by one, and given back to it: larger than the messages of a stream, of
/// which each is made in memory of its own, some more than a mebibyte.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_FROM_BYTES: libc::c_int = 4 << 20;

/// A heap grows by so much more than it was asked for: by itself it asks the kernel for each few KiB, and waits while it maps
/// something else.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const GROWN_BY_BYTES: libc::c_int = 1 << 20;

/// From now on some freed memory stays with the process. By itself the C library gives it back to the kernel from 128 KiB on,
/// and fetches it again page by page, a microsecond each: a sixth of what the answers to a burst of writes took. For the
/// beginning of a program.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: plain calls; values that the C library does not take change nothing.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
        libc::mallopt(libc::M_TOP_PAD, GROWN_BY_BYTES);
    }
}
