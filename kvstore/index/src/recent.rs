//! Where the blocks probably are that the next changes go on from, for the writer: what is stored goes on from what was
//! stored before, and what is removed ends where the last removal began.

use crate::ids::Key;
use crate::run::Place;

/// Places that are kept, one a slot, at most.
const SLOTS_MAX: u64 = 1 << 16;
const SLOTS_MIN: u64 = 1 << 9;
/// Bytes of an index for each slot.
const BYTES_A_SLOT: u64 = 4096;

/// A slot is the last place noted for a key of its hash. To be compared with the key: blocks come and go.
#[derive(Debug, Default)]
pub(crate) struct Recent(Box<[u32]>);

impl Recent {
    /// For an index of so many bytes.
    pub(crate) fn new(bytes_max: u64) -> Self {
        let slots = (bytes_max / BYTES_A_SLOT).clamp(SLOTS_MIN, SLOTS_MAX).next_power_of_two();
        Self((0..slots).map(|_| 0).collect())
    }

    pub(crate) fn find(&self, key: Key) -> Option<Place> {
        Some(self.0[self.slot(key)]).filter(|bits| *bits != 0).map(Place::of)
    }

    /// The place that has to give way, if there is one.
    pub(crate) fn note(&mut self, key: Key, place: Place) -> Option<Place> {
        let slot = self.slot(key);
        let before = std::mem::replace(&mut self.0[slot], place.bits());
        Some(before).filter(|bits| *bits != 0 && *bits != place.bits()).map(Place::of)
    }

    /// Forgets a place that was found under this key.
    pub(crate) fn forget(&mut self, key: Key) {
        let slot = self.slot(key);
        self.0[slot] = 0;
    }

    pub(crate) fn bytes(&self) -> u64 {
        size_of_val(&*self.0) as u64
    }

    fn slot(&self, key: Key) -> usize {
        key.hash() as usize & (self.0.len() - 1)
    }
}
