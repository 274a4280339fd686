//! Which block leaves a tier: the tables of the policy, wired to the residency table.
//!
//! A space has one set of lists a tier, for frames cannot serve another space.
//! What was learned, and which order leads, is shared by all spaces of a tier.

use std::collections::VecDeque;

use crate::api::{Policy, Residence};
use crate::core::Core;
use crate::cost::ComputeCost;
use crate::ids::{BlockId, Memory, SessionId};
use crate::policy::class::Class;
use crate::policy::duel::{Duel, Leader};
use crate::policy::ghost::Step;
use crate::policy::queues::{Facts, Links, Look, Place, Queues, Slab};
use crate::policy::s3fifo::S3Fifo;
use crate::policy::{self, Choice, Lookup, PASTS_MIN, PASTS_REACH};
use crate::state::block::{Arriving, Block, BlockIndex, BlockTable, Nvme, WRITE_FAULTS_MAX};
use crate::state::chunk::{ChunkKind, ChunkTable, FrameState};
use crate::state::count;
use crate::state::disk::Disks;
use crate::state::session::Asked;
use crate::state::space::{Space, SpaceIndex};
use crate::units::{BlockCount, Micros};

/// Busy blocks that S3-FIFO moves on before a choice gives up.
const S3_BUSY_MAX: u32 = 64;
/// Frames that are looked at when no list has anything to give.
const SWEEP_MAX: u32 = 4096;
/// Pause between two such looks, which take some hundred microseconds: mostly the lists have nothing
/// because all is being written, and the next answer of a device helps.
const SWEEP_PAUSE: Micros = Micros::from_millis(10);
/// Requests between two looks at how many blocks a tier holds.
const RESIZE_EVERY: u32 = 1024;
/// A tier is small, and more than one past for each of its blocks is remembered, until those would be so many.
const PASTS_SMALL: u32 = 1 << 16;
/// Requests that write, of which nothing is learned yet.
const LESSONS_MAX: usize = 64;
/// A block's worth never falls to nothing: of blocks that cost nothing the older goes first.
pub(crate) const WORTH_MIN: f64 = 1e-15;

/// A tier whose lists go through the residency table itself; those of Hbm go through its devices' tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    Pinned,
    Nvme,
}

/// Whether a block moves when it is listed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relist {
    /// It stays where it is.
    Keep,
    /// What its place depends on has changed.
    Touch,
}

/// The blocks of a space that may leave a tier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Evictable {
    pub(crate) queues: Queues,
    pub(crate) s3: S3Fifo,
}

/// What is to be learned from a request.
#[derive(Debug)]
pub(crate) struct Lesson {
    /// Those of its blocks that are in a sample, and their depths.
    watched: Vec<(u64, u32)>,
    blocks: usize,
    first_depth: u32,
    space: SpaceIndex,
    memory: Memory,
}

/// One duel a tier.
#[derive(Debug)]
pub(crate) struct Duels {
    pub(crate) pinned: Duel,
    pub(crate) nvme: Duel,
    /// One a device.
    pub(crate) hbm: Vec<Duel>,
    /// What the requests of a burst teach.
    lessons: VecDeque<Lesson>,
    sized: (u32, u32),
}

impl Duels {
    pub(crate) fn new(gpus: usize) -> Self {
        let none = BlockCount::new(1);
        let hbm = vec![Duel::new(none); gpus];
        Self { pinned: Duel::new(none), nvme: Duel::new(none), hbm, lessons: VecDeque::new(), sized: (1, 1) }
    }

    /// Whether something is yet to be learned.
    pub(crate) fn are_behind(&self) -> bool {
        !self.lessons.is_empty()
    }

    fn of(&self, tier: Tier) -> &Duel {
        match tier {
            Tier::Pinned => &self.pinned,
            Tier::Nvme => &self.nvme,
        }
    }
}

/// What a use of a block saves, per byte. The same for all depths of a space: to
/// weigh deep blocks by what they cost more took nine points of hits from agent
/// traffic and saved no second, for they are also those that come back least.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Worth {
    compute: ComputeCost,
    load_seconds: f64,
    bytes: f64,
}

impl Worth {
    fn of(&self, block: &Block, tier: Tier) -> f32 {
        let compute = self.compute.first_seconds;
        let saved = match tier {
            Tier::Pinned if matches!(block.nvme, Nvme::Sealed { .. }) => self.load_seconds,
            Tier::Pinned => compute,
            Tier::Nvme => compute - self.load_seconds,
        };
        narrow((saved / self.bytes).max(WORTH_MIN))
    }
}

/// The residency table as the lists of one tier of one space see it.
struct Listed<'a> {
    blocks: &'a mut BlockTable,
    tier: Tier,
}

impl Look for Listed<'_> {
    fn links(&self, index: u32) -> Links {
        self.blocks.at(BlockIndex::new(index)).links(self.tier)
    }

    fn facts(&self, index: u32) -> Facts {
        // A place in the lists depends on class and last use only.
        let block = self.blocks.at(BlockIndex::new(index));
        Facts { class: Class::of(block.stats()), used: block.used, worth: 0.0 }
    }
}

impl Slab for Listed<'_> {
    fn links_mut(&mut self, index: u32) -> &mut Links {
        let block = self.blocks.at_mut(BlockIndex::new(index));
        match self.tier {
            Tier::Pinned => &mut block.listed_pinned,
            Tier::Nvme => &mut block.listed_nvme,
        }
    }
}

/// Whether a policy goes by last use; the others go by arrival.
pub(crate) fn is_by_use(policy: Policy) -> bool {
    match policy {
        Policy::Duel | Policy::Learned | Policy::Lru => true,
        Policy::Fifo | Policy::S3Fifo => false,
    }
}

impl Core {
    /// Puts a block into the lists that it belongs to now: leaves that could be
    /// evicted. In Pinned: its copy is in a chunk of the pool, no lease pins it,
    /// no child is in Pinned. In Nvme: its copy is sealed, no child is in either tier.
    pub(crate) fn relist(&mut self, index: BlockIndex, how: Relist) {
        let block = self.blocks.at(index);
        let pinned = block.pinned.is_some() || block.listed_pinned.is_listed();
        let nvme = matches!(block.nvme, Nvme::Sealed { .. }) || block.listed_nvme.is_listed();
        if pinned {
            self.relist_in(index, Tier::Pinned, how);
        }
        if nvme {
            self.relist_in(index, Tier::Nvme, how);
        }
        let hbm = self.blocks.at(index).hbm;
        if !hbm.is_empty() {
            hbm.iter().for_each(|gpu| self.relist_in_hbm(index, gpu, how));
        }
    }

    fn relist_in(&mut self, index: BlockIndex, tier: Tier, how: Relist) {
        let wanted = self.place_of(index, tier);
        let listed = self.blocks.at(index).links(tier).is_listed();
        let stays = how == Relist::Keep || !is_by_use(self.config.policy);
        match wanted {
            None if !listed => {}
            Some(_) if listed && stays => {}
            None | Some(_) => self.list(index, tier, wanted),
        }
    }

    pub(crate) fn place_of(&self, index: BlockIndex, tier: Tier) -> Option<Place> {
        let block = self.blocks.at(index);
        let place = if block.is_retained() { Place::Retained } else { Place::Ordinary };
        let (leaf_pinned, leaf) = block.leaf_of();
        let wanted = match tier {
            Tier::Pinned => {
                leaf_pinned
                    && block.pinned.is_some_and(|frame| {
                        let chunk = self.chunks.at(frame.chunk);
                        let state = chunk.frames[frame.index as usize].state;
                        let unpinned = matches!(state, FrameState::Sealed { pins: 0, .. });
                        matches!(chunk.kind, ChunkKind::Pool | ChunkKind::Retiring) && unpinned
                    })
            }
            Tier::Nvme => leaf && matches!(block.nvme, Nvme::Sealed { .. }),
        };
        wanted.then_some(place)
    }

    fn list(&mut self, index: BlockIndex, tier: Tier, wanted: Option<Place>) {
        let (tick, policy) = (self.tick, self.config.policy);
        let (mut slab, evictable) = self.listed(self.blocks.at(index).space, tier);
        let place = index.get();
        if policy == Policy::S3Fifo {
            evictable.s3.unlist(&mut slab, place);
            if wanted.is_some() {
                evictable.s3.list(&mut slab, place, tick);
            }
            return;
        }
        evictable.queues.unlist(&mut slab, place);
        if let Some(wanted) = wanted {
            evictable.queues.list(&mut slab, place, wanted, tick);
        }
    }

    /// The table and the lists of one tier of a space, apart.
    fn listed(&mut self, space: SpaceIndex, tier: Tier) -> (Listed<'_>, &mut Evictable) {
        (Listed { blocks: &mut self.blocks, tier }, self.spaces.at_mut(space).evictable(tier))
    }

    /// A block was used: what is listed moves, S3-FIFO counts.
    pub(crate) fn relist_used(&mut self, index: BlockIndex) {
        let block = self.blocks.at(index);
        if self.config.policy != Policy::S3Fifo {
            if block.is_listed() || !block.hbm.is_empty() {
                self.relist(index, Relist::Touch);
            }
            return;
        }
        let (space, there) = (block.space, block.residence());
        for (tier, there) in [(Tier::Pinned, there.pinned), (Tier::Nvme, there.nvme)] {
            if there {
                let (mut slab, evictable) = self.listed(space, tier);
                evictable.s3.used(&mut slab, index.get());
            }
        }
        there.hbm.iter().for_each(|gpu| self.s3_used_in_hbm(index, gpu));
    }

    /// A copy came into a tier or left it: S3-FIFO counts what it holds.
    pub(crate) fn count_copies(&mut self, index: BlockIndex, before: Residence, after: Residence) {
        let block = self.blocks.at(index);
        let (space, remembered) = (block.space, block.uses > 0);
        for (tier, was, is) in
            [(Tier::Pinned, before.pinned, after.pinned), (Tier::Nvme, before.nvme, after.nvme)]
        {
            let (mut slab, evictable) = self.listed(space, tier);
            match (was, is) {
                (false, true) => evictable.s3.enter(&mut slab, index.get(), remembered),
                (true, false) => evictable.s3.leave(&mut slab, index.get()),
                (true, true) | (false, false) => {}
            }
        }
    }

    /// A session asks for a prefix, of which the first block that is known has
    /// this depth and space. What is missing is mostly computed and sealed next:
    /// the shadows see the request whole.
    pub(crate) fn asked(
        &mut self,
        session: SessionId,
        blocks: &[BlockId],
        known: Option<(u32, SpaceIndex)>,
        memory: Memory,
    ) {
        let at = self.tick;
        let Some(open) = self.sessions.get_mut(&session) else { return };
        let space = known.map(|(_, space)| space).or(open.asked.map(|asked| asked.space));
        // Without a space it is not known what a block is worth: its seal will tell.
        let Some(space) = space else { return };
        open.asked = Some(Asked { first: blocks.first().copied(), at, space, added: 0 });
        self.learn(blocks, known.map_or(0, |(depth, _)| depth), space, memory);
    }

    /// A session is about to compute and seal these blocks. That is part of its
    /// last request if it goes on where that did, else a request of its own.
    pub(crate) fn writes(
        &mut self,
        session: SessionId,
        blocks: &[BlockId],
        parent: Option<BlockId>,
        space: SpaceIndex,
        memory: Memory,
    ) {
        let above = parent.and_then(|parent| self.blocks.find(parent)).map(|index| self.blocks.at(index));
        let depth = above.map_or(0, |above| above.depth.saturating_add(1));
        let tick = self.tick;
        let since = above.map(|above| tick.since(above.used));
        let Some(open) = self.sessions.get_mut(&session) else { return };
        let goes_on = open.asked.is_some_and(|asked| match since {
            Some(since) => since <= tick.since(asked.at),
            None => asked.first == blocks.first().copied(),
        });
        let added = count(blocks.len());
        if let (true, Some(asked)) = (goes_on, &mut open.asked) {
            asked.added = asked.added.saturating_add(added);
            return;
        }
        let at = tick.next();
        open.asked = Some(Asked { first: blocks.first().copied(), at, space, added });
        self.tick = at;
        if self.duels.lessons.len() >= LESSONS_MAX
            && let Some(oldest) = self.duels.lessons.pop_front()
        {
            self.learn_from(&oldest);
        }
        let lesson = self.lesson(blocks, depth, space, memory);
        self.duels.lessons.push_back(lesson);
    }

    /// Tells the curves and the shadows what was asked for.
    fn learn(&mut self, blocks: &[BlockId], first_depth: u32, space: SpaceIndex, memory: Memory) {
        self.catch_up();
        let lesson = self.lesson(blocks, first_depth, space, memory);
        self.learn_from(&lesson);
    }

    /// What was written in a burst is learned when it is over: it costs as much as all else that is done for a block.
    pub(crate) fn pump_lessons(&mut self) {
        if !self.burst.is_on(self.now) {
            self.catch_up();
        }
    }

    fn catch_up(&mut self) {
        while let Some(lesson) = self.duels.lessons.pop_front() {
            self.learn_from(&lesson);
        }
    }

    /// What the curves and the shadows learn from a request. Each of them looks at a sample of the blocks only.
    fn lesson(&self, blocks: &[BlockId], first_depth: u32, space: SpaceIndex, memory: Memory) -> Lesson {
        let tenant = self.spaces.at(space).tenant;
        let duels = matches!(self.config.policy, Policy::Duel | Policy::Learned);
        let nvme = self.disks.any_usable();
        let mut shift = self.curves.shift(tenant);
        if duels {
            shift = shift.min(self.duels.pinned.shift());
            shift = if nvme { shift.min(self.duels.nvme.shift()) } else { shift };
        }
        let keys = blocks.iter().map(|&block| Step::key_of(block)).zip(first_depth..);
        if let (true, Memory::Hbm(gpu)) = (duels, memory) {
            shift = shift.min(self.duels.hbm[usize::from(gpu.get())].shift());
        }
        let mut watched = Vec::with_capacity((blocks.len() >> shift.min(63)) * 3 / 2 + 16);
        watched.extend(keys.filter(|(key, _)| key.leading_zeros() >= shift));
        Lesson { watched, blocks: blocks.len(), first_depth, space, memory }
    }

    fn learn_from(&mut self, lesson: &Lesson) {
        let &Lesson { ref watched, blocks, first_depth, space, memory } = lesson;
        let held = self.spaces.at(space);
        let (tenant, size, tokens) = (held.tenant, held.frame_bytes.get(), held.block_tokens.get());
        let cost = held.compute.cost();
        let duels = matches!(self.config.policy, Policy::Duel | Policy::Learned);
        let nvme = self.disks.any_usable();
        let lookup =
            |&(key, depth): &(u64, u32)| Lookup { key, size, tokens, seconds: narrow(cost.seconds(depth)) };
        // Once for all curves.
        let lookups: Vec<_> = watched.iter().map(lookup).collect();
        let asked = asked_of(cost, tokens, first_depth, blocks);
        let count = blocks as u64;
        self.curves.request(tenant, asked, count, lookups.iter().copied());
        if !duels {
            return;
        }
        let worth = worth_of(self.spaces.at(space), self.load_seconds_idle(space));
        let steps = |tier: Tier| {
            let first = match tier {
                Tier::Pinned if nvme => worth.load_seconds,
                Tier::Pinned => worth.compute.first_seconds,
                Tier::Nvme => worth.compute.first_seconds - worth.load_seconds,
            };
            let per_byte = narrow((first / worth.bytes).max(WORTH_MIN));
            watched.iter().map(move |&(key, depth)| {
                let compute = worth.compute.seconds(depth);
                let seconds = match tier {
                    Tier::Pinned if nvme => worth.load_seconds,
                    Tier::Pinned => compute,
                    Tier::Nvme => (compute - worth.load_seconds).max(0.0),
                };
                Step { key, seconds: narrow(seconds), worth: per_byte }
            })
        };
        self.duels.pinned.request(count, steps(Tier::Pinned));
        if nvme {
            self.duels.nvme.request(count, steps(Tier::Nvme));
        }
        if let Memory::Hbm(gpu) = memory {
            let seconds = narrow(self.gpus.at(gpu).load.seconds_idle(size));
            let per_byte = narrow((f64::from(seconds) / worth.bytes).max(WORTH_MIN));
            let steps = watched.iter().map(|&(key, _)| Step { key, seconds, worth: per_byte });
            self.duels.hbm[usize::from(gpu.get())].request(count, steps);
        }
        if self.duels.sized == (1, 1) || self.tick.is_multiple_of(RESIZE_EVERY) {
            self.resize_duels();
        }
    }

    /// Shadows hold as many blocks as their tier would at its present mix of spaces.
    pub(crate) fn resize_duels(&mut self) {
        let (mut chunks, mut frames, mut slots, mut cells) = (0u64, 0u64, 0u64, 0u64);
        for (_, space) in self.spaces.iter() {
            let known = u64::from(space.pinned.chunks).max(u64::from(chunks == 0));
            chunks += known;
            frames += known * u64::from(space.frames_per_chunk);
            let held = space.blocks_nvme.max(1);
            slots += held;
            cells += held * u64::from(space.frames_per_slot);
        }
        let all_slots: u64 = self.config.device_slots.iter().map(|&slots| u64::from(slots)).sum();
        let pinned = u64::from(self.chunks_max()) * frames / chunks.max(1);
        let nvme = all_slots * cells / slots.max(1);
        let held = |blocks: u64| u32::try_from(blocks.max(1)).unwrap_or(u32::MAX);
        let (pinned, nvme) = (held(pinned), held(nvme));
        let known_chunks = chunks.max(1);
        let changed = |old: u32, new: u32| old.abs_diff(new) > old / 8;
        if changed(self.duels.sized.0, pinned) {
            self.duels.sized.0 = pinned;
            self.duels.pinned.resize(BlockCount::new(pinned));
            self.blocks.remember(pasts(pinned.max(nvme)));
        }
        if changed(self.duels.sized.1, nvme) {
            self.duels.sized.1 = nvme;
            self.duels.nvme.resize(BlockCount::new(nvme));
            self.blocks.remember(pasts(pinned.max(nvme)));
        }
        for gpu in self.gpus.ids() {
            let chunks = self.gpus.at(gpu).limit() / self.config.chunk_bytes.get().max(1);
            let blocks = chunks * frames / known_chunks;
            self.duels.hbm[usize::from(gpu.get())].resize(BlockCount::new(held(blocks)));
        }
    }

    /// What to do for a free frame of the space's pool, when somebody waits for it.
    pub(crate) fn pinned_victim_now(&mut self, space: SpaceIndex) -> Choice {
        match self.pinned_victim(space) {
            Choice::Nothing if self.now >= self.sweep_next => {
                self.sweep_next = self.now.after(SWEEP_PAUSE);
                self.sweep(space, self.is_persisting())
            }
            choice => choice,
        }
    }

    /// What to do for a free frame of the space's pool.
    pub(crate) fn pinned_victim(&mut self, space: SpaceIndex) -> Choice {
        let keep = self.is_persisting();
        let at_once = self.victim(space, Tier::Pinned, |frames, block| {
            frames.is_busy_in_pinned(block) || must_be_written(block, keep)
        });
        if let Some(index) = at_once {
            return Choice::Evict(index);
        }
        if keep
            && let Some(index) =
                self.victim(space, Tier::Pinned, |frames, block| frames.is_busy_in_pinned(block))
        {
            return Choice::Demote(index);
        }
        Choice::Nothing
    }

    /// The parent of a block that leaves Pinned now, if it is the next to go: a leaf from then on, and to every
    /// order of eviction what this block was.
    pub(crate) fn heir(&self, index: BlockIndex) -> Option<BlockIndex> {
        let block = self.blocks.at(index);
        let parent = block.parent?;
        let above = self.blocks.at(parent);
        let same = above.used == block.used
            && Class::of(above.stats()) == Class::of(block.stats())
            && above.residence().nvme == block.residence().nvme
            && above.space == block.space;
        let free = above.children_pinned == 1
            && !above.is_retained()
            && !block.is_retained()
            && !must_be_written(above, self.is_persisting())
            && self.config.policy != Policy::S3Fifo;
        (same && free && !self.frames().is_busy_in_pinned(above)).then_some(parent)
    }

    /// A block of the space whose Nvme copy may go.
    pub(crate) fn nvme_victim(&mut self, space: SpaceIndex) -> Choice {
        match self.victim(space, Tier::Nvme, |frames, block| frames.is_busy_in_nvme(block)) {
            Some(index) => Choice::Evict(index),
            None => Choice::Nothing,
        }
    }

    fn frames(&self) -> Frames<'_> {
        Frames { chunks: &self.chunks, disks: &self.disks }
    }

    fn victim(
        &mut self,
        space: SpaceIndex,
        tier: Tier,
        busy: impl Fn(&Frames<'_>, &Block) -> bool,
    ) -> Option<BlockIndex> {
        if self.config.policy == Policy::S3Fifo {
            return self.s3_victim(space, tier, busy);
        }
        let leader = match self.config.policy {
            Policy::Learned => Leader::Learned,
            Policy::Duel => self.duels.of(tier).leader(),
            Policy::Lru | Policy::Fifo | Policy::S3Fifo => Leader::Lru,
        };
        let worth = match leader {
            Leader::Learned => worth_of(self.spaces.at(space), self.load_seconds_idle(space)),
            // Goes by age alone.
            Leader::Lru => Worth::default(),
        };
        let tick = self.tick;
        let seen = Seen { blocks: &self.blocks, tier, worth };
        let frames = Frames { chunks: &self.chunks, disks: &self.disks };
        let is_busy = |index: u32| busy(&frames, seen.blocks.at(BlockIndex::new(index)));
        let queues = &mut self.spaces.at_mut(space).evictable(tier).queues;
        let found = match leader {
            Leader::Lru => queues.coldest(&seen, tick, is_busy),
            Leader::Learned => queues.least(&seen, self.duels.of(tier).hazards(), tick, is_busy),
        };
        found.map(BlockIndex::new)
    }

    fn s3_victim(
        &mut self,
        space: SpaceIndex,
        tier: Tier,
        busy: impl Fn(&Frames<'_>, &Block) -> bool,
    ) -> Option<BlockIndex> {
        let tick = self.tick;
        for _ in 0..S3_BUSY_MAX {
            let (mut slab, evictable) = self.listed(space, tier);
            let index = BlockIndex::new(evictable.s3.victim(&mut slab, |_| false)?.index);
            if !busy(&self.frames(), self.blocks.at(index)) {
                return Some(index);
            }
            let (mut slab, evictable) = self.listed(space, tier);
            evictable.s3.leave(&mut slab, index.get());
            evictable.s3.enter(&mut slab, index.get(), true);
            evictable.s3.list(&mut slab, index.get(), tick);
        }
        None
    }

    /// The lists have nothing to give: every leaf is leased, say, and its
    /// ancestors are not. Looks at some frames of the space's chunks in turn.
    fn sweep(&mut self, space: SpaceIndex, keep: bool) -> Choice {
        let mut demote = Choice::Nothing;
        let mut looked = 0;
        for (_, chunk) in self.chunks.iter_in(Memory::Pinned) {
            if chunk.space != space || chunk.kind != ChunkKind::Pool {
                continue;
            }
            for cell in &chunk.frames {
                let FrameState::Sealed { block: index, pins: 0, .. } = cell.state else { continue };
                let block = self.blocks.at(index);
                looked += 1;
                if looked > SWEEP_MAX {
                    return demote;
                }
                if self.frames().is_busy_in_pinned(block) {
                    continue;
                }
                if !must_be_written(block, keep) {
                    return Choice::Evict(index);
                }
                demote = Choice::Demote(index);
            }
        }
        demote
    }

    /// The space with a block that was not used for longest in Nvme.
    pub(crate) fn coldest_space(&mut self) -> Option<SpaceIndex> {
        let mut coldest: Option<(u32, SpaceIndex)> = None;
        for index in (0..self.spaces.len()).map(SpaceIndex) {
            if self.spaces.at(index).blocks_nvme == 0 {
                continue;
            }
            let Choice::Evict(block) = self.nvme_victim(index) else { continue };
            let age = self.tick.since(self.blocks.at(block).used);
            if coldest.is_none_or(|(oldest, _)| age > oldest) {
                coldest = Some((age, index));
            }
        }
        coldest.map(|(_, index)| index)
    }

    /// Seconds to bring a block of the space in from a device that does nothing else.
    pub(crate) fn load_seconds_idle(&self, space: SpaceIndex) -> f64 {
        let bytes = self.spaces.at(space).frame_bytes.get();
        let usable = self.disks.devices.iter().find(|device| device.usable);
        usable.map_or(0.0, |device| device.load.seconds_idle(bytes))
    }
}

/// The residency table as it is only looked at.
struct Seen<'a> {
    blocks: &'a BlockTable,
    tier: Tier,
    worth: Worth,
}

impl Look for Seen<'_> {
    fn links(&self, index: u32) -> Links {
        self.blocks.at(BlockIndex::new(index)).links(self.tier)
    }

    fn facts(&self, index: u32) -> Facts {
        let block = self.blocks.at(BlockIndex::new(index));
        let worth = self.worth.of(block, self.tier);
        Facts { class: Class::of(block.stats()), used: block.used, worth }
    }
}

/// Where copies are, for a look at whether one may go.
struct Frames<'a> {
    chunks: &'a ChunkTable,
    disks: &'a Disks,
}

impl Frames<'_> {
    fn is_busy_in_pinned(&self, block: &Block) -> bool {
        let Some(frame) = block.pinned else { return true };
        let chunk = self.chunks.at(frame.chunk);
        let cell = &chunk.frames[frame.index as usize];
        chunk.kind != ChunkKind::Pool
            || cell.busy > 0
            || !matches!(cell.state, FrameState::Sealed { pins: 0, .. })
            || block.arriving() != Arriving::No
    }

    fn is_busy_in_nvme(&self, block: &Block) -> bool {
        let busy = match block.nvme {
            Nvme::Sealed { frame, .. } => self.disks.cell(frame).is_none_or(|cell| cell.busy > 0),
            Nvme::None | Nvme::Writing { .. } | Nvme::Committing { .. } | Nvme::Deleting => true,
        };
        busy || block.arriving() != Arriving::No
    }
}

/// No slower tier has it, and one should.
fn must_be_written(block: &Block, keep: bool) -> bool {
    !block.residence().nvme && keep && !block.is_refused() && block.write_faults() < WRITE_FAULTS_MAX
}

/// Of how many blocks the past is remembered, for a tier that holds so many: of a
/// small tier's many times as many, for they come back long after they left it.
fn pasts(blocks: u32) -> u32 {
    blocks.saturating_mul(PASTS_REACH).clamp(PASTS_MIN, PASTS_SMALL.max(blocks))
}

/// What a whole request asks for.
fn asked_of(cost: ComputeCost, tokens: u32, first_depth: u32, blocks: usize) -> policy::Asked {
    let blocks = f64::from(count(blocks));
    let depths = blocks * f64::from(first_depth) + blocks * (blocks - 1.0).max(0.0) / 2.0;
    policy::Asked {
        tokens: blocks * f64::from(tokens),
        seconds: blocks * cost.first_seconds + depths * cost.slope_seconds,
    }
}

fn worth_of(space: &Space, load_seconds: f64) -> Worth {
    #[expect(clippy::cast_precision_loss, reason = "a block is far shorter than 2^52 bytes")]
    let bytes = space.frame_bytes.get() as f64;
    Worth { compute: space.compute.cost(), load_seconds, bytes }
}

#[expect(clippy::cast_possible_truncation, reason = "an estimate needs no more digits")]
pub(crate) fn narrow(value: f64) -> f32 {
    value as f32
}
