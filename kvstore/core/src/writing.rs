//! Write leases and seals: a block is reserved, filled by its writer, and published once.

use crate::api::{Durability, Grant, Locality, MissReason, Refusal, Reply, SealOutcome};
use crate::checksum::Checksum;
use crate::core::Core;
use crate::cost::seconds;
use crate::evict::Relist;
use crate::ids::{BlockId, ChunkId, FrameRef, LeaseId, Memory, SessionId, SpaceId, TenantId};
use crate::memory::Allocated;
use crate::residence::Vacate;
use crate::state::block::{BlockIndex, Nvme};
use crate::state::chunk::{Filler, FrameState};
use crate::state::count;
use crate::state::session::{Held, LeaseKind, WaitId};
use crate::state::space::{HEADER_PAGE_BYTES, SpaceIndex};
use crate::units::{ByteCount, Micros};
use crate::waiting::{Asker, WaitKind};

/// Frames that may be filled for one block at a time: sessions that all compute it.
const FILLING_MAX: u16 = 1 << 12;

/// What became of one step of a write lease.
#[derive(Clone, Copy, Debug)]
enum Step {
    Settled(Grant),
    /// Memory is on its way.
    Wait,
}

/// A write lease whose blocks are being granted: read off once for all of them,
/// and written back after the last.
struct Writing {
    lease: LeaseId,
    session: SessionId,
    space: SpaceIndex,
    memory: Memory,
    frame_bytes: u64,
    /// Of a block's payload.
    length: ByteCount,
    /// Blocks go through windows of the session.
    local: bool,
    /// Evicted for it, and not used yet.
    frames: Vec<FrameRef>,
    /// Where its last frame came from.
    window: Option<ChunkId>,
    items: Vec<Option<Held>>,
    tenant: TenantId,
    /// Bytes that its tenant may yet lease.
    allowance: u64,
    /// Bytes of `items` that its tenant is not charged for yet.
    owed: u64,
    /// A limit was in the way of a block.
    short: bool,
}

/// Whose blocks are being sealed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sealing {
    pub(crate) lease: LeaseId,
    /// The frame that was filled is the one that is served from, and the lease pins it.
    pub(crate) in_place: bool,
    /// Its bytes were compared with the checksum.
    pub(crate) verified: bool,
    /// Blocks that its session's last request computes.
    pub(crate) added: u32,
    /// They are copied to Nvme.
    pub(crate) persist: bool,
    /// Where its frames are.
    pub(crate) memory: Memory,
}

/// Position in the lease, length, checksum.
pub(crate) type SealedPart = (u32, ByteCount, Checksum);

impl Core {
    pub(crate) fn lease_write(
        &mut self,
        asker: Asker,
        tenant: TenantId,
        (space, memory): (SpaceId, Memory),
        blocks: Vec<BlockId>,
        parent: Option<BlockId>,
        ttl: Option<Micros>,
    ) -> Option<Reply> {
        let space = match self.writable_space(tenant, space) {
            Ok(space) => space,
            Err(refusal) => return Some(Reply::Refused(refusal)),
        };
        let kind = LeaseKind::Write { space, memory };
        let lease = match self.add_lease(asker.session, tenant, kind, ttl, blocks.len()) {
            Ok(lease) => lease,
            Err(limit) => return Some(Reply::Throttled(limit)),
        };
        self.blocks.warm(blocks.iter().copied());
        self.writes(asker.session, &blocks, parent, space, memory);
        let can_wait = self.may_wait(asker.session).is_ok();
        let patience = self.now.after(self.config.limits.lease_ttl_default);
        let (grants, asked) = (Vec::with_capacity(blocks.len()), count(blocks.len()));
        let wait = self.wait(asker, Some(patience), WaitKind::Write { lease, grants, blocks, parent });
        self.advance_write(wait);
        if self.waits.contains_key(&wait) {
            if can_wait {
                self.writers.insert(wait);
            } else {
                self.answer_due(wait);
            }
        }
        if memory == Memory::Pinned {
            self.wrote(asker.session, space, asked);
        }
        None
    }

    /// A request has waited for memory: what it was granted is gone from its session's windows only now, and whether
    /// the next one is needed may have been asked meanwhile.
    fn wrote_late(&mut self, lease: LeaseId) {
        let Some(lease) = self.leases.get(&lease) else { return };
        if let LeaseKind::Write { space, memory: Memory::Pinned } = lease.kind {
            self.wrote(lease.session, space, 0);
        }
    }

    /// A space of the tenant whose frames fit into a chunk.
    pub(crate) fn writable_space(&self, tenant: TenantId, id: SpaceId) -> Result<SpaceIndex, Refusal> {
        let index = self.spaces.find(id).ok_or(Refusal::UnknownSpace)?;
        let space = self.spaces.at(index);
        if space.tenant != tenant {
            return Err(Refusal::UnknownSpace);
        }
        if space.frames_per_chunk == 0 {
            return Err(Refusal::BlockTooLarge {
                block_bytes: space.block_bytes.get(),
                chunk_bytes: self.config.chunk_bytes.get(),
                needed: space.frame_bytes.get().saturating_add(HEADER_PAGE_BYTES),
            });
        }
        Ok(index)
    }

    /// Write leases that waited for memory go on.
    pub(crate) fn pump_writers(&mut self) {
        let writers: Vec<WaitId> = self.writers.iter().copied().collect();
        for wait in writers {
            self.advance_write(wait);
        }
    }

    /// Grants blocks in order until one has to wait for memory; answers after the last.
    fn advance_write(&mut self, id: WaitId) {
        // Nothing that happens meanwhile looks for this request.
        let Some(mut wait) = self.waits.remove(&id) else { return };
        let mut settled = true;
        if let WaitKind::Write { lease, grants, blocks, parent } = &mut wait.kind {
            settled = self.grant_writes(*lease, grants, blocks, *parent);
            if settled && self.writers.contains(&id) {
                self.wrote_late(*lease);
            }
        }
        self.waits.insert(id, wait);
        if settled {
            self.finish(id);
        }
    }

    /// False: the next block has to wait for memory.
    fn grant_writes(
        &mut self,
        lease: LeaseId,
        grants: &mut Vec<Grant>,
        blocks: &[BlockId],
        parent: Option<BlockId>,
    ) -> bool {
        let Some(mut writing) = self.begin_writing(lease) else {
            grants.resize(blocks.len(), Grant::Throttled);
            return true;
        };
        if self.leases.get(&lease).is_some_and(|lease| lease.cleared) {
            grants.resize(blocks.len(), Grant::Missing(MissReason::Unknown));
        }
        let mut above = parent.map(|parent| (parent, None));
        if let Some(&last) = grants.len().checked_sub(1).and_then(|last| blocks.get(last)) {
            above = Some((last, None));
        }
        let mut settled = true;
        while let Some(&block) = blocks.get(grants.len()) {
            match self.step_write(&mut writing, grants.len(), block, above) {
                (Step::Wait, _) => {
                    settled = false;
                    break;
                }
                (Step::Settled(grant), index) => {
                    grants.push(grant);
                    above = Some((block, index));
                }
            }
        }
        self.charge(writing.tenant, writing.session, writing.owed);
        if writing.short {
            self.recall_ahead(Some(writing.tenant), Micros::default());
        }
        writing.frames.into_iter().for_each(|frame| self.free_frame(frame));
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.items = writing.items;
        }
        settled
    }

    fn begin_writing(&mut self, id: LeaseId) -> Option<Writing> {
        let lease = self.leases.get_mut(&id)?;
        let (session, tenant) = (lease.session, lease.tenant);
        let LeaseKind::Write { space, memory } = lease.kind else { return None };
        let items = std::mem::take(&mut lease.items);
        let held = self.spaces.at(space);
        Some(Writing {
            lease: id,
            session,
            space,
            memory,
            frame_bytes: held.frame_bytes.get(),
            length: held.block_bytes,
            local: self.is_local(session),
            frames: Vec::new(),
            window: None,
            items,
            tenant,
            allowance: self.lease_allowance(tenant, session),
            owed: 0,
            short: false,
        })
    }

    /// One block of a write lease. `above` is the block before it, and its entry
    /// if it is at hand.
    #[inline(always)]
    fn step_write(
        &mut self,
        writing: &mut Writing,
        position: usize,
        block: BlockId,
        above: Option<(BlockId, Option<BlockIndex>)>,
    ) -> (Step, Option<BlockIndex>) {
        let throttled = (Step::Settled(Grant::Throttled), None);
        let found = self.blocks.find_after(above.and_then(|(_, index)| index), block);
        if let Some(index) = found {
            if self.blocks.at(index).space != writing.space {
                return (Step::Settled(Grant::Missing(MissReason::Unknown)), None);
            }
            let there = self.residence(index);
            if there.is_in_memory() || there.nvme {
                return (Step::Settled(Grant::Exists), Some(index));
            }
            if self.blocks.at(index).filling >= FILLING_MAX {
                return throttled;
            }
        }
        // Room for the block and, perhaps, for its parent.
        if self.blocks.len() + 2 > self.config.limits.blocks || writing.allowance < writing.frame_bytes {
            writing.short = true;
            return throttled;
        }
        let wanted = writing.items.len() - position;
        let frame = match self.take_frame(writing, wanted) {
            Allocated::Frame(frame) => frame,
            Allocated::Wait => return (Step::Wait, None),
            Allocated::Never => return throttled,
        };
        let now = self.now;
        let index = match found {
            None => self.blocks.insert(block, writing.space, now),
            // What was evicted for the frame may have been all that kept the entry.
            Some(_) => self.blocks.find_or_insert(block, writing.space, now),
        };
        self.link(index, block, above);
        (Step::Settled(self.reserve(writing, position, index, frame)), Some(index))
    }

    /// A frame for the lease, which its tenant may have; `wanted` at most come after it, itself included.
    fn take_frame(&mut self, writing: &mut Writing, wanted: usize) -> Allocated {
        if let Some(frame) = writing.frames.pop() {
            return Allocated::Frame(frame);
        }
        if !writing.local {
            return self.take_pool_frames(writing.space, wanted, &mut writing.frames);
        }
        if let Some(frame) = writing.window.and_then(|window| self.take_from_window(window)) {
            return Allocated::Frame(frame);
        }
        self.charge(writing.tenant, writing.session, std::mem::take(&mut writing.owed));
        let mut taken = self.take_window_frame(writing.session, writing.space, writing.memory);
        if self.goes_to_pinned(writing, taken) {
            writing.memory = Memory::Pinned;
            if let Some(lease) = self.leases.get_mut(&writing.lease) {
                lease.kind = LeaseKind::Write { space: writing.space, memory: Memory::Pinned };
            }
            taken = self.take_window_frame(writing.session, writing.space, Memory::Pinned);
        }
        writing.allowance = self.lease_allowance(writing.tenant, writing.session);
        writing.window = match taken {
            Allocated::Frame(frame) => Some(frame.chunk),
            Allocated::Wait | Allocated::Never => None,
        };
        taken
    }

    /// Whether a lease that has no frame yet is written in Pinned, because its device has no memory now.
    fn goes_to_pinned(&self, writing: &Writing, taken: Allocated) -> bool {
        let Memory::Hbm(gpu) = writing.memory else { return false };
        let none = match taken {
            Allocated::Frame(_) => false,
            Allocated::Wait => self.now < self.gpus.at(gpu).create_paused_until,
            Allocated::Never => true,
        };
        none && writing.items.iter().all(Option::is_none)
    }

    /// Is this still the entry of this block?
    fn is_entry(&self, index: BlockIndex, block: BlockId) -> bool {
        self.blocks.try_at(index).is_some_and(|entry| entry.id == block)
    }

    /// The entry of a block, linked to its parent, whose own entry may be at
    /// hand. There is room in the table.
    pub(crate) fn enter(
        &mut self,
        block: BlockId,
        space: SpaceIndex,
        above: Option<(BlockId, Option<BlockIndex>)>,
    ) -> BlockIndex {
        let index = self.blocks.find_or_insert(block, space, self.now);
        self.link(index, block, above);
        index
    }

    #[inline(always)]
    fn link(&mut self, index: BlockIndex, block: BlockId, above: Option<(BlockId, Option<BlockIndex>)>) {
        let Some((parent, hint)) = above.filter(|&(parent, _)| parent != block) else { return };
        let entry = self.blocks.at(index);
        if entry.parent.is_some() {
            return;
        }
        let (space, now) = (entry.space, self.now);
        let hint = hint.filter(|&hint| self.is_entry(hint, parent));
        let above = hint.unwrap_or_else(|| self.blocks.find_or_insert(parent, space, now));
        let attached = if self.restoring {
            self.blocks.attach_unchecked(index, above)
        } else {
            self.blocks.attach(index, above)
        };
        if attached && !self.blocks.at(index).hbm.is_empty() {
            self.attached_in_hbm(index);
        }
        if !attached {
            // It may have been entered for this block.
            self.blocks.remove_if_gone(above);
        } else if self.blocks.at(above).is_listed() {
            self.relist(above, Relist::Keep);
        }
    }

    #[inline(always)]
    fn reserve(
        &mut self,
        writing: &mut Writing,
        position: usize,
        index: BlockIndex,
        frame: FrameRef,
    ) -> Grant {
        let chunk = self.chunks.at_mut(frame.chunk);
        let fence = chunk.fill(frame.index, index, Filler::Lease(writing.lease.into()));
        chunk.touched = self.now;
        let entry = self.blocks.at_mut(index);
        entry.filling += 1;
        let bytes = writing.frame_bytes;
        writing.items[position] = Some(Held { frame, fence, bytes });
        writing.owed += bytes;
        writing.allowance -= bytes;
        let offset = u64::from(frame.index) * bytes + HEADER_PAGE_BYTES;
        let (block, length, memory) = (entry.id, writing.length, writing.memory);
        Grant::Granted { block, frame, fence, offset, length, checksum: None, memory }
    }

    pub(crate) fn seal(
        &mut self,
        asker: Asker,
        id: LeaseId,
        parts: &[SealedPart],
        durability: Durability,
    ) -> Option<Reply> {
        if let Err(refusal) = self.check_seal(asker, id, parts) {
            return Some(Reply::Refused(refusal));
        }
        if self.is_isolated(asker.session) {
            return self.take_in(asker, id, parts, durability);
        }
        if durability == Durability::Readable {
            let mut outcomes = Vec::with_capacity(parts.len());
            self.seal_all(id, parts, |outcome, _| outcomes.push(outcome));
            return Some(Reply::Sealed { outcomes });
        }
        if let Err(limit) = self.may_wait(asker.session) {
            return Some(Reply::Throttled(limit));
        }
        let wait = self.wait(asker, None, WaitKind::Seal { outcomes: vec![SealOutcome::Lost; parts.len()] });
        if let Some(wait) = self.waits.get_mut(&wait) {
            wait.pending = count(parts.len()) + 1;
        }
        let mut sealed = Vec::with_capacity(parts.len());
        self.seal_all(id, parts, |outcome, block| sealed.push((outcome, block)));
        for (place, (outcome, block)) in sealed.into_iter().enumerate() {
            if let Some(WaitKind::Seal { outcomes }) = self.waits.get_mut(&wait).map(|wait| &mut wait.kind) {
                outcomes[place] = outcome;
            }
            self.settle_durability(wait, place, block);
        }
        self.part_done(wait);
        None
    }

    /// Everything is checked before anything changes.
    fn check_seal(&self, asker: Asker, id: LeaseId, parts: &[SealedPart]) -> Result<(), Refusal> {
        let lease = self.own_lease(asker.session, id)?;
        let LeaseKind::Write { space, .. } = lease.kind else { return Err(Refusal::WrongKind { lease: id }) };
        if lease.cleared {
            return Err(Refusal::Cleared);
        }
        let blocks = count(lease.items.len());
        let expected = self.spaces.at(space).block_bytes.get();
        let mut named = vec![false; lease.items.len()];
        for &(index, length, _) in parts {
            let Some(named) = named.get_mut(index as usize) else {
                return Err(Refusal::BadIndex { index, blocks });
            };
            if std::mem::replace(named, true) {
                return Err(Refusal::IndexTwice { index });
            }
            if length.get() != expected {
                return Err(Refusal::WrongLength { index, found: length.get(), expected });
            }
        }
        Ok(())
    }

    /// A sealed block of a durable seal is waited for, or settled at once.
    pub(crate) fn settle_durability(&mut self, wait: WaitId, place: usize, block: Option<BlockIndex>) {
        let Some(index) = block.filter(|&index| !self.blocks.at(index).residence().nvme) else {
            self.part_done(wait);
            return;
        };
        self.durables.entry(index).or_default().push((wait, count(place)));
        if self.is_persisting() && !self.is_clear_stuck(self.blocks.at(index).space) {
            self.persist_now(index);
        } else {
            self.durable(index, false);
        }
    }

    /// Publishes blocks, in this order, and tells what became of each. It is given back when it is sealed. What was
    /// sealed now was computed since the lease was granted or last sealed in.
    fn seal_all(
        &mut self,
        id: LeaseId,
        parts: &[SealedPart],
        mut tell: impl FnMut(SealOutcome, Option<BlockIndex>),
    ) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let LeaseKind::Write { space, memory } = lease.kind else { return };
        let (session, items) = (lease.session, std::mem::take(&mut lease.items));
        let took = seconds(self.now.since(std::mem::replace(&mut lease.mark, self.now)));
        let sealing = Sealing { memory, ..self.sealing(id, session) };
        let (mut fresh, mut depths) = (0u32, 0u64);
        // The lengths were compared with the space's.
        for &(position, _, checksum) in parts {
            let (outcome, block) = self.seal_one(sealing, items[position as usize], checksum);
            if let (SealOutcome::Sealed, Some(index)) = (outcome, block) {
                fresh += 1;
                depths += u64::from(self.blocks.at(index).depth);
            }
            tell(outcome, block);
        }
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.items = items;
        }
        self.observe_compute(space, took, fresh, depths);
    }

    pub(crate) fn sealing(&self, lease: LeaseId, session: SessionId) -> Sealing {
        let open = self.sessions.get(&session);
        // The daemon compares a block's bytes when it stores or copies them itself.
        let locality = open.map_or(Locality::Local, |open| open.locality);
        Sealing {
            lease,
            in_place: locality != Locality::Isolated,
            verified: locality != Locality::Local,
            added: open.and_then(|open| open.asked).map_or(1, |asked| asked.added),
            persist: self.is_written_behind(),
            memory: Memory::Pinned,
        }
    }

    /// So many blocks, with these depths in sum, were computed in this time.
    pub(crate) fn observe_compute(&mut self, space: SpaceIndex, took: f64, fresh: u32, depths: u64) {
        if let Some(mean) = depths.checked_div(u64::from(fresh)) {
            let mean = u32::try_from(mean).unwrap_or(u32::MAX);
            self.spaces.at_mut(space).compute.observe(mean, took / f64::from(fresh));
        }
    }

    #[inline(always)]
    fn seal_one(
        &mut self,
        sealing: Sealing,
        item: Option<Held>,
        checksum: Checksum,
    ) -> (SealOutcome, Option<BlockIndex>) {
        let lost = (SealOutcome::Lost, None);
        let Some(held) = item else { return lost };
        let Some(cell) = self.chunks.frame(held.frame).filter(|cell| cell.fence == held.fence) else {
            return lost;
        };
        match cell.state {
            FrameState::Filling { block: index, filler: Filler::Lease(filler) }
                if filler == sealing.lease.into() =>
            {
                let outcome = self.publish_frame(index, held.frame, checksum, sealing);
                match outcome {
                    SealOutcome::Conflict | SealOutcome::Lost => (outcome, None),
                    SealOutcome::Sealed | SealOutcome::Already | SealOutcome::NotDurable => {
                        (outcome, Some(index))
                    }
                }
            }
            FrameState::Sealed { block: index, .. } => {
                if self.blocks.at(index).seal() == Some(checksum) {
                    return (SealOutcome::Already, Some(index));
                }
                self.counters.seal_conflicts += 1;
                (SealOutcome::Conflict, None)
            }
            FrameState::Filling { .. }
            | FrameState::Free
            | FrameState::Evicting
            | FrameState::Quarantined => lost,
        }
    }

    /// The first seal of a block wins. A second one is a repetition or a conflict; its frame is given back.
    #[inline(always)]
    pub(crate) fn publish_frame(
        &mut self,
        index: BlockIndex,
        frame: FrameRef,
        checksum: Checksum,
        sealing: Sealing,
    ) -> SealOutcome {
        let block = self.blocks.at_mut(index);
        let before = block.seal();
        let same = before.is_none_or(|seal| seal == checksum);
        let there = match sealing.memory {
            Memory::Pinned => block.pinned.is_some(),
            Memory::Hbm(gpu) => block.hbm.contains(gpu),
        };
        if !same || there {
            self.abandon_filling(frame, Vacate::Free);
            if same {
                self.counters.seals_repeated += 1;
                return SealOutcome::Already;
            }
            self.counters.seal_conflicts += 1;
            return SealOutcome::Conflict;
        }
        block.set_seal(Some(checksum));
        let pins = u32::from(sealing.in_place);
        match sealing.memory {
            Memory::Pinned => self.seal_frame(index, frame, sealing.verified, pins),
            Memory::Hbm(gpu) => self.seal_in_hbm(index, gpu, frame, sealing.verified, pins),
        }
        if !sealing.verified {
            self.window_settled(frame.chunk);
        }
        if before.is_some() {
            return SealOutcome::Already;
        }
        self.counters.seals += 1;
        if sealing.persist {
            let block = self.blocks.at(index);
            if block.nvme == Nvme::None {
                self.consider(index, block.id, sealing.added);
            }
        }
        SealOutcome::Sealed
    }
}
