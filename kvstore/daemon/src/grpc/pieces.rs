//! Memory for the messages of read streams, used again: fresh memory costs more than what is copied into it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use terrace_proto::PIECE_BYTES;

/// Most that is kept for the next streams: what two of them have on their way.
const KEPT_MAX: usize = 16;

/// What is not in use.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    kept: Mutex<Vec<Box<[u8]>>>,
}

/// Bytes of a message. What was in them before is still there.
#[derive(Debug)]
pub(crate) struct Piece {
    memory: Box<[u8]>,
    length: usize,
    home: Arc<Pieces>,
}

impl Pieces {
    /// # Panics
    /// If `length` is above [`PIECE_BYTES`].
    pub(crate) fn take(self: &Arc<Self>, length: usize) -> Piece {
        assert!(length <= PIECE_BYTES, "a message of at most {PIECE_BYTES} bytes");
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = kept.unwrap_or_else(|| vec![0; PIECE_BYTES].into());
        Piece { memory, length, home: Arc::clone(self) }
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.length]
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.length]
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut kept = self.home.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What is not given back costs every message its pages, and what is kept without bound stays for ever.
    #[test]
    fn memory_is_used_again_and_bounded() {
        let pieces = Arc::new(Pieces::default());
        let first = pieces.take(5);
        let place = first.as_ptr();
        assert_eq!(first.len(), 5);
        drop(bytes::Bytes::from_owner(first));
        assert_eq!(pieces.take(PIECE_BYTES).as_ptr(), place);
        let many: Vec<_> = (0..KEPT_MAX + 3).map(|_| pieces.take(1)).collect();
        drop(many);
        assert_eq!(pieces.kept.lock().unwrap().len(), KEPT_MAX);
    }
}
