//! Where blocks lie that were leased before: a hint, and safe to follow.
//!
//! The fence of a frame moves before its block is evicted, cleared or dropped and before its bytes change, whether or
//! not anybody has a lease of it. So who copies from where a block lay, and finds the fence as it was granted
//! afterwards, has the block, as the holder of a lease has that expired meanwhile. Nothing is pinned by it, and nothing is asked.
//!
//! The daemon is told now and then which blocks were used, as it counts by that what to keep.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{self, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use terrace_core::{BlockId, Checksum, Fence};
use terrace_lane::{Called, SharedBytes, WeakBytes};
use terrace_proto::v1::TouchRequest;

use crate::get::{BlockTarget, How};
use crate::status::Status;

/// Places that one session remembers: some hundreds of bytes each.
const PLACES_MAX: usize = 4096;

/// Where a block was granted. It keeps nothing mapped.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) bytes: WeakBytes,
    pub(crate) chunk: u64,
    pub(crate) frame: u32,
    pub(crate) fence: Fence,
    pub(crate) checksum: Checksum,
    pub(crate) generation: u64,
}

/// A block that lay somewhere, and is kept mapped.
#[derive(Debug)]
pub(crate) struct Lying {
    pub(crate) bytes: SharedBytes,
    frame: u32,
    fence: Fence,
    checksum: Checksum,
    generation: u64,
}

impl Lying {
    fn at(place: &Place, length: usize, how: How) -> Option<Self> {
        let bytes = place.bytes.upgrade().filter(|bytes| bytes.len() == length)?;
        let (frame, fence, checksum, generation) =
            (place.frame, place.fence, place.checksum, place.generation);
        Some(Self { bytes: how.of_many(bytes), frame, fence, checksum, generation })
    }

    /// Whether the block still lies there: ask before its bytes are read, and again afterwards.
    fn holds(&self, status: &Status) -> bool {
        // What was read before must not be read after the fence.
        atomic::fence(Ordering::Acquire);
        let fence = self.bytes.mapping().and_then(|mapping| mapping.fence(self.frame));
        fence == Some(self.fence) && !status.is_closed()
    }

    /// Copies the block, compares the copy with the sealed checksum if that is wanted, and then looks whether it lies
    /// there still. False: it has to be leased; `target` holds anything.
    pub(crate) fn copy(
        &self,
        block: BlockId,
        status: &Status,
        target: &mut impl BlockTarget,
        how: How,
        called: Called,
    ) -> bool {
        if !self.holds(status) {
            return false;
        }
        let found = how.copy(&self.bytes, target, (block, self.generation), called);
        if !self.holds(status) {
            return false;
        }
        let good = found.is_none_or(|found| found == self.checksum);
        if !good {
            tracing::warn!(%block, "not the bytes that were sealed; leasing it anew");
        }
        good
    }
}

/// An id is a hash by itself.
#[derive(Clone, Copy, Debug, Default)]
struct ById(u64);

impl Hasher for ById {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Places {
    table: Mutex<Table<Place>>,
    /// Blocks of one request.
    blocks_max: usize,
}

#[derive(Debug)]
struct Table<P> {
    slots: HashMap<BlockId, usize, BuildHasherDefault<ById>>,
    known: Vec<Known<P>>,
    /// Behind the one that was found last: blocks that are kept one after the other are wanted so as well.
    next: usize,
    /// The next to make room, unless it was used since the hand was there.
    hand: usize,
}

#[derive(Debug)]
struct Known<P> {
    block: BlockId,
    place: P,
    /// As the daemon is told of it.
    space: u32,
    key: Bytes,
    recent: bool,
    /// How often it was found since the daemon was told.
    untold: u32,
}

/// What was read where it was known to lie.
#[derive(Debug, Default)]
pub(crate) struct Used {
    pub(crate) chunks: BTreeSet<u64>,
    /// What the daemon is told, a request's worth of one space each.
    pub(crate) blocks: Vec<TouchRequest>,
}

impl Places {
    pub(crate) fn new(blocks_max: usize) -> Self {
        let table = Table { slots: HashMap::default(), known: Vec::new(), next: 0, hand: 0 };
        Self { table: Mutex::new(table), blocks_max }
    }

    fn table(&self) -> MutexGuard<'_, Table<Place>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where these blocks of `length` bytes lay, as far as that is known and still mapped, in order.
    pub(crate) fn find(&self, blocks: &[BlockId], length: usize, how: How) -> Vec<Option<Lying>> {
        let mut table = self.table();
        blocks.iter().map(|block| Lying::at(table.place(*block)?, length, how)).collect()
    }

    /// Remembers where a block was granted.
    pub(crate) fn keep(&self, block: BlockId, place: Place, space: u32, key: &[u8]) {
        let known = Known { block, place, space, key: Bytes::copy_from_slice(key), recent: false, untold: 0 };
        self.table().keep(known);
    }

    /// What was used since the last time.
    pub(crate) fn take_used(&self) -> Used {
        let mut used = Used::default();
        let mut spaces: BTreeMap<u32, Vec<(Bytes, u32)>> = BTreeMap::new();
        for known in self.table().known.iter_mut().filter(|known| known.untold > 0) {
            used.chunks.insert(known.place.chunk);
            let reads = std::mem::take(&mut known.untold);
            spaces.entry(known.space).or_default().push((known.key.clone(), reads));
        }
        for (space, blocks) in spaces {
            used.blocks.extend(blocks.chunks(self.blocks_max).map(|blocks| {
                let (keys, reads) = blocks.iter().cloned().unzip();
                TouchRequest { space, keys, reads }
            }));
        }
        used
    }
}

impl<P> Table<P> {
    fn place(&mut self, block: BlockId) -> Option<&P> {
        let slot = match self.known.get(self.next) {
            Some(known) if known.block == block => self.next,
            Some(_) | None => *self.slots.get(&block)?,
        };
        self.next = slot + 1;
        let known = &mut self.known[slot];
        known.recent = true;
        known.untold = known.untold.saturating_add(1);
        Some(&known.place)
    }

    fn keep(&mut self, mut known: Known<P>) {
        let slot = match self.slots.get(&known.block) {
            Some(slot) => {
                // It was read where it lay before.
                known.untold = self.known[*slot].untold;
                *slot
            }
            None if self.known.len() < PLACES_MAX => {
                self.slots.insert(known.block, self.known.len());
                return self.known.push(known);
            }
            None => {
                let slot = self.make_room();
                self.slots.remove(&self.known[slot].block);
                self.slots.insert(known.block, slot);
                slot
            }
        };
        self.known[slot] = known;
    }

    /// The first slot that was not used since the hand was there.
    fn make_room(&mut self) -> usize {
        loop {
            let slot = self.hand;
            self.hand = (slot + 1) % self.known.len();
            if !std::mem::take(&mut self.known[slot].recent) {
                return slot;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(number: u64) -> Known<u64> {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        let block = BlockId::from_bytes(id);
        Known { block, place: number, space: 1, key: Bytes::new(), recent: false, untold: 0 }
    }

    // A place under another block's name would be the wrong bytes, found by the checksum only, and a table without a bound
    // would grow: many more blocks than there is room for pass by one that is used all the time.
    #[test]
    fn what_is_used_stays_and_nothing_is_mixed_up() {
        let mut table = Table { slots: HashMap::default(), known: Vec::new(), next: 0, hand: 0 };
        for number in 0..3 * PLACES_MAX as u64 {
            table.keep(known(number));
            assert_eq!(table.place(known(0).block), Some(&0), "{number}");
        }
        assert_eq!((table.known.len(), table.slots.len()), (PLACES_MAX, PLACES_MAX));
        let mut found = 0;
        for number in 0..3 * PLACES_MAX as u64 {
            if let Some(place) = table.place(known(number).block) {
                assert_eq!(*place, number);
                found += 1;
            }
        }
        assert_eq!(found, PLACES_MAX);
        // A block that moved is known at its new place only.
        table.keep(Known { place: 77, ..known(0) });
        assert_eq!((table.place(known(0).block).copied(), table.known.len()), (Some(77), PLACES_MAX));
    }

    // A block that is found somewhere else was read where it lay before, and operators must see that.
    #[test]
    fn what_was_read_is_told_though_the_block_moved() {
        let mut table = Table { slots: HashMap::default(), known: Vec::new(), next: 0, hand: 0 };
        table.keep(known(1));
        table.place(known(1).block);
        table.keep(Known { place: 77, ..known(1) });
        table.place(known(1).block);
        assert_eq!(table.known[0].untold, 2);
    }
}
