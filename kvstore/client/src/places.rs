//! Where blocks lie that were leased before: a hint, and safe to follow.
//!
//! The fence of a frame moves before its block is evicted, cleared or dropped and before its bytes change, whether or
//! not anybody has a lease of it. So who copies from where a block lay, and finds the fence as it was granted
//! afterwards, has the block, as the holder of a lease has that expired meanwhile. Nothing is pinned by it, and nothing is asked.
//!
//! The daemon is told now and then which blocks were used, as it counts by that what to keep.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{self, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use terrace_core::{BlockId, Checksum, Fence};
use terrace_lane::{SharedBytes, WeakBytes};

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

impl Place {
    /// Whether the block still lies there: ask before its bytes are read, and again afterwards.
    fn holds(&self, bytes: &SharedBytes, status: &Status) -> bool {
        // What was read before must not be read after the fence.
        atomic::fence(Ordering::Acquire);
        let fence = bytes.mapping().and_then(|mapping| mapping.fence(self.frame));
        fence == Some(self.fence) && !status.is_closed()
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
    slots: HashMap<BlockId, usize>,
    known: Vec<Known<P>>,
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
    untold: bool,
}

/// What was read where it was known to lie.
#[derive(Debug, Default)]
pub(crate) struct Used {
    pub(crate) chunks: BTreeSet<u64>,
    /// Requests' worth of keys of one space.
    pub(crate) blocks: Vec<(u32, Vec<Bytes>)>,
}

impl Places {
    pub(crate) fn new(blocks_max: usize) -> Self {
        let table = Table { slots: HashMap::new(), known: Vec::new(), hand: 0 };
        Self { table: Mutex::new(table), blocks_max }
    }

    fn table(&self) -> MutexGuard<'_, Table<Place>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the block from where it lay, compares the copy with the sealed checksum if that is wanted, and then looks
    /// whether it lies there still. False: it has to be leased; `target` holds anything.
    pub(crate) fn copy(
        &self,
        block: BlockId,
        status: &Status,
        target: &mut impl BlockTarget,
        how: How,
    ) -> bool {
        let Some(place) = self.table().place(block) else { return false };
        let Some(bytes) = place.bytes.upgrade().filter(|bytes| bytes.len() == target.length()) else {
            return false;
        };
        if !place.holds(&bytes, status) {
            return false;
        }
        let found = how.copy(bytes.clone(), target, block, place.generation);
        if !place.holds(&bytes, status) {
            return false;
        }
        let good = found.is_none_or(|found| found == place.checksum);
        if !good {
            tracing::warn!(%block, "not the bytes that were sealed; leasing it anew");
        }
        good
    }

    /// Remembers where a block was granted.
    pub(crate) fn keep(&self, block: BlockId, place: Place, space: u32, key: &[u8]) {
        let known =
            Known { block, place, space, key: Bytes::copy_from_slice(key), recent: false, untold: false };
        self.table().keep(known);
    }

    /// What was used since the last time.
    pub(crate) fn take_used(&self) -> Used {
        let mut used = Used::default();
        let mut spaces: BTreeMap<u32, Vec<Bytes>> = BTreeMap::new();
        for known in self.table().known.iter_mut().filter(|known| known.untold) {
            known.untold = false;
            used.chunks.insert(known.place.chunk);
            spaces.entry(known.space).or_default().push(known.key.clone());
        }
        for (space, keys) in spaces {
            used.blocks.extend(keys.chunks(self.blocks_max).map(|keys| (space, keys.to_vec())));
        }
        used
    }
}

impl<P: Clone> Table<P> {
    fn place(&mut self, block: BlockId) -> Option<P> {
        let known = &mut self.known[*self.slots.get(&block)?];
        known.recent = true;
        known.untold = true;
        Some(known.place.clone())
    }

    fn keep(&mut self, known: Known<P>) {
        let slot = match self.slots.get(&known.block) {
            Some(slot) => *slot,
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
        Known { block, place: number, space: 1, key: Bytes::new(), recent: false, untold: false }
    }

    // A place under another block's name would be the wrong bytes, found by the checksum only, and a table without a bound
    // would grow: many more blocks than there is room for pass by one that is used all the time.
    #[test]
    fn what_is_used_stays_and_nothing_is_mixed_up() {
        let mut table = Table { slots: HashMap::new(), known: Vec::new(), hand: 0 };
        for number in 0..3 * PLACES_MAX as u64 {
            table.keep(known(number));
            assert_eq!(table.place(known(0).block), Some(0), "{number}");
        }
        assert_eq!((table.known.len(), table.slots.len()), (PLACES_MAX, PLACES_MAX));
        let mut found = 0;
        for number in 0..3 * PLACES_MAX as u64 {
            if let Some(place) = table.place(known(number).block) {
                assert_eq!(place, number);
                found += 1;
            }
        }
        assert_eq!(found, PLACES_MAX);
        // A block that moved is known at its new place only.
        table.keep(Known { place: 77, ..known(0) });
        assert_eq!((table.place(known(0).block), table.known.len()), (Some(77), PLACES_MAX));
    }
}
