//! Kernels that run along one row: normalisation, activation, softmax.
//!
//! Reductions keep sixteen partial sums, one per lane, and add the lanes in one
//! fixed tree. Rows are a multiple of sixteen long; callers see to it.

use super::lanes::{LANES, Lanes};
use super::{Isa, multiversion};

/// `target = source / rms(source) * weight`.
pub(crate) fn rms_norm(isa: Isa, source: &[f32], weight: &[f32], epsilon: f32, target: &mut [f32]) {
    assert!(source.len().is_multiple_of(LANES), "rows are whole registers");
    assert_eq!(source.len(), weight.len(), "one weight per value");
    assert_eq!(source.len(), target.len(), "one result per value");
    // SAFETY: all three slices have this length, a multiple of 16.
    unsafe {
        rms_norm_in(isa, source.as_ptr(), weight.as_ptr(), epsilon, target.as_mut_ptr(), source.len());
    }
}

multiversion! {
    /// # Safety
    /// The three pointers are good for `len` values.
    unsafe fn rms_norm_in = rms_norm_body(
        source: *const f32, weight: *const f32, epsilon: f32, target: *mut f32, len: usize,
    )
}

#[inline(always)]
unsafe fn rms_norm_body<V: Lanes>(
    source: *const f32,
    weight: *const f32,
    epsilon: f32,
    target: *mut f32,
    len: usize,
) {
    // SAFETY: every access is below `len`, by the caller's promise.
    unsafe {
        let mut squares = V::splat(0.0);
        for at in (0..len).step_by(LANES) {
            let value = V::load(source.add(at));
            squares = value.fma(value, squares);
        }
        let scale = V::splat(1.0 / (squares.sum() / len as f32 + epsilon).sqrt());
        for at in (0..len).step_by(LANES) {
            V::load(source.add(at)).mul(scale).mul(V::load(weight.add(at))).store(target.add(at));
        }
    }
}

/// `target = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
pub(crate) fn silu_product(isa: Isa, gate: &[f32], up: &[f32], target: &mut [f32]) {
    assert!(gate.len().is_multiple_of(LANES), "rows are whole registers");
    assert_eq!(gate.len(), up.len(), "one factor per value");
    assert_eq!(gate.len(), target.len(), "one result per value");
    // SAFETY: all three slices have this length, a multiple of 16.
    unsafe { silu_product_in(isa, gate.as_ptr(), up.as_ptr(), target.as_mut_ptr(), gate.len()) }
}

multiversion! {
    /// # Safety
    /// The three pointers are good for `len` values.
    unsafe fn silu_product_in = silu_product_body(gate: *const f32, up: *const f32, target: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn silu_product_body<V: Lanes>(gate: *const f32, up: *const f32, target: *mut f32, len: usize) {
    // SAFETY: every access is below `len`, by the caller's promise.
    unsafe {
        let one = V::splat(1.0);
        for at in (0..len).step_by(LANES) {
            let value = V::load(gate.add(at));
            let bottom = exponential(V::splat(0.0).sub(value)).add(one);
            value.div(bottom).mul(V::load(up.add(at))).store(target.add(at));
        }
    }
}

/// Turns the first `count` scores into probabilities, in place, and the rest of
/// the row into zeros.
pub(crate) fn softmax(isa: Isa, scores: &mut [f32], count: usize) {
    assert!(scores.len().is_multiple_of(LANES), "rows are whole registers");
    assert!(count > 0, "a token sees at least itself");
    assert!(count <= scores.len(), "the count is inside the row");
    let len = count.next_multiple_of(LANES);
    scores[count..].fill(f32::NEG_INFINITY);
    // SAFETY: `len` is a multiple of 16 and at most the row.
    unsafe { exponentials_in(isa, scores.as_mut_ptr(), len) };
    scores[count..].fill(0.0);
    // SAFETY: as above.
    unsafe { normalise_in(isa, scores.as_mut_ptr(), len) };
}

multiversion! {
    /// Subtracts the largest value and takes the exponential.
    ///
    /// # Safety
    /// `row` is good for `len` values, a multiple of 16.
    unsafe fn exponentials_in = exponentials_body(row: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn exponentials_body<V: Lanes>(row: *mut f32, len: usize) {
    // SAFETY: every access is below `len`, by the caller's promise.
    unsafe {
        let mut largest = V::splat(f32::NEG_INFINITY);
        for at in (0..len).step_by(LANES) {
            largest = V::load(row.add(at)).max(largest);
        }
        let largest = V::splat(largest.largest());
        for at in (0..len).step_by(LANES) {
            exponential(V::load(row.add(at)).sub(largest)).store(row.add(at));
        }
    }
}

multiversion! {
    /// Divides by the sum.
    ///
    /// # Safety
    /// `row` is good for `len` values, a multiple of 16.
    unsafe fn normalise_in = normalise_body(row: *mut f32, len: usize)
}

#[inline(always)]
unsafe fn normalise_body<V: Lanes>(row: *mut f32, len: usize) {
    // SAFETY: every access is below `len`, by the caller's promise.
    unsafe {
        let mut total = V::splat(0.0);
        for at in (0..len).step_by(LANES) {
            total = total.add(V::load(row.add(at)));
        }
        let scale = V::splat(1.0 / total.sum());
        for at in (0..len).step_by(LANES) {
            V::load(row.add(at)).mul(scale).store(row.add(at));
        }
    }
}

/// `e^x` to about one unit in the last place, for x clamped to [-87, 88].
///
/// `x = n ln 2 + r`: the polynomial gives `e^r`, the exponent bits take `n`.
/// Rounding to `n` adds and subtracts 1.5 * 2^23, which leaves the nearest integer.
#[inline(always)]
unsafe fn exponential<V: Lanes>(x: V) -> V {
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: only arithmetic; instructions by the caller's promise.
    unsafe {
        let x = x.max(V::splat(-87.0)).min(V::splat(88.0));
        let n = x.fma(V::splat(std::f32::consts::LOG2_E), V::splat(ROUND)).sub(V::splat(ROUND));
        let r = n.fma(V::splat(-LN2_HIGH), x);
        let r = n.fma(V::splat(-LN2_LOW), r);
        let mut p = V::splat(1.987_569_2e-4);
        for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.fma(r, V::splat(coefficient));
        }
        let p = p.fma(r.mul(r), r).add(V::splat(1.0));
        p.scale_by_power(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // A wrong constant in the exponential would still give plausible text, so
    // compare softmax with one computed in f64 over the whole range.
    #[test]
    fn softmax_matches_f64() {
        for isa in Isa::available() {
            let scores: Vec<f32> = (0..48).map(|at| (at as f32 * 0.77).sin() * 20.0).collect();
            for count in [1, 15, 16, 17, 48] {
                let mut row = scores.clone();
                softmax(isa, &mut row, count);
                let largest = scores[..count].iter().copied().fold(f32::MIN, f32::max);
                let powers: Vec<f64> = scores[..count].iter().map(|s| f64::from(s - largest).exp()).collect();
                let total: f64 = powers.iter().sum();
                for (got, want) in row[..count].iter().zip(&powers) {
                    assert!((f64::from(*got) - want / total).abs() < 2e-7, "{isa:?} {got} {}", want / total);
                }
                assert!(row[count..].iter().all(|value| value.to_bits() == 0), "masked values are zero");
            }
        }
    }

    // The instruction sets must agree to the bit, or blocks could not be shared
    // between machines: run the same awkward values through each.
    #[test]
    fn instruction_sets_agree() {
        let gate: Vec<f32> = (0..64).map(|at| (at as f32 - 31.0) * 3.1).collect();
        let up: Vec<f32> = (0..64).map(|at| (at as f32 * 1.3).cos()).collect();
        let run = |isa| {
            let mut silu = vec![0.0; 64];
            silu_product(isa, &gate, &up, &mut silu);
            let mut norm = vec![0.0; 64];
            rms_norm(isa, &gate, &up, 1e-5, &mut norm);
            silu.iter().chain(&norm).map(|value| value.to_bits()).collect::<Vec<u32>>()
        };
        let reference = run(*Isa::available().last().unwrap());
        for isa in Isa::available() {
            assert_eq!(run(isa), reference, "{isa:?} differs from portable");
        }
        let silu = gate[40] / (1.0 + (-gate[40]).exp()) * up[40];
        assert!((f32::from_bits(reference[40]) - silu).abs() < 1e-5);
    }
}
