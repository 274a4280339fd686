//! Where the records of crowded runs are, for the writer: the beginning that all prompts share has a record for
//! every holder, and walking through thousands of them for each change would cost more than the change.

use std::collections::BTreeMap;

use crate::ids::HolderId;

/// Records in a chain from which on they are listed here.
pub(crate) const CROWDED: u32 = 32;
/// What an entry takes in a tree that is two thirds full.
const ENTRY_BYTES: u64 = 36;

/// Extent and slot of each record of the crowded runs, by run and holder.
#[derive(Debug, Default)]
pub(crate) struct Crowd(BTreeMap<(u32, u32), (u32, u32)>);

impl Crowd {
    /// Where a holder's record is, if its run is crowded.
    pub(crate) fn find(&self, run: u32, holder: HolderId) -> Option<(u32, u32)> {
        self.0.get(&(run, holder.0)).copied()
    }

    pub(crate) fn insert(&mut self, run: u32, holder: HolderId, place: (u32, u32)) {
        self.0.insert((run, holder.0), place);
    }

    pub(crate) fn remove(&mut self, run: u32, holder: HolderId) {
        self.0.remove(&(run, holder.0));
    }

    /// Takes all records of a run out.
    pub(crate) fn clear(&mut self, run: u32) {
        while let Some((&key, _)) = self.0.range((run, 0)..=(run, u32::MAX)).next() {
            self.0.remove(&key);
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.len() as u64 * ENTRY_BYTES
    }
}
