//! The tables behind [`crate::Core`]. Each file holds one table and keeps its
//! own books; the decisions are in the files beside `core.rs`.

pub(crate) mod block;
pub(crate) mod chunk;
pub(crate) mod departed;
pub(crate) mod disk;
pub(crate) mod gone;
pub(crate) mod gpu;
pub(crate) mod index;
pub(crate) mod session;
pub(crate) mod space;

/// A table index. Every table is limited to fewer than 2^32 entries.
pub(crate) fn count(n: usize) -> u32 {
    u32::try_from(n).expect("every table is limited to less than 2^32 entries")
}
