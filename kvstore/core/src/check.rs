//! A walk of the whole state that proves what the tables claim about each other.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::{Core, Deadline, Op};
use crate::evict::Tier;
use crate::ids::{DeviceId, DiskFrame, FrameRef, GpuId, Memory, TenantId};
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::chunk::{Chunk, ChunkKind, Filler, FrameCounts, FrameState};
use crate::state::count;
use crate::state::disk::{DiskState, Slot, SlotState, device_id};
use crate::state::space::SpaceIndex;

/// What operations and queues hold, counted from their side.
#[derive(Debug, Default)]
pub(crate) struct Held {
    frames: BTreeMap<FrameRef, u32>,
    cells: BTreeMap<DiskFrame, u32>,
    reads: u32,
    writes: u32,
    verifies: u32,
    copies: u32,
    scrubs: BTreeMap<DeviceId, u32>,
    clears: BTreeMap<SpaceIndex, u32>,
    commits: u32,
    carvings: u32,
    creations: u32,
    drops: u32,
    closings: u32,
    intakes: u32,
    /// Copies to and from devices of Hbm, and verifications on them.
    pub(crate) gpus: BTreeMap<GpuId, u32>,
}

impl Core {
    /// Asserts every invariant that spans tables. For tests: it looks at everything.
    ///
    /// # Panics
    /// If an invariant does not hold.
    pub fn check(&self) {
        let held = self.held_by_operations();
        let pins = self.pins_of_leases();
        let filling = self.check_chunks(&held, &pins);
        self.check_blocks(&filling);
        self.check_gpus(&held);
        self.check_lists();
        self.check_disks(&held);
        self.check_quotas();
        self.check_sessions();
        self.check_queues();
        assert_eq!(held.reads, self.reads_running, "reads are counted");
        assert_eq!(held.writes, self.writes_running, "writes are counted");
        assert_eq!(held.verifies, self.verifies_running, "verifications are counted");
        assert_eq!(held.copies, self.copies_running, "copies are counted");
        assert_eq!(held.intakes, self.intakes_running, "intakes are counted");
        assert_eq!(held.commits, self.commits_running, "commits are counted");
        for (&space, &clears) in &held.clears {
            assert_eq!(self.spaces.at(space).clearing, clears, "clears of a space are counted");
        }
    }

    fn held_by_operations(&self) -> Held {
        let mut held = Held::default();
        for op in self.ops.values() {
            match op {
                Op::CreateChunk { .. } => held.creations += 1,
                Op::DropChunk { .. } => held.drops += 1,
                Op::CloseWindow { .. } => held.closings += 1,
                Op::CarveSlot { .. } => held.carvings += 1,
                Op::Read { source, stuck, .. } => {
                    held.reads += u32::from(!stuck);
                    *held.cells.entry(*source).or_default() += 1;
                }
                Op::Write { source, target, stuck, .. } => {
                    held.writes += u32::from(!stuck);
                    *held.frames.entry(*source).or_default() += 1;
                    *held.cells.entry(*target).or_default() += 1;
                }
                Op::Commit { puts, deletes } => {
                    held.commits += 1;
                    puts.iter().for_each(|put| *held.cells.entry(put.frame).or_default() += 1);
                    deletes.iter().for_each(|delete| *held.cells.entry(delete.frame).or_default() += 1);
                }
                Op::ClearSpace { clearing, .. } => {
                    *held.clears.entry(clearing.space).or_default() += 1;
                    clearing.cells.iter().for_each(|cell| *held.cells.entry(*cell).or_default() += 1);
                }
                Op::Verify { frame, .. } => {
                    match self.chunks.at(frame.chunk).memory {
                        Memory::Pinned => held.verifies += 1,
                        Memory::Hbm(gpu) => *held.gpus.entry(gpu).or_default() += 1,
                    }
                    *held.frames.entry(*frame).or_default() += 1;
                }
                Op::Copy { source, target, .. } => {
                    let memory = |frame: FrameRef| self.chunks.at(frame.chunk).memory;
                    match (memory(*source), memory(*target)) {
                        (Memory::Pinned, Memory::Pinned) => held.copies += 1,
                        (_, Memory::Hbm(gpu)) | (Memory::Hbm(gpu), Memory::Pinned) => {
                            *held.gpus.entry(gpu).or_default() += 1;
                        }
                    }
                    *held.frames.entry(*source).or_default() += 1;
                }
                Op::Intake { intake, .. } => {
                    held.intakes += 1;
                    *held.frames.entry(intake.source).or_default() += 1;
                }
                Op::Scrub { source, .. } => {
                    *held.scrubs.entry(source.device).or_default() += 1;
                    *held.cells.entry(*source).or_default() += 1;
                }
            }
        }
        self.intakes.iter().for_each(|intake| *held.frames.entry(intake.source).or_default() += 1);
        self.commit_puts.iter().for_each(|put| *held.cells.entry(put.frame).or_default() += 1);
        self.commit_deletes.iter().for_each(|delete| *held.cells.entry(delete.frame).or_default() += 1);
        for (&space, (_, clear)) in &self.clears_again {
            assert!(clear.space == space && clear.failures > 0, "what is cleared again has failed");
            *held.clears.entry(space).or_default() += 1;
            clear.cells.iter().for_each(|cell| *held.cells.entry(*cell).or_default() += 1);
        }
        held
    }

    /// Leases by frame, as long as the frame's fence has not moved.
    fn pins_of_leases(&self) -> BTreeMap<FrameRef, u32> {
        let mut pins = BTreeMap::new();
        for item in self.leases.values().flat_map(|lease| lease.items.iter().flatten()) {
            if self.chunks.frame(item.frame).is_some_and(|cell| cell.fence == item.fence) {
                *pins.entry(item.frame).or_default() += 1;
            }
        }
        pins
    }

    /// I3 for every chunk. Returns the filling frames of each block.
    fn check_chunks(&self, held: &Held, pins: &BTreeMap<FrameRef, u32>) -> BTreeMap<BlockIndex, u32> {
        let mut filling = BTreeMap::new();
        let mut chunks = BTreeMap::<(SpaceIndex, Memory), u32>::new();
        let (mut creating, mut dropping, mut closing) = (0, 0, 0);
        for (id, chunk) in self.chunks.iter() {
            *chunks.entry((chunk.space, chunk.memory)).or_default() += 1;
            let mut counts = FrameCounts::default();
            let mut busy = 0;
            for (index, cell) in chunk.frames.iter().enumerate() {
                let frame = FrameRef { chunk: id, index: count(index) };
                let leases = pins.get(&frame).copied().unwrap_or(0);
                self.check_frame(frame, chunk, leases, &mut counts);
                if let FrameState::Filling { block, .. } = cell.state {
                    *filling.entry(block).or_default() += 1;
                }
                assert_eq!(cell.busy, held.frames.get(&frame).copied().unwrap_or(0), "{frame:?}: operations");
                busy += u32::from(cell.busy > 0);
            }
            assert_eq!(counts, chunk.counts, "frames of {id} by state");
            assert_eq!(busy, chunk.busy, "busy frames of {id}");
            let free = chunk.free.iter().collect::<BTreeSet<_>>().len() as u64;
            assert_eq!((chunk.free.len() as u64, free), (counts.free, counts.free), "free list of {id}");
            let open = self.spaces.at(chunk.space).pool(chunk.memory).open.contains(&id);
            let should = chunk.kind == ChunkKind::Pool && !chunk.free.is_empty();
            assert_eq!(open, should, "{id} is open to its space");
            let leaving = matches!(chunk.kind, ChunkKind::Replacing | ChunkKind::Retiring);
            assert_eq!(self.emptying.contains(&id), leaving, "{id} is being emptied");
            creating += u32::from(matches!(chunk.kind, ChunkKind::Creating { .. }));
            dropping += u32::from(chunk.kind == ChunkKind::Dropping);
            closing += u32::from(matches!(chunk.kind, ChunkKind::Closing { .. }));
        }
        assert_eq!((creating, dropping), (held.creations, held.drops), "chunks come and go by operations");
        assert_eq!(closing, held.closings, "windows are closed by operations");
        for &id in &self.ahead.windows {
            let chunk = self.chunks.at(id);
            let kind = matches!(
                chunk.kind,
                ChunkKind::Window { recalled: false, .. } | ChunkKind::Creating { owner: Some(_) }
            );
            assert!(kind, "{id} is a window");
            assert_eq!(chunk.counts.free, chunk.frames.len() as u64, "nothing was granted in {id} yet");
        }
        for (index, space) in self.spaces.iter() {
            for memory in self.memories() {
                let pool = space.pool(memory);
                let found = chunks.get(&(index, memory)).copied().unwrap_or(0);
                assert_eq!(pool.chunks, found, "chunks of a space");
                assert!(pool.open.iter().all(|&id| self.chunks.find(id).is_some()), "open chunks are alive");
            }
        }
        filling
    }

    fn check_frame(&self, frame: FrameRef, chunk: &Chunk, leases: u32, counts: &mut FrameCounts) {
        let cell = &chunk.frames[frame.index as usize];
        match cell.state {
            FrameState::Free => {
                counts.free += 1;
                assert_eq!((leases, cell.busy), (0, 0), "{frame:?}: nothing refers to a free frame");
            }
            FrameState::Filling { filler, .. } => {
                counts.filling += 1;
                match filler {
                    Filler::Lease(lease) => {
                        assert_eq!(leases, 1, "{frame:?}: one lease fills it");
                        assert!(
                            self.leases.keys().any(|&id| lease == id.into()),
                            "{frame:?}: its lease is live"
                        );
                    }
                    Filler::Op(op) => {
                        assert_eq!(leases, 0, "{frame:?}: an operation fills it, no lease");
                        assert!(
                            self.ops.keys().any(|&id| op == id.into()),
                            "{frame:?}: its operation is in flight"
                        );
                    }
                }
            }
            FrameState::Sealed { block, pins, .. } => {
                counts.sealed += 1;
                counts.pinned += u64::from(pins > 0);
                assert_eq!(pins, leases, "{frame:?}: pins are those of leases");
                let own = match chunk.memory {
                    Memory::Pinned => self.blocks.at(block).pinned,
                    Memory::Hbm(gpu) => self.gpus.at(gpu).entries.of(block).and_then(|entry| entry.frame),
                };
                assert_eq!(own, Some(frame), "{frame:?}: index and frame agree");
            }
            FrameState::Evicting => {
                counts.evicting += 1;
                assert!(cell.busy > 0, "{frame:?}: an evicting frame waits for an operation");
            }
            FrameState::Quarantined => {
                counts.quarantined += 1;
                assert!(chunk.kind != ChunkKind::Pool, "{frame:?}: a pool chunk has no quarantined frame");
            }
        }
    }

    fn check_blocks(&self, filling: &BTreeMap<BlockIndex, u32>) {
        let mut children = BTreeMap::<BlockIndex, (u32, u32, u32)>::new();
        let mut resident = BTreeMap::<SpaceIndex, (u64, u64)>::new();
        let mut unpersisted = 0;
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let Some(block) = self.blocks.try_at(index) else { continue };
            assert!(!block.is_gone(), "{:?}: an entry nobody needs is removed", block.id);
            assert_eq!(self.blocks.find(block.id), Some(index), "an entry is found by its id");
            assert_eq!(
                u32::from(block.filling),
                filling.get(&index).copied().unwrap_or(0),
                "{:?}: filling",
                block.id
            );
            let tiers = block.residence();
            let copied = tiers.is_in_memory() || tiers.nvme || block.nvme.is_coming();
            assert_eq!(block.seal().is_some(), copied, "{:?}: seal facts", block.id);
            let held = resident.entry(block.space).or_default();
            held.0 += u64::from(tiers.pinned);
            held.1 += u64::from(tiers.nvme);
            if tiers.is_in_memory() && !tiers.nvme {
                unpersisted += self.spaces.at(block.space).block_bytes.get();
            }
            if let Some(parent) = block.parent {
                let below = children.entry(parent).or_default();
                below.0 += 1;
                below.1 += u32::from(tiers.pinned);
                below.2 += u32::from(tiers.nvme);
            }
            self.check_block(index);
        }
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let Some(block) = self.blocks.try_at(index) else { continue };
            let found = (block.children, block.children_pinned, block.children_nvme);
            assert_eq!(found, children.get(&index).copied().unwrap_or_default(), "{:?}: children", block.id);
        }
        for (index, space) in self.spaces.iter() {
            let found = (space.pinned.blocks, space.blocks_nvme);
            assert_eq!(found, resident.get(&index).copied().unwrap_or_default(), "blocks of a space");
        }
        assert_eq!(unpersisted, self.unpersisted, "bytes that a crash would lose");
    }

    fn check_block(&self, index: BlockIndex) {
        let block = self.blocks.at(index);
        if let Some(frame) = block.pinned {
            let state = self.chunks.frame(frame).map(|cell| cell.state);
            assert!(
                matches!(state, Some(FrameState::Sealed { block, .. }) if block == index),
                "{:?}: index and frame agree",
                block.id
            );
            assert_eq!(
                self.chunks.at(frame.chunk).space,
                block.space,
                "{:?}: a chunk has one space",
                block.id
            );
        }
        let cell = |frame| self.disks.cell(frame).map(|cell| cell.state);
        match block.nvme {
            Nvme::None | Nvme::Deleting => {}
            Nvme::Writing { frame, sequence } => {
                let writing =
                    |op: &Op| matches!(op, Op::Write { header, .. } if header.write_sequence == sequence);
                assert!(self.ops.values().any(writing), "{:?}: its write is in flight", block.id);
                assert_eq!(cell(frame), Some(DiskState::Filling { block: index }), "{:?}: writing", block.id);
            }
            Nvme::Committing { frame, .. } => {
                assert_eq!(
                    cell(frame),
                    Some(DiskState::Filling { block: index }),
                    "{:?}: committing",
                    block.id
                );
            }
            Nvme::Sealed { frame, .. } => {
                assert_eq!(cell(frame), Some(DiskState::Sealed { block: index }), "{:?}: durable", block.id);
            }
        }
        match block.arriving() {
            Arriving::No => {
                assert!(!self.arrivals.contains_key(&index), "{:?}: nobody waits in vain", block.id)
            }
            Arriving::Queued(class) => {
                let parked = self.disks.devices.iter().any(|device| device.reads_waiting.contains(&index));
                let queued =
                    self.wanted.contains(index, class) || self.wanted_stalled.contains(&index) || parked;
                assert!(queued, "{:?}: it is in the queue", block.id);
            }
            Arriving::Reading(op) | Arriving::Verifying(op) => {
                assert!(
                    self.ops.keys().any(|&id| op == id.into()),
                    "{:?}: its operation is in flight",
                    block.id
                );
            }
        }
    }

    fn check_lists(&self) {
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let Some(block) = self.blocks.try_at(index) else { continue };
            for tier in [Tier::Pinned, Tier::Nvme] {
                let should = self.place_of(index, tier).is_some();
                assert_eq!(
                    block.links(tier).is_listed(),
                    should,
                    "{:?}: {tier:?} list of its space",
                    block.id
                );
            }
        }
    }

    /// I3 for every slot.
    fn check_disks(&self, held: &Held) {
        let mut carving = 0;
        for (place, device) in self.disks.devices.iter().enumerate() {
            let id = device_id(place);
            let scrubs = held.scrubs.get(&id).copied().unwrap_or(0);
            assert_eq!(scrubs, device.scrubs, "scrub reads of {id} are counted");
            for (number, slot) in device.slots.iter().enumerate() {
                let number = count(number);
                carving += u32::from(matches!(slot.state, SlotState::Carving { .. }));
                let free = slot.state == SlotState::Free && !slot.unscanned;
                assert_eq!(device.slots_free.contains(&number), free, "slot {number} of {id} can be carved");
                for (index, cell) in slot.cells.iter().enumerate() {
                    let frame = DiskFrame { device: id, slot: number, index: count(index) };
                    let operations = held.cells.get(&frame).copied().unwrap_or(0);
                    assert_eq!(cell.busy, operations, "{frame:?}: operations");
                    self.check_cell(frame, cell.state, cell.busy);
                }
                check_slot(slot);
                for (index, space) in self.spaces.iter() {
                    let open = space.slots_open[place].contains(&number);
                    let should = slot.state == SlotState::Carved { space: index }
                        && !slot.unscanned
                        && !slot.free.is_empty();
                    assert_eq!(open, should, "slot {number} of {id} is open to its space");
                }
            }
        }
        assert_eq!(carving, held.carvings, "slots are carved by operations");
    }

    fn check_cell(&self, frame: DiskFrame, state: DiskState, busy: u32) {
        match state {
            DiskState::Free => assert_eq!(busy, 0, "{frame:?}: nothing refers to a free frame"),
            DiskState::Filling { block } => {
                let nvme = self.blocks.at(block).nvme;
                let agrees = matches!(nvme, Nvme::Writing { frame: own, .. } | Nvme::Committing { frame: own, .. } if own == frame);
                assert!(agrees, "{frame:?}: index and frame agree");
            }
            DiskState::Sealed { block } => {
                let nvme = self.blocks.at(block).nvme;
                assert!(
                    matches!(nvme, Nvme::Sealed { frame: own, .. } if own == frame),
                    "{frame:?}: index and frame agree"
                );
            }
            DiskState::Evicting => assert!(busy > 0, "{frame:?}: an evicting frame waits for something"),
            DiskState::Quarantined => {}
        }
    }

    fn check_quotas(&self) {
        let mut leased = BTreeMap::<TenantId, u64>::new();
        for lease in self.leases.values() {
            let bytes: u64 = lease.items.iter().flatten().map(|held| held.bytes).sum();
            *leased.entry(lease.tenant).or_default() += bytes;
        }
        for (_, chunk) in self.chunks.iter().filter(|(_, chunk)| chunk.charged) {
            *leased.entry(chunk.tenant).or_default() += self.config.chunk_bytes.get();
        }
        let mut retained = BTreeMap::<TenantId, u64>::new();
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let Some(block) = self.blocks.try_at(index).filter(|block| block.is_retained()) else {
                continue;
            };
            let space = self.spaces.at(block.space);
            *retained.entry(space.tenant).or_default() += space.frame_bytes.get();
        }
        for (tenant, used) in &self.tenants {
            let leases = self.leases.values().filter(|lease| lease.tenant == *tenant).count();
            assert_eq!(used.leases, count(leases), "leases of a tenant");
            let sessions = self.sessions.values().filter(|session| session.tenant == *tenant);
            let waits = sessions.map(|session| session.waits.len()).sum();
            assert_eq!(used.waits, count(waits), "waiting requests of a tenant");
            assert_eq!(
                used.leased_bytes,
                leased.get(tenant).copied().unwrap_or(0),
                "leased bytes of a tenant"
            );
            assert_eq!(
                used.retained_bytes,
                retained.get(tenant).copied().unwrap_or(0),
                "retained bytes of a tenant"
            );
        }
    }

    fn check_sessions(&self) {
        for (id, chunk) in self.chunks.iter() {
            let open = chunk.mappers.iter().all(|mapper| self.sessions.contains_key(mapper));
            assert!(open, "{id} is mapped by sessions that are open");
        }
        self.departed.check();
        self.chunks.gone.check();
        let limits = &self.config.limits;
        assert!(self.sessions.len() <= limits.sessions as usize, "sessions are limited");
        let mut leases = 0;
        for (id, session) in &self.sessions {
            session.repeats.check(session.waits.len(), limits.replies_remembered);
            assert!(session.leases.len() <= limits.leases_per_session as usize, "leases are limited");
            leases += session.leases.len();
            for lease in &session.leases {
                assert!(
                    self.leases.get(lease).is_some_and(|lease| lease.session == *id),
                    "a session's lease is live"
                );
            }
            for window in &session.windows {
                let kind = self.chunks.at(*window).kind;
                let own = matches!(kind, ChunkKind::Window { owner, .. } | ChunkKind::Creating { owner: Some(owner) } if owner == *id);
                assert!(own, "a session's window is its own");
            }
            assert!(
                session.waits.iter().all(|wait| self.waits.contains_key(wait)),
                "a session's request waits"
            );
            let held = session.leases.iter().filter_map(|lease| self.leases.get(lease));
            let pinned: u64 =
                held.flat_map(|lease| lease.items.iter().flatten()).map(|item| item.bytes).sum();
            let windows = session.windows.len() as u64 * self.config.chunk_bytes.get();
            assert_eq!(session.leased_bytes, pinned + windows, "leased bytes of a session");
        }
        assert_eq!(leases, self.leases.len(), "every lease has a live session");
        for (id, lease) in &self.leases {
            if let Some(at) = lease.deadline {
                assert!(self.deadlines.contains(&(at, Deadline::Lease(*id))), "a deadline is armed");
            }
        }
    }

    fn check_queues(&self) {
        let limits = &self.config.limits;
        assert!(self.blocks.len() <= limits.blocks, "blocks are limited");
        assert!(self.waits.len() <= limits.requests_waiting as usize + 1, "waiting requests are limited");
        assert!(self.reads_running + self.verifies_running <= limits.reads_in_flight, "reads are limited");
        assert!(self.writes_running <= limits.writes_in_flight, "writes are limited");
        assert!(
            self.chunks.pinned_len()
                <= u32::try_from(self.config.pinned_bytes.get() / self.config.chunk_bytes.get()).unwrap_or(0),
            "memory is limited"
        );
        let queued = self.queued();
        assert!(queued <= self.queued_max(), "{queued} wait to be written, of {} blocks", self.blocks.len());
        assert!(
            self.stalled.values().all(|stalled| stalled.len() > 0),
            "who has nothing that waits is not named"
        );
        for index in self.durables.keys() {
            let block = self.blocks.at(*index);
            let open = block.seal().is_some() && !block.residence().nvme;
            assert!(open, "{:?}: who waits for durability waits for what can become durable", block.id);
        }
        for (id, wait) in &self.waits {
            assert!(self.sessions.contains_key(&wait.asker.session), "a request ends with its session");
            if let Some(at) = wait.deadline {
                assert!(self.deadlines.contains(&(at, Deadline::Answer(*id))), "an answer is due");
            }
        }
    }
}

fn check_slot(slot: &Slot) {
    let mut counts = FrameCounts::default();
    for cell in &slot.cells {
        match cell.state {
            DiskState::Free => counts.free += 1,
            DiskState::Filling { .. } => counts.filling += 1,
            DiskState::Sealed { .. } => counts.sealed += 1,
            DiskState::Evicting => counts.evicting += 1,
            DiskState::Quarantined => counts.quarantined += 1,
        }
    }
    assert_eq!(counts, slot.counts, "frames of a slot by state");
    assert_eq!(slot.free.len() as u64, counts.free, "free list of a slot");
}
