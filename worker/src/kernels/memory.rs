//! Memory that holds blocks: leased frames of the store, or private memory.
//!
//! A leased frame is shared with other processes, so it is never a Rust
//! reference: these types carry a raw pointer, its length, and the owner that
//! keeps the mapping alive. Whoever leases guarantees what the bytes are (a
//! fence check after use tells whether they were right); here we guarantee that
//! no access leaves them.

use std::any::Any;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

// Blocks hold little-endian f16, and the kernels load them as they are.
const _: () = assert!(cfg!(target_endian = "little"));

/// Bytes of one sealed block, to be read in place. Clones share the memory.
#[derive(Clone)]
pub struct ReadBytes {
    pointer: NonNull<u8>,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory stays mapped while `_owner` lives, wherever the value is;
// reads from several threads at once do not conflict.
unsafe impl Send for ReadBytes {}
// SAFETY: as above; there are only reads.
unsafe impl Sync for ReadBytes {}

impl ReadBytes {
    /// Takes `len` bytes at `pointer`, which `owner` keeps readable.
    ///
    /// # Safety
    /// The bytes are readable, and aligned to two bytes, until `owner` is
    /// dropped. Another process may change them only in breach of the lease;
    /// then the values read are arbitrary, and the fence says so.
    ///
    /// # Panics
    /// If `pointer` is odd.
    pub unsafe fn new(pointer: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        assert!(pointer.addr().get().is_multiple_of(2), "blocks hold f16");
        Self { pointer, len, _owner: owner }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte; good while this value or a clone of it lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.pointer.as_ptr()
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        copy_out(self.pointer, self.len)
    }

    pub(crate) fn base(&self) -> BlockBase<'_> {
        BlockBase { pointer: self.pointer.as_ptr(), bytes: self.len, block: PhantomData }
    }
}

/// Bytes of one block that is being filled. There is one writer, so no clones.
pub struct WriteBytes {
    pointer: NonNull<u8>,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory stays mapped while `owner` lives, wherever the value is.
unsafe impl Send for WriteBytes {}
// SAFETY: shared references only read; writing takes `&mut self`.
unsafe impl Sync for WriteBytes {}

impl WriteBytes {
    /// Takes `len` bytes at `pointer`, which `owner` keeps writable.
    ///
    /// # Safety
    /// The bytes are readable and writable, and aligned to two bytes, until
    /// `owner` is dropped, and nobody else writes to them in this process.
    ///
    /// # Panics
    /// If `pointer` is odd.
    pub unsafe fn new(pointer: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        assert!(pointer.addr().get().is_multiple_of(2), "blocks hold f16");
        Self { pointer, len, owner }
    }

    /// Zeroed memory of this process alone.
    pub fn private(len: usize) -> Self {
        let memory = Box::leak(vec![0u64; len.div_ceil(8).max(1)].into_boxed_slice());
        let owned = Owned(NonNull::from(memory));
        let pointer = owned.0.cast::<u8>();
        // SAFETY: `owned` frees the memory when it is dropped, not before, and
        // keeps its only other pointer.
        unsafe { Self::new(pointer, len, Arc::new(owned)) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte; good while this value lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.pointer.as_ptr()
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        copy_out(self.pointer, self.len)
    }

    pub(crate) fn base(&self) -> BlockBase<'_> {
        BlockBase { pointer: self.pointer.as_ptr(), bytes: self.len, block: PhantomData }
    }

    /// Writes f16 bits at `offset` bytes.
    ///
    /// # Panics
    /// If the values do not fit behind `offset`.
    pub fn write(&mut self, offset: usize, values: &[u16]) {
        assert!(offset.is_multiple_of(2), "f16 values lie at even offsets");
        let end = offset.checked_add(size_of_val(values)).expect("a slice is far from the address limit");
        assert!(end <= self.len, "the values end inside the block");
        // SAFETY: `offset..end` is inside the memory (asserted), which is writable
        // by the constructor's contract; `values` is ours and cannot overlap a
        // frame that nobody else in this process writes.
        unsafe {
            let target = self.pointer.as_ptr().add(offset).cast::<u16>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), target, values.len());
        }
    }

    /// Copies a whole block in, as bytes.
    ///
    /// # Panics
    /// If `bytes` is not exactly as long as this memory.
    pub fn copy_from(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len, "a block is copied whole");
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer.as_ptr(), self.len) };
    }

    /// Gives up the right to write.
    pub fn freeze(self) -> ReadBytes {
        ReadBytes { pointer: self.pointer, len: self.len, _owner: self.owner }
    }
}

/// First bytes of a sequence's blocks, borrowed for the kernels.
pub(crate) struct BlockBases<'a> {
    pointers: Vec<*const u8>,
    bytes: usize,
    blocks: PhantomData<&'a [u8]>,
}

// SAFETY: the blocks outlive `'a`, whichever thread reads them.
unsafe impl Send for BlockBases<'_> {}
// SAFETY: as above; there are only reads.
unsafe impl Sync for BlockBases<'_> {}

impl<'a> BlockBases<'a> {
    /// Takes blocks of `bytes` bytes each, borrowed for `'a`.
    pub(crate) fn new(bytes: usize, blocks: impl Iterator<Item = BlockBase<'a>>) -> Self {
        let pointers = blocks
            .map(|block| {
                assert_eq!(block.bytes, bytes, "blocks of one sequence are equal in size");
                block.pointer
            })
            .collect();
        Self { pointers, bytes, blocks: PhantomData }
    }

    /// How many blocks there are.
    pub(crate) fn count(&self) -> usize {
        self.pointers.len()
    }

    /// Bytes of each block.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// First byte of a block.
    pub(crate) fn at(&self, index: usize) -> *const u8 {
        self.pointers[index]
    }

    /// The list itself.
    pub(crate) fn as_ptr(&self) -> *const *const u8 {
        self.pointers.as_ptr()
    }
}

/// One block, borrowed.
pub(crate) struct BlockBase<'a> {
    pointer: *const u8,
    bytes: usize,
    block: PhantomData<&'a [u8]>,
}

/// Frees memory that `WriteBytes::private` took.
struct Owned(NonNull<[u64]>);

// SAFETY: owns its memory like the box that it came from.
unsafe impl Send for Owned {}
// SAFETY: gives out nothing by shared reference.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a leaked box and is freed only here.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

fn copy_out(pointer: NonNull<u8>, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: both constructors were promised `len` readable bytes; the vector is
    // new, so it cannot overlap.
    unsafe { std::ptr::copy_nonoverlapping(pointer.as_ptr(), bytes.as_mut_ptr(), len) };
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    // A write past the end of a frame would corrupt the next frame, which may
    // belong to a sealed block: one value too many must panic.
    #[test]
    #[should_panic(expected = "inside the block")]
    fn write_past_the_end_panics() {
        WriteBytes::private(16).write(14, &[1, 2]);
    }

    // Frozen bytes must be what was written, and outlive the writer.
    #[test]
    fn freeze_keeps_bytes() {
        let mut bytes = WriteBytes::private(8);
        bytes.write(2, &[0x0102, 0x0304]);
        let frozen = bytes.freeze();
        assert_eq!(frozen.clone().to_vec(), [0, 0, 2, 1, 4, 3, 0, 0]);
    }
}
