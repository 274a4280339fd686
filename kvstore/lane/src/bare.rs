//! The loops that benchmarks compare the lane with: the same copies between
//! ordinary buffers, without leases, fences or shared memory.

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer};

use crate::copy::{drain, stream};
use crate::fold::{Stores, copy_and_sum_by};

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
    one_pass(source, target, block, Stores::Cached)
}

/// Copies and sums in one pass, past the cache.
///
/// # Panics
/// If the lengths differ.
pub fn copy_streaming_and_checksum(source: &[u8], target: &mut [u8], block: BlockId) -> Checksum {
    one_pass(source, target, block, Stores::Streamed)
}

fn one_pass(source: &[u8], target: &mut [u8], block: BlockId, stores: Stores) -> Checksum {
    assert_eq!(source.len(), target.len(), "source and target of a copy have one length");
    let mut summer = Checksummer::new(block, ByteCount::new(source.len() as u64), 0);
    // SAFETY: both are slices of one length; one is borrowed mutably, so they do not overlap.
    unsafe { copy_and_sum_by(source.as_ptr(), target.as_mut_ptr(), source.len(), stores, &mut summer) };
    drain();
    summer.finish()
}
