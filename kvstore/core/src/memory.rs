//! Memory of Pinned and Hbm: chunks come, serve a space as pool or window, are
//! emptied, and go. One chunk belongs to one tenant and one space for life.

use crate::api::{Effect, Fault, Notice};
use crate::core::{Core, Deadline, Op, RETRY_AFTER};
use crate::evict::Relist;
use crate::ids::{ChunkId, Fence, FrameRef, GpuId, Memory, OpId, SessionId};
use crate::policy::{Choice, ChunkFacts, cheapest_chunk};
use crate::residence::Vacate;
use crate::state::block::{Arriving, BlockIndex, Nvme, WRITE_FAULTS_MAX};
use crate::state::chunk::{Chunk, ChunkKind, Filler, FrameState};
use crate::state::count;
use crate::state::gone::Owner;
use crate::state::session::WaitId;
use crate::state::space::SpaceIndex;
use crate::units::{Micros, Now};

/// Copies between chunks at one time.
const COPIES_MAX: u32 = 16;

/// What the memory of a dropped chunk takes to come back. Later, somebody keeps it, and another chunk is dropped beside.
const DROP_TIME: Micros = Micros::from_millis(250);
/// Chunks that are late at a time: a process that keeps all of them must not empty the pool.
const LATE_DROPS_MAX: usize = 4;

/// Blocks whose eviction is prepared at a time.
const WARM_VICTIMS_MAX: usize = 64;

/// What became of the wish for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Allocated {
    /// Here it is; its state is to be set at once.
    Frame(FrameRef),
    /// One will come free without anybody's doing.
    Wait,
    /// There is none to be had.
    Never,
}

/// Whom a new chunk may push out of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reserve {
    /// Leaves memory for windows.
    Kept,
    /// May use the last of it.
    Used,
}

impl Core {
    /// Chunks that the memory allows.
    pub(crate) fn chunks_max(&self) -> u32 {
        let bytes = self.memory_limit.min(self.config.pinned_bytes.get());
        u32::try_from(bytes / self.config.chunk_bytes.get().max(1)).unwrap_or(u32::MAX)
    }

    fn may_create(&self, reserve: Reserve) -> bool {
        self.may_create_leaving(match reserve {
            Reserve::Kept => self.config.chunks_ready_min,
            Reserve::Used => 0,
        })
    }

    /// Whether there may be one more chunk of Pinned, beside so many that are kept for others.
    pub(crate) fn may_create_leaving(&self, kept: u32) -> bool {
        self.chunks.may_insert()
            && self.now >= self.create_paused_until
            && self.chunks.pinned_len() < self.chunks_max().saturating_sub(kept)
    }

    /// Whether a memory may have one more chunk.
    fn may_create_in(&self, memory: Memory, reserve: Reserve) -> bool {
        match memory {
            Memory::Pinned => self.may_create(reserve),
            Memory::Hbm(gpu) => {
                let held = self.gpus.at(gpu);
                let most = held.limit() / self.config.chunk_bytes.get().max(1);
                held.usable
                    && self.chunks.may_insert()
                    && self.now >= held.create_paused_until
                    && u64::from(held.chunks) < most
            }
        }
    }

    pub(crate) fn create_chunk(
        &mut self,
        space: SpaceIndex,
        owner: Option<SessionId>,
        memory: Memory,
    ) -> ChunkId {
        let private = owner.is_some_and(|session| self.is_isolated(session));
        let held = self.spaces.at_mut(space);
        let (tenant, frames, frame_bytes) = (held.tenant, held.frames_per_chunk, held.frame_bytes);
        held.pool_mut(memory).chunks += 1;
        if let Memory::Hbm(gpu) = memory {
            self.gpus.at_mut(gpu).chunks += 1;
        }
        let mut chunk = Chunk::new(ChunkKind::Creating { owner }, tenant, space, frames, self.now);
        chunk.charged = owner.is_some();
        chunk.sealer = owner;
        chunk.private = private;
        chunk.memory = memory;
        let id = self.chunks.insert(chunk);
        match owner {
            Some(session) => {
                self.charge(tenant, session, self.config.chunk_bytes.get());
                if let Some(open) = self.sessions.get_mut(&session) {
                    open.windows.insert(id);
                }
            }
            None => self.spaces.at_mut(space).pool_mut(memory).creating += 1,
        }
        let op = self.start(Op::CreateChunk { chunk: id });
        let chunk = id;
        self.effects.push_back(Effect::CreateChunk { op, chunk, tenant, owner, frame_bytes, frames, memory });
        id
    }

    pub(crate) fn chunk_created(&mut self, id: ChunkId, outcome: Result<(), Fault>) {
        let chunk = self.chunks.at(id);
        let (space, tenant, memory) = (chunk.space, chunk.tenant, chunk.memory);
        let ChunkKind::Creating { owner } = chunk.kind else { return };
        if owner.is_none() {
            self.spaces.at_mut(space).pool_mut(memory).creating -= 1;
        }
        self.memory_changed = true;
        if memory == Memory::Pinned {
            self.create_failed = outcome.is_err();
        }
        if outcome.is_err() {
            self.counters.memory_faults += 1;
            let paused_until = self.now.after(RETRY_AFTER);
            match memory {
                Memory::Pinned => self.create_paused_until = paused_until,
                Memory::Hbm(gpu) => self.gpus.at_mut(gpu).create_paused_until = paused_until,
            }
            self.at(paused_until, Deadline::Retry);
            self.forget_chunk(id);
            return;
        }
        let usable = match memory {
            Memory::Pinned => true,
            Memory::Hbm(gpu) => self.gpus.at(gpu).usable,
        };
        let owner = match owner {
            None if !usable => {
                self.chunks.at_mut(id).kind = ChunkKind::Retiring;
                self.emptying.insert(id);
                return;
            }
            Some(owner) if !usable => {
                self.window_left(owner, id);
                self.chunks.at_mut(id).kind = ChunkKind::Replacing;
                self.emptying.insert(id);
                return;
            }
            owner => owner,
        };
        match owner {
            Some(owner) if self.sessions.contains_key(&owner) => {
                let chunk = self.chunks.at_mut(id);
                chunk.kind = ChunkKind::Window { owner, recalled: false };
                chunk.touched = self.now;
                self.at(self.now.after(self.config.window_idle), Deadline::WindowIdle(id));
                let of_owner =
                    |wait: &WaitId| self.waits.get(wait).is_some_and(|wait| wait.asker.session == owner);
                // Whoever waits for it maps it when he has his answer.
                if memory == Memory::Pinned && !self.writers.iter().any(of_owner) {
                    let notice = Notice::WindowOpened { chunk: id, space: self.spaces.at(space).id };
                    self.effects.push_back(Effect::Notify { session: owner, notice });
                }
            }
            Some(_) => {
                self.ahead.windows.remove(&id);
                self.chunks.at_mut(id).kind = ChunkKind::Replacing;
                self.emptying.insert(id);
            }
            None => {
                let reserved_until = self.now.after(RETRY_AFTER);
                let chunk = self.chunks.at_mut(id);
                chunk.kind = ChunkKind::Pool;
                chunk.reserved_until = reserved_until;
                self.spaces.at_mut(space).pool_mut(memory).open.insert(id);
            }
        }
        debug_assert!(self.chunks.at(id).tenant == tenant, "a chunk has one tenant for life");
    }

    pub(crate) fn chunk_dropped(&mut self, id: ChunkId, outcome: Result<(), Fault>) {
        let held = outcome == Err(Fault::StillMapped);
        for mapper in &self.chunks.at(id).mappers {
            if let Some(open) = self.sessions.get_mut(mapper) {
                open.holds_on = held;
            }
        }
        let owner = Owner::of(self.chunks.at(id));
        self.chunks.gone.keep(id, owner);
        self.forget_chunk(id);
        self.memory_changed = true;
    }

    fn forget_chunk(&mut self, id: ChunkId) {
        let chunk = self.chunks.remove(id);
        self.ahead.windows.remove(&id);
        assert!(chunk.is_empty(), "a chunk goes when nothing is left in it");
        self.spaces.at_mut(chunk.space).pool_mut(chunk.memory).chunks -= 1;
        if let Memory::Hbm(gpu) = chunk.memory {
            self.gpus.at_mut(gpu).chunks -= 1;
        }
        if chunk.charged {
            self.uncharge_tenant(chunk.tenant, self.config.chunk_bytes.get());
        }
        if let ChunkKind::Creating { owner: Some(owner) } = chunk.kind {
            self.window_left(owner, id);
        }
    }

    /// A frame of the daemon's own chunks: a free one, a new chunk's, or an evicted block's.
    pub(crate) fn take_pool_frame(&mut self, space: SpaceIndex) -> Allocated {
        let mut frames = Vec::new();
        self.take_pool_frames(space, 1, &mut frames)
    }

    /// The same, for a caller that wants more of them: what else of a path is evicted with it is put into `more`.
    /// The caller fills those at once too, or frees them.
    pub(crate) fn take_pool_frames(
        &mut self,
        space: SpaceIndex,
        wanted: usize,
        more: &mut Vec<FrameRef>,
    ) -> Allocated {
        self.pool_space = Some(space);
        if let Some(frame) = self.take_free_pool_frame(space) {
            return Allocated::Frame(frame);
        }
        if self.spaces.at(space).frames_per_chunk == 0 {
            return Allocated::Never;
        }
        if self.spaces.at(space).pinned.creating > 0 {
            return Allocated::Wait;
        }
        if self.may_create(Reserve::Kept) {
            self.create_chunk(space, None, Memory::Pinned);
            return Allocated::Wait;
        }
        match self.pinned_victim_now(space) {
            Choice::Evict(index) => {
                if self.warm_victims == 0 {
                    self.warm_victims = self.blocks.warm_path(index, wanted.min(WARM_VICTIMS_MAX));
                }
                self.evict_path(index, wanted.min(WARM_VICTIMS_MAX), more);
                let evicted = count(more.len());
                self.warm_victims = self.warm_victims.saturating_sub(evicted);
                // The path's own order: its leaf first.
                more.reverse();
                if let Some(frame) = more.pop() {
                    return Allocated::Frame(frame);
                }
            }
            Choice::Demote(index) => {
                self.persist_now(index);
                return Allocated::Wait;
            }
            Choice::Nothing => {}
        }
        if self.may_create(Reserve::Used) {
            self.create_chunk(space, None, Memory::Pinned);
            return Allocated::Wait;
        }
        self.wait_for_memory(Memory::Pinned)
    }

    pub(crate) fn take_free_pool_frame(&mut self, space: SpaceIndex) -> Option<FrameRef> {
        self.take_free_frame_in(space, Memory::Pinned)
    }

    #[inline(always)]
    fn take_free_frame_in(&mut self, space: SpaceIndex, memory: Memory) -> Option<FrameRef> {
        let &chunk = self.spaces.at(space).pool(memory).open.first()?;
        let now = self.now;
        let held = self.chunks.at_mut(chunk);
        held.reserved_until = now;
        let index = held.take_free().expect("an open chunk has a free frame");
        if held.free.is_empty() {
            self.spaces.at_mut(space).pool_mut(memory).open.remove(&chunk);
        }
        Some(FrameRef { chunk, index })
    }

    /// A frame of a device's pool: a free one, a new chunk's, or an evicted block's.
    pub(crate) fn take_hbm_frame(&mut self, space: SpaceIndex, gpu: GpuId) -> Allocated {
        let memory = Memory::Hbm(gpu);
        if let Some(frame) = self.take_free_frame_in(space, memory) {
            return Allocated::Frame(frame);
        }
        if self.spaces.at(space).frames_per_chunk == 0 || !self.gpus.at(gpu).usable {
            return Allocated::Never;
        }
        if self.spaces.at(space).pool(memory).creating > 0 {
            return Allocated::Wait;
        }
        if self.may_create_in(memory, Reserve::Used) {
            self.create_chunk(space, None, memory);
            return Allocated::Wait;
        }
        match self.hbm_victim(space, gpu) {
            Choice::Evict(index) => {
                let idle = self.blocks.at(index).idle(self.now);
                self.rebalance_in(space, memory, idle);
                if let Some(frame) = self.evict_from_hbm(index, gpu) {
                    return Allocated::Frame(frame);
                }
                Allocated::Wait
            }
            Choice::Demote(index) => match self.demote(index, gpu) {
                Allocated::Never => match self.evict_from_hbm(index, gpu) {
                    Some(frame) => Allocated::Frame(frame),
                    None => Allocated::Wait,
                },
                Allocated::Wait | Allocated::Frame(_) => Allocated::Wait,
            },
            Choice::Nothing => self.wait_for_memory(memory),
        }
    }

    /// A frame of one of the session's own windows.
    pub(crate) fn take_window_frame(
        &mut self,
        session: SessionId,
        space: SpaceIndex,
        memory: Memory,
    ) -> Allocated {
        let Some(open) = self.sessions.get(&session) else { return Allocated::Never };
        let tenant = open.tenant;
        let mut creating = false;
        let mut found = None;
        for &id in &open.windows {
            let chunk = self.chunks.at(id);
            if chunk.space != space || chunk.memory != memory {
                continue;
            }
            match chunk.kind {
                ChunkKind::Window { recalled: false, .. } if !chunk.free.is_empty() => {
                    found = Some(id);
                    break;
                }
                ChunkKind::Creating { .. } => creating = true,
                ChunkKind::Window { .. }
                | ChunkKind::Closing { .. }
                | ChunkKind::Pool
                | ChunkKind::Replacing
                | ChunkKind::Retiring
                | ChunkKind::Dropping => {}
            }
        }
        if let Some(frame) = found.and_then(|window| self.take_from_window(window)) {
            return Allocated::Frame(frame);
        }
        if creating {
            return Allocated::Wait;
        }
        if self.lease_allowance(tenant, session) < self.config.chunk_bytes.get() {
            self.recall_ahead(Some(tenant), Micros::default());
            return Allocated::Never;
        }
        if self.may_create_in(memory, Reserve::Used) {
            self.create_chunk(space, Some(session), memory);
            return Allocated::Wait;
        }
        self.wait_for_memory(memory)
    }

    /// A free frame of a window that is being filled.
    pub(crate) fn take_from_window(&mut self, id: ChunkId) -> Option<FrameRef> {
        let chunk = self.chunks.at_mut(id);
        if !matches!(chunk.kind, ChunkKind::Window { recalled: false, .. }) {
            return None;
        }
        if chunk.free.len() == chunk.frames.len() {
            self.ahead.windows.remove(&id);
        }
        chunk.take_free().map(|index| FrameRef { chunk: id, index })
    }

    /// Is memory on its way, or can some be freed?
    fn wait_for_memory(&mut self, memory: Memory) -> Allocated {
        let paused = match memory {
            Memory::Pinned => self.now < self.create_paused_until,
            Memory::Hbm(gpu) if !self.gpus.at(gpu).usable => return Allocated::Never,
            Memory::Hbm(gpu) => self.now < self.gpus.at(gpu).create_paused_until,
        };
        let coming = self.chunks.iter_in(memory).any(|(_, chunk)| match chunk.kind {
            ChunkKind::Creating { .. }
            | ChunkKind::Closing { .. }
            | ChunkKind::Replacing
            | ChunkKind::Retiring => true,
            ChunkKind::Dropping => !self.is_late(chunk),
            ChunkKind::Window { recalled, .. } => recalled,
            ChunkKind::Pool => false,
        });
        let coming = coming || self.late_drops(memory) >= LATE_DROPS_MAX;
        let freed = coming || paused || self.retire_chunk(memory);
        if freed || memory == Memory::Pinned && self.recall_ahead(None, Micros::default()) {
            Allocated::Wait
        } else {
            Allocated::Never
        }
    }

    /// Sessions that may keep the memory of a chunk after it is gone: a process that stands still does.
    fn kept_by(&self, chunk: &Chunk) -> usize {
        let holds_on = |mapper: &&SessionId| self.sessions.get(mapper).is_some_and(|open| open.holds_on);
        chunk.mappers.iter().filter(holds_on).count()
    }

    /// Its memory should be back: somebody keeps it.
    fn is_late(&self, chunk: &Chunk) -> bool {
        chunk.kind == ChunkKind::Dropping && self.now >= chunk.touched.after(DROP_TIME)
    }

    fn late_drops(&self, memory: Memory) -> usize {
        self.chunks.iter_in(memory).filter(|(_, chunk)| self.is_late(chunk)).count()
    }

    /// Starts to empty the cheapest chunk of the pool.
    pub(crate) fn retire_chunk(&mut self, memory: Memory) -> bool {
        let facts = self.chunks.iter_in(memory).filter_map(|(chunk, held)| {
            let counts = held.counts;
            let eligible = held.kind == ChunkKind::Pool
                && counts.pinned == 0
                && counts.filling == 0
                && held.reserved_until <= self.now;
            let (sealed, touched, kept_by) = (counts.sealed, held.touched, self.kept_by(held));
            eligible.then_some(ChunkFacts { chunk, sealed, touched, kept_by })
        });
        let Some(id) = cheapest_chunk(facts) else { return false };
        self.retire(id);
        true
    }

    /// A space that has evicted a chunk's worth of its blocks gets a chunk of
    /// another, if nothing in that was used since the last of them was: so memory
    /// follows the mix of models.
    /// `idle` is how long the block that goes now was not used.
    #[inline(always)]
    pub(crate) fn rebalance(&mut self, space: SpaceIndex, idle: Micros) {
        self.rebalance_in(space, Memory::Pinned, idle);
    }

    #[inline(always)]
    fn rebalance_in(&mut self, space: SpaceIndex, memory: Memory, idle: Micros) {
        let held = self.spaces.at_mut(space);
        let frames = held.frames_per_chunk;
        let pool = held.pool_mut(memory);
        pool.evicted += 1;
        if pool.evicted >= frames && self.emptying.is_empty() {
            pool.evicted = 0;
            let all = match memory {
                Memory::Pinned => self.chunks.pinned_len(),
                Memory::Hbm(gpu) => self.gpus.at(gpu).chunks,
            };
            if all > pool.chunks {
                self.take_chunk_for(space, memory, idle);
            }
        }
    }

    #[cold]
    fn take_chunk_for(&mut self, space: SpaceIndex, memory: Memory, idle: Micros) {
        let colder = self.chunks.iter_in(memory).filter(|(_, chunk)| {
            chunk.space != space
                && chunk.kind == ChunkKind::Pool
                && chunk.counts.pinned == 0
                && chunk.counts.filling == 0
                && chunk.reserved_until <= self.now
                && self.kept_by(chunk) == 0
                && self.now.since(chunk.touched) > idle
        });
        if let Some((id, _)) = colder.min_by_key(|&(id, chunk)| (chunk.touched, id)) {
            self.retire(id);
        }
    }

    pub(crate) fn retire(&mut self, id: ChunkId) {
        let chunk = self.chunks.at_mut(id);
        chunk.kind = ChunkKind::Retiring;
        let (space, memory) = (chunk.space, chunk.memory);
        self.spaces.at_mut(space).pool_mut(memory).open.remove(&id);
        self.emptying.insert(id);
        self.emptying_due = true;
        self.counters.chunks_retired += 1;
    }

    /// Keeps memory ready for windows while the pool is full.
    pub(crate) fn pump_reserve(&mut self) {
        let Some((ready, wanted)) = self.wants_reserve() else { return };
        if ready > 0 && self.burst.is_on(self.now) {
            return;
        }
        let leaving = |chunk: &Chunk| match chunk.kind {
            ChunkKind::Retiring | ChunkKind::Replacing => true,
            ChunkKind::Dropping => !self.is_late(chunk),
            ChunkKind::Creating { .. }
            | ChunkKind::Pool
            | ChunkKind::Window { .. }
            | ChunkKind::Closing { .. } => false,
        };
        let coming = self.chunks.iter_in(Memory::Pinned).filter(|(_, chunk)| leaving(chunk)).count();
        if self.late_drops(Memory::Pinned) >= LATE_DROPS_MAX {
            return;
        }
        if ready.saturating_add(count(coming)) < wanted && self.retire_chunk(Memory::Pinned) {
            self.pump_emptying();
        }
    }

    /// How many chunks there is room for, and should be, if that is more.
    pub(crate) fn wants_reserve(&self) -> Option<(u32, u32)> {
        let wanted = self.config.chunks_ready_min.min(self.chunks_max() / 2);
        let ready = self.chunks_max().saturating_sub(self.chunks.pinned_len());
        (ready < wanted).then_some((ready, wanted))
    }

    /// Keeps frames free in a full pool, so that the next block does not wait, and
    /// a new one is not kept just because it is new.
    pub(crate) fn pump_frames(&mut self) {
        let wanted = self.config.frames_ready_min as usize;
        let Some(space) = self.pool_space.filter(|_| wanted > 0 && !self.may_create(Reserve::Kept)) else {
            return;
        };
        let open = self.spaces.at(space).pinned.open.iter();
        let mut free: usize = open.map(|&chunk| self.chunks.at(chunk).free.len()).sum();
        while free < wanted {
            match self.pinned_victim(space) {
                Choice::Evict(index) => {
                    let idle = self.blocks.at(index).idle(self.now);
                    self.rebalance(space, idle);
                    self.evict_from_pinned(index);
                }
                // It is written before it is needed.
                Choice::Demote(index) if !self.blocks.at(index).is_urgent() => self.persist_now(index),
                Choice::Demote(_) | Choice::Nothing => return,
            }
            free += 1;
        }
    }

    fn evict_from_pinned(&mut self, index: BlockIndex) {
        if let Some(frame) = self.evict(index, None) {
            self.free_frame(frame);
        }
    }

    /// Chunks that are being emptied go one step further.
    pub(crate) fn pump_emptying(&mut self) {
        while std::mem::take(&mut self.emptying_due) {
            let chunks: Vec<ChunkId> = self.emptying.iter().copied().collect();
            for chunk in chunks {
                self.empty_chunk(chunk);
            }
        }
    }

    fn empty_chunk(&mut self, id: ChunkId) {
        let chunk = self.chunks.at(id);
        if chunk.kind == ChunkKind::Retiring && chunk.counts.pinned > 0 && !chunk.forced {
            return self.keep_chunk(id);
        }
        let frames = count(chunk.frames.len());
        for first in (0..frames).step_by(WARM_VICTIMS_MAX) {
            let end = frames.min(first + count(WARM_VICTIMS_MAX));
            self.warm_frames(id, first..end);
            for index in first..end {
                let frame = FrameRef { chunk: id, index };
                let Some(cell) = self.chunks.frame(frame) else { return };
                let FrameState::Sealed { block, pins, .. } = cell.state else { continue };
                let stays = pins > 0 && self.now < self.chunks.at(id).leave_by;
                if cell.busy == 0 && !stays {
                    self.move_out(block, frame);
                }
            }
        }
        if self.chunks.at(id).is_empty() {
            self.emptying.remove(&id);
            let now = self.now;
            let chunk = self.chunks.at_mut(id);
            (chunk.kind, chunk.touched) = (ChunkKind::Dropping, now);
            self.at(now.after(DROP_TIME), Deadline::Retry);
            let mappers = self.chunks.at(id).mappers.iter().copied().collect();
            let op = self.start(Op::DropChunk { chunk: id });
            self.effects.push_back(Effect::DropChunk { op, chunk: id, mappers });
        }
    }

    /// Brings what the eviction of these frames' blocks will touch into the cache.
    fn warm_frames(&self, id: ChunkId, frames: std::ops::Range<u32>) {
        let chunk = self.chunks.at(id);
        let blocks = frames.filter_map(|index| match chunk.frames[index as usize].state {
            FrameState::Sealed { block, .. } => Some(self.blocks.at(block).id),
            FrameState::Free
            | FrameState::Filling { .. }
            | FrameState::Evicting
            | FrameState::Quarantined => None,
        });
        self.blocks.warm(blocks);
    }

    /// Somebody uses the chunk again: another one is emptied instead.
    fn keep_chunk(&mut self, id: ChunkId) {
        self.emptying.remove(&id);
        let chunk = self.chunks.at_mut(id);
        chunk.kind = ChunkKind::Pool;
        chunk.touched = self.now;
        let (space, memory, free) = (chunk.space, chunk.memory, !chunk.free.is_empty());
        if free {
            self.spaces.at_mut(space).pool_mut(memory).open.insert(id);
        }
        self.memory_changed = true;
    }

    /// Moves a block out of a chunk: into a free frame, else it is evicted, else written first. One that is retained
    /// takes the place of another one before that.
    fn move_out(&mut self, index: BlockIndex, source: FrameRef) {
        if let Memory::Hbm(gpu) = self.chunks.at(source.chunk).memory {
            return self.move_out_of_hbm(index, gpu);
        }
        let block = self.blocks.at(index);
        let (space, nvme) = (block.space, block.nvme);
        let writable = self.is_persisting() && block.write_faults() < WRITE_FAULTS_MAX;
        if matches!(block.arriving(), Arriving::Verifying(_)) || self.copies_running >= COPIES_MAX {
            return;
        }
        if let Some(target) = self.take_free_pool_frame(space).or_else(|| self.frame_for_retained(index)) {
            return self.start_copy(index, source, target);
        }
        if matches!(nvme, Nvme::Sealed { .. }) {
            return self.evict_from_pinned(index);
        }
        if self.spaces.at(space).pinned.creating > 0 {
            return;
        }
        let replacing = self.chunks.at(source.chunk).kind == ChunkKind::Replacing;
        if replacing && self.may_create(Reserve::Kept) {
            self.create_chunk(space, None, Memory::Pinned);
        } else if writable {
            self.persist_now(index);
        } else {
            self.evict_from_pinned(index);
        }
    }

    /// A block that is to be kept gets the frame of one that is not.
    fn frame_for_retained(&mut self, index: BlockIndex) -> Option<FrameRef> {
        let block = self.blocks.at(index);
        let space = block.space;
        if !block.is_retained() {
            return None;
        }
        match self.pinned_victim(space) {
            Choice::Evict(other) if !self.blocks.at(other).is_retained() => self.evict(other, None),
            Choice::Evict(_) | Choice::Demote(_) | Choice::Nothing => None,
        }
    }

    /// Copies a block between frames. The caller counts the copy.
    pub(crate) fn start_moving(&mut self, index: BlockIndex, source: FrameRef, target: FrameRef) -> OpId {
        let expect = self.header_of(index, 0);
        let fence = self.hold_frame(source);
        let op = self.start(Op::Copy { block: index, source, fence, target, sent: self.now });
        self.chunks.at_mut(target.chunk).fill(target.index, index, Filler::Op(op.into()));
        self.blocks.at_mut(index).filling += 1;
        self.effects.push_back(Effect::Copy { op, source, target, expect });
        op
    }

    fn start_copy(&mut self, index: BlockIndex, source: FrameRef, target: FrameRef) {
        self.start_moving(index, source, target);
        self.copies_running += 1;
    }

    pub(crate) fn copy_done(
        &mut self,
        op: OpId,
        index: BlockIndex,
        (source, fence): (FrameRef, Fence),
        (target, sent): (FrameRef, Now),
        outcome: Result<(), Fault>,
    ) {
        let ends = (self.chunks.at(source.chunk).memory, self.chunks.at(target.chunk).memory);
        if ends != (Memory::Pinned, Memory::Pinned) {
            return self.crossing_done(op, index, (source, fence), (target, sent), outcome);
        }
        self.copies_running -= 1;
        let current = self.let_frame_go(source, fence);
        if current {
            let cell = self.chunks.frame(source).map(|cell| cell.state);
            let pinned = matches!(cell, Some(FrameState::Sealed { pins, .. }) if pins > 0);
            let kind = self.chunks.at(source.chunk).kind;
            let overdue = self.now >= self.chunks.at(source.chunk).leave_by;
            let moves = !pinned || (kind == ChunkKind::Replacing && overdue);
            match outcome {
                Ok(()) if moves => self.move_copy(index, target),
                Ok(()) => {}
                Err(_) => self.reject_pinned(index),
            }
        }
        // Only if nothing moved: then it is still Filling.
        self.abandon_filling(target, Vacate::Free);
        self.blocks.remove_if_gone(index);
    }

    /// The block's Pinned copy is the verified one in `target` from now on.
    fn move_copy(&mut self, index: BlockIndex, target: FrameRef) {
        let Some(old) = self.blocks.at(index).pinned else { return };
        let chunk = self.chunks.at_mut(target.chunk);
        chunk.seal(target.index, index, true, 0);
        self.blocks.at_mut(index).filling -= 1;
        self.vacate(old, Vacate::Free);
        self.transition(index, |block| block.pinned = Some(target));
        self.relist(index, Relist::Keep);
        self.counters.copies += 1;
    }
}
