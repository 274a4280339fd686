//! Copies that go past the cache.
//!
//! A block that is longer than the cache would push everything else out of it, and
//! each line of the target would be fetched only to be overwritten. Stores of this
//! module do neither. What is copied is as arbitrary as its source when somebody
//! else writes there meanwhile.

/// Blocks from this length on are copied past the cache: shorter ones are still in
/// it when the reader looks at them.
pub(crate) const STREAM_BYTES_MIN: usize = 256 << 10;
/// Bytes of a line of the cache.
pub(crate) const LINE: usize = 64;

/// So far ahead of a copy past the cache its source is fetched.
#[cfg(target_arch = "x86_64")]
pub(crate) const FETCH_AHEAD_BYTES: usize = 8 << 10;
/// Into the first cache. A hint of [`fetch`].
#[cfg(target_arch = "x86_64")]
pub(crate) const NEAR: i32 = std::arch::x86_64::_MM_HINT_T0;
/// Into the second cache.
#[cfg(target_arch = "x86_64")]
pub(crate) const FAR: i32 = std::arch::x86_64::_MM_HINT_T1;

/// How the source of a copy past the cache is fetched ahead.
///
/// Zen 5 does so by itself, but not across gaps: blocks of 64 KiB that do not lie side by side were copied at nine tenths of
/// the pace of one long range without, and with half of it or less. Intel's have few requests of the first cache under way, and stores
/// past the cache take of those: a copy that sums what it copies had 12.5 GiB/s (2 MiB) and 11.2 (64 KiB) on Granite Rapids by way of the second
/// cache, 11.5 and 7.7 by way of the first, and 7.6 and 8.1 without.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// The processor sees to it.
    Not,
    Near,
    Far,
}

#[cfg(target_arch = "x86_64")]
impl Ahead {
    /// On this processor, with where the next copy's source begins: where that is null and is asked for all the same, it is
    /// taken to lie behind this one.
    pub(crate) fn of_copy(source: *const u8, length: usize, next: *const u8) -> (Self, *const u8) {
        match (is_intel(), next.is_null()) {
            (true, true) => (Self::Far, source.wrapping_add(length)),
            (true, false) => (Self::Far, next),
            (false, true) => (Self::Not, next),
            (false, false) => (Self::Near, next),
        }
    }
}

/// Whether Intel made the processor. Asked once: in a virtual machine the answer takes longer than a block.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_intel() -> bool {
    use std::arch::x86_64::__cpuid;
    use std::sync::LazyLock;

    static INTEL: LazyLock<bool> = LazyLock::new(|| {
        let maker = __cpuid(0);
        [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    });
    *INTEL
}

/// Fetches what a copy of `length` bytes from `source` comes to `AHEAD` bytes behind `at`: behind its end, that is the
/// beginning of `next`. 0 fetches nothing.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn fetch<const AHEAD: usize, const HINT: i32>(
    source: *const u8,
    length: usize,
    at: usize,
    next: *const u8,
) {
    if AHEAD > 0 {
        let ahead = at + AHEAD;
        let line =
            if ahead < length { source.wrapping_add(ahead) } else { next.wrapping_add(ahead - length) };
        // SAFETY: a hint, which loads nothing and never faults, whatever the address; SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_prefetch::<HINT>(line.cast()) };
    }
}

/// Copies between ranges that do not overlap. The copy is whole for other threads
/// after [`drain`]. `next` is where the source of the next copy begins, null if that is not known; nothing is read through it.
///
/// # Safety
/// `source` must be readable and `target` writable for `length` bytes, and the two
/// must not overlap. Bytes of the source may change meanwhile.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn stream(mut source: *const u8, mut target: *mut u8, length: usize, next: *const u8) {
    let head = target.align_offset(LINE).min(length);
    let whole = (length - head) / LINE * LINE;
    let tail = length - head - whole;
    // SAFETY: head, lines and tail add up to the length, so that every access lies in the two ranges; the target is
    // aligned to a line after the head, as its stores need. The processor was asked for AVX-512; SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        source = source.add(head);
        target = target.add(head);
        let (ahead, next) = Ahead::of_copy(source, whole, next);
        match (std::arch::is_x86_feature_detected!("avx512f"), ahead) {
            (true, Ahead::Not) => lines_at_once::<0, NEAR>(source, target, whole, next),
            (true, Ahead::Near) => lines_at_once::<FETCH_AHEAD_BYTES, NEAR>(source, target, whole, next),
            (true, Ahead::Far) => lines_at_once::<FETCH_AHEAD_BYTES, FAR>(source, target, whole, next),
            (false, Ahead::Not) => lines::<0, NEAR>(source, target, whole, next),
            (false, Ahead::Near) => lines::<FETCH_AHEAD_BYTES, NEAR>(source, target, whole, next),
            (false, Ahead::Far) => lines::<FETCH_AHEAD_BYTES, FAR>(source, target, whole, next),
        }
        std::ptr::copy_nonoverlapping(source.add(whole), target.add(whole), tail);
    }
}

/// Each line by one store: 27 GiB/s on Zen 5, where four have 25.8.
///
/// # Safety
/// As [`stream`]; the target is aligned to a line, and the length is a multiple of one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn lines_at_once<const AHEAD: usize, const HINT: i32>(
    source: *const u8,
    target: *mut u8,
    length: usize,
    next: *const u8,
) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};

    for at in (0..length).step_by(LINE) {
        fetch::<AHEAD, HINT>(source, length, at, next);
        // SAFETY: a line of both ranges.
        unsafe { _mm512_stream_si512(target.add(at).cast(), _mm512_loadu_si512(source.add(at).cast())) };
    }
}

/// Each line by four stores.
///
/// # Safety
/// As [`stream`]; the target is aligned to a line, and the length is a multiple of one.
#[cfg(target_arch = "x86_64")]
unsafe fn lines<const AHEAD: usize, const HINT: i32>(
    source: *const u8,
    target: *mut u8,
    length: usize,
    next: *const u8,
) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

    const PART: usize = size_of::<__m128i>();
    for at in (0..length).step_by(LINE) {
        fetch::<AHEAD, HINT>(source, length, at, next);
        // SAFETY: a line of both ranges.
        unsafe {
            let parts =
                [0, PART, 2 * PART, 3 * PART].map(|part| _mm_loadu_si128(source.add(at + part).cast()));
            for (index, part) in parts.into_iter().enumerate() {
                _mm_stream_si128(target.add(at + index * PART).cast(), part);
            }
        }
    }
}

/// Makes copies whole for other threads: orders what went past the cache before everything that this thread stores later.
#[cfg(target_arch = "x86_64")]
pub fn drain() {
    // SAFETY: an instruction of SSE, which is part of x86-64; it touches no memory.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

/// Elsewhere stores are plain.
#[cfg(not(target_arch = "x86_64"))]
pub fn drain() {}

/// Copies between ranges that do not overlap.
///
/// # Safety
/// `source` must be readable and `target` writable for `length` bytes, and the two
/// must not overlap. Bytes of the source may change meanwhile.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn stream(source: *const u8, target: *mut u8, length: usize, _: *const u8) {
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
                unsafe {
                    // Any address will do.
                    let next = if length % 2 == 0 { std::ptr::null() } else { source.as_ptr() };
                    stream(source.as_ptr().add(3), target.as_mut_ptr().add(skew), length, next);
                }
                assert_eq!(target[skew..skew + length], source[3..3 + length], "{skew} {length}");
                let beside = target[..skew].iter().chain(&target[skew + length..]);
                assert!(beside.copied().all(|byte| byte == 0xEE), "bytes beside {skew} {length} changed");
            }
        }
    }

    // The way that this processor does not take would be wrong without anybody noticing.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn lines_are_copied_by_four_stores_too() {
        let source: Vec<u8> = (0..400usize).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let mut target = vec![0xEE; 400];
        let skew = target.as_ptr().align_offset(LINE);
        // SAFETY: three lines from 5 on are in the source, and from the first whole line on in the target.
        unsafe {
            let (from, to) = (source.as_ptr().add(5), target.as_mut_ptr().add(skew));
            lines::<0, NEAR>(from, to, 3 * LINE, std::ptr::null());
        }
        assert_eq!(target[skew..skew + 3 * LINE], source[5..5 + 3 * LINE]);
        let beside = target[..skew].iter().chain(&target[skew + 3 * LINE..]);
        assert!(beside.copied().all(|byte| byte == 0xEE));
    }
}
