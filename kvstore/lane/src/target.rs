//! Memory of the caller's that one block is copied into.

use std::marker::PhantomData;

/// Bytes in one piece. They are any mix where others store there meanwhile.
#[derive(Debug)]
pub struct TargetMemory<'memory> {
    start: *mut u8,
    length: usize,
    _memory: PhantomData<&'memory mut [u8]>,
}

// SAFETY: it is as a slice that can be changed, or its maker's promise holds on any thread.
unsafe impl Send for TargetMemory<'_> {}

impl<'memory> From<&'memory mut [u8]> for TargetMemory<'memory> {
    fn from(memory: &'memory mut [u8]) -> Self {
        Self { start: memory.as_mut_ptr(), length: memory.len(), _memory: PhantomData }
    }
}

impl TargetMemory<'_> {
    /// Memory that is no slice of ours.
    ///
    /// # Safety
    /// For as long as this lives, from whatever thread, `length` bytes from `start` on are writable, and no part of what
    /// blocks are copied from, nor of another one's: several threads may store into them at once.
    pub unsafe fn from_raw(start: *mut u8, length: usize) -> Self {
        Self { start, length, _memory: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing fits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Where it begins, for copies within its length.
    pub(crate) fn start(&mut self) -> *mut u8 {
        self.start
    }

    /// Stores a piece, from `offset` on.
    ///
    /// # Panics
    /// If it does not lie inside.
    pub fn store(&mut self, offset: usize, piece: &[u8]) {
        let inside = offset.checked_add(piece.len()).is_some_and(|end| end <= self.length);
        assert!(inside, "a piece lies in its target");
        // SAFETY: inside memory that is writable while this lives; the piece is an ordinary slice, which cannot be the same.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), self.start.add(offset), piece.len()) };
    }
}
