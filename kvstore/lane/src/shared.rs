//! Views of memory that another process may be writing at this moment.
//!
//! No reference to such memory ever exists: it is copied out through raw
//! pointers, and whoever copied checks the fence afterwards. Bytes that were
//! copied while somebody wrote are arbitrary, never undefined in effect: they
//! are integers in a buffer of ours, to be thrown away when the fence moved.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer, JOINED_BYTES, JOINED_DOUBLINGS_MAX};

use crate::copy::{drain, stream};
use crate::crew::{Called, SHARED_BYTES_MIN, Start, share};
use crate::fold::{self, Stores, Way};
use crate::mapping::Mapping;
use crate::target::TargetMemory;

/// A readable piece of shared memory. Keeps the mapping alive.
#[derive(Clone)]
pub struct SharedBytes {
    start: NonNull<u8>,
    length: usize,
    stores: Stores,
    wholeness: Wholeness,
    /// Where the next one that is copied begins, or its own end. Nothing is read through it.
    next: *const u8,
    owner: Arc<dyn Any + Send + Sync>,
}

/// When a copy is whole for other threads than the one that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wholeness {
    AtItsEnd,
    /// After [`drain`].
    Later,
}

/// A piece of shared memory that it does not keep mapped.
#[derive(Clone)]
pub struct WeakBytes {
    start: NonNull<u8>,
    length: usize,
    owner: Weak<dyn Any + Send + Sync>,
}

// SAFETY: nothing is read through it; [`WeakBytes::upgrade`] makes a view only of memory that is still mapped.
unsafe impl Send for WeakBytes {}
// SAFETY: as above.
unsafe impl Sync for WeakBytes {}

impl fmt::Debug for WeakBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakBytes").field("length", &self.length).finish_non_exhaustive()
    }
}

impl WeakBytes {
    /// The view again, while somebody keeps its memory mapped.
    pub fn upgrade(&self) -> Option<SharedBytes> {
        let owner = self.owner.upgrade()?;
        Some(SharedBytes::whole(self.start, self.length, owner))
    }
}

// SAFETY: the pointer is only read through, by copies that tolerate concurrent
// writers; the memory stays mapped while `owner` lives, on whatever thread.
unsafe impl Send for SharedBytes {}
// SAFETY: as above; `&SharedBytes` offers no more than copies out.
unsafe impl Sync for SharedBytes {}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedBytes").field("length", &self.length).finish_non_exhaustive()
    }
}

impl SharedBytes {
    /// A view of `length` bytes from `start`.
    ///
    /// # Safety
    /// The bytes must be mapped readable for as long as `owner` (or a clone of
    /// it) lives, and the memory behind them must not shrink.
    pub unsafe fn from_raw(owner: Arc<dyn Any + Send + Sync>, start: NonNull<u8>, length: usize) -> Self {
        Self::whole(start, length, owner)
    }

    fn whole(start: NonNull<u8>, length: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let next = start.as_ptr().wrapping_add(length);
        Self { start, length, stores: Stores::of(length), wholeness: Wholeness::AtItsEnd, next, owner }
    }

    /// The chunk that it is a part of; `None` if it is something else's.
    pub fn mapping(&self) -> Option<&Mapping> {
        self.owner.downcast_ref()
    }

    /// The same, without keeping the memory mapped.
    pub fn downgrade(&self) -> WeakBytes {
        WeakBytes { start: self.start, length: self.length, owner: Arc::downgrade(&self.owner) }
    }

    /// The same, copied past the cache however short it is: for whoever copies many, and looks at none of them soon.
    #[must_use]
    pub fn past_the_cache(self) -> Self {
        Self { stores: Stores::Streamed, ..self }
    }

    /// The same, copied through the cache however long it is: for whoever copies so few that they fit there.
    #[must_use]
    pub fn through_the_cache(self) -> Self {
        Self { stores: Stores::Cached, ..self }
    }

    /// The same, whose copies are whole for other threads than the caller's only after [`drain`]: for whoever makes many.
    #[must_use]
    pub fn drained_later(self) -> Self {
        Self { wholeness: Wholeness::Later, ..self }
    }

    /// `next` is what will be copied next: the end of this one's copy brings its beginning into the cache. Where blocks do not
    /// lie side by side, the processor does not know by itself where the next one begins.
    pub fn come_before(&mut self, next: &Self) {
        self.next = next.start.as_ptr();
    }

    fn end(&self) -> *const u8 {
        self.start.as_ptr().wrapping_add(self.length)
    }

    /// What is copied after `length` bytes from `source` on, by whichever thread.
    fn after(&self, source: *const u8, length: usize) -> *const u8 {
        let behind = source.wrapping_add(length);
        if behind == self.end() { self.next } else { behind }
    }

    pub(crate) fn drain_later(&mut self) {
        self.wholeness = Wholeness::Later;
    }

    pub(crate) fn go_past_the_cache(&mut self) {
        self.stores = Stores::Streamed;
    }

    pub(crate) fn stores(&self) -> Stores {
        self.stores
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The first byte. Valid for [`SharedBytes::len`] bytes while this view or a
    /// clone lives. Reading through it is a race unless a lease and its fence
    /// say otherwise: use the bytes, then check the fence, before anything
    /// derived from them goes anywhere.
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the part is not inside.
    #[must_use]
    pub fn part(&self, offset: usize, length: usize) -> Self {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.length);
        assert!(inside, "a part lies inside its whole");
        // SAFETY: `offset` is at most `length`, so the pointer stays in the mapping or one past its end.
        let start = unsafe { self.start.add(offset) };
        Self::whole(start, length, Arc::clone(&self.owner))
    }

    /// Loads the first byte of each 4 KiB and answers their sum: whoever reads the
    /// bytes in place finds them mapped afterwards.
    pub fn load_pages(&self) -> u8 {
        let mut sum = 0u8;
        for at in (0..self.length).step_by(4096) {
            // SAFETY: inside the view, which stays mapped while `owner` lives; whatever is there is a byte.
            sum = sum.wrapping_add(unsafe { self.start.as_ptr().add(at).read_volatile() });
        }
        sum
    }

    /// Copies everything out.
    ///
    /// # Panics
    /// If `target` has another length.
    pub fn copy_to(&self, target: &mut [u8]) {
        self.copy_into(&mut TargetMemory::from(target), Called::NONE);
    }

    /// Copies everything out, in parts by those that are called where it is long enough.
    ///
    /// # Panics
    /// If `target` has another length.
    pub fn copy_into(&self, target: &mut TargetMemory<'_>, called: Called) {
        assert_eq!(target.len(), self.length, "source and target of a copy have one length");
        let (source, target) = (Start(self.start.as_ptr()), Start(target.start()));
        self.map_ahead();
        let copy = |offset: usize, length: usize| {
            let (source, target) = (source.at(offset).cast_const(), target.at(offset));
            // SAFETY: a part of this view, and of writable memory that is as long and no part of this view.
            unsafe { self.copy_part(source, target, length) };
        };
        if is_split(self.length, called) {
            let mut parts: Vec<_> = parts(self.length, doublings(self.length)).collect();
            share(&mut parts, self.length, called, |(offset, length)| copy(*offset, *length));
        } else {
            copy(0, self.length);
        }
        self.copied();
    }

    /// # Safety
    /// `length` bytes of this view from `source` on, and as many writable ones from `target` on that do not overlap it.
    unsafe fn copy_part(&self, source: *const u8, target: *mut u8, length: usize) {
        // SAFETY: the source is mapped while `owner` lives; the rest is the caller's promise. Another process may store
        // into the source meanwhile: the bytes are then arbitrary, which u8 allows, and the caller's fence check throws
        // them away.
        unsafe {
            match self.stores {
                Stores::Cached => std::ptr::copy_nonoverlapping(source, target, length),
                Stores::Streamed => stream(source, target, length, self.after(source, length)),
            }
        }
    }

    pub(crate) fn copied(&self) {
        match self.wholeness {
            Wholeness::AtItsEnd => drain(),
            Wholeness::Later => {}
        }
    }

    /// Copies everything out and computes the checksum of what was copied: each
    /// shared byte is loaded once.
    ///
    /// # Panics
    /// If `target` has another length.
    pub fn copy_and_checksum(&self, target: &mut [u8], block: BlockId, generation: u64) -> Checksum {
        self.copy_and_checksum_into(&mut TargetMemory::from(target), block, generation, Called::NONE)
    }

    /// The same, in parts by those that are called where it is long enough.
    ///
    /// # Panics
    /// If `target` has another length.
    pub fn copy_and_checksum_into(
        &self,
        target: &mut TargetMemory<'_>,
        block: BlockId,
        generation: u64,
        called: Called,
    ) -> Checksum {
        assert_eq!(target.len(), self.length, "source and target of a copy have one length");
        let (source, target) = (Start(self.start.as_ptr()), Start(target.start()));
        self.map_ahead();
        let begun = Checksummer::new(block, ByteCount::new(self.length as u64), generation);
        let sum = sum_parts(self.length, called, begun, |offset, length, summer| {
            let (source, target) = (source.at(offset).cast_const(), target.at(offset));
            let way = Way { stores: self.stores, next: self.after(source, length) };
            // SAFETY: a part of this view, and of writable memory that is as long and no part of this view.
            unsafe { fold::copy_and_sum_by(source, target, length, way, summer) };
        });
        self.copied();
        sum
    }

    /// Copies everything out into pieces, one behind the other, as [`SharedBytes::copy_and_checksum_into`].
    ///
    /// # Panics
    /// If the pieces have another length together.
    ///
    /// # Safety
    /// Every piece must be writable for its length, and overlap neither this view nor another piece.
    pub unsafe fn scatter_and_checksum(
        &self,
        pieces: &[(*mut u8, usize)],
        block: BlockId,
        generation: u64,
    ) -> Checksum {
        let copies = self.along(pieces).map(|(own, (piece, length))| (own.cast_const(), piece, length));
        // SAFETY: the pieces add up to this view, which is mapped while `owner` lives; the rest is the caller's promise.
        unsafe { self.copy_and_sum(copies, block, generation) }
    }

    /// Copies pieces in, one behind the other, and computes the checksum of what was copied: each byte of theirs is
    /// loaded once, and may change meanwhile.
    ///
    /// # Panics
    /// If the pieces have another length together.
    ///
    /// # Safety
    /// Stores into this view must be allowed until this returns. Every piece must be readable for its length, and not
    /// overlap this view.
    pub unsafe fn gather_and_checksum(
        &self,
        pieces: &[(*const u8, usize)],
        block: BlockId,
        generation: u64,
    ) -> Checksum {
        let copies = self.along(pieces).map(|(own, (piece, length))| (piece, own, length));
        // SAFETY: the pieces add up to this view, which is mapped while `owner` lives and may be written, as the caller
        // promises; so are the pieces.
        unsafe { self.copy_and_sum(copies, block, generation) }
    }

    /// Each piece with its place in this view, which all of them fill.
    fn along<P: Copy>(&self, pieces: &[(P, usize)]) -> impl Iterator<Item = (*mut u8, (P, usize))> {
        let whole = pieces.iter().map(|(_, length)| *length).fold(0, usize::saturating_add);
        assert_eq!(whole, self.length, "the pieces of a block are as long as the block");
        let mut place = self.start.as_ptr();
        pieces.iter().map(move |piece| {
            let behind = place.wrapping_add(piece.1);
            (std::mem::replace(&mut place, behind), *piece)
        })
    }

    /// The checksum of this view's bytes, copied from, to, and so many at a time.
    ///
    /// # Safety
    /// Each is readable there and writable here for its length, and the two do not overlap.
    unsafe fn copy_and_sum(
        &self,
        copies: impl Iterator<Item = (*const u8, *mut u8, usize)>,
        block: BlockId,
        generation: u64,
    ) -> Checksum {
        self.map_ahead();
        let mut summer = Checksummer::new(block, ByteCount::new(self.length as u64), generation);
        for (source, target, length) in copies {
            let behind = source.wrapping_add(length);
            // Pieces of this view lie side by side. Where a copy is to its pieces, the next one is not known.
            let next = if behind == self.end() { self.next } else { std::ptr::null() };
            let way = Way { stores: self.stores, next };
            // SAFETY: the caller's promise.
            unsafe { fold::copy_and_sum_by(source, target, length, way, &mut summer) };
        }
        self.copied();
        summer.finish()
    }

    /// Has the pages mapped, once for each place, for whoever reads or copies them afterwards. Whatever is no part of a
    /// chunk is left alone.
    pub fn map_ahead(&self) {
        if let Some(mapping) = self.mapping() {
            mapping.map_ahead(self.start.as_ptr(), self.length);
        }
    }

    /// The checksum of the bytes as they are now: each is loaded once.
    pub fn checksum(&self, block: BlockId, generation: u64) -> Checksum {
        self.map_ahead();
        let mut summer = Checksummer::new(block, ByteCount::new(self.length as u64), generation);
        // SAFETY: mapped while `owner` lives.
        unsafe { fold::sum(self.start.as_ptr(), self.length, &mut summer) };
        summer.finish()
    }
}

/// Whether something so long is copied in parts.
fn is_split(length: usize, called: Called) -> bool {
    length >= SHARED_BYTES_MIN && !called.is_none()
}

/// The sum of something so long that `sum` adds to, by offset and length, in one part or, by those that are called, in many.
pub(crate) fn sum_parts(
    length: usize,
    called: Called,
    mut begun: Checksummer,
    sum: impl Fn(usize, usize, &mut Checksummer) + Sync,
) -> Checksum {
    if !is_split(length, called) {
        sum(0, length, &mut begun);
        return begun.finish();
    }
    let sums = std::iter::once(begun).chain(std::iter::repeat_with(Checksummer::of_part));
    let doublings = doublings(length);
    let mut parts: Vec<_> = parts(length, doublings).zip(sums).collect();
    share(&mut parts, length, called, |((offset, length), summer)| sum(*offset, *length, summer));
    let mut sums = parts.into_iter().map(|(_, summer)| summer);
    let mut whole = sums.next().expect("the first part is there, however short");
    sums.for_each(|part| whole.join(&part, doublings));
    whole.finish()
}

/// Parts of something long, about: enough for a thread that is late to leave some to the others.
const PARTS: usize = 16;

/// How often the shortest part that can be joined is doubled, for something so long.
fn doublings(length: usize) -> u32 {
    let wanted = (length / (PARTS * JOINED_BYTES)).max(1);
    wanted.ilog2().min(JOINED_DOUBLINGS_MAX)
}

/// Offsets and lengths of parts that several threads copy: each but the first is as long as sums are joined by.
fn parts(length: usize, doublings: u32) -> impl Iterator<Item = (usize, usize)> {
    let each = JOINED_BYTES << doublings;
    let first = length % each;
    let others = (first..length).step_by(each).map(move |offset| (offset, each));
    std::iter::once((0, first)).chain(others)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::STREAM_BYTES_MIN;

    fn over(memory: &Arc<Vec<u8>>) -> SharedBytes {
        let owner: Arc<dyn Any + Send + Sync> = Arc::clone(memory) as _;
        let start = NonNull::new(memory.as_ptr().cast_mut()).expect("a vector's pointer is not null");
        // SAFETY: the vector is the owner and is never changed.
        unsafe { SharedBytes::from_raw(owner, start, memory.len()) }
    }

    // Copies change their way where they begin to go past the cache, and could lose bytes there: they are compared with
    // the whole at lengths around it.
    #[test]
    fn copies_and_sums_are_of_the_whole() {
        let block = BlockId::from_bytes([7; 16]);
        let around = [STREAM_BYTES_MIN - 1, STREAM_BYTES_MIN, STREAM_BYTES_MIN + 1];
        for length in around.into_iter().chain([0, 1, 3 * 4096 + 5]) {
            let memory: Arc<Vec<u8>> =
                Arc::new((0..length).map(|at| u8::try_from(at % 251).unwrap()).collect());
            let shared = over(&memory);
            let whole = terrace_core::checksum(block, 3, &memory);
            assert_eq!(shared.checksum(block, 3), whole, "checksum of {length} bytes");
            let mut copy = vec![0; length];
            assert_eq!(shared.copy_and_checksum(&mut copy, block, 3), whole, "copy of {length} bytes");
            assert_eq!(copy, *memory);
            copy.fill(0);
            shared.copy_to(&mut copy);
            assert_eq!(copy, *memory, "plain copy of {length} bytes");
            copy.fill(0);
            let mut later = shared.clone().past_the_cache().drained_later();
            later.come_before(&shared);
            later.copy_to(&mut copy);
            drain();
            assert_eq!(copy, *memory, "copy of {length} bytes that is drained later");
            for (way, shared) in
                [("past", shared.clone().past_the_cache()), ("through", shared.through_the_cache())]
            {
                copy.fill(0);
                let found = shared.copy_and_checksum(&mut copy, block, 3);
                assert_eq!(found, whole, "copy of {length} bytes {way} the cache");
                assert_eq!(copy, *memory);
                copy.fill(0);
                shared.copy_to(&mut copy);
                assert_eq!(copy, *memory, "plain copy of {length} bytes {way} the cache");
            }
        }
    }

    // Pieces that end where no line and no group of the sum ends could lose bytes between them, or sum them twice: what is
    // scattered and gathered again by other pieces is the whole, and has the sum of the whole.
    #[test]
    fn pieces_are_the_whole() {
        let block = BlockId::from_bytes([9; 16]);
        for (length, piece) in [(5000, 1), (STREAM_BYTES_MIN + 77, 4099), (24_576 * 12, 24_576), (777, 777)] {
            let memory: Arc<Vec<u8>> =
                Arc::new((0..length).map(|at| u8::try_from(at % 251).unwrap()).collect());
            let whole = terrace_core::checksum(block, 3, &memory);
            let mut apart: Vec<Vec<u8>> = memory.chunks(piece).map(|part| vec![0; part.len()]).collect();
            let targets: Vec<_> = apart.iter_mut().map(|part| (part.as_mut_ptr(), part.len())).collect();
            // SAFETY: vectors of their own, of these lengths.
            assert_eq!(unsafe { over(&memory).scatter_and_checksum(&targets, block, 3) }, whole);
            assert_eq!(apart.concat(), *memory, "{length} bytes by {piece}");
            let target = Arc::new(vec![0u8; length]);
            let (head, tail) = memory.split_at(length / 3);
            let sources = [(head.as_ptr(), head.len()), (tail.as_ptr(), tail.len())];
            // SAFETY: nobody else looks at the target's bytes, which are only reached by address until this returns.
            assert_eq!(unsafe { over(&target).gather_and_checksum(&sources, block, 3) }, whole);
            assert_eq!(target, memory, "{length} bytes of two pieces");
        }
    }

    // Parts that several threads copy could leave bytes out between them, or be summed in another order.
    #[test]
    fn parts_of_several_threads_are_the_whole() {
        let block = BlockId::from_bytes([8; 16]);
        let around =
            [SHARED_BYTES_MIN - 1, SHARED_BYTES_MIN, SHARED_BYTES_MIN + 1, 368_640, 2 << 20, 8 << 20];
        for (length, threads) in
            around.into_iter().flat_map(|length| [1, 2, 4].map(|threads| (length, threads)))
        {
            let memory: Arc<Vec<u8>> =
                Arc::new((0..length).map(|at| u8::try_from(at % 251).unwrap()).collect());
            let whole = terrace_core::checksum(block, 3, &memory);
            for shared in [over(&memory), over(&memory).through_the_cache()] {
                let mut copy = vec![0; length + 1];
                // Some of it is at no line's beginning.
                let mut target = TargetMemory::from(&mut copy[1..]);
                let found =
                    shared.copy_and_checksum_into(&mut target, block, 3, Called::of(threads, 8 << 20));
                assert_eq!(found, whole, "{length} bytes by {threads}");
                assert!(copy[1..] == memory[..], "{length} bytes by {threads}");
                copy.fill(0);
                shared.copy_into(&mut TargetMemory::from(&mut copy[1..]), Called::of(threads, 8 << 20));
                assert!(copy[1..] == memory[..], "plain copy of {length} bytes by {threads}");
            }
        }
    }

    // A view that keeps nothing mapped must not come back when the memory has gone.
    #[test]
    fn a_weak_view_ends_with_its_memory() {
        let memory = Arc::new(vec![1u8, 2, 3]);
        let weak = over(&memory).part(1, 2).downgrade();
        let mut two = [0; 2];
        weak.upgrade().unwrap().copy_to(&mut two);
        assert_eq!(two, [2, 3]);
        drop(memory);
        assert!(weak.upgrade().is_none());
    }

    // A part must be the bytes it says, and one that reaches outside must not exist.
    #[test]
    fn parts_lie_inside() {
        let memory = Arc::new(vec![1u8, 2, 3, 4]);
        let shared = over(&memory);
        let mut two = [0; 2];
        shared.part(1, 2).copy_to(&mut two);
        assert_eq!(two, [2, 3]);
        assert!(shared.part(4, 0).is_empty());
        for (offset, length) in [(3, 2), (usize::MAX, 2)] {
            let outside = std::panic::AssertUnwindSafe(|| shared.part(offset, length));
            assert!(std::panic::catch_unwind(outside).is_err());
        }
    }
}
