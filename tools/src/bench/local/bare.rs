//! The loops that the lane is compared with.

use std::hint::black_box;

use terrace_lane::bare::{self, Fetch};

use super::BARE_BLOCK;

/// Copies and sums in one pass.
pub(super) fn checked(source: &[u8], target: &mut [u8]) {
    black_box(bare::copy_and_checksum(source, target, BARE_BLOCK));
}

/// The same, past the cache.
pub(super) fn checked_streaming(source: &[u8], target: &mut [u8]) {
    black_box(bare::copy_streaming_and_checksum(source, target, BARE_BLOCK, Fetch::Not));
}

/// The same, with the source fetched ahead.
pub(super) fn checked_ahead(source: &[u8], target: &mut [u8]) {
    black_box(bare::copy_streaming_and_checksum(source, target, BARE_BLOCK, Fetch::Ahead));
}

/// Copies past the cache.
pub(super) fn streaming(source: &[u8], target: &mut [u8]) {
    bare::copy_streaming(source, target, Fetch::Not);
}

/// The same, with the source fetched ahead.
pub(super) fn streaming_ahead(source: &[u8], target: &mut [u8]) {
    bare::copy_streaming(source, target, Fetch::Ahead);
}
