//! The fold of CRC-64/NVMe by 256 and by 512 bits at a time, for processors with VPCLMULQDQ: one loop, by the registers and
//! instructions of either.

use terrace_core::CHECKSUM_POLYNOMIAL;

/// Parts that are loaded together: with the eight sums they fit into sixteen registers.
const LOADED: usize = 4;
const SUMS: usize = 2 * LOADED;

/// `x` to this power, modulo the polynomial: what moves a sum over so many bits.
const fn power(exponent: usize) -> u64 {
    let (mut value, mut at) = (1 << 63, 0);
    while at < exponent {
        value = if value & 1 == 1 { value >> 1 ^ CHECKSUM_POLYNOMIAL } else { value >> 1 };
        at += 1;
    }
    value
}

macro_rules! folds {
    (
        $(#[$about:meta])*
        mod $name:ident {
            features: $features:literal,
            vector: $vector:ident,
            bits: $bits:literal,
            ahead: $ahead:expr,
            ahead_on_intel: $ahead_on_intel:expr,
            ahead_beside_stores: $ahead_beside_stores:expr,
            zero: $zero:ident,
            load: $load:ident,
            store: $store:ident,
            stream: $stream:ident,
            multiply: $multiply:ident,
            exclusive_or: $exclusive_or:ident,
            sum: $sum:expr,
            registers: $registers:ident,
            load_once: $load_once:literal,
        }
    ) => {
        $(#[$about])*
        pub(super) mod $name {
            use std::arch::asm;
            use std::arch::x86_64::{$exclusive_or, $load, $multiply, $store, $stream, $vector, $zero};

            use terrace_core::Checksummer;

            use super::{LOADED, SUMS, power};
            use crate::copy::{Ahead, FAR, FETCH_AHEAD_BYTES, LINE, NEAR, fetch, is_intel};
            use crate::fold::{Stores, Way};

            /// Bytes that the eight registers hold.
            pub(crate) const GROUP_BYTES: usize = SUMS * PART_BYTES;
            const PART_BYTES: usize = size_of::<$vector>();
            const _: () = assert!(PART_BYTES * 8 == $bits);
            /// Numbers of 64 bits in a part.
            const LANES: usize = PART_BYTES / 8;
            const AHEAD: usize = $ahead;
            const AHEAD_ON_INTEL: usize = $ahead_on_intel;
            const AHEAD_BESIDE_STORES: usize = $ahead_beside_stores;

            /// What moves the two halves of a sum over a group.
            const LOW: u64 = power(8 * GROUP_BYTES + 63);
            const HIGH: u64 = power(8 * GROUP_BYTES - 1);

            /// Sums whole groups, and copies them.
            ///
            /// # Safety
            /// `source` must be readable for `length` bytes, a multiple of a group and not 0, and the target, if there is one,
            /// writable and aligned to a line; the processor has the features.
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn whole(
                source: *const u8,
                length: usize,
                target: Option<(*mut u8, Way)>,
                state: u64,
            ) -> Checksummer {
                let none = source.wrapping_add(length);
                // SAFETY: the caller's promise; the stores need no more than the alignment.
                let left = unsafe {
                    match target {
                        None if is_intel() => {
                            fold::<AHEAD_ON_INTEL, NEAR>(source, length, state, none, |_, _| ())
                        }
                        None => fold::<AHEAD, NEAR>(source, length, state, none, |_, _| ()),
                        Some((target, Way { stores: Stores::Cached, next: _ })) => {
                            let store = |at, part| $store(target.add(at).cast(), part);
                            fold::<AHEAD_BESIDE_STORES, NEAR>(source, length, state, none, store)
                        }
                        Some((target, Way { stores: Stores::Streamed, next })) => {
                            let store = |at, part| $stream(target.add(at).cast(), part);
                            match Ahead::of_copy(source, length, next) {
                                (Ahead::Not, _) => {
                                    fold::<AHEAD_BESIDE_STORES, NEAR>(source, length, state, none, store)
                                }
                                (Ahead::Near, next) => {
                                    fold::<FETCH_AHEAD_BYTES, NEAR>(source, length, state, next, store)
                                }
                                (Ahead::Far, next) => {
                                    fold::<FETCH_AHEAD_BYTES, FAR>(source, length, state, next, store)
                                }
                            }
                        }
                    }
                };
                Checksummer::from_folded(&left)
            }

            /// Sums, and hands every part with its place to `store`. Answers bytes whose sum, begun with nothing, is that of
            /// everything. `AHEAD`, `HINT` and `next` are those of [`fetch`].
            ///
            /// # Safety
            /// As [`whole`].
            #[target_feature(enable = $features)]
            unsafe fn fold<const AHEAD: usize, const HINT: i32>(
                source: *const u8,
                length: usize,
                state: u64,
                next: *const u8,
                store: impl Fn(usize, $vector),
            ) -> [u8; GROUP_BYTES] {
                let keys: [u64; LANES] = std::array::from_fn(|lane| if lane % 2 == 0 { LOW } else { HIGH });
                let first: [u64; LANES] = std::array::from_fn(|lane| if lane == 0 { state } else { 0 });
                // SAFETY: each has as many bytes as a part.
                let (keys, mut state) = unsafe { ($load(keys.as_ptr().cast()), $load(first.as_ptr().cast())) };
                let mut sums = [$zero(); SUMS];
                let mut at = 0;
                while at < length {
                    for line in (0..GROUP_BYTES).step_by(LINE) {
                        fetch::<AHEAD, HINT>(source, length, at + line, next);
                    }
                    for half in [0, LOADED] {
                        let offset = at + half * PART_BYTES;
                        // SAFETY: a half of a group lies in the source, which has whole groups.
                        let parts = unsafe { load(source.add(offset)) };
                        for (index, part) in parts.into_iter().enumerate() {
                            store(offset + index * PART_BYTES, part);
                            let sum = &mut sums[half + index];
                            let (low, high) = ($multiply::<0x00>(*sum, keys), $multiply::<0x11>(*sum, keys));
                            *sum = $sum(low, high, part);
                        }
                    }
                    sums[0] = $exclusive_or(sums[0], state);
                    state = $zero();
                    at += GROUP_BYTES;
                }
                let mut left = Lines([0; GROUP_BYTES]);
                for (index, sum) in sums.into_iter().enumerate() {
                    // SAFETY: part `index` of the group; the lines are aligned.
                    unsafe { $store(left.0.as_mut_ptr().add(index * PART_BYTES).cast(), sum) };
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
            #[target_feature(enable = $features)]
            unsafe fn load(source: *const u8) -> [$vector; LOADED] {
                let (first, second, third, fourth);
                // SAFETY: four loads of the caller's range, of any alignment.
                unsafe {
                    asm!(
                        concat!($load_once, " {first}, [{source}]"),
                        concat!($load_once, " {second}, [{source} + {part}]"),
                        concat!($load_once, " {third}, [{source} + 2 * {part}]"),
                        concat!($load_once, " {fourth}, [{source} + 3 * {part}]"),
                        source = in(reg) source,
                        part = const PART_BYTES,
                        first = out($registers) first,
                        second = out($registers) second,
                        third = out($registers) third,
                        fourth = out($registers) fourth,
                        options(readonly, nostack, preserves_flags),
                    );
                }
                [first, second, third, fourth]
            }
        }
    };
}

folds! {
    /// Fetched 2 KiB ahead of a sum: without, 1 GiB from memory takes a fifth longer on Zen 3; half or twice as far makes no
    /// difference.
    mod by_256 {
        features: "vpclmulqdq,avx2",
        vector: __m256i,
        bits: 256,
        ahead: 2 << 10,
        ahead_on_intel: 2 << 10,
        ahead_beside_stores: 2 << 10,
        zero: _mm256_setzero_si256,
        load: _mm256_loadu_si256,
        store: _mm256_store_si256,
        stream: _mm256_stream_si256,
        multiply: _mm256_clmulepi64_epi128,
        exclusive_or: _mm256_xor_si256,
        sum: |low, high, part| _mm256_xor_si256(_mm256_xor_si256(low, high), part),
        registers: ymm_reg,
        load_once: "vmovdqu",
    }
}

folds! {
    /// Fetched 4 KiB ahead of a sum: 38 GiB/s from memory on Zen 5, which is what loads alone reach; 35.5 without. Beside
    /// stores it costs a tenth. On Granite Rapids 2 KiB: 16.0 GiB/s, where 4 KiB have 13.4 and none 12.5.
    mod by_512 {
        features: "vpclmulqdq,avx512f",
        vector: __m512i,
        bits: 512,
        ahead: 4 << 10,
        ahead_on_intel: 2 << 10,
        ahead_beside_stores: 0,
        zero: _mm512_setzero_si512,
        load: _mm512_loadu_si512,
        store: _mm512_store_si512,
        stream: _mm512_stream_si512,
        multiply: _mm512_clmulepi64_epi128,
        exclusive_or: _mm512_xor_si512,
        sum: |low, high, part| std::arch::x86_64::_mm512_ternarylogic_epi64::<0x96>(low, high, part),
        registers: zmm_reg,
        load_once: "vmovdqu64",
    }
}
