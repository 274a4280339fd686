//! The fold of CRC-64/NVMe by 512 bits at a time, for processors with VPCLMULQDQ and AVX-512.

use std::arch::asm;
use std::arch::x86_64::{
    __m512i, _mm512_clmulepi64_epi128, _mm512_set_epi64, _mm512_setzero_si512, _mm512_store_si512,
    _mm512_ternarylogic_epi64, _mm512_xor_si512,
};

use super::LINE_BYTES;
use super::power::power;
use crate::copy::fetch;

/// Bytes that the eight registers hold.
pub(super) const GROUP_BYTES: usize = 512;
const PART_BYTES: usize = size_of::<__m512i>();
/// Parts that are loaded together.
const LOADED: usize = 4;
const SUMS: usize = 2 * LOADED;
const _: () = assert!(SUMS * PART_BYTES == GROUP_BYTES && PART_BYTES == LINE_BYTES);
/// So far ahead of a sum its source is fetched: 38 GiB/s from memory on Zen 5, which is what loads alone reach; 35.5
/// without. Beside stores it costs a tenth.
pub(super) const AHEAD: usize = 4 << 10;
/// Exclusive or of three.
const XOR: i32 = 0x96;

/// What moves the two halves of a sum over a group.
const LOW: u64 = power(GROUP_BITS + 63);
const HIGH: u64 = power(GROUP_BITS - 1);
const GROUP_BITS: u32 = 4096;
const _: () = assert!(GROUP_BITS as usize == GROUP_BYTES * 8);

/// Sums, and hands every part with its place to `store`. Answers bytes whose sum, begun with nothing, is that of
/// everything. `AHEAD` and `next` are those of [`fetch`].
///
/// # Safety
/// `source` must be readable for `length` bytes, a multiple of a group and not 0; the processor has `vpclmulqdq` and
/// `avx512f`.
#[target_feature(enable = "vpclmulqdq,avx512f")]
pub(super) unsafe fn fold<const AHEAD: usize>(
    source: *const u8,
    length: usize,
    state: u64,
    next: *const u8,
    store: impl Fn(usize, __m512i),
) -> [u8; GROUP_BYTES] {
    let (high, low) = (HIGH.cast_signed(), LOW.cast_signed());
    let keys = _mm512_set_epi64(high, low, high, low, high, low, high, low);
    let mut sums = [_mm512_setzero_si512(); SUMS];
    let mut state = _mm512_set_epi64(0, 0, 0, 0, 0, 0, 0, state.cast_signed());
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
                let low = _mm512_clmulepi64_epi128::<0x00>(*sum, keys);
                let high = _mm512_clmulepi64_epi128::<0x11>(*sum, keys);
                *sum = _mm512_ternarylogic_epi64::<XOR>(low, high, part);
            }
        }
        sums[0] = _mm512_xor_si512(sums[0], state);
        state = _mm512_setzero_si512();
        at += GROUP_BYTES;
    }
    let mut left = Lines([0; GROUP_BYTES]);
    for (index, sum) in sums.into_iter().enumerate() {
        // SAFETY: part `index` of the group; the lines are aligned.
        unsafe { _mm512_store_si512(left.0.as_mut_ptr().add(index * PART_BYTES).cast(), sum) };
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
#[target_feature(enable = "avx512f")]
unsafe fn load(source: *const u8) -> [__m512i; LOADED] {
    let (first, second, third, fourth);
    // SAFETY: four loads of the caller's range, of any alignment.
    unsafe {
        asm!(
            "vmovdqu64 {first}, [{source}]",
            "vmovdqu64 {second}, [{source} + 64]",
            "vmovdqu64 {third}, [{source} + 128]",
            "vmovdqu64 {fourth}, [{source} + 192]",
            source = in(reg) source,
            first = out(zmm_reg) first,
            second = out(zmm_reg) second,
            third = out(zmm_reg) third,
            fourth = out(zmm_reg) fourth,
            options(readonly, nostack, preserves_flags),
        );
    }
    [first, second, third, fourth]
}
