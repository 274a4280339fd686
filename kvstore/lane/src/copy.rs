//! Copies that go past the cache.
//!
//! A block that is longer than the cache would push everything else out of it, and
//! each line of the target would be fetched only to be overwritten. Stores of this
//! module do neither. What is copied is as arbitrary as its source when somebody
//! else writes there meanwhile.

/// Blocks from this length on are copied past the cache: shorter ones are still in
/// it when the reader looks at them.
pub(crate) const STREAM_BYTES_MIN: usize = 256 << 10;

/// Copies between ranges that do not overlap. The copy is whole for other threads
/// after [`drain`].
///
/// # Safety
/// `source` must be readable and `target` writable for `length` bytes, and the two
/// must not overlap. Bytes of the source may change meanwhile.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn stream(mut source: *const u8, mut target: *mut u8, length: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

    const LINE: usize = 64;
    const PART: usize = size_of::<__m128i>();
    let head = target.align_offset(LINE).min(length);
    let lines = (length - head) / LINE;
    let tail = (length - head) % LINE;
    // SAFETY: head, lines and tail add up to the length, so that every access lies in the two ranges; the target is
    // aligned to a line after the head, as its stores need. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        source = source.add(head);
        target = target.add(head);
        for _ in 0..lines {
            let parts = [0, PART, 2 * PART, 3 * PART].map(|at| _mm_loadu_si128(source.add(at).cast()));
            _mm_stream_si128(target.cast(), parts[0]);
            _mm_stream_si128(target.add(PART).cast(), parts[1]);
            _mm_stream_si128(target.add(2 * PART).cast(), parts[2]);
            _mm_stream_si128(target.add(3 * PART).cast(), parts[3]);
            source = source.add(LINE);
            target = target.add(LINE);
        }
        std::ptr::copy_nonoverlapping(source, target, tail);
    }
}

/// Orders what [`stream`] stored before everything that this thread stores later.
#[cfg(target_arch = "x86_64")]
pub(crate) fn drain() {
    // SAFETY: an instruction of SSE, which is part of x86-64; it touches no memory.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

/// Elsewhere stores are plain.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn drain() {}

/// Copies between ranges that do not overlap.
///
/// # Safety
/// `source` must be readable and `target` writable for `length` bytes, and the two
/// must not overlap. Bytes of the source may change meanwhile.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn stream(source: *const u8, target: *mut u8, length: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(source, target, length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Head, lines and tail could leave a seam: every alignment and length around a line is compared, and the bytes
    // beside the target must stay.
    #[test]
    fn every_alignment_copies_all_and_no_more() {
        let source: Vec<u8> = (0..400usize).map(|at| u8::try_from(at % 251).unwrap()).collect();
        for skew in 0..70 {
            for length in (0..140).chain([256, 300]) {
                let mut target = vec![0xEE; 400];
                assert!(skew + length < target.len());
                // SAFETY: both ranges were just checked, and belong to different vectors.
                unsafe { stream(source.as_ptr().add(3), target.as_mut_ptr().add(skew), length) };
                assert_eq!(target[skew..skew + length], source[3..3 + length], "{skew} {length}");
                let beside = target[..skew].iter().chain(&target[skew + length..]);
                assert!(beside.copied().all(|byte| byte == 0xEE), "bytes beside {skew} {length} changed");
            }
        }
    }
}
