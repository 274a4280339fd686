//! The residency table: one entry a block, whatever tiers hold it, linked into
//! the prefix forest by parent index.
//!
//! An entry without a copy (a ghost) stays while a child entry names it as its
//! parent, so that a parent link always leads somewhere and child counts are
//! exact. Look-ups hash the id's own bits; nothing iterates the hash table.

use hashbrown::HashTable;

use crate::api::{IoClass, Residence};
use crate::checksum::Checksum;
use crate::ids::{BlockId, DiskFrame, FrameRef, OpId};
use crate::state::count;
use crate::state::lru::Links;
use crate::state::space::SpaceIndex;
use crate::units::{ByteCount, Now};

/// Longest walk towards the root when a parent is attached to an entry that
/// has children already. Beyond it the parent is not recorded.
const ANCESTORS_MAX: u32 = 1 << 16;

/// Index of an entry. Valid until the entry is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BlockIndex(pub(crate) u32);

/// What every copy of a sealed block agrees on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SealFacts {
    pub(crate) length: ByteCount,
    pub(crate) checksum: Checksum,
    pub(crate) generation: u64,
}

/// The copy on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nvme {
    None,
    /// The device is writing it.
    Writing {
        frame: DiskFrame,
        op: OpId,
    },
    /// Written; waits for the commit that makes it durable.
    Committing {
        frame: DiskFrame,
        sequence: u64,
    },
    /// Durable.
    Sealed {
        frame: DiskFrame,
        sequence: u64,
    },
    /// No longer served; its catalog entry is being deleted.
    Deleting,
}

impl Nvme {
    /// A copy is being made.
    pub(crate) fn is_coming(self) -> bool {
        match self {
            Nvme::Writing { .. } | Nvme::Committing { .. } => true,
            Nvme::None | Nvme::Sealed { .. } | Nvme::Deleting => false,
        }
    }
}

/// How a Pinned copy that may be served is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arriving {
    No,
    /// In the queue of wanted blocks of this class.
    Queued(IoClass),
    /// Being read from a device.
    Reading(OpId),
    /// Its Pinned copy is being compared with its checksum.
    Verifying(OpId),
}

/// A promise to evict the block last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Retained {
    pub(crate) priority: u8,
    pub(crate) until: Now,
}

/// One block.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) id: BlockId,
    pub(crate) space: SpaceIndex,
    pub(crate) parent: Option<BlockIndex>,
    /// Entries that name this one as parent.
    pub(crate) children: u32,
    /// Of these, sealed in Pinned.
    pub(crate) children_pinned: u32,
    /// Of these, sealed in Nvme.
    pub(crate) children_nvme: u32,
    /// Present while a tier holds a sealed copy, or Nvme is about to.
    pub(crate) seal: Option<SealFacts>,
    /// The sealed copy in Pinned.
    pub(crate) pinned: Option<FrameRef>,
    pub(crate) nvme: Nvme,
    /// Pinned frames that are being filled for it.
    pub(crate) filling: u32,
    pub(crate) arriving: Arriving,
    pub(crate) touched: Now,
    pub(crate) retained: Option<Retained>,
    /// Device errors while writing it, since the last success; the most when no device has room for it.
    pub(crate) write_faults: u8,
    /// It waits in the queue of urgent writes.
    pub(crate) urgent: bool,
    pub(crate) lru_pinned: Links,
    pub(crate) lru_nvme: Links,
}

impl Block {
    fn new(id: BlockId, space: SpaceIndex, now: Now) -> Self {
        Self {
            id,
            space,
            parent: None,
            children: 0,
            children_pinned: 0,
            children_nvme: 0,
            seal: None,
            pinned: None,
            nvme: Nvme::None,
            filling: 0,
            arriving: Arriving::No,
            touched: now,
            retained: None,
            write_faults: 0,
            urgent: false,
            lru_pinned: Links::default(),
            lru_nvme: Links::default(),
        }
    }

    /// Tiers with a sealed copy.
    pub(crate) fn residence(&self) -> Residence {
        Residence { pinned: self.pinned.is_some(), nvme: matches!(self.nvme, Nvme::Sealed { .. }) }
    }

    /// Nothing needs the entry any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.pinned.is_none()
            && self.nvme == Nvme::None
            && self.filling == 0
            && self.arriving == Arriving::No
            && self.children == 0
    }
}

/// All entries.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    entries: Vec<Option<Block>>,
    free: Vec<BlockIndex>,
    index: HashTable<u32>,
}

/// The id's own low bits: they are uniform already.
#[expect(clippy::cast_possible_truncation, reason = "a hash is the low half of uniform bits")]
fn hash(id: BlockId) -> u64 {
    id.as_u128() as u64
}

impl BlockTable {
    /// Entries, ghosts included.
    pub(crate) fn len(&self) -> u32 {
        count(self.entries.len() - self.free.len())
    }

    /// One past the highest index in use.
    pub(crate) fn end(&self) -> u32 {
        count(self.entries.len())
    }

    /// The entry of a block.
    pub(crate) fn find(&self, id: BlockId) -> Option<BlockIndex> {
        let entries = &self.entries;
        self.index.find(hash(id), |&slot| entry(entries, slot).id == id).map(|&slot| BlockIndex(slot))
    }

    /// A live entry.
    pub(crate) fn at(&self, index: BlockIndex) -> &Block {
        entry(&self.entries, index.0)
    }

    /// A live entry.
    pub(crate) fn at_mut(&mut self, index: BlockIndex) -> &mut Block {
        self.entries[index.0 as usize].as_mut().expect("a block index is used only while its entry lives")
    }

    /// The entry at an index that may be stale.
    pub(crate) fn try_at(&self, index: BlockIndex) -> Option<&Block> {
        self.entries.get(index.0 as usize)?.as_ref()
    }

    /// Adds an entry for a block that has none.
    pub(crate) fn insert(&mut self, id: BlockId, space: SpaceIndex, now: Now) -> BlockIndex {
        assert!(self.find(id).is_none(), "a block has one entry");
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            BlockIndex(count(self.entries.len() - 1))
        });
        self.entries[index.0 as usize] = Some(Block::new(id, space, now));
        let entries = &self.entries;
        self.index.insert_unique(hash(id), index.0, |&slot| hash(entry(entries, slot).id));
        index
    }

    /// Removes an entry that is gone, and every ancestor that only it kept.
    pub(crate) fn remove_if_gone(&mut self, index: BlockIndex) {
        let mut next = Some(index);
        while let Some(index) = next {
            let Some(block) = self.try_at(index) else { return };
            if !block.is_gone() {
                return;
            }
            assert!(!block.lru_pinned.is_listed(), "a block without a Pinned copy is in no Pinned list");
            assert!(!block.lru_nvme.is_listed(), "a block without an Nvme copy is in no Nvme list");
            next = block.parent;
            let id = block.id;
            if let Ok(found) = self.index.find_entry(hash(id), |&slot| slot == index.0) {
                found.remove();
            }
            self.entries[index.0 as usize] = None;
            self.free.push(index);
            if let Some(parent) = next {
                let parent = self.at_mut(parent);
                assert!(parent.children > 0, "a child is counted once by its parent");
                parent.children -= 1;
            }
        }
    }

    /// Records the parent of an entry that has none. Refuses what would make a
    /// cycle: then the entry stays a root.
    pub(crate) fn attach(&mut self, child: BlockIndex, parent: BlockIndex) {
        let entry = self.at(child);
        if entry.parent.is_some() || self.at(parent).space != entry.space {
            return;
        }
        if child == parent || (entry.children > 0 && self.has_ancestor(parent, child)) {
            return;
        }
        let residence = entry.residence();
        self.at_mut(child).parent = Some(parent);
        let parent = self.at_mut(parent);
        parent.children += 1;
        parent.children_pinned += u32::from(residence.pinned);
        parent.children_nvme += u32::from(residence.nvme);
    }

    /// Is `wanted` the entry or an ancestor of it? Also true when the walk is too long to tell.
    fn has_ancestor(&self, from: BlockIndex, wanted: BlockIndex) -> bool {
        let mut next = Some(from);
        for _ in 0..ANCESTORS_MAX {
            match next {
                None => return false,
                Some(index) if index == wanted => return true,
                Some(index) => next = self.at(index).parent,
            }
        }
        true
    }
}

fn entry(entries: &[Option<Block>], slot: u32) -> &Block {
    entries[slot as usize].as_ref().expect("a block index is used only while its entry lives")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> BlockId {
        BlockId::from_bytes([n; 16])
    }

    fn add(table: &mut BlockTable, n: u8) -> BlockIndex {
        let index = table.insert(id(n), SpaceIndex(0), Now::default());
        table.at_mut(index).filling = 1;
        index
    }

    /// A client may name parents in a circle: walks up the forest would never end.
    #[test]
    fn a_circle_of_parents_is_refused() {
        let mut table = BlockTable::default();
        let (a, b, c) = (add(&mut table, 1), add(&mut table, 2), add(&mut table, 3));
        table.attach(b, a);
        table.attach(c, b);
        table.attach(a, c);
        table.attach(a, a);
        assert_eq!((table.at(a).parent, table.at(c).parent), (None, Some(b)));
        assert_eq!((table.at(a).children, table.at(b).children, table.at(c).children), (1, 1, 0));
    }

    /// Entries without a copy could pile up: they go with the last child that names them.
    #[test]
    fn ghosts_go_with_their_last_child() {
        let mut table = BlockTable::default();
        let (a, b, c) = (add(&mut table, 1), add(&mut table, 2), add(&mut table, 3));
        table.attach(b, a);
        table.attach(c, b);
        for index in [a, b] {
            table.at_mut(index).filling = 0;
            table.remove_if_gone(index);
        }
        assert_eq!(table.len(), 3, "their descendant is still there");
        table.at_mut(c).filling = 0;
        table.remove_if_gone(c);
        assert_eq!(table.len(), 0);
        assert_eq!(table.find(id(2)), None);
        let again = add(&mut table, 2);
        assert_eq!(table.find(id(2)), Some(again));
    }
}
