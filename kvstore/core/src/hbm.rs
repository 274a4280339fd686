//! Copies in Hbm: how one comes and goes, and which one leaves a device next.
//!
//! Promises: the device's table, the block's own entry, the lists of its space
//! and the event stream change together. Only leaves leave: a block with a child
//! on the device stays. The same policies choose as in the other tiers. A block
//! that nothing else holds is copied to Pinned first.

use crate::api::{Grant, MissReason, Policy};
use crate::core::Core;
use crate::evict::{Evictable, Relist, WORTH_MIN, is_by_use, narrow};
use crate::ids::{FrameRef, GpuId, Memory};
use crate::policy::Choice;
use crate::policy::class::Class;
use crate::policy::duel::Leader;
use crate::policy::queues::{Facts, Links, Look, Place, Slab};
use crate::residence::Vacate;
use crate::state::block::{Block, BlockIndex, BlockTable};
use crate::state::chunk::{ChunkKind, ChunkTable, FrameState};
use crate::state::gpu::{Coming, Entries, Entry};
use crate::state::space::SpaceIndex;

/// Busy blocks that S3-FIFO moves on before a choice gives up.
const S3_BUSY_MAX: u32 = 64;

/// A device's table as the lists of one space see it.
struct Listed<'a> {
    blocks: &'a BlockTable,
    entries: &'a mut Entries,
}

impl Look for Listed<'_> {
    fn links(&self, slot: u32) -> Links {
        self.entries.at(slot).links
    }

    fn facts(&self, slot: u32) -> Facts {
        let block = self.blocks.at(self.entries.at(slot).block);
        Facts { class: Class::of(block.stats()), used: block.used, worth: 0.0 }
    }
}

impl Slab for Listed<'_> {
    fn links_mut(&mut self, slot: u32) -> &mut Links {
        &mut self.entries.at_mut(slot).links
    }
}

/// The same, only looked at.
struct Seen<'a> {
    blocks: &'a BlockTable,
    entries: &'a Entries,
    worth: f32,
}

impl Look for Seen<'_> {
    fn links(&self, slot: u32) -> Links {
        self.entries.at(slot).links
    }

    fn facts(&self, slot: u32) -> Facts {
        let block = self.blocks.at(self.entries.at(slot).block);
        Facts { class: Class::of(block.stats()), used: block.used, worth: self.worth }
    }
}

impl Core {
    /// A frame of the device, filled for the block, is its copy there from now on.
    pub(crate) fn seal_in_hbm(
        &mut self,
        index: BlockIndex,
        gpu: GpuId,
        frame: FrameRef,
        verified: bool,
        pins: u32,
    ) {
        let now = self.now;
        let chunk = self.chunks.at_mut(frame.chunk);
        assert!(chunk.memory == Memory::Hbm(gpu), "a device's copies are in its own chunks");
        chunk.seal(frame.index, index, verified, pins);
        chunk.touched = now;
        let tick = self.tick;
        let block = self.blocks.at_mut(index);
        assert!(!block.hbm.contains(gpu), "a block has one copy on a device");
        assert!(block.filling > 0, "a filling frame is counted by its block");
        block.filling -= 1;
        block.touch(tick, now);
        let (space, parent, remembered) = (block.space, block.parent, block.uses > 0);
        let entries = &mut self.gpus.at_mut(gpu).entries;
        let slot = entries.enter(index);
        entries.at_mut(slot).frame = Some(frame);
        if self.config.policy == Policy::S3Fifo {
            let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
            evictable.s3.enter(&mut slab, slot, remembered);
        }
        self.spaces.at_mut(space).pool_mut(Memory::Hbm(gpu)).blocks += 1;
        if let Some(parent) = parent {
            self.count_child(parent, gpu);
        }
        self.transition(index, |block| block.hbm = block.hbm.with(gpu));
    }

    fn count_child(&mut self, parent: BlockIndex, gpu: GpuId) {
        let entries = &mut self.gpus.at_mut(gpu).entries;
        let above = entries.enter(parent);
        entries.at_mut(above).children += 1;
        self.relist_in_hbm(parent, gpu, Relist::Keep);
    }

    /// A block got a parent while devices held it.
    pub(crate) fn attached_in_hbm(&mut self, index: BlockIndex) {
        let block = self.blocks.at(index);
        let Some(parent) = block.parent else { return };
        block.hbm.iter().for_each(|gpu| self.count_child(parent, gpu));
    }

    /// Ends a device's copy: readers see the fence move before the frame can be used again. The frame is given
    /// back if nothing reads from it any more: the caller uses it or frees it.
    pub(crate) fn evict_from_hbm(&mut self, index: BlockIndex, gpu: GpuId) -> Option<FrameRef> {
        let frame = self.gpus.at(gpu).entries.of(index)?.frame?;
        let (fence, free) = self.chunks.at_mut(frame.chunk).evict(frame.index);
        self.fences.push((frame, fence));
        self.emptying_due = true;
        self.counters.evictions_hbm += 1;
        self.leave_hbm(index, gpu);
        free.then_some(frame)
    }

    /// Ends a device's copy and frees its frame.
    pub(crate) fn drop_from_hbm(&mut self, index: BlockIndex, gpu: GpuId) {
        let frame = self.gpus.at(gpu).entries.of(index).and_then(|entry| entry.frame);
        if let Some(frame) = frame {
            self.vacate(frame, Vacate::Free);
            self.leave_hbm(index, gpu);
        }
    }

    /// Ends the copies of all devices, and the wait for those that are on their way.
    pub(crate) fn drop_everywhere_in_hbm(&mut self, index: BlockIndex) {
        for gpu in self.gpus.ids() {
            if self.blocks.try_at(index).is_none() {
                return;
            }
            self.drop_from_hbm(index, gpu);
            if self.gpus.at(gpu).entries.of(index).is_some_and(|entry| entry.coming != Coming::No) {
                self.came(index, gpu, Grant::Missing(MissReason::Unknown));
            }
        }
    }

    /// The frame of a device's copy holds it no more.
    fn leave_hbm(&mut self, index: BlockIndex, gpu: GpuId) {
        let block = self.blocks.at(index);
        let (space, parent) = (block.space, block.parent);
        if let Some(slot) = self.gpus.at(gpu).entries.find(index) {
            self.unlist_in_hbm(space, gpu, slot);
            if self.config.policy == Policy::S3Fifo {
                let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
                evictable.s3.leave(&mut slab, slot);
            }
            self.gpus.at_mut(gpu).entries.at_mut(slot).frame = None;
        }
        self.spaces.at_mut(space).pool_mut(Memory::Hbm(gpu)).blocks -= 1;
        if let Some(parent) = parent {
            let entry = self.gpus.at_mut(gpu).entries.of_mut(parent);
            let above = entry.expect("a parent's entry counts its children");
            assert!(above.children > 0, "a child is counted once by its parent");
            above.children -= 1;
            self.gpus.at_mut(gpu).entries.settle(parent);
            self.relist_in_hbm(parent, gpu, Relist::Keep);
        }
        self.gpus.at_mut(gpu).entries.settle(index);
        self.transition(index, |block| block.hbm = block.hbm.without(gpu));
        self.blocks.remove_if_gone(index);
    }

    fn listed_in_hbm(&mut self, space: SpaceIndex, gpu: GpuId) -> (Listed<'_>, &mut Evictable) {
        let entries = &mut self.gpus.at_mut(gpu).entries;
        let evictable = &mut self.spaces.at_mut(space).pool_mut(Memory::Hbm(gpu)).evictable;
        (Listed { blocks: &self.blocks, entries }, evictable)
    }

    /// Puts a block into the list of the device that it belongs to now, or out of it.
    pub(crate) fn relist_in_hbm(&mut self, index: BlockIndex, gpu: GpuId, how: Relist) {
        let Some(slot) = self.gpus.at(gpu).entries.find(index) else { return };
        let entry = self.gpus.at(gpu).entries.at(slot);
        let listed = entry.links.is_listed();
        let wanted = self.place_in_hbm(entry);
        let stays = how == Relist::Keep || !is_by_use(self.config.policy);
        if wanted.is_none() && !listed || wanted.is_some() && listed && stays {
            return;
        }
        let (space, tick, policy) = (self.blocks.at(index).space, self.tick, self.config.policy);
        self.unlist_in_hbm(space, gpu, slot);
        let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
        match wanted {
            None => {}
            Some(_) if policy == Policy::S3Fifo => evictable.s3.list(&mut slab, slot, tick),
            Some(place) => evictable.queues.list(&mut slab, slot, place, tick),
        }
    }

    fn unlist_in_hbm(&mut self, space: SpaceIndex, gpu: GpuId, slot: u32) {
        let policy = self.config.policy;
        let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
        if policy == Policy::S3Fifo {
            evictable.s3.unlist(&mut slab, slot);
        } else {
            evictable.queues.unlist(&mut slab, slot);
        }
    }

    pub(crate) fn s3_used_in_hbm(&mut self, index: BlockIndex, gpu: GpuId) {
        let space = self.blocks.at(index).space;
        let Some(slot) = self.gpus.at(gpu).entries.find(index) else { return };
        let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
        evictable.s3.used(&mut slab, slot);
    }

    /// Where a leaf that no lease pins, in a chunk of the pool, is listed.
    pub(crate) fn place_in_hbm(&self, entry: &Entry) -> Option<Place> {
        let chunk = self.chunks.at(entry.frame?.chunk);
        let state = chunk.frames[entry.frame?.index as usize].state;
        let unpinned = matches!(state, FrameState::Sealed { pins: 0, .. });
        let pooled = matches!(chunk.kind, ChunkKind::Pool | ChunkKind::Retiring);
        let retained = self.blocks.at(entry.block).is_retained();
        let place = if retained { Place::Retained } else { Place::Ordinary };
        (entry.children == 0 && pooled && unpinned).then_some(place)
    }

    /// What to do for a free frame of the space on a device: take one that another copy stands for, else copy the
    /// first to go to Pinned.
    pub(crate) fn hbm_victim(&mut self, space: SpaceIndex, gpu: GpuId) -> Choice {
        let only_here = |block: &Block| {
            let there = block.residence();
            !there.pinned && !there.nvme && there.hbm.without(gpu).is_empty()
        };
        if let Some(index) = self.hbm_leaf(space, gpu, only_here) {
            return Choice::Evict(index);
        }
        match self.hbm_leaf(space, gpu, |_| false) {
            Some(index) => Choice::Demote(index),
            None => Choice::Nothing,
        }
    }

    /// The first leaf to go that is neither in use nor passed over.
    fn hbm_leaf(
        &mut self,
        space: SpaceIndex,
        gpu: GpuId,
        passed_over: impl Fn(&Block) -> bool,
    ) -> Option<BlockIndex> {
        let place = usize::from(gpu.get());
        if self.config.policy == Policy::S3Fifo {
            return self.s3_hbm_leaf(space, gpu, passed_over);
        }
        let leader = match self.config.policy {
            Policy::Learned => Leader::Learned,
            Policy::Duel => self.duels.hbm[place].leader(),
            Policy::Lru | Policy::Fifo | Policy::S3Fifo => Leader::Lru,
        };
        #[expect(clippy::cast_precision_loss, reason = "a block is far shorter than 2^52 bytes")]
        let bytes = self.spaces.at(space).frame_bytes.get() as f64;
        let seconds = self.gpus.at(gpu).load.seconds_idle(self.spaces.at(space).frame_bytes.get());
        let worth = narrow((seconds / bytes).max(WORTH_MIN));
        let tick = self.tick;
        let entries = &self.gpus.at(gpu).entries;
        let seen = Seen { blocks: &self.blocks, entries, worth };
        let busy = |slot: u32| {
            let entry = entries.at(slot);
            is_busy(&self.chunks, entry) || passed_over(self.blocks.at(entry.block))
        };
        let queues = &mut self.spaces.at_mut(space).pool_mut(Memory::Hbm(gpu)).evictable.queues;
        let found = match leader {
            Leader::Lru => queues.coldest(&seen, tick, busy),
            Leader::Learned => queues.least(&seen, self.duels.hbm[place].hazards(), tick, busy),
        };
        found.map(|slot| entries.at(slot).block)
    }

    fn s3_hbm_leaf(
        &mut self,
        space: SpaceIndex,
        gpu: GpuId,
        passed_over: impl Fn(&Block) -> bool,
    ) -> Option<BlockIndex> {
        let tick = self.tick;
        for _ in 0..S3_BUSY_MAX {
            let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
            let slot = evictable.s3.victim(&mut slab, |_| false)?.index;
            let entry = self.gpus.at(gpu).entries.at(slot);
            let index = entry.block;
            if !is_busy(&self.chunks, entry) && !passed_over(self.blocks.at(index)) {
                return Some(index);
            }
            let (mut slab, evictable) = self.listed_in_hbm(space, gpu);
            evictable.s3.leave(&mut slab, slot);
            evictable.s3.enter(&mut slab, slot, true);
            evictable.s3.list(&mut slab, slot, tick);
        }
        None
    }
}

fn is_busy(chunks: &ChunkTable, entry: &Entry) -> bool {
    let Some(frame) = entry.frame else { return true };
    let chunk = chunks.at(frame.chunk);
    let cell = &chunk.frames[frame.index as usize];
    chunk.kind != ChunkKind::Pool
        || cell.busy > 0
        || !matches!(cell.state, FrameState::Sealed { pins: 0, .. })
        || entry.coming != Coming::No
}
