//! Where a block changes tier. Every change of a copy goes through
//! [`Core::transition`], so that child counts, recency lists, quotas and the
//! event stream cannot disagree with the residency table.

use crate::api::{Effect, Event, Policy, Residence};
use crate::core::Core;
use crate::evict::{Relist, is_by_use};
use crate::ids::{BlockId, Fence, FrameRef};
use crate::state::block::{Block, BlockIndex, Nvme};
use crate::state::chunk::{ChunkKind, FrameState};
use crate::state::space::SpaceIndex;

/// What becomes of a frame that holds nothing valid any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vacate {
    /// It can be used again.
    Free,
    /// A client may still write into it.
    Quarantine,
}

/// The block whose copies change.
#[derive(Clone, Copy)]
struct Who {
    index: BlockIndex,
    id: BlockId,
    space: SpaceIndex,
    parent: Option<BlockIndex>,
}

impl Core {
    /// Changes a block's copies and everything that follows from them.
    pub(crate) fn transition(&mut self, index: BlockIndex, change: impl FnOnce(&mut Block)) {
        if let Some(parent) = self.change(index, change) {
            self.relist(parent, Relist::Keep);
        }
        self.relist(index, Relist::Keep);
    }

    /// The same, but for the lists. The parent is given back if it may have to move in them.
    fn change(&mut self, index: BlockIndex, change: impl FnOnce(&mut Block)) -> Option<BlockIndex> {
        let block = self.blocks.at_mut(index);
        let before = block.residence();
        change(block);
        let after = block.residence();
        let who = Who { index, id: block.id, space: block.space, parent: block.parent };
        let moves = if before == after { None } else { self.changed(who, before, after) };
        if after == Residence::default() {
            self.left(index);
        }
        moves
    }

    /// The copies of a block were others before. The parent is given back if it may have to move in the lists.
    #[inline(always)]
    fn changed(&mut self, who: Who, before: Residence, after: Residence) -> Option<BlockIndex> {
        let Who { index, id, space, parent } = who;
        let (mut parent_id, mut moves) = (None, None);
        if let Some(parent) = parent {
            let above = self.blocks.at_mut(parent);
            parent_id = Some(above.id);
            let was_leaf = above.leaf_of();
            adjust(&mut above.children_pinned, before.pinned, after.pinned);
            adjust(&mut above.children_nvme, before.nvme, after.nvme);
            let (leaf_pinned, leaf) = above.leaf_of();
            if (leaf_pinned, leaf) != was_leaf {
                let there = above.residence();
                let may_be_listed = leaf_pinned && there.pinned || leaf && there.nvme;
                moves = (may_be_listed || above.is_listed()).then_some(parent);
            }
        }
        let held = self.spaces.at_mut(space);
        let length = held.block_bytes.get();
        if !self.restoring {
            let (tenant, space, none) = (held.tenant, held.id, Residence::default());
            if before == none {
                let length = held.block_bytes;
                let event = Event::Sealed { space, block: id, parent: parent_id, length, tiers: after };
                self.events.push((tenant, event));
            } else if after == none {
                self.events.push((tenant, Event::Evicted { space, block: id }));
            } else {
                self.events.push((tenant, Event::Moved { space, block: id, tiers: after }));
            }
        }
        adjust(&mut held.pinned.blocks, before.pinned, after.pinned);
        adjust(&mut held.blocks_nvme, before.nvme, after.nvme);
        match (is_unpersisted(before), is_unpersisted(after)) {
            (false, true) => self.unpersisted += length,
            (true, false) => self.unpersisted -= length,
            (true, true) | (false, false) => {}
        }
        if self.config.policy == Policy::S3Fifo {
            self.count_copies(index, before, after);
        }
        moves
    }

    /// No tier holds the block any more.
    fn left(&mut self, index: BlockIndex) {
        let block = self.blocks.at_mut(index);
        // A copy that is on its way to a device may outlive the one it was made from.
        let coming = block.nvme.is_coming();
        if !coming {
            block.set_seal(None);
        }
        if block.is_retained() {
            self.unretain(index);
        }
        if !coming && !self.durables.is_empty() {
            self.durable(index, false);
        }
    }

    /// Marks a block as used now.
    pub(crate) fn touch(&mut self, index: BlockIndex) {
        let (tick, now) = (self.tick, self.now);
        let by_use = is_by_use(self.config.policy);
        let block = self.blocks.at_mut(index);
        let again = block.used != tick && block.residence() != Residence::default();
        if again {
            block.uses = block.uses.saturating_add(1);
        }
        let refused =
            again && block.is_refused() && block.residence().is_in_memory() && block.nvme == Nvme::None;
        let id = block.id;
        if by_use {
            block.touch(tick, now);
        }
        self.relist_used(index);
        if refused {
            self.consider(index, id, 1);
        }
    }

    /// The frame's bytes become the block's Pinned copy. The frame was filled for it.
    #[inline(always)]
    pub(crate) fn seal_frame(&mut self, index: BlockIndex, frame: FrameRef, verified: bool, pins: u32) {
        let chunk = self.chunks.at_mut(frame.chunk);
        chunk.seal(frame.index, index, verified, pins);
        chunk.touched = self.now;
        let (tick, now) = (self.tick, self.now);
        let block = self.blocks.at_mut(index);
        assert!(block.pinned.is_none(), "a block has one Pinned copy");
        assert!(block.filling > 0, "a filling frame is counted by its block");
        block.filling -= 1;
        block.touch(tick, now);
        let before = block.residence();
        block.pinned = Some(frame);
        let who = Who { index, id: block.id, space: block.space, parent: block.parent };
        let Residence { nvme, hbm, .. } = before;
        let after = Residence { pinned: true, nvme, hbm };
        if let Some(parent) = self.changed(who, before, after) {
            self.relist(parent, Relist::Keep);
        }
        // A lease that pins it keeps it off the list of Pinned.
        if pins == 0 || nvme || !hbm.is_empty() {
            self.relist(index, Relist::Keep);
        }
    }

    /// Ends the Pinned copy: readers see the fence move before the frame can be used again.
    pub(crate) fn drop_pinned(&mut self, index: BlockIndex) {
        let Some(frame) = self.blocks.at(index).pinned else { return };
        self.vacate(frame, Vacate::Free);
        self.transition(index, |block| block.pinned = None);
    }

    /// Evicts a leaf for the sake of its frame, and then its ancestors, as long as each is the next to go for
    /// certain, up to `wanted` frames. They are the caller's, who fills them at once.
    pub(crate) fn evict_path(&mut self, leaf: BlockIndex, wanted: usize, frames: &mut Vec<FrameRef>) {
        let coldest = self.blocks.at(leaf);
        let (space, idle) = (coldest.space, coldest.idle(self.now));
        let mut next = Some(leaf);
        while let Some(index) = next {
            next = if frames.len() + 1 < wanted { self.heir(index) } else { None };
            self.rebalance(space, idle);
            frames.extend(self.evict(index, next));
        }
    }

    /// Ends the Pinned copy of a block for the sake of its memory. `heir` is evicted next, so it is not listed
    /// before. The frame, unless operations still read from it: the caller uses it or frees it.
    #[inline(always)]
    pub(crate) fn evict(&mut self, index: BlockIndex, heir: Option<BlockIndex>) -> Option<FrameRef> {
        let block = self.blocks.at_mut(index);
        let frame = block.pinned.take()?;
        let after = block.residence();
        let Residence { nvme, hbm, .. } = after;
        let listed = block.is_listed();
        let who = Who { index, id: block.id, space: block.space, parent: block.parent };
        self.counters.evictions_pinned += 1;
        self.emptying_due = true;
        let (fence, free) = self.chunks.at_mut(frame.chunk).evict(frame.index);
        self.fences.push((frame, fence));
        let before = Residence { pinned: true, nvme, hbm };
        let parent = self.changed(who, before, after);
        if let Some(parent) = parent.filter(|&parent| heir != Some(parent)) {
            self.relist(parent, Relist::Keep);
        }
        if after == Residence::default() {
            self.left(index);
        }
        if listed || nvme {
            self.relist(index, Relist::Keep);
        }
        self.blocks.remove_if_gone(index);
        free.then_some(frame)
    }

    /// Ends what a frame is being filled with.
    pub(crate) fn abandon_filling(&mut self, frame: FrameRef, how: Vacate) {
        let state = self.chunks.frame(frame).map(|frame| frame.state);
        let Some(FrameState::Filling { block, .. }) = state else { return };
        self.vacate(frame, how);
        let entry = self.blocks.at_mut(block);
        assert!(entry.filling > 0, "a filling frame is counted by its block");
        entry.filling -= 1;
        self.blocks.remove_if_gone(block);
    }

    /// Bumps the fence of a frame, then takes what it holds away.
    pub(crate) fn vacate(&mut self, frame: FrameRef, how: Vacate) {
        let chunk = self.chunks.at_mut(frame.chunk);
        let cell = &mut chunk.frames[frame.index as usize];
        cell.fence = cell.fence.next();
        let (fence, busy) = (cell.fence, cell.busy > 0);
        self.fences.push((frame, fence));
        match how {
            Vacate::Quarantine => chunk.set(frame.index, FrameState::Quarantined),
            Vacate::Free if busy => chunk.set(frame.index, FrameState::Evicting),
            Vacate::Free => self.free_frame(frame),
        }
        self.emptying_due = true;
    }

    /// Nothing refers to the frame any more, or whoever took it does not use it after all.
    pub(crate) fn free_frame(&mut self, frame: FrameRef) {
        let chunk = self.chunks.at_mut(frame.chunk);
        assert!(chunk.frames[frame.index as usize].busy == 0, "a frame is freed after its last operation");
        chunk.set(frame.index, FrameState::Free);
        if chunk.kind == ChunkKind::Pool {
            let (space, memory) = (chunk.space, chunk.memory);
            self.spaces.at_mut(space).pool_mut(memory).open.insert(frame.chunk);
        }
        self.memory_changed = true;
        self.emptying_due = true;
    }

    /// An operation starts to read from a frame.
    pub(crate) fn hold_frame(&mut self, frame: FrameRef) -> Fence {
        let chunk = self.chunks.at_mut(frame.chunk);
        let cell = &mut chunk.frames[frame.index as usize];
        cell.busy += 1;
        let fence = cell.fence;
        if cell.busy == 1 {
            chunk.busy += 1;
        }
        fence
    }

    /// It ended. True if the frame still holds what it held then.
    pub(crate) fn let_frame_go(&mut self, frame: FrameRef, fence: Fence) -> bool {
        let chunk = self.chunks.at_mut(frame.chunk);
        let cell = &mut chunk.frames[frame.index as usize];
        assert!(cell.busy > 0, "an operation lets go what it holds");
        cell.busy -= 1;
        let (idle, same, state) = (cell.busy == 0, cell.fence == fence, cell.state);
        if idle {
            chunk.busy -= 1;
            if state == FrameState::Evicting {
                self.free_frame(frame);
            }
        }
        same
    }

    /// A promise to keep the block ends.
    pub(crate) fn unretain(&mut self, index: BlockIndex) {
        let block = self.blocks.at_mut(index);
        if !block.is_retained() {
            return;
        }
        block.set_retained(false);
        let (space, id) = (block.space, block.id);
        let Some(retained) = self.retained.remove(&index) else { return };
        self.deadlines.remove(&(retained.until, crate::core::Deadline::Retain(index, id)));
        let held = self.spaces.at(space);
        let (tenant, bytes) = (held.tenant, held.frame_bytes.get());
        self.tenants.entry(tenant).or_default().retained_bytes -= bytes;
    }

    pub(crate) fn retain_ended(&mut self, index: BlockIndex, id: BlockId) {
        if self.blocks.try_at(index).is_some_and(|block| block.id == id) {
            self.unretain(index);
            self.relist(index, Relist::Touch);
        }
    }

    /// Whoever sealed a damaged copy is told, as far as is known who it was.
    pub(crate) fn tell_sealer(&mut self, index: BlockIndex, frame: FrameRef) {
        let block = self.blocks.at(index);
        let (id, space) = (block.id, self.spaces.at(block.space).id);
        if let Some(chunk) = self.chunks.find(frame.chunk)
            && chunk.is_sealers(frame.index)
            && let Some(session) = chunk.sealer.filter(|session| self.sessions.contains_key(session))
        {
            let notice = crate::api::Notice::SealRejected { space, block: id };
            self.effects.push_back(Effect::Notify { session, notice });
        }
    }

    /// A Pinned copy turned out to be damaged. What was made from it is not trusted either.
    pub(crate) fn reject_pinned(&mut self, index: BlockIndex) {
        self.counters.checksum_failures += 1;
        if let Some(frame) = self.blocks.at(index).pinned {
            self.tell_sealer(index, frame);
        }
        match self.blocks.at(index).nvme {
            Nvme::Writing { frame, .. } | Nvme::Committing { frame, .. } => self.forget_written(index, frame),
            Nvme::None | Nvme::Sealed { .. } | Nvme::Deleting => {}
        }
        self.drop_pinned(index);
        self.durable(index, false);
    }
}

fn is_unpersisted(residence: Residence) -> bool {
    residence.is_in_memory() && !residence.nvme
}

fn adjust<N: std::ops::AddAssign + std::ops::SubAssign + From<u8>>(count: &mut N, before: bool, after: bool) {
    match (before, after) {
        (false, true) => *count += N::from(1),
        (true, false) => *count -= N::from(1),
        (true, true) | (false, false) => {}
    }
}
