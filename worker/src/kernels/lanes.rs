//! Sixteen f32 lanes, as three implementations that agree to the bit.
//!
//! Every operation is either exact or correctly rounded by IEEE 754, which is
//! why the implementations cannot differ. Nothing here may be replaced by an
//! approximation (reciprocal estimates, fast exponentials): blocks are shared
//! between machines.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m256i, __m512, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps,
    _mm256_castps_si256, _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cvtph_ps, _mm256_cvtps_epi32,
    _mm256_div_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_permute2x128_si256, _mm256_set1_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps, _mm256_unpackhi_epi16,
    _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi16, _mm256_unpacklo_epi32,
    _mm256_unpacklo_epi64, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_div_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_max_ps,
    _mm512_min_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

use half::f16;

/// Lanes in one value, of every implementation.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values.
///
/// # Safety
/// Every method of an implementation may be called only inside a function that
/// has the implementation's instructions enabled.
pub(crate) unsafe trait Lanes: Copy {
    unsafe fn splat(value: f32) -> Self;
    /// Reads 16 f32 from `source`, any alignment.
    unsafe fn load(source: *const f32) -> Self;
    /// Reads 16 f16 from `source`, any alignment; exact.
    unsafe fn load_f16(source: *const u16) -> Self;
    /// Writes 16 f32 to `target`, any alignment.
    unsafe fn store(self, target: *mut f32);
    /// `self * factor + addend`, rounded once.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// The larger one; `other` where either is not a number.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller one; `other` where either is not a number.
    unsafe fn min(self, other: Self) -> Self;
    /// `self * 2^exponent` for integral `exponent`, where both the value and the
    /// result are normal numbers; adds to the exponent bits.
    unsafe fn scale_by_power(self, exponent: Self) -> Self;

    /// Reads 16 rows of 16 f16, `stride` values apart, and writes them as f32 with
    /// rows and columns exchanged; exact.
    #[inline(always)]
    unsafe fn transpose_f16(source: *const u16, stride: usize, target: *mut f32) {
        for row in 0..LANES {
            let mut values = [0.0f32; LANES];
            // SAFETY: the caller provides 16 rows to read and 256 values to write;
            // instructions by the trait's rule.
            unsafe {
                Self::load_f16(source.add(row * stride)).store(values.as_mut_ptr());
                for (column, value) in values.iter().enumerate() {
                    target.add(column * LANES + row).write(*value);
                }
            }
        }
    }

    /// Sum of the lanes: halves are added onto each other, 8, 4, 2, 1.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array holds 16 values; instructions by the trait's rule.
        unsafe { self.store(lanes.as_mut_ptr()) };
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array holds 16 values; instructions by the trait's rule.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Plain Rust; the reference for the other two.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, operation: impl Fn(f32, f32) -> f32) -> Self {
        let mut result = self;
        for (a, b) in result.0.iter_mut().zip(other.0) {
            *a = operation(*a, b);
        }
        result
    }
}

// SAFETY: needs no instructions beyond the target's baseline.
unsafe impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: the caller provides 16 readable values.
        Self(unsafe { source.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> Self {
        // SAFETY: the caller provides 16 readable values.
        let bits = unsafe { source.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|bits| f16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: the caller provides room for 16 values.
        unsafe { target.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        let mut result = self;
        for ((a, b), c) in result.0.iter_mut().zip(factor.0).zip(addend.0) {
            *a = a.mul_add(b, c);
        }
        result
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "an exponent is integral and below 256")]
    unsafe fn scale_by_power(self, exponent: Self) -> Self {
        self.zip(exponent, |a, b| {
            f32::from_bits(a.to_bits().wrapping_add(((b as i32) << 23).cast_unsigned()))
        })
    }
}

/// Exchanges rows and columns of 16 rows of 16 f16, `stride` values apart.
///
/// # Safety
/// The rows are readable, and the caller has avx2 enabled.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_halves(source: *const u16, stride: usize) -> [__m256i; LANES] {
    // SAFETY: 16 rows are read by the caller's promise; the rest is arithmetic on
    // registers.
    unsafe {
        let zero = _mm256_setzero_si256();
        let mut rows = [zero; LANES];
        for (at, row) in rows.iter_mut().enumerate() {
            *row = _mm256_loadu_si256(source.add(at * stride).cast());
        }
        // Inside each 128-bit half, 8 by 8 values are exchanged in three rounds
        // of interleaving, once for the first eight rows and once for the rest.
        let mut turned = [zero; LANES];
        for half in [0, 8] {
            let mut pairs = [zero; 8];
            for at in 0..4 {
                let (a, b) = (rows[half + at * 2], rows[half + at * 2 + 1]);
                pairs[at * 2] = _mm256_unpacklo_epi16(a, b);
                pairs[at * 2 + 1] = _mm256_unpackhi_epi16(a, b);
            }
            let mut fours = [zero; 8];
            for at in 0..2 {
                let quad = at * 4;
                fours[quad] = _mm256_unpacklo_epi32(pairs[quad], pairs[quad + 2]);
                fours[quad + 1] = _mm256_unpackhi_epi32(pairs[quad], pairs[quad + 2]);
                fours[quad + 2] = _mm256_unpacklo_epi32(pairs[quad + 1], pairs[quad + 3]);
                fours[quad + 3] = _mm256_unpackhi_epi32(pairs[quad + 1], pairs[quad + 3]);
            }
            for at in 0..4 {
                turned[half + at * 2] = _mm256_unpacklo_epi64(fours[at], fours[at + 4]);
                turned[half + at * 2 + 1] = _mm256_unpackhi_epi64(fours[at], fours[at + 4]);
            }
        }
        let mut columns = [zero; LANES];
        for at in 0..8 {
            columns[at] = _mm256_permute2x128_si256::<0x20>(turned[at], turned[at + 8]);
            columns[at + 8] = _mm256_permute2x128_si256::<0x31>(turned[at], turned[at + 8]);
        }
        columns
    }
}

/// Asks for the cache line at `address`, which need not be readable.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE is part of x86-64.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// One 512-bit register.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY: callers enable avx512f, avx2, fma and f16c, by the trait's rule.
#[cfg(target_arch = "x86_64")]
unsafe impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: instructions by the trait's rule, as in all methods below.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: the caller provides 16 readable values.
        Self(unsafe { _mm512_loadu_ps(source) })
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> Self {
        // SAFETY: the caller provides 16 readable values.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(source.cast())) })
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: the caller provides room for 16 values.
        unsafe { _mm512_storeu_ps(target, self.0) };
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn scale_by_power(self, exponent: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(exponent.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shifted)))
        }
    }

    #[inline(always)]
    unsafe fn transpose_f16(source: *const u16, stride: usize, target: *mut f32) {
        // SAFETY: the caller provides 16 rows to read and 256 values to write.
        unsafe {
            for (at, column) in transpose_halves(source, stride).into_iter().enumerate() {
                Self(_mm512_cvtph_ps(column)).store(target.add(at * LANES));
            }
        }
    }
}

/// Two 256-bit registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

// SAFETY: callers enable avx2, fma and f16c, by the trait's rule.
#[cfg(target_arch = "x86_64")]
unsafe impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: instructions by the trait's rule, as in all methods below.
        unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: the caller provides 16 readable values.
        unsafe { Self(_mm256_loadu_ps(source), _mm256_loadu_ps(source.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> Self {
        // SAFETY: the caller provides 16 readable values.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(source.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(source.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: the caller provides room for 16 values.
        unsafe {
            _mm256_storeu_ps(target, self.0);
            _mm256_storeu_ps(target.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe {
            Self(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn scale_by_power(self, exponent: Self) -> Self {
        // SAFETY: by the trait's rule.
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(exponent.0));
            let high = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(exponent.1));
            Self(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), low)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.1), high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn transpose_f16(source: *const u16, stride: usize, target: *mut f32) {
        // SAFETY: the caller provides 16 rows to read and 256 values to write.
        unsafe {
            for (at, column) in transpose_halves(source, stride).into_iter().enumerate() {
                let low = _mm256_cvtph_ps(_mm256_castsi256_si128(column));
                let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(column));
                Self(low, high).store(target.add(at * LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A wrong shuffle would mix slots of a block: transpose values that say where
    // they stood, by each implementation that runs here.
    #[test]
    fn transposed_values_stand_where_they_should() {
        let halves: Vec<u16> = (0..16u16 * 20).map(|at| f16::from_f32(f32::from(at)).to_bits()).collect();
        let run = |transpose: unsafe fn(*const u16, usize, *mut f32)| {
            let mut target = vec![0.0f32; 256];
            // SAFETY: 16 rows, 20 apart, are readable, and 256 values writable; the
            // caller passes only implementations whose instructions exist.
            unsafe { transpose(halves.as_ptr(), 20, target.as_mut_ptr()) };
            for (at, value) in target.iter().enumerate() {
                assert_eq!(*value, ((at % 16) * 20 + at / 16) as f32, "value {at}");
            }
        };
        run(Portable::transpose_f16);
        #[cfg(target_arch = "x86_64")]
        for isa in crate::kernels::Isa::available() {
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            unsafe fn avx512(source: *const u16, stride: usize, target: *mut f32) {
                // SAFETY: features are enabled; the rest is the caller's promise.
                unsafe { Avx512::transpose_f16(source, stride, target) }
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2(source: *const u16, stride: usize, target: *mut f32) {
                // SAFETY: as above.
                unsafe { Avx2::transpose_f16(source, stride, target) }
            }
            match isa.name() {
                "avx512" => run(avx512),
                "avx2" => run(avx2),
                _ => {}
            }
        }
    }
}
