//! The loops that benchmarks compare the lane with: the same copies between
//! ordinary buffers, without leases, fences or shared memory.

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer};

use crate::copy::{drain, stream};
use crate::shared::PIECE_BYTES;

/// Copies past the cache.
///
/// # Panics
/// If the lengths differ.
pub fn copy_streaming(source: &[u8], target: &mut [u8]) {
    assert_eq!(source.len(), target.len(), "source and target of a copy have one length");
    // SAFETY: both are slices of one length; one is borrowed mutably, so they do not overlap.
    unsafe { stream(source.as_ptr(), target.as_mut_ptr(), source.len()) };
    drain();
}

/// Copies and sums in one pass, through the cache.
///
/// # Panics
/// If the lengths differ.
pub fn copy_and_checksum(source: &[u8], target: &mut [u8], block: BlockId) -> Checksum {
    one_pass(source, target, block, |source, target| target.copy_from_slice(source))
}

/// Sums and copies in one pass, past the cache.
///
/// # Panics
/// If the lengths differ.
pub fn copy_streaming_and_checksum(source: &[u8], target: &mut [u8], block: BlockId) -> Checksum {
    let sum = one_pass(source, target, block, |source, target| {
        // SAFETY: as in `copy_streaming`; pieces have equal lengths.
        unsafe { stream(source.as_ptr(), target.as_mut_ptr(), source.len().min(target.len())) }
    });
    drain();
    sum
}

fn one_pass(source: &[u8], target: &mut [u8], block: BlockId, copy: fn(&[u8], &mut [u8])) -> Checksum {
    assert_eq!(source.len(), target.len(), "source and target of a copy have one length");
    let mut summer = Checksummer::new(block, ByteCount::new(source.len() as u64), 0);
    for (source, target) in source.chunks(PIECE_BYTES).zip(target.chunks_mut(PIECE_BYTES)) {
        summer.update(source);
        copy(source, target);
    }
    summer.finish()
}
