//! BLAKE3 of one short block, keyed, for eight or sixteen inputs side by side.

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_add_epi32, _mm256_loadu_si256, _mm256_or_si256, _mm256_set1_epi32,
    _mm256_setr_epi8, _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_si256,
    _mm256_xor_si256, _mm512_add_epi32, _mm512_loadu_si512, _mm512_ror_epi32, _mm512_set1_epi32,
    _mm512_storeu_si512, _mm512_xor_si512,
};

use super::{Names, SPACE_WORDS};

const IV: [u32; 4] = [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A];
/// Which word of the block each half of a step takes, round by round.
const ORDER: [[usize; 16]; 7] = {
    const NEXT: [usize; 16] = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8];
    let mut order = [[0; 16]; 7];
    let (mut round, mut at) = (0, 0);
    while round < 7 {
        while at < 16 {
            order[round][at] = if round == 0 { at } else { order[round - 1][NEXT[at]] };
            at += 1;
        }
        (round, at) = (round + 1, 0);
    }
    order
};
/// The block is the first, the last and the root of a keyed hash.
const FLAGS: u32 = 1 | 2 | 8 | 16;

/// What this processor hashes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Best {
    Avx512,
    Avx2,
}

pub(super) fn best() -> Option<Best> {
    if std::arch::is_x86_feature_detected!("avx512f") {
        Some(Best::Avx512)
    } else if std::arch::is_x86_feature_detected!("avx2") {
        Some(Best::Avx2)
    } else {
        None
    }
}

/// One word of every input.
trait Words<const LANES: usize>: Copy {
    /// # Safety
    /// The processor can; so of all of these.
    unsafe fn all(word: u32) -> Self;
    unsafe fn load(words: &[u32; LANES]) -> Self;
    unsafe fn store(self, words: &mut [u32; LANES]);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn xor(self, other: Self) -> Self;
    unsafe fn right_16(self) -> Self;
    unsafe fn right_12(self) -> Self;
    unsafe fn right_8(self) -> Self;
    unsafe fn right_7(self) -> Self;
}

impl Words<16> for __m512i {
    #[inline(always)]
    unsafe fn all(word: u32) -> Self {
        // SAFETY: the caller's promise; so of all of these.
        unsafe { _mm512_set1_epi32(word.cast_signed()) }
    }

    #[inline(always)]
    unsafe fn load(words: &[u32; 16]) -> Self {
        // SAFETY: 64 readable bytes; no alignment is needed.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, words: &mut [u32; 16]) {
        // SAFETY: 64 writable bytes; no alignment is needed.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm512_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm512_xor_si512(self, other) }
    }

    #[inline(always)]
    unsafe fn right_16(self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm512_ror_epi32::<16>(self) }
    }

    #[inline(always)]
    unsafe fn right_12(self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm512_ror_epi32::<12>(self) }
    }

    #[inline(always)]
    unsafe fn right_8(self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm512_ror_epi32::<8>(self) }
    }

    #[inline(always)]
    unsafe fn right_7(self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm512_ror_epi32::<7>(self) }
    }
}

impl Words<8> for __m256i {
    #[inline(always)]
    unsafe fn all(word: u32) -> Self {
        // SAFETY: the caller's promise; so of all of these.
        unsafe { _mm256_set1_epi32(word.cast_signed()) }
    }

    #[inline(always)]
    unsafe fn load(words: &[u32; 8]) -> Self {
        // SAFETY: 32 readable bytes; no alignment is needed.
        unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, words: &mut [u32; 8]) {
        // SAFETY: 32 writable bytes; no alignment is needed.
        unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm256_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm256_xor_si256(self, other) }
    }

    #[inline(always)]
    unsafe fn right_16(self) -> Self {
        // SAFETY: see `all`.
        unsafe {
            let bytes = _mm256_setr_epi8(
                2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9,
                14, 15, 12, 13,
            );
            _mm256_shuffle_epi8(self, bytes)
        }
    }

    #[inline(always)]
    unsafe fn right_12(self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm256_or_si256(_mm256_srli_epi32::<12>(self), _mm256_slli_epi32::<20>(self)) }
    }

    #[inline(always)]
    unsafe fn right_8(self) -> Self {
        // SAFETY: see `all`.
        unsafe {
            let bytes = _mm256_setr_epi8(
                1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12, 1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8,
                13, 14, 15, 12,
            );
            _mm256_shuffle_epi8(self, bytes)
        }
    }

    #[inline(always)]
    unsafe fn right_7(self) -> Self {
        // SAFETY: see `all`.
        unsafe { _mm256_or_si256(_mm256_srli_epi32::<7>(self), _mm256_slli_epi32::<25>(self)) }
    }
}

/// One step: four words of the state and two of the block.
///
/// # Safety
/// The processor can.
#[inline(always)]
unsafe fn step<const LANES: usize, W: Words<LANES>>(v: &mut [W; 16], at: [usize; 4], one: W, two: W) {
    let [a, b, c, d] = at;
    // SAFETY: the caller's promise.
    unsafe {
        v[a] = v[a].add(v[b]).add(one);
        v[d] = v[d].xor(v[a]).right_16();
        v[c] = v[c].add(v[d]);
        v[b] = v[b].xor(v[c]).right_12();
        v[a] = v[a].add(v[b]).add(two);
        v[d] = v[d].xor(v[a]).right_8();
        v[c] = v[c].add(v[d]);
        v[b] = v[b].xor(v[c]).right_7();
    }
}

/// One round. Written out, and by a number that is known when it is compiled: the state must stay in registers.
///
/// # Safety
/// The processor can.
#[inline(always)]
unsafe fn round<const LANES: usize, const NUMBER: usize, W: Words<LANES>>(v: &mut [W; 16], m: &[W; 16]) {
    let word = |at: usize| m[ORDER[NUMBER][at]];
    // SAFETY: the caller's promise.
    unsafe {
        step(v, [0, 4, 8, 12], word(0), word(1));
        step(v, [1, 5, 9, 13], word(2), word(3));
        step(v, [2, 6, 10, 14], word(4), word(5));
        step(v, [3, 7, 11, 15], word(6), word(7));
        step(v, [0, 5, 10, 15], word(8), word(9));
        step(v, [1, 6, 11, 12], word(10), word(11));
        step(v, [2, 7, 8, 13], word(12), word(13));
        step(v, [3, 4, 9, 14], word(14), word(15));
    }
}

/// The first four words of the hash of each input.
///
/// # Safety
/// The processor can.
#[inline(always)]
unsafe fn hash<const LANES: usize, W: Words<LANES>>(
    secret: &[u32; 8],
    head: &[u32; SPACE_WORDS],
    names: &Names<LANES>,
) -> [[u32; LANES]; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = W::all(0);
        let [n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11] = &names.words;
        let [h0, h1, h2, h3] = head.map(|word| W::all(word));
        let name = |words: &[u32; LANES]| W::load(words);
        let m = [
            h0,
            h1,
            h2,
            h3,
            name(n0),
            name(n1),
            name(n2),
            name(n3),
            name(n4),
            name(n5),
            name(n6),
            name(n7),
            name(n8),
            name(n9),
            name(n10),
            name(n11),
        ];
        let [s0, s1, s2, s3, s4, s5, s6, s7] = secret.map(|word| W::all(word));
        let [i0, i1, i2, i3] = IV.map(|word| W::all(word));
        // The zeros are the number of the piece, which is the first.
        let ends = [zero, zero, W::load(&names.lengths), W::all(FLAGS)];
        let [e0, e1, e2, e3] = ends;
        let mut v = [s0, s1, s2, s3, s4, s5, s6, s7, i0, i1, i2, i3, e0, e1, e2, e3];
        round::<LANES, 0, W>(&mut v, &m);
        round::<LANES, 1, W>(&mut v, &m);
        round::<LANES, 2, W>(&mut v, &m);
        round::<LANES, 3, W>(&mut v, &m);
        round::<LANES, 4, W>(&mut v, &m);
        round::<LANES, 5, W>(&mut v, &m);
        round::<LANES, 6, W>(&mut v, &m);
        let mut hashes = [[0; LANES]; 4];
        let [w0, w1, w2, w3] = &mut hashes;
        v[0].xor(v[8]).store(w0);
        v[1].xor(v[9]).store(w1);
        v[2].xor(v[10]).store(w2);
        v[3].xor(v[11]).store(w3);
        hashes
    }
}

/// # Safety
/// The processor has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn hash_16(
    secret: &[u32; 8],
    head: &[u32; SPACE_WORDS],
    names: &Names<16>,
) -> [[u32; 16]; 4] {
    // SAFETY: the caller's promise.
    unsafe { hash::<16, __m512i>(secret, head, names) }
}

/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn hash_8(secret: &[u32; 8], head: &[u32; SPACE_WORDS], names: &Names<8>) -> [[u32; 8]; 4] {
    // SAFETY: the caller's promise.
    unsafe { hash::<8, __m256i>(secret, head, names) }
}
