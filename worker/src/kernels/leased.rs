//! Leased frames as memory of a sequence.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use terrace_client::{ReadBlock, WriteBlock};

use crate::kernels::memory::{ReadBytes, WriteBytes};

/// The bytes of a sealed block, in place. The guard lives as long as they do.
/// `None` if the frame is not aligned for f16, which no daemon grants.
pub(crate) fn read_leased(block: &ReadBlock) -> Option<ReadBytes> {
    let pointer = NonNull::new(block.bytes().as_ptr().cast_mut()).filter(|start| is_aligned(*start))?;
    let length = block.bytes().len();
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(block.clone());
    // SAFETY: the guard keeps the mapping, and `owner` is a clone of the guard.
    // The frame changes only after its fence has moved, which whoever leased
    // checks before anything derived from the bytes leaves.
    Some(unsafe { ReadBytes::new(pointer, length, owner) })
}

/// The bytes of a frame to be filled, in place. `owner` holds the write lease
/// that `block` belongs to, so that neither the mapping nor its write
/// permission goes while somebody may store.
pub(crate) fn write_leased(block: &WriteBlock, owner: Arc<dyn Any + Send + Sync>) -> Option<WriteBytes> {
    let pointer = NonNull::new(block.as_mut_ptr()).filter(|start| is_aligned(*start))?;
    // SAFETY: `owner` keeps the lease and with it the mapping; the frame was
    // granted to this session alone, and only the sequence that leased it stores.
    Some(unsafe { WriteBytes::new(pointer, block.bytes().len(), owner) })
}

fn is_aligned(pointer: NonNull<u8>) -> bool {
    pointer.addr().get().is_multiple_of(2)
}
