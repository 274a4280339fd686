//! The fold of CRC-64/NVMe by 256 bits at a time, for processors with VPCLMULQDQ and AVX2.

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, _mm256_clmulepi64_epi128, _mm256_set_epi64x, _mm256_setzero_si256, _mm256_store_si256,
    _mm256_xor_si256,
};

use super::LINE_BYTES;
use super::power::power;
use crate::copy::fetch;

/// Bytes that the eight registers hold.
pub(super) const GROUP_BYTES: usize = 256;
const PART_BYTES: usize = size_of::<__m256i>();
/// Parts that are loaded together: with the eight sums they fit into the sixteen registers.
const LOADED: usize = 4;
const SUMS: usize = 2 * LOADED;
const _: () = assert!(SUMS * PART_BYTES == GROUP_BYTES);
/// So far ahead of the sum its source is fetched: without, 1 GiB from memory takes a fifth longer on Zen 3; half or
/// twice as far makes no difference.
pub(super) const AHEAD: usize = 2 << 10;

/// What moves the two halves of a sum over a group.
const LOW: u64 = power(GROUP_BITS + 63);
const HIGH: u64 = power(GROUP_BITS - 1);
const GROUP_BITS: u32 = 2048;
const _: () = assert!(GROUP_BITS as usize == GROUP_BYTES * 8);

/// Sums, and hands every part with its place to `store`. Answers bytes whose sum, begun with nothing, is that of
/// everything. `AHEAD` and `next` are those of [`fetch`].
///
/// # Safety
/// `source` must be readable for `length` bytes, a multiple of a group and not 0; the processor has `vpclmulqdq` and
/// `avx2`.
#[target_feature(enable = "vpclmulqdq,avx2")]
pub(super) unsafe fn fold<const AHEAD: usize>(
    source: *const u8,
    length: usize,
    state: u64,
    next: *const u8,
    store: impl Fn(usize, __m256i),
) -> [u8; GROUP_BYTES] {
    let (high, low) = (HIGH.cast_signed(), LOW.cast_signed());
    let keys = _mm256_set_epi64x(high, low, high, low);
    let mut sums = [_mm256_setzero_si256(); SUMS];
    let mut state = _mm256_set_epi64x(0, 0, 0, state.cast_signed());
    let mut at = 0;
    while at < length {
        for line in (0..GROUP_BYTES).step_by(LINE_BYTES) {
            fetch::<AHEAD>(source, length, at + line, next);
        }
        for half in [0, LOADED] {
            let offset = at + half * PART_BYTES;
            // SAFETY: a half of a group lies in the source, which has whole groups.
            let parts = unsafe { load(source.add(offset)) };
            for (index, part) in parts.into_iter().enumerate() {
                store(offset + index * PART_BYTES, part);
                let sum = &mut sums[half + index];
                let low = _mm256_clmulepi64_epi128::<0x00>(*sum, keys);
                let high = _mm256_clmulepi64_epi128::<0x11>(*sum, keys);
                *sum = _mm256_xor_si256(_mm256_xor_si256(low, high), part);
            }
        }
        sums[0] = _mm256_xor_si256(sums[0], state);
        state = _mm256_setzero_si256();
        at += GROUP_BYTES;
    }
    let mut left = Lines([0; GROUP_BYTES]);
    for (index, sum) in sums.into_iter().enumerate() {
        // SAFETY: part `index` of the group; the lines are aligned.
        unsafe { _mm256_store_si256(left.0.as_mut_ptr().add(index * PART_BYTES).cast(), sum) };
    }
    left.0
}

#[repr(align(64))]
struct Lines([u8; GROUP_BYTES]);

/// Loads once: what a compiler loads, it may load a second time.
///
/// # Safety
/// The parts must be readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(source: *const u8) -> [__m256i; LOADED] {
    let (first, second, third, fourth);
    // SAFETY: four loads of the caller's range, of any alignment.
    unsafe {
        asm!(
            "vmovdqu {first}, [{source}]",
            "vmovdqu {second}, [{source} + 32]",
            "vmovdqu {third}, [{source} + 64]",
            "vmovdqu {fourth}, [{source} + 96]",
            source = in(reg) source,
            first = out(ymm_reg) first,
            second = out(ymm_reg) second,
            third = out(ymm_reg) third,
            fourth = out(ymm_reg) fourth,
            options(readonly, nostack, preserves_flags),
        );
    }
    [first, second, third, fourth]
}
