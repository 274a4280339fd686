//! Memory of the index: segments that are made once and never move, so that a reader needs no lock to
//! follow a number into them, and a pool of 128-byte extents that serve for keys, records and overflow.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Items in a segment, as a power of two.
const SHIFT_MIN: u32 = 10;
const SHIFT_MAX: u32 = 13;
/// Segments wanted of a slab that is as large as it may be.
const SEGMENTS: u64 = 512;

/// A growing array whose items stay where they are.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    segments: Box<[OnceLock<Box<[T]>>]>,
    /// Items in a segment, as a power of two.
    shift: u32,
    /// Segments made so far. Only the writer changes it.
    made: AtomicU32,
}

impl<T: Default> Slab<T> {
    /// Room for `items`, none of them made yet.
    pub(crate) fn new(items: u64) -> Self {
        let shift = (items / SEGMENTS).checked_ilog2().unwrap_or(0).clamp(SHIFT_MIN, SHIFT_MAX);
        let segments = items.div_ceil(1 << shift).max(1);
        Self { segments: (0..segments).map(|_| OnceLock::new()).collect(), shift, made: AtomicU32::new(0) }
    }

    /// The item, which must have been made.
    #[inline]
    pub(crate) fn at(&self, index: u32) -> &T {
        let segment = self.segments[(index >> self.shift) as usize].get();
        &segment.expect("a number in the index names an item that was made")
            [index as usize & ((1 << self.shift) - 1)]
    }

    /// The item, if there is one of this number.
    #[inline]
    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        let segment = self.segments.get((index >> self.shift) as usize)?.get()?;
        segment.get(index as usize & ((1 << self.shift) - 1))
    }

    /// Makes the next segment and says which items it holds; none if the slab is as large as it may be.
    pub(crate) fn grow(&self) -> Option<std::ops::Range<u32>> {
        let made = self.made.load(Ordering::Relaxed);
        let segment = self.segments.get(made as usize)?;
        segment.get_or_init(|| (0..1 << self.shift).map(|_| T::default()).collect());
        self.made.store(made + 1, Ordering::Relaxed);
        Some(made << self.shift..(made + 1) << self.shift)
    }

    /// Items made so far.
    pub(crate) fn items(&self) -> u32 {
        self.made.load(Ordering::Relaxed) << self.shift
    }

    /// Bytes of all segments and of the array that names them.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.items()) * size_of::<T>() as u64
            + self.segments.len() as u64 * size_of::<OnceLock<Box<[T]>>>() as u64
    }

    /// Bytes of one more segment.
    pub(crate) fn segment_bytes(&self) -> u64 {
        (size_of::<T>() as u64) << self.shift
    }
}

/// Two cache lines of words: eight keys, four records, or overflow of the directory.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Extent(pub(crate) [AtomicU64; Extent::WORDS]);

impl Extent {
    pub(crate) const WORDS: usize = 16;
}

/// All extents. Number 0 stands for none.
#[derive(Debug)]
pub(crate) struct Pool {
    extents: Slab<Extent>,
    /// The extent after each, in a chain of them.
    links: Slab<AtomicU32>,
}

/// The writer's list of extents that are free.
#[derive(Debug, Default)]
pub(crate) struct FreeExtents(Vec<u32>);

impl Pool {
    pub(crate) fn new(extents_max: u64) -> Self {
        Self { extents: Slab::new(extents_max), links: Slab::new(extents_max) }
    }

    #[inline]
    pub(crate) fn at(&self, extent: u32) -> &[AtomicU64; Extent::WORDS] {
        &self.extents.at(extent).0
    }

    /// A word of an extent; 0 of none.
    #[inline]
    pub(crate) fn load(&self, extent: u32, word: usize) -> u64 {
        if extent == 0 { 0 } else { self.at(extent)[word].load(Ordering::Relaxed) }
    }

    /// The extent after this one, or 0.
    #[inline]
    pub(crate) fn next(&self, extent: u32) -> u32 {
        self.links.at(extent).load(Ordering::Acquire)
    }

    pub(crate) fn link(&self, extent: u32, next: u32) {
        self.links.at(extent).store(next, Ordering::Release);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.extents.bytes() + self.links.bytes()
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.extents.segment_bytes() + self.links.segment_bytes()
    }

    /// Makes a segment of extents. False if there may be no more.
    pub(crate) fn grow(&self, free: &mut FreeExtents) -> bool {
        let (Some(range), Some(_)) = (self.extents.grow(), self.links.grow()) else { return false };
        free.0.extend(range.rev().filter(|extent| *extent != 0));
        true
    }

    /// A zeroed extent. The writer has made sure that there is one.
    pub(crate) fn take(&self, free: &mut FreeExtents) -> u32 {
        let extent = free.0.pop().expect("a change begins only with enough free extents");
        for word in self.at(extent) {
            word.store(0, Ordering::Relaxed);
        }
        self.link(extent, 0);
        extent
    }
}

impl FreeExtents {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    pub(crate) fn give(&mut self, extent: u32) {
        assert!(extent != 0, "number 0 is no extent");
        self.0.push(extent);
    }
}
