//! The residency table: one entry a block, whatever tiers hold it, linked into
//! the prefix forest by parent index.
//!
//! An entry without a copy (a ghost) stays while a child entry names it as its
//! parent, so that a parent link always leads somewhere and child counts are
//! exact. Look-ups hash the id's own bits; nothing iterates the hash table.

use std::num::NonZeroU32;

use crate::api::Residence;
use crate::checksum::Checksum;
use crate::ids::{BlockId, DiskFrame, FrameRef, OpId};
use crate::state::count;
use crate::state::index::Index;
use crate::state::lru::Links;
use crate::state::space::SpaceIndex;
use crate::units::Now;

/// Longest walk towards the root when a parent is attached to an entry that
/// has children already. Beyond it the parent is not recorded.
const ANCESTORS_MAX: u32 = 1 << 16;

/// Index of an entry. Valid until the entry is removed. Kept as the number
/// after it, so that an absent link takes no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BlockIndex(NonZeroU32);

impl BlockIndex {
    /// The entry at a place of the table, which is limited to fewer than 2^32 - 1 entries.
    pub(crate) fn new(place: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(place))
    }

    /// Its place in the table.
    pub(crate) fn get(self) -> u32 {
        self.0.get() - 1
    }

    fn place(self) -> usize {
        self.get() as usize
    }
}

/// The copy on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nvme {
    None,
    /// The device is writing it.
    Writing {
        frame: DiskFrame,
        sequence: u64,
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

/// How a Pinned copy that may be served is on its way. Operations are known by
/// the low half of their number: no two with the same half are ever in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arriving {
    No,
    /// In the queue of wanted blocks.
    Queued,
    /// Being read from a device.
    Reading(ShortOp),
    /// Its Pinned copy is being compared with its checksum.
    Verifying(ShortOp),
}

/// Low half of an operation's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShortOp(u32);

impl From<OpId> for ShortOp {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is kept")]
    fn from(op: OpId) -> Self {
        Self(op.get() as u32)
    }
}

/// A promise to evict the block last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Retained {
    pub(crate) priority: u8,
    pub(crate) until: Now,
}

/// One block, in two cache lines: there are as many as blocks in all tiers.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) id: BlockId,
    /// Of the payload, while `sealed`.
    checksum: Checksum,
    pub(crate) touched: Now,
    pub(crate) nvme: Nvme,
    /// The sealed copy in Pinned.
    pub(crate) pinned: Option<FrameRef>,
    pub(crate) arriving: Arriving,
    pub(crate) space: SpaceIndex,
    pub(crate) parent: Option<BlockIndex>,
    /// The entry that named this one as parent last: where a prefix mostly goes on.
    child: Option<BlockIndex>,
    /// Entries that name this one as parent.
    pub(crate) children: u32,
    /// Of these, sealed in Pinned.
    pub(crate) children_pinned: u32,
    /// Of these, sealed in Nvme.
    pub(crate) children_nvme: u32,
    pub(crate) lru_pinned: Links,
    pub(crate) lru_nvme: Links,
    /// Pinned frames that are being filled for it.
    pub(crate) filling: u16,
    /// Device errors while writing it, since the last success; the most when no device has room for it.
    pub(crate) write_faults: u8,
    /// It waits in the queue of urgent writes.
    pub(crate) urgent: bool,
    /// It is evicted last; until when is in the core's table.
    pub(crate) retained: bool,
    /// A tier holds a sealed copy, or Nvme is about to.
    sealed: bool,
}

const _: () = assert!(size_of::<Option<Block>>() == 128);

impl Block {
    fn new(id: BlockId, space: SpaceIndex, now: Now) -> Self {
        Self {
            id,
            checksum: Checksum::new(0),
            touched: now,
            nvme: Nvme::None,
            pinned: None,
            arriving: Arriving::No,
            space,
            parent: None,
            child: None,
            children: 0,
            children_pinned: 0,
            children_nvme: 0,
            lru_pinned: Links::default(),
            lru_nvme: Links::default(),
            filling: 0,
            write_faults: 0,
            urgent: false,
            retained: false,
            sealed: false,
        }
    }

    /// Checksum of every sealed copy. Its length and generation are those of
    /// its space: a cleared space's blocks are dropped at once.
    pub(crate) fn seal(&self) -> Option<Checksum> {
        self.sealed.then_some(self.checksum)
    }

    pub(crate) fn set_seal(&mut self, seal: Option<Checksum>) {
        self.sealed = seal.is_some();
        self.checksum = seal.unwrap_or(self.checksum);
    }

    /// Tiers with a sealed copy.
    pub(crate) fn residence(&self) -> Residence {
        Residence { pinned: self.pinned.is_some(), nvme: matches!(self.nvme, Nvme::Sealed { .. }) }
    }

    /// Whether no child is sealed in Pinned; in either tier.
    pub(crate) fn leaf_of(&self) -> (bool, bool) {
        (self.children_pinned == 0, self.children_pinned == 0 && self.children_nvme == 0)
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
    index: Index,
}

/// The id's own low bits: they are uniform already.
#[expect(clippy::cast_possible_truncation, reason = "a tag is the low bits of uniform ones")]
fn tag(id: BlockId) -> u32 {
    id.as_u128() as u32
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
        self.index.find(tag(id), |slot| entry(entries, slot).id == id).map(BlockIndex::new)
    }

    /// Many blocks will be looked for, of which few are there.
    pub(crate) fn warm(&self, ids: &[BlockId]) {
        self.index.warm(ids.iter().map(|&id| tag(id)));
    }

    /// The entry of the block that comes after `before` in a prefix: mostly its
    /// last child, which is found without hashing.
    pub(crate) fn find_after(&self, before: Option<BlockIndex>, id: BlockId) -> Option<BlockIndex> {
        let child = before.and_then(|before| self.at(before).child);
        match child {
            Some(child) if self.at(child).id == id => Some(child),
            Some(_) | None => self.find(id),
        }
    }

    /// A live entry.
    pub(crate) fn at(&self, index: BlockIndex) -> &Block {
        entry(&self.entries, index.get())
    }

    /// A live entry.
    pub(crate) fn at_mut(&mut self, index: BlockIndex) -> &mut Block {
        self.entries[index.place()].as_mut().expect("a block index is used only while its entry lives")
    }

    /// The entry at an index that may be stale.
    pub(crate) fn try_at(&self, index: BlockIndex) -> Option<&Block> {
        self.entries.get(index.place())?.as_ref()
    }

    /// The entry of a block; a new one if it has none.
    pub(crate) fn find_or_insert(&mut self, id: BlockId, space: SpaceIndex, now: Now) -> BlockIndex {
        if let Some(found) = self.find(id) {
            return found;
        }
        let index = self.free.pop().unwrap_or_else(|| BlockIndex::new(count(self.entries.len())));
        self.index.insert(tag(id), index.get());
        let block = Some(Block::new(id, space, now));
        if index.place() == self.entries.len() {
            self.entries.push(block);
        } else {
            self.entries[index.place()] = block;
        }
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
            self.index.remove(tag(id), index.get());
            self.entries[index.place()] = None;
            self.free.push(index);
            if let Some(parent) = next {
                let above = tag(self.at(parent).id);
                // A leaf's parent is mostly the next to go.
                self.index.warm(std::iter::once(above));
                let parent = self.at_mut(parent);
                assert!(parent.children > 0, "a child is counted once by its parent");
                parent.children -= 1;
                parent.child = parent.child.filter(|&child| child != index);
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
        parent.child = Some(child);
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
        let index = table.find_or_insert(id(n), SpaceIndex(0), Now::default());
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
