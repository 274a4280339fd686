//! The residency table: one entry a block, whatever tiers hold it, linked into
//! the prefix forest by parent index.
//!
//! An entry without a copy (a ghost) stays while a child entry names it as its
//! parent, so that a parent link always leads somewhere and child counts are
//! exact. Look-ups hash the id's own bits; nothing iterates the hash table.

use std::num::NonZeroU32;

use crate::api::{IoClass, Residence, UseStats};
use crate::checksum::Checksum;
use crate::evict::Tier;
use crate::ids::{BlockId, DiskFrame, FrameRef, GpuSet, OpId};
use crate::policy::class::Tick;
use crate::policy::queues::Links;
use crate::state::count;
use crate::state::index::{Index, Past, tag};
use crate::state::space::SpaceIndex;
use crate::units::{Micros, Now};

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
    /// In the queue of wanted blocks of this class.
    Queued(IoClass),
    /// Being read from a device.
    Reading(ShortOp),
    /// Its Pinned copy is being compared with its checksum.
    Verifying(ShortOp),
}

/// Low half of an operation's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShortOp(u32);

impl ShortOp {
    /// The operation, which was started at `last` or before.
    pub(crate) fn of(self, last: u64) -> OpId {
        let high = last >> 32 << 32;
        let found = high | u64::from(self.0);
        OpId::new(if found > last { found.wrapping_sub(1 << 32) } else { found })
    }
}

impl From<OpId> for ShortOp {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is kept")]
    fn from(op: OpId) -> Self {
        Self(op.get() as u32)
    }
}

/// A time in units of 16 milliseconds: two years fit into 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CoarseTime(u32);

const COARSE_SHIFT: u32 = 14;

impl From<Now> for CoarseTime {
    fn from(now: Now) -> Self {
        Self(u32::try_from(now.micros() >> COARSE_SHIFT).unwrap_or(u32::MAX))
    }
}

impl From<CoarseTime> for Now {
    fn from(coarse: CoarseTime) -> Self {
        Now::from_micros(u64::from(coarse.0) << COARSE_SHIFT)
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
    /// Of the payload, while it is sealed.
    checksum: Checksum,
    pub(crate) nvme: Nvme,
    /// The sealed copy in Pinned.
    pub(crate) pinned: Option<FrameRef>,
    /// While it is on its way: the operation, or the class that it is queued in.
    arriving_op: ShortOp,
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
    pub(crate) listed_pinned: Links,
    pub(crate) listed_nvme: Links,
    /// Last use, by the clock of requests and by the one on the wall.
    pub(crate) used: Tick,
    touched: CoarseTime,
    /// Blocks before it in its prefix.
    pub(crate) depth: u32,
    /// Pinned frames that are being filled for it.
    pub(crate) filling: u16,
    /// See [`UseStats`].
    pub(crate) uses: u8,
    /// See [`UseStats`].
    pub(crate) turn: u8,
    /// Devices of Hbm with a sealed copy; the devices' own tables say more.
    pub(crate) hbm: GpuSet,
    /// Devices of Hbm to which a copy is on its way.
    pub(crate) hbm_coming: u8,
    marks: u8,
}

const _: () = assert!(size_of::<Option<Block>>() == 128);

/// A tier holds a sealed copy, or Nvme is about to.
const SEALED: u8 = 1;
/// It waits in the queue of urgent writes.
const URGENT: u8 = 1 << 1;
/// It is evicted last; until when is in the core's table.
const RETAINED: u8 = 1 << 2;
/// Two bits: device errors while writing it.
const WRITE_FAULTS_SHIFT: u8 = 3;
/// Two bits: how a copy is on its way.
const ARRIVING_SHIFT: u8 = 5;
const TWO_BITS: u8 = 3;
/// Admission refused to copy it to Nvme.
const REFUSED: u8 = 1 << 7;

/// Most device errors that are counted for one block.
pub(crate) const WRITE_FAULTS_MAX: u8 = TWO_BITS;

impl Block {
    fn new(id: BlockId, space: SpaceIndex, now: Now) -> Self {
        Self {
            id,
            checksum: Checksum::new(0),
            nvme: Nvme::None,
            pinned: None,
            arriving_op: ShortOp(0),
            space,
            parent: None,
            child: None,
            children: 0,
            children_pinned: 0,
            children_nvme: 0,
            listed_pinned: Links::default(),
            listed_nvme: Links::default(),
            used: Tick::default(),
            touched: now.into(),
            depth: 0,
            filling: 0,
            uses: 0,
            turn: 0,
            hbm: GpuSet::NONE,
            hbm_coming: 0,
            marks: 0,
        }
    }

    fn mark(&mut self, bit: u8, on: bool) {
        self.marks = if on { self.marks | bit } else { self.marks & !bit };
    }

    fn set_two_bits(&mut self, shift: u8, value: u8) {
        self.marks = self.marks & !(TWO_BITS << shift) | (value & TWO_BITS) << shift;
    }

    /// Whether admission refused to copy it to Nvme.
    pub(crate) fn is_refused(&self) -> bool {
        self.marks & REFUSED != 0
    }

    pub(crate) fn set_refused(&mut self, refused: bool) {
        self.mark(REFUSED, refused);
    }

    /// Whether it waits in the queue of urgent writes.
    pub(crate) fn is_urgent(&self) -> bool {
        self.marks & URGENT != 0
    }

    pub(crate) fn set_urgent(&mut self, urgent: bool) {
        self.mark(URGENT, urgent);
    }

    /// Whether it was promised to be evicted last.
    pub(crate) fn is_retained(&self) -> bool {
        self.marks & RETAINED != 0
    }

    pub(crate) fn set_retained(&mut self, retained: bool) {
        self.mark(RETAINED, retained);
    }

    /// Device errors while writing it, since the last success, up to
    /// [`WRITE_FAULTS_MAX`]; the most when no device has room for it.
    pub(crate) fn write_faults(&self) -> u8 {
        self.marks >> WRITE_FAULTS_SHIFT & TWO_BITS
    }

    pub(crate) fn set_write_faults(&mut self, faults: u8) {
        self.set_two_bits(WRITE_FAULTS_SHIFT, faults.min(WRITE_FAULTS_MAX));
    }

    /// How a copy is on its way to Pinned.
    pub(crate) fn arriving(&self) -> Arriving {
        match self.marks >> ARRIVING_SHIFT & TWO_BITS {
            0 => Arriving::No,
            1 => Arriving::Queued(IoClass::ALL[self.arriving_op.0 as usize % IoClass::ALL.len()]),
            2 => Arriving::Reading(self.arriving_op),
            _ => Arriving::Verifying(self.arriving_op),
        }
    }

    pub(crate) fn set_arriving(&mut self, arriving: Arriving) {
        let (bits, op) = match arriving {
            Arriving::No => (0, ShortOp(0)),
            Arriving::Queued(class) => (1, ShortOp(class as u32)),
            Arriving::Reading(op) => (2, op),
            Arriving::Verifying(op) => (3, op),
        };
        self.set_two_bits(ARRIVING_SHIFT, bits);
        self.arriving_op = op;
    }

    /// Its place in the lists of a tier.
    pub(crate) fn links(&self, tier: Tier) -> Links {
        match tier {
            Tier::Pinned => self.listed_pinned,
            Tier::Nvme => self.listed_nvme,
        }
    }

    /// Whether it is in a list of any tier.
    pub(crate) fn is_listed(&self) -> bool {
        self.listed_pinned.is_listed() || self.listed_nvme.is_listed()
    }

    /// What its past says about its future.
    pub(crate) fn stats(&self) -> UseStats {
        UseStats { depth: self.depth, turn: self.turn, uses: self.uses }
    }

    /// Takes up what was remembered of it on a device.
    pub(crate) fn restore_stats(&mut self, stats: UseStats) {
        self.depth = self.depth.max(stats.depth);
        self.turn = self.turn.max(stats.turn);
        self.uses = self.uses.max(stats.uses);
    }

    /// It was used now.
    pub(crate) fn touch(&mut self, tick: Tick, now: Now) {
        self.used = tick;
        self.touched = now.into();
    }

    /// Since its last use, to some milliseconds.
    pub(crate) fn idle(&self, now: Now) -> Micros {
        now.since(self.touched.into())
    }

    /// Checksum of every sealed copy. Its length and generation are those of
    /// its space: a cleared space's blocks are dropped at once.
    pub(crate) fn seal(&self) -> Option<Checksum> {
        (self.marks & SEALED != 0).then_some(self.checksum)
    }

    pub(crate) fn set_seal(&mut self, seal: Option<Checksum>) {
        self.mark(SEALED, seal.is_some());
        self.checksum = seal.unwrap_or(self.checksum);
    }

    /// Tiers with a sealed copy.
    pub(crate) fn residence(&self) -> Residence {
        let nvme = matches!(self.nvme, Nvme::Sealed { .. });
        Residence { pinned: self.pinned.is_some(), nvme, hbm: self.hbm }
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
            && self.arriving() == Arriving::No
            && self.children == 0
            && self.hbm.is_empty()
            && self.hbm_coming == 0
    }
}

/// All entries.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    entries: Vec<Option<Block>>,
    free: Vec<BlockIndex>,
    /// Also knows what blocks without an entry had earned.
    index: Index,
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

    /// Remembers what about this many blocks had earned when they left.
    pub(crate) fn remember(&mut self, blocks: u32) {
        self.index.remember(blocks);
    }

    /// Many blocks will be looked for, of which few are there.
    pub(crate) fn warm(&self, ids: impl Iterator<Item = BlockId>) {
        self.index.warm(ids.map(tag));
    }

    /// A block leaves its last tier soon, and after it its ancestors up to one that more hangs on. Brings what
    /// that will touch into the cache, of so many blocks at most. How many that are.
    pub(crate) fn warm_path(&self, leaf: BlockIndex, limit: usize) -> u32 {
        // Paths are mostly written in one go, and lie in the table as in the forest: the loads of their entries
        // do not wait for each other, as those of the walk would.
        if let Some(parent) = self.at(leaf).parent {
            let (from, towards) = (leaf.place(), parent.place());
            let marks = (0..limit).filter_map(|nth| {
                let at = if towards < from { from.checked_sub(nth)? } else { from + nth };
                self.entries.get(at)?.as_ref().map(|block| block.marks)
            });
            std::hint::black_box(marks.fold(0, |all, marks| all ^ marks));
        }
        let mut ids = Vec::with_capacity(limit);
        let mut next = Some(leaf);
        while let Some(block) = next.map(|index| self.at(index)).filter(|_| ids.len() < limit) {
            ids.push(block.id);
            next = block.parent.filter(|&parent| self.at(parent).children == 1);
        }
        self.warm(ids.iter().copied());
        count(ids.len())
    }

    /// The entry of the block that comes after `before` in a prefix: mostly its
    /// last child, which is found without hashing.
    #[inline(always)]
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
        self.find(id).unwrap_or_else(|| self.insert(id, space, now))
    }

    /// A new entry, of a block that has none.
    #[inline(always)]
    pub(crate) fn insert(&mut self, id: BlockId, space: SpaceIndex, now: Now) -> BlockIndex {
        debug_assert!(self.find(id).is_none(), "a block has one entry");
        let index = self.free.pop().unwrap_or_else(|| BlockIndex::new(count(self.entries.len())));
        let past = self.index.insert(tag(id), index.get());
        let (uses, turn) = past.map_or((0, 0), |past| (past.uses.saturating_add(1), past.turn));
        let block = Some(Block { uses, turn, ..Block::new(id, space, now) });
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
            assert!(!block.is_listed(), "a block without a copy is in no list");
            next = block.parent;
            let (tag, past) = (tag(block.id), Past { turn: block.turn, uses: block.uses });
            self.index.remove(tag, index.get(), Some(past));
            self.entries[index.place()] = None;
            self.free.push(index);
            if let Some(parent) = next {
                let parent = self.at_mut(parent);
                assert!(parent.children > 0, "a child is counted once by its parent");
                parent.children -= 1;
                parent.child = parent.child.filter(|&child| child != index);
            }
        }
    }

    /// Records the parent of an entry that has none. False: that would make a
    /// cycle, or is none of its space's. Then the entry stays a root.
    pub(crate) fn attach(&mut self, child: BlockIndex, parent: BlockIndex) -> bool {
        let closes = self.at(child).children > 0 && self.has_ancestor(parent, child);
        !closes && self.attach_unchecked(child, parent)
    }

    /// Records a parent that may close a circle. [`BlockTable::cut_circles`]
    /// follows before anybody walks the forest.
    ///
    /// A block's depth follows from its parent, and so does its turn: a parent
    /// that was used since it was sealed had ended an earlier request.
    #[inline(always)]
    pub(crate) fn attach_unchecked(&mut self, child: BlockIndex, parent: BlockIndex) -> bool {
        let (index, below) = (child, self.at(child));
        let (space, residence) = (below.space, below.residence());
        if below.parent.is_some() || child == parent {
            return false;
        }
        let above = self.at_mut(parent);
        if above.space != space {
            return false;
        }
        above.child = Some(child);
        above.children += 1;
        above.children_pinned += u32::from(residence.pinned);
        above.children_nvme += u32::from(residence.nvme);
        let stats = above.stats();
        let block = self.at_mut(index);
        block.parent = Some(parent);
        block.depth = stats.depth.saturating_add(1);
        if block.uses == 0 {
            block.turn = stats.turn.saturating_add(u8::from(stats.uses > 0));
        }
        true
    }

    /// Makes a root of one entry of each circle of parents. One walk over the table,
    /// which looks at each entry a few times: to check each parent as it comes in
    /// would take a walk to its root.
    pub(crate) fn cut_circles(&mut self) -> u64 {
        // The walk in which an entry was seen first; zero is not yet.
        let mut seen = vec![0u32; self.entries.len()];
        // Side by side, so that the walks stay in the cache.
        let parent_of = |entry: &Option<Block>| entry.as_ref().and_then(|block| block.parent);
        let parents: Vec<Option<BlockIndex>> = self.entries.iter().map(parent_of).collect();
        let mut cut = 0;
        for start in (0..self.end()).map(BlockIndex::new) {
            let walk = start.get() + 1;
            let mut next = Some(start);
            while let Some(index) = next.filter(|index| seen[index.place()] == 0) {
                seen[index.place()] = walk;
                next = parents[index.place()];
            }
            let Some(again) = next.filter(|index| seen[index.place()] == walk) else { continue };
            self.detach(again);
            cut += 1;
        }
        cut
    }

    fn detach(&mut self, child: BlockIndex) {
        let entry = self.at_mut(child);
        let residence = entry.residence();
        let Some(parent) = entry.parent.take() else { return };
        let parent = self.at_mut(parent);
        parent.child = parent.child.filter(|&other| other != child);
        parent.children -= 1;
        parent.children_pinned -= u32::from(residence.pinned);
        parent.children_nvme -= u32::from(residence.nvme);
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

    /// A catalog whose entries were written in different lives may name parents in a circle. It must
    /// be cut once, and everything else stay as it is.
    #[test]
    fn circles_of_a_catalog_are_cut() {
        let mut table = BlockTable::default();
        let all: Vec<BlockIndex> = (1..=6).map(|n| add(&mut table, n)).collect();
        for (child, parent) in [(0, 1), (1, 2), (2, 0), (3, 2), (5, 4)] {
            table.attach_unchecked(all[child], all[parent]);
        }
        assert_eq!(table.cut_circles(), 1);
        assert_eq!(table.cut_circles(), 0);
        let rooted = all
            .iter()
            .filter(|&&index| !table.has_ancestor(index, all[4]) && table.at(index).parent.is_some());
        assert_eq!(rooted.count(), 3, "two of the circle and what hung on it");
        assert_eq!(table.at(all[5]).parent, Some(all[4]));
        let children: u32 = all.iter().map(|&index| table.at(index).children).sum();
        assert_eq!(children, 4);
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
