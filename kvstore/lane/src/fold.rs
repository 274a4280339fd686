//! Copying and summing in one look at each byte.
//!
//! Shared bytes may change between two looks, so whoever sums what he copies keeps it to himself in between: in a
//! buffer, or, as here, in registers. The sum is CRC-64/NVMe, folded: eight registers hold 128 bytes that are worth
//! all that came before them, and the [`Checksummer`] goes on with those.

use terrace_core::Checksummer;

use crate::copy::STREAM_BYTES_MIN;

/// Bytes that the eight registers hold.
const GROUP_BYTES: usize = 128;
/// Where the processor cannot fold: short enough to stay in the first-level cache.
const BUFFER_BYTES: usize = 2 << 10;
const LINE_BYTES: usize = 64;

/// Where copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// Into the cache.
    Cached,
    /// Past it; whole for other threads after [`crate::copy::drain`].
    Streamed,
}

impl Stores {
    /// For a block of this length.
    pub(crate) fn of(length: usize) -> Self {
        if length < STREAM_BYTES_MIN { Self::Cached } else { Self::Streamed }
    }
}

/// Copies between ranges that do not overlap, and sums what was copied: every byte of the source is loaded once.
///
/// # Safety
/// `source` must be readable and `target` writable for `length` bytes, and the two must not overlap. Bytes of the
/// source may change meanwhile.
pub(crate) unsafe fn copy_and_sum(
    source: *const u8,
    target: *mut u8,
    length: usize,
    stores: Stores,
    summer: &mut Checksummer,
) {
    let head = target.align_offset(LINE_BYTES).min(length);
    let groups = if can_fold() { (length - head) / GROUP_BYTES * GROUP_BYTES } else { 0 };
    // SAFETY: head, groups and rest add up to the length, so that each part lies in the two ranges. The target of the
    // groups is aligned to a line, and the processor was asked whether it can fold.
    unsafe {
        by_buffer(source, target, head, summer);
        fold(source.add(head), target.add(head), groups, stores, summer);
        let done = head + groups;
        by_buffer(source.add(done), target.add(done), length - done, summer);
    }
}

/// By way of a buffer.
///
/// # Safety
/// As [`copy_and_sum`].
unsafe fn by_buffer(source: *const u8, target: *mut u8, length: usize, summer: &mut Checksummer) {
    let mut buffer = [0u8; BUFFER_BYTES];
    let mut done = 0;
    while done < length {
        let piece = &mut buffer[..(length - done).min(BUFFER_BYTES)];
        // SAFETY: `done` and the piece are at most `length`; the buffer is our own.
        unsafe {
            std::ptr::copy_nonoverlapping(source.add(done), piece.as_mut_ptr(), piece.len());
            std::ptr::copy_nonoverlapping(piece.as_ptr(), target.add(done), piece.len());
        }
        summer.update(piece);
        done += piece.len();
    }
}

#[cfg(target_arch = "x86_64")]
fn can_fold() -> bool {
    std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
fn can_fold() -> bool {
    false
}

/// Copies and sums whole groups.
///
/// # Safety
/// As [`copy_and_sum`]; the target is aligned to a line, `length` is a multiple of a group, and 0 if the processor
/// cannot fold.
#[cfg(target_arch = "x86_64")]
unsafe fn fold(source: *const u8, target: *mut u8, length: usize, stores: Stores, summer: &mut Checksummer) {
    use std::arch::x86_64::{_mm_store_si128, _mm_stream_si128};
    if length == 0 {
        return;
    }
    // SAFETY: the caller's promise; the two stores need no more than the alignment.
    let left = unsafe {
        match stores {
            Stores::Cached => {
                x86::fold(source, target, length, summer.state(), |at, part| _mm_store_si128(at, part))
            }
            Stores::Streamed => {
                x86::fold(source, target, length, summer.state(), |at, part| _mm_stream_si128(at, part))
            }
        }
    };
    *summer = Checksummer::from_folded(&left);
}

/// Elsewhere nothing is folded.
///
/// # Safety
/// `length` is 0.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn fold(_: *const u8, _: *mut u8, length: usize, _: Stores, _: &mut Checksummer) {
    assert!(length == 0, "nothing is folded on this processor");
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_clmulepi64_si128, _mm_cvtsi64_si128, _mm_prefetch, _mm_set_epi64x,
        _mm_setzero_si128, _mm_store_si128, _mm_xor_si128,
    };

    use super::GROUP_BYTES;

    const PART_BYTES: usize = size_of::<__m128i>();
    /// Parts that are loaded together: with the eight sums they fit into the sixteen registers.
    const LOADED: usize = 4;
    const SUMS: usize = 2 * LOADED;
    const _: () = assert!(SUMS * PART_BYTES == GROUP_BYTES);
    /// So far ahead of the copy its source is fetched.
    const FETCH_AHEAD_BYTES: usize = 2 << 10;

    /// The polynomial of CRC-64/NVMe, lowest bit highest.
    const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
    /// What moves the two halves of a sum over a group.
    const LOW: u64 = power(1024 + 63);
    const HIGH: u64 = power(1024 - 1);

    /// `x` to this power, modulo the polynomial.
    const fn power(exponent: u32) -> u64 {
        let (mut value, mut at) = (1 << 63, 0);
        while at < exponent {
            value = if value & 1 == 1 { value >> 1 ^ POLYNOMIAL } else { value >> 1 };
            at += 1;
        }
        value
    }

    /// Copies and sums; answers bytes whose sum, begun with nothing, is that of everything.
    ///
    /// # Safety
    /// As [`super::fold`]; `length` is not 0, and the processor has `pclmulqdq`.
    #[target_feature(enable = "pclmulqdq")]
    pub(super) unsafe fn fold(
        source: *const u8,
        target: *mut u8,
        length: usize,
        state: u64,
        store: impl Fn(*mut __m128i, __m128i),
    ) -> [u8; GROUP_BYTES] {
        let keys = _mm_set_epi64x(HIGH.cast_signed(), LOW.cast_signed());
        let mut sums = [_mm_setzero_si128(); SUMS];
        let mut state = _mm_cvtsi64_si128(state.cast_signed());
        let mut at = 0;
        while at < length {
            _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(at + FETCH_AHEAD_BYTES).cast());
            _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(at + FETCH_AHEAD_BYTES + 64).cast());
            for half in [0, LOADED] {
                let offset = at + half * PART_BYTES;
                // SAFETY: a half of a group lies in the source, which has whole groups.
                let parts = unsafe { load(source.add(offset)) };
                for (index, part) in parts.into_iter().enumerate() {
                    // SAFETY: inside the target, which is as long.
                    store(unsafe { target.add(offset + index * PART_BYTES) }.cast(), part);
                    let sum = &mut sums[half + index];
                    let low = _mm_clmulepi64_si128::<0x00>(*sum, keys);
                    let high = _mm_clmulepi64_si128::<0x11>(*sum, keys);
                    *sum = _mm_xor_si128(_mm_xor_si128(low, high), part);
                }
            }
            sums[0] = _mm_xor_si128(sums[0], state);
            state = _mm_setzero_si128();
            at += GROUP_BYTES;
        }
        let mut left = Lines([0; GROUP_BYTES]);
        for (index, sum) in sums.into_iter().enumerate() {
            // SAFETY: part `index` of the group; the lines are aligned.
            unsafe { _mm_store_si128(left.0.as_mut_ptr().add(index * PART_BYTES).cast(), sum) };
        }
        left.0
    }

    #[repr(align(64))]
    struct Lines([u8; GROUP_BYTES]);

    /// Loads once: what a compiler loads, it may load a second time.
    ///
    /// # Safety
    /// The parts must be readable.
    #[inline(always)]
    unsafe fn load(source: *const u8) -> [__m128i; LOADED] {
        let (first, second, third, fourth);
        // SAFETY: four loads of the caller's range, of any alignment.
        unsafe {
            asm!(
                "movdqu {first}, [{source}]",
                "movdqu {second}, [{source} + 16]",
                "movdqu {third}, [{source} + 32]",
                "movdqu {fourth}, [{source} + 48]",
                source = in(reg) source,
                first = out(xmm_reg) first,
                second = out(xmm_reg) second,
                third = out(xmm_reg) third,
                fourth = out(xmm_reg) fourth,
                options(readonly, nostack, preserves_flags),
            );
        }
        [first, second, third, fourth]
    }
}

#[cfg(test)]
mod tests {
    use terrace_core::{BlockId, ByteCount};

    use super::*;
    use crate::copy::drain;

    // A wrong constant, or a seam between head, groups and rest, would make a sum that nobody else computes: lengths
    // and alignments around a line and a group are compared with the sum of the whole, and bytes beside must stay.
    #[test]
    fn the_sum_is_that_of_the_whole() {
        let block = BlockId::from_bytes([9; 16]);
        let source: Vec<u8> =
            (0..5000usize).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[2]).collect();
        for stores in [Stores::Cached, Stores::Streamed] {
            for skew in [0, 1, 15, 16, 63, 64] {
                for length in (0..140).chain([255, 256, 257, 383, 384, 400, 4096, 4901]) {
                    let mut target = vec![0xEE; 5000];
                    let mut summer = Checksummer::new(block, ByteCount::new(length as u64), 4);
                    let (from, to) = (source.as_ptr(), target.as_mut_ptr());
                    // SAFETY: skew and length fit both vectors, which are different.
                    unsafe { copy_and_sum(from.add(3), to.add(skew), length, stores, &mut summer) };
                    drain();
                    let whole = terrace_core::checksum(block, 4, &source[3..3 + length]);
                    assert_eq!(summer.finish(), whole, "{stores:?} {skew} {length}");
                    assert_eq!(
                        target[skew..skew + length],
                        source[3..3 + length],
                        "{stores:?} {skew} {length}"
                    );
                    let beside = target[..skew].iter().chain(&target[skew + length..]);
                    assert!(beside.copied().all(|byte| byte == 0xEE), "bytes beside {skew} {length} changed");
                }
            }
        }
    }
}
