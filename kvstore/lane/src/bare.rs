//! The loops that benchmarks compare the lane with: the same copies between
//! ordinary buffers, without leases, fences or shared memory.

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer};

use crate::copy::{drain, stream};
use crate::fold::{Stores, Way, copy_and_sum_by};

/// Copies past the cache. `next` is what the next call copies, if its beginning is to be fetched already.
///
/// # Panics
/// If the lengths differ.
pub fn copy_streaming(source: &[u8], target: &mut [u8], next: Option<&[u8]>) {
    assert_eq!(source.len(), target.len(), "source and target of a copy have one length");
    // SAFETY: both are slices of one length; one is borrowed mutably, so they do not overlap.
    unsafe { stream(source.as_ptr(), target.as_mut_ptr(), source.len(), start(next)) };
    drain();
}

/// Copies and sums in one pass, through the cache.
///
/// # Panics
/// If the lengths differ.
pub fn copy_and_checksum(source: &[u8], target: &mut [u8], block: BlockId) -> Checksum {
    one_pass(source, target, block, Way::alone(Stores::Cached))
}

/// Copies and sums in one pass, past the cache. `next` as for [`copy_streaming`].
///
/// # Panics
/// If the lengths differ.
pub fn copy_streaming_and_checksum(
    source: &[u8],
    target: &mut [u8],
    block: BlockId,
    next: Option<&[u8]>,
) -> Checksum {
    one_pass(source, target, block, Way { stores: Stores::Streamed, next: start(next) })
}

fn start(next: Option<&[u8]>) -> *const u8 {
    next.map_or(std::ptr::null(), <[u8]>::as_ptr)
}

fn one_pass(source: &[u8], target: &mut [u8], block: BlockId, way: Way) -> Checksum {
    assert_eq!(source.len(), target.len(), "source and target of a copy have one length");
    let mut summer = Checksummer::new(block, ByteCount::new(source.len() as u64), 0);
    // SAFETY: both are slices of one length; one is borrowed mutably, so they do not overlap.
    unsafe { copy_and_sum_by(source.as_ptr(), target.as_mut_ptr(), source.len(), way, &mut summer) };
    drain();
    summer.finish()
}
