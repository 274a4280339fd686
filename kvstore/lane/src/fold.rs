//! Summing, and copying and summing, in one look at each byte.
//!
//! Shared bytes may change between two looks, so whoever sums what he copies keeps it to himself in between: in a
//! buffer, or, as here, in registers. The sum is CRC-64/NVMe, folded: eight registers hold a group of bytes that are worth
//! all that came before them, and the [`Checksummer`] goes on with those. That is also two and four times as fast as folding
//! 128 bits at a time, so bytes that nobody else changes are summed here as well.

#[cfg(target_arch = "x86_64")]
mod wide;

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer};

use crate::copy::{LINE, STREAM_BYTES_MIN, drain};

/// Where the processor cannot fold: short enough to stay in the first-level cache.
const BUFFER_BYTES: usize = 2 << 10;

/// Where copies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// Into the cache.
    Cached,
    /// Past it; whole for other threads after [`drain`].
    Streamed,
}

impl Stores {
    /// For a block of this length.
    pub(crate) fn of(length: usize) -> Self {
        if length < STREAM_BYTES_MIN { Self::Cached } else { Self::Streamed }
    }
}

/// How a copy is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) stores: Stores,
    /// Where the next copy's source begins, null if that is not known. Nothing is read through it.
    pub(crate) next: *const u8,
}

impl Way {
    /// Of a copy that none follows.
    pub(crate) fn alone(stores: Stores) -> Self {
        Self { stores, next: std::ptr::null() }
    }
}

/// The checksum of a whole payload, as [`terrace_core::checksum`] answers it.
pub fn checksum(block: BlockId, generation: u64, payload: &[u8]) -> Checksum {
    let mut summer = Checksummer::new(block, ByteCount::new(payload.len() as u64), generation);
    update(&mut summer, payload);
    summer.finish()
}

/// Adds the next piece of a payload, as [`Checksummer::update`] does.
pub fn update(summer: &mut Checksummer, piece: &[u8]) {
    // SAFETY: a slice is readable for its length.
    unsafe { sum(piece.as_ptr(), piece.len(), summer) }
}

/// Sums bytes that somebody else may change meanwhile: every byte is loaded once.
///
/// # Safety
/// `source` must be readable for `length` bytes.
pub unsafe fn sum(source: *const u8, length: usize, summer: &mut Checksummer) {
    // SAFETY: the caller's promise.
    unsafe { sum_by(Width::of_processor(), source, length, summer) }
}

/// The same by a width that the processor has.
///
/// # Safety
/// As [`sum`].
unsafe fn sum_by(width: Width, source: *const u8, length: usize, summer: &mut Checksummer) {
    let groups = width.whole(length);
    // SAFETY: groups and rest add up to the length; the processor has the width.
    unsafe {
        if groups > 0 {
            fold(width, source, groups, None, summer);
        }
        by_buffer(source.add(groups), length - groups, None, summer);
    }
}

/// Copies between ranges that do not overlap, and sums what was copied: every byte of the source is loaded once. The
/// copy is whole for other threads when it returns.
///
/// # Safety
/// `source` must be readable and `target` writable for `length` bytes, and the two must not overlap. Bytes of the
/// source may change meanwhile.
pub unsafe fn copy_and_sum(source: *const u8, target: *mut u8, length: usize, summer: &mut Checksummer) {
    // SAFETY: the caller's promise.
    unsafe { copy_and_sum_by(source, target, length, Way::alone(Stores::of(length)), summer) };
    drain();
}

/// The same by a way that the caller chooses. Streamed copies are whole for other threads after [`drain`].
///
/// # Safety
/// As [`copy_and_sum`].
pub(crate) unsafe fn copy_and_sum_by(
    source: *const u8,
    target: *mut u8,
    length: usize,
    way: Way,
    summer: &mut Checksummer,
) {
    // SAFETY: the caller's promise.
    unsafe { copy_and_sum_with(Width::of_processor(), source, target, length, way, summer) }
}

/// The same by a width that the processor has.
///
/// # Safety
/// As [`copy_and_sum`].
unsafe fn copy_and_sum_with(
    width: Width,
    source: *const u8,
    target: *mut u8,
    length: usize,
    way: Way,
    summer: &mut Checksummer,
) {
    let head = target.align_offset(LINE).min(length);
    let groups = width.whole(length - head);
    // SAFETY: head, groups and rest add up to the length, so that each part lies in the two ranges. The target of the
    // groups is aligned to a line, and the processor has the width.
    unsafe {
        by_buffer(source, head, Some(target), summer);
        if groups > 0 {
            fold(width, source.add(head), groups, Some((target.add(head), way)), summer);
        }
        let done = head + groups;
        by_buffer(source.add(done), length - done, Some(target.add(done)), summer);
    }
}

/// By way of a buffer.
///
/// # Safety
/// As [`sum`], and as [`copy_and_sum`] with a target.
unsafe fn by_buffer(source: *const u8, length: usize, target: Option<*mut u8>, summer: &mut Checksummer) {
    let mut buffer = [0u8; BUFFER_BYTES];
    let mut done = 0;
    while done < length {
        let piece = &mut buffer[..(length - done).min(BUFFER_BYTES)];
        // SAFETY: `done` and the piece are at most `length`; the buffer is our own.
        unsafe {
            std::ptr::copy_nonoverlapping(source.add(done), piece.as_mut_ptr(), piece.len());
            if let Some(target) = target {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), target.add(done), piece.len());
            }
        }
        summer.update(piece);
        done += piece.len();
    }
}

/// How many bits the processor folds at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    /// It cannot.
    None,
    /// VPCLMULQDQ with AVX2.
    Wide,
    /// VPCLMULQDQ with AVX-512.
    Widest,
}

impl Width {
    #[cfg(target_arch = "x86_64")]
    fn of_processor() -> Self {
        use std::arch::is_x86_feature_detected as has;
        match has!("vpclmulqdq") {
            true if has!("avx512f") => Self::Widest,
            true if has!("avx2") => Self::Wide,
            true | false => Self::None,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_processor() -> Self {
        Self::None
    }

    /// Bytes of the whole groups in so many.
    fn whole(self, length: usize) -> usize {
        match self {
            Self::None => 0,
            #[cfg(target_arch = "x86_64")]
            Self::Wide => length / wide::by_256::GROUP_BYTES * wide::by_256::GROUP_BYTES,
            #[cfg(target_arch = "x86_64")]
            Self::Widest => length / wide::by_512::GROUP_BYTES * wide::by_512::GROUP_BYTES,
            #[cfg(not(target_arch = "x86_64"))]
            Self::Wide | Self::Widest => 0,
        }
    }
}

/// Sums whole groups, and copies them.
///
/// # Safety
/// As [`copy_and_sum`]; `length` is a multiple of the width's group and not 0, the target is aligned to a line, and the processor
/// can fold by this width.
#[cfg(target_arch = "x86_64")]
unsafe fn fold(
    width: Width,
    source: *const u8,
    length: usize,
    target: Option<(*mut u8, Way)>,
    summer: &mut Checksummer,
) {
    let state = summer.state();
    // SAFETY: the caller's promise.
    *summer = unsafe {
        match width {
            Width::None => unreachable!("nothing is folded on this processor"),
            Width::Wide => wide::by_256::whole(source, length, target, state),
            Width::Widest => wide::by_512::whole(source, length, target, state),
        }
    };
}

/// Elsewhere nothing is folded.
///
/// # Safety
/// Never called.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn fold(_: Width, _: *const u8, _: usize, _: Option<(*mut u8, Way)>, _: &mut Checksummer) {
    unreachable!("nothing is folded on this processor");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this processor has.
    fn widths() -> Vec<Width> {
        match Width::of_processor() {
            Width::Widest => vec![Width::None, Width::Wide, Width::Widest],
            Width::Wide => vec![Width::None, Width::Wide],
            Width::None => vec![Width::None],
        }
    }

    // A wrong constant, or a seam between head, groups and rest, would make a sum that nobody else computes: lengths
    // and alignments around a line and a group are compared with the sum of the whole, and bytes beside must stay.
    #[test]
    fn the_sum_is_that_of_the_whole() {
        let block = BlockId::from_bytes([9; 16]);
        let source: Vec<u8> =
            (0..5000usize).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[2]).collect();
        let around = [255, 256, 257, 383, 511, 512, 513, 767, 768, 1024, 1100, 1535, 1536, 4096, 4901];
        for (width, length) in
            widths().into_iter().flat_map(|width| (0..140).chain(around).map(move |length| (width, length)))
        {
            let payload = &source[3..3 + length];
            let whole = terrace_core::checksum(block, 4, payload);
            let new = || Checksummer::new(block, ByteCount::new(length as u64), 4);
            let mut summer = new();
            // SAFETY: a slice is readable for its length.
            unsafe { sum_by(width, payload.as_ptr(), length, &mut summer) };
            assert_eq!(summer.finish(), whole, "{width:?} {length}");
            for (stores, skew) in [Stores::Cached, Stores::Streamed]
                .into_iter()
                .flat_map(|stores| [0, 1, 15, 16, 63, 64].map(|skew| (stores, skew)))
            {
                let (mut target, mut summer) = (vec![0xEE; 5000], new());
                let (from, to) = (payload.as_ptr(), target.as_mut_ptr());
                // SAFETY: skew and length fit both vectors, which are different.
                unsafe {
                    // Any address will do.
                    let next = if skew % 2 == 0 { std::ptr::null() } else { from };
                    copy_and_sum_with(width, from, to.add(skew), length, Way { stores, next }, &mut summer);
                }
                drain();
                let said = format!("{width:?} {stores:?} {skew} {length}");
                assert_eq!(summer.finish(), whole, "{said}");
                assert_eq!(target[skew..skew + length], *payload, "{said}");
                let beside = target[..skew].iter().chain(&target[skew + length..]);
                assert!(beside.copied().all(|byte| byte == 0xEE), "bytes beside changed: {said}");
            }
        }
    }

    // Pieces that are summed one after the other must add up to the whole: the state is handed from one to the next.
    #[test]
    fn sums_go_on_where_the_last_one_ended() {
        let block = BlockId::from_bytes([2; 16]);
        let source: Vec<u8> =
            (0..3000usize).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[1]).collect();
        for (width, cut) in widths()
            .into_iter()
            .flat_map(|width| [0, 1, 255, 256, 300, 512, 1024, 2999, 3000].map(|cut| (width, cut)))
        {
            let mut summer = Checksummer::new(block, ByteCount::new(3000), 1);
            for piece in [&source[..cut], &source[cut..]] {
                // SAFETY: a slice is readable for its length.
                unsafe { sum_by(width, piece.as_ptr(), piece.len(), &mut summer) };
            }
            assert_eq!(summer.finish(), terrace_core::checksum(block, 1, &source), "{width:?} cut at {cut}");
        }
    }
}
