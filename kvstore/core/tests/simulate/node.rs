//! The model of everything outside the core: memory, devices, catalog, time.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use terrace_core::*;

use crate::client::Client;
use crate::random::Random;
use crate::seen::Seen;

pub(crate) const BLOCK_BYTES: u64 = 4096;
pub(crate) const CHUNK_BYTES: u64 = 64 * KIB;
pub(crate) const DEVICES: u16 = 2;
pub(crate) const SLOTS: u32 = 4;
/// Bytes that no block has.
pub(crate) const GARBAGE: u64 = 0xdead;

pub(crate) fn config(incarnation: u32) -> Config {
    Config {
        incarnation,
        pinned_bytes: ByteCount::new(8 * CHUNK_BYTES),
        chunk_bytes: ByteCount::new(CHUNK_BYTES),
        device_slots: vec![SLOTS; usize::from(DEVICES)],
        hbm: crate::gpus::configs(CHUNK_BYTES),
        persist_delay: Micros::from_millis(50),
        window_idle: Micros::from_millis(200),
        window_recall_max: Micros::from_millis(200),
        chunks_ready_min: 1,
        frames_ready_min: 0,
        policy: Policy::Lru,
        admission: Admission::All,
        limits: Limits {
            blocks: 110,
            spaces: 8,
            sessions: 6,
            leases_per_session: 8,
            blocks_per_request: 8,
            leases_per_tenant: 14,
            leased_bytes_per_tenant: ByteCount::new(6 * CHUNK_BYTES),
            leased_bytes_per_session: ByteCount::new(5 * CHUNK_BYTES),
            lease_hold_max: Micros::from_millis(700),
            requests_waiting_per_session: 5,
            requests_waiting_per_tenant: 9,
            lease_ttl_max: Micros::from_millis(1000),
            lease_ttl_default: Micros::from_millis(300),
            requests_waiting: 12,
            reads_in_flight: 6,
            writes_in_flight: 4,
            replies_remembered: 8,
            retained_percent: 20,
        },
    }
}

/// The checksum of a block's bytes, which the model keeps as one number.
pub(crate) fn checksum_of(block: BlockId, payload: u64) -> Checksum {
    let mut hasher = DefaultHasher::new();
    (block, payload).hash(&mut hasher);
    Checksum::new(hasher.finish())
}

pub(crate) struct MemoryFrame {
    pub(crate) fence: u64,
    pub(crate) payload: u64,
}

pub(crate) struct Chunk {
    pub(crate) owner: Option<SessionId>,
    pub(crate) tenant: TenantId,
    pub(crate) frames: Vec<MemoryFrame>,
    pub(crate) memory: Memory,
    ready: bool,
}

/// What a device holds in a frame, and what a power cut could bring back.
#[derive(Clone)]
pub(crate) struct Cell {
    pub(crate) header: BlockHeader,
    pub(crate) payload: u64,
    pub(crate) synced: bool,
    pub(crate) before: Option<(BlockHeader, u64)>,
}

pub(crate) struct Pending {
    pub(crate) op: OpId,
    pub(crate) effect: Effect,
    /// Bytes that were sampled when it started.
    pub(crate) sample: Option<u64>,
    pub(crate) not_before: u32,
    /// Taken back before the device had it.
    pub(crate) cancelled: bool,
    /// A device that it needs was lost meanwhile.
    pub(crate) doomed: bool,
}

/// A space of the model.
#[derive(Clone)]
pub(crate) struct Space {
    pub(crate) id: SpaceId,
    pub(crate) tenant: TenantId,
    /// As the core counts; the durable one follows.
    pub(crate) generation: u64,
    pub(crate) durable_generation: u64,
    pub(crate) chains: Vec<Vec<BlockId>>,
}

pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) random: Random,
    pub(crate) now: u64,
    pub(crate) steps: u32,
    pub(crate) history: u64,
    pub(crate) seen: Seen,
    pub(crate) incarnation: u32,
    pub(crate) faults: bool,
    pub(crate) chunks: BTreeMap<ChunkId, Chunk>,
    pub(crate) cells: BTreeMap<DiskFrame, Cell>,
    pub(crate) catalog: BTreeMap<BlockId, (DiskFrame, BlockHeader)>,
    pub(crate) carved: BTreeMap<(DeviceId, u32), SpaceId>,
    /// Frames that do not hold what their device says.
    pub(crate) lied: BTreeSet<DiskFrame>,
    pub(crate) pending: Vec<Pending>,
    pub(crate) spaces: Vec<Space>,
    /// Checksums under which a block was ever sealed.
    pub(crate) sealed: BTreeMap<BlockId, BTreeSet<u64>>,
    /// Acknowledged as durable, and nothing was said of it since.
    pub(crate) durable: BTreeMap<BlockId, ()>,
    /// Blocks that the catalog knew at some time of this life.
    pub(crate) committed: BTreeSet<BlockId>,
    /// Frames whose writer stored other bytes than it sealed.
    pub(crate) damaged: BTreeMap<FrameRef, SessionId>,
    /// Tiers as the event stream tells them.
    pub(crate) events: BTreeMap<BlockId, Residence>,
    pub(crate) clients: BTreeMap<SessionId, Client>,
    /// Frames that somebody who lost his lease may still write into.
    pub(crate) ghosts: Vec<(FrameRef, SessionId, u32)>,
    pub(crate) session_last: u64,
    pub(crate) request_last: u64,
    pub(crate) degraded: bool,
    /// Devices of Hbm that are lost.
    pub(crate) lost: BTreeSet<GpuId>,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let random = Random::new(seed);
        let spaces = (0..3u8)
            .map(|n| {
                let chains = (0..3u8).map(|c| (0..8u8).map(|b| block_id(n, c, b)).collect()).collect();
                let tenant = TenantId::from_bytes([n / 2 + 1; 16]);
                let id = SpaceId::from_bytes([n + 1; 16]);
                Space { id, tenant, generation: 0, durable_generation: 0, chains }
            })
            .collect();
        let mut world = Self {
            core: Core::new(config(1)),
            random,
            now: 1000,
            steps: 0,
            history: 0,
            seen: Seen::default(),
            incarnation: 1,
            faults: true,
            chunks: BTreeMap::new(),
            cells: BTreeMap::new(),
            catalog: BTreeMap::new(),
            carved: BTreeMap::new(),
            lied: BTreeSet::new(),
            pending: Vec::new(),
            spaces,
            sealed: BTreeMap::new(),
            durable: BTreeMap::new(),
            committed: BTreeSet::new(),
            damaged: BTreeMap::new(),
            events: BTreeMap::new(),
            clients: BTreeMap::new(),
            ghosts: Vec::new(),
            session_last: 0,
            request_last: 0,
            degraded: false,
            lost: BTreeSet::new(),
        };
        world.tell_spaces();
        world
    }

    pub(crate) fn tell_spaces(&mut self) {
        for space in self.spaces.clone() {
            self.tell(Input::SpaceKnown {
                space: space.id,
                tenant: space.tenant,
                block_bytes: ByteCount::new(BLOCK_BYTES),
                block_tokens: TokenCount::new(16),
                generation: space.durable_generation,
            });
        }
    }

    pub(crate) fn tell(&mut self, input: Input) {
        self.core.handle(Now::from_micros(self.now), input);
        while let Some(effect) = self.core.poll_effect() {
            let mut hasher = DefaultHasher::new();
            (self.history, format!("{effect:?}")).hash(&mut hasher);
            self.history = hasher.finish();
            self.perform(effect);
        }
    }

    /// One random thing happens.
    pub(crate) fn step(&mut self) {
        self.steps += 1;
        match self.random.below(1000) {
            0..=449 => self.complete_one(),
            450..=539 => self.pass_time(),
            540..=546 => self.world_changes(),
            547..=549 => self.gpus_change(),
            550..=551 => self.restart(),
            552..=579 => self.ghost_writes(),
            _ => self.client_acts(),
        }
        self.check_reads();
        if self.steps.is_multiple_of(4) {
            self.core.check();
            self.check_events();
        }
    }

    fn pass_time(&mut self) {
        self.now += if self.random.percent(5) { 400_000 } else { self.random.below(20_000) };
        self.tell(Input::Tick);
        let overdue = self.core.next_deadline().is_some_and(|at| at <= Now::from_micros(self.now));
        assert!(!overdue, "a deadline that has passed is not asked for again");
    }

    fn world_changes(&mut self) {
        let device = DeviceId::new(if self.random.percent(50) { 0 } else { 1 });
        match self.random.below(8) {
            6 => self.rot(),
            7 => {
                let bytes_per_second = ByteCount::new(8192 * (1 + self.random.below(1000)));
                self.tell(Input::Scrub(Scrub::Start { bytes_per_second }));
            }
            0 => self.tell(Input::DeviceState { device, usable: false }),
            1 | 2 => self.tell(Input::DeviceState { device, usable: true }),
            3 => self.set_degraded(!self.degraded),
            4 => {
                let chunks = 4 + self.random.below(4);
                self.tell(Input::MemoryLimit { bytes: ByteCount::new(chunks * CHUNK_BYTES) });
            }
            _ => self.set_degraded(false),
        }
    }

    /// A byte on a device changes by itself.
    fn rot(&mut self) {
        let frames: Vec<DiskFrame> = self.cells.keys().copied().collect();
        if !frames.is_empty() {
            let frame = frames[self.random.index(frames.len())];
            if let Some(cell) = self.cells.get_mut(&frame) {
                cell.payload = GARBAGE;
            }
        }
    }

    fn set_degraded(&mut self, degraded: bool) {
        self.degraded = degraded;
        self.tell(Input::Degraded { degraded });
    }

    fn fences_moved(&mut self, fences: &[(FrameRef, Fence)]) {
        for (frame, fence) in fences {
            let cell = self.frame(*frame);
            assert_eq!(cell.fence + 1, fence.get(), "{frame:?}: a fence moves by one");
            cell.fence = fence.get();
        }
    }

    /// Starts an effect. What is fast happens now.
    fn perform(&mut self, effect: Effect) {
        let (op, sample) = match &effect {
            Effect::Reply { session, request, reply } => {
                return self.replied(*session, *request, Reply::clone(reply));
            }
            Effect::EndSession { .. } => panic!("no session of a named client is opened here"),
            Effect::Notify { session, notice } => return self.notified(*session, notice.clone()),
            Effect::SetFences { fences } => return self.fences_moved(fences),
            Effect::Publish { events } => {
                return events.iter().for_each(|(_, event)| self.published(event.clone()));
            }
            Effect::Promote { op, class, .. } => return self.promoted(*op, *class),
            Effect::Cancel { op, .. } => return self.cancelled(*op),
            Effect::CreateChunk { op, .. } => {
                self.chunk_asked(&effect);
                (*op, None)
            }
            Effect::CloseWindow { op, chunk } => {
                assert!(self.chunks[chunk].owner.is_some(), "only a window is closed");
                (*op, None)
            }
            Effect::DropChunk { op, chunk, .. } => {
                self.assert_unread(*chunk);
                (*op, None)
            }
            Effect::Read { op, source, source_offset, target, .. } => {
                assert_eq!(
                    *source_offset,
                    DATA_START + u64::from(source.slot) * CHUNK_BYTES + 4096 + u64::from(source.index) * 8192
                );
                self.frame(*target).payload = GARBAGE;
                self.assert_may_read(*target);
                (*op, None)
            }
            Effect::Write { op, source, target, .. } => {
                assert_eq!(self.memory_of(*source), Memory::Pinned, "devices of Nvme write from Pinned");
                let generations: BTreeMap<SpaceId, u64> =
                    self.spaces.iter().map(|space| (space.id, space.durable_generation)).collect();
                let claims = self.catalog.values().find(|(frame, header)| {
                    frame == target && header.generation >= generations[&header.space]
                });
                assert!(
                    claims.is_none(),
                    "{target:?} is overwritten while the catalog says that it holds {claims:?}"
                );
                let sample = self.frame(*source).payload;
                let early = self.random.percent(50).then_some(sample);
                (*op, early)
            }
            Effect::CarveSlot { op, .. } | Effect::Commit { op, .. } | Effect::ClearSpace { op, .. } => {
                (*op, None)
            }
            Effect::Verify { op, frame, .. } => {
                self.frame(*frame);
                (*op, None)
            }
            Effect::Copy { op, source, target, .. } => {
                self.count_copy(*source, *target);
                self.frame(*target).payload = GARBAGE;
                (*op, None)
            }
            Effect::Scrub { op, source, expect, .. } => {
                self.assert_durable(expect.block, *source);
                (*op, None)
            }
        };
        let delay = if self.random.percent(4) { 150 } else { 0 };
        let not_before = self.steps + delay;
        self.pending.push(Pending { op, effect, sample, not_before, cancelled: false, doomed: false });
    }

    fn chunk_asked(&mut self, effect: &Effect) {
        let &Effect::CreateChunk { chunk, tenant, owner, frames, memory, .. } = effect else {
            panic!("{effect:?} makes no chunk");
        };
        let frames = (0..frames).map(|_| MemoryFrame { fence: 1, payload: GARBAGE }).collect();
        let made = Chunk { owner, tenant, frames, memory, ready: false };
        assert!(self.chunks.insert(chunk, made).is_none(), "chunk ids are never used again");
        self.assert_limited(memory);
    }

    fn assert_durable(&self, block: BlockId, source: DiskFrame) {
        let entry = self.catalog.get(&block).map(|(frame, _)| *frame);
        assert_eq!(entry, Some(source), "what is scrubbed is durable");
    }

    fn promoted(&mut self, op: OpId, to: IoClass) {
        self.seen.promoted += 1;
        let pending = self.pending.iter_mut().find(|pending| pending.op == op);
        let effect = pending.map(|pending| &mut pending.effect);
        let Some(Effect::Read { class, .. }) = effect else { panic!("{op} is no read in flight") };
        assert!(to < *class, "a read only becomes more urgent");
        *class = to;
    }

    /// The device may have it already: then it ends as it would have.
    fn cancelled(&mut self, op: OpId) {
        self.seen.cancelled += 1;
        let queued = self.random.percent(50);
        let pending = self.pending.iter_mut().find(|pending| pending.op == op);
        let pending = pending.expect("only a read in flight is cancelled");
        assert!(matches!(pending.effect, Effect::Read { .. }), "only reads are cancelled");
        pending.cancelled = queued;
    }

    /// The memory of a frame in use. Its chunk is alive and ready, or the core touches what is not there.
    pub(crate) fn frame(&mut self, frame: FrameRef) -> &mut MemoryFrame {
        let chunk = self.chunks.get_mut(&frame.chunk).expect("a frame is used while its chunk is alive");
        assert!(chunk.ready, "{frame:?} is used before its chunk is ready");
        &mut chunk.frames[frame.index as usize]
    }

    /// A chunk goes only after every reader could see that its frames are no longer theirs.
    fn assert_unread(&mut self, id: ChunkId) {
        let reads: Vec<_> =
            self.clients.values().flat_map(Client::reads).filter(|read| read.frame.chunk == id).collect();
        for read in reads {
            let fence = self.frame(read.frame).fence;
            assert!(fence > read.fence, "{:?} is dropped under a reader", read.frame);
        }
    }

    fn complete_one(&mut self) {
        let steps = self.steps;
        let ready: Vec<usize> =
            (0..self.pending.len()).filter(|&i| self.pending[i].not_before <= steps).collect();
        if ready.is_empty() {
            return self.pass_time();
        }
        let place = ready[self.random.index(ready.len())];
        let pending = self.pending.remove(place);
        let outcome = self.finish(&pending);
        self.tell(Input::OpDone { op: pending.op, outcome });
        if outcome_is(&pending.effect, "Commit") && !self.degraded && self.faults && self.random.percent(1) {
            self.set_degraded(true);
        }
    }

    /// Ends an operation: its bytes arrive, whatever became of those who waited for them.
    fn finish(&mut self, pending: &Pending) -> Result<Done, Fault> {
        let fails = self.faults && self.random.percent(6);
        if pending.cancelled {
            return Err(Fault::NotStarted);
        }
        if pending.doomed {
            return Err(Fault::Device);
        }
        match &pending.effect {
            Effect::CreateChunk { chunk, .. } => {
                if fails {
                    self.chunks.remove(chunk);
                    return Err(Fault::NoMemory);
                }
                self.chunks.get_mut(chunk).expect("it was made").ready = true;
                Ok(Done::ChunkCreated)
            }
            Effect::CloseWindow { chunk, .. } => self.finish_close(*chunk, fails),
            Effect::DropChunk { chunk, .. } => {
                self.chunks.remove(chunk);
                self.ghosts.retain(|(frame, _, _)| frame.chunk != *chunk);
                if fails { Err(Fault::StillMapped) } else { Ok(Done::Plain) }
            }
            Effect::Read { source, target, expect, .. } => self.finish_read(*source, *target, expect, fails),
            Effect::Write { source, target, header, via, .. } => {
                self.finish_write(*source, *target, header, *via, pending.sample, fails)
            }
            Effect::CarveSlot { device, slot, space, .. } => {
                if fails {
                    return Err(Fault::Device);
                }
                self.carved.insert((*device, *slot), *space);
                Ok(Done::Plain)
            }
            Effect::Commit { put, delete, .. } => {
                let applied = !fails || self.random.percent(50);
                self.commit(put, delete, applied);
                if fails { Err(Fault::Catalog) } else { Ok(Done::Plain) }
            }
            Effect::ClearSpace { space, generation, .. } => {
                if fails {
                    return Err(Fault::Catalog);
                }
                self.clear_durably(*space, *generation);
                Ok(Done::Plain)
            }
            Effect::Verify { frame, .. } if fails && self.breaks(*frame, *frame) => Err(Fault::Device),
            Effect::Copy { source, target, .. } if fails && self.breaks(*source, *target) => {
                Err(Fault::Device)
            }
            Effect::Verify { frame, expect, .. } => {
                let payload = self.frame(*frame).payload;
                is_sound(*expect, payload, fails)
            }
            Effect::Copy { source, target, expect, .. } => {
                let payload = self.frame(*source).payload;
                self.frame(*target).payload = payload;
                is_sound(*expect, payload, fails)
            }
            Effect::Scrub { source, expect, .. } => self.finish_scrub(*source, expect, fails),
            other => panic!("{other:?} is no slow effect"),
        }
    }

    fn finish_read(
        &mut self,
        source: DiskFrame,
        target: FrameRef,
        expect: &BlockHeader,
        fails: bool,
    ) -> Result<Done, Fault> {
        let found = self.cells.get(&source).map(|cell| (cell.header, cell.payload));
        let (header, payload) = found.unwrap_or((*expect, GARBAGE));
        self.frame(target).payload = payload;
        let sound = header == *expect && checksum_of(expect.block, payload) == expect.checksum;
        self.seen.lies_read += u64::from(self.lied.contains(&source));
        match (fails, self.random.percent(50)) {
            (true, true) => Err(Fault::Device),
            (true, false) => Err(Fault::Checksum),
            (false, _) if sound => Ok(Done::Plain),
            (false, _) => Err(Fault::Checksum),
        }
    }

    /// The kernel knows of everybody who can still write.
    fn finish_close(&mut self, chunk: ChunkId, fails: bool) -> Result<Done, Fault> {
        if self.chunks[&chunk].memory != Memory::Pinned {
            // Nothing tells who can write: the session that hands a window back vouches for it.
            self.seen.hbm_adopted += u64::from(!fails);
            self.ghosts.retain(|(frame, _, _)| frame.chunk != chunk);
        }
        let kept = self.ghosts.iter().any(|(frame, _, _)| frame.chunk == chunk);
        self.seen.kept += u64::from(kept);
        if kept || fails {
            return Err(Fault::StillMapped);
        }
        self.chunks.get_mut(&chunk).expect("a window that is closed is alive").owner = None;
        Ok(Done::Plain)
    }

    fn finish_scrub(&self, source: DiskFrame, expect: &BlockHeader, fails: bool) -> Result<Done, Fault> {
        let cell = self.cells.get(&source);
        let sound = cell.is_some_and(|cell| {
            cell.header == *expect && checksum_of(expect.block, cell.payload) == expect.checksum
        });
        match (fails, sound) {
            (true, _) => Err(Fault::Device),
            (false, true) => Ok(Done::Plain),
            (false, false) => Err(Fault::Checksum),
        }
    }

    fn finish_write(
        &mut self,
        source: FrameRef,
        target: DiskFrame,
        header: &BlockHeader,
        via: Via,
        sample: Option<u64>,
        fails: bool,
    ) -> Result<Done, Fault> {
        if fails && self.random.percent(30) {
            return Err(Fault::NotStarted);
        }
        let now = self.frame(source).payload;
        let payload = sample.unwrap_or(now);
        let sound = checksum_of(header.block, payload) == header.checksum;
        if via == Via::Bounce && !sound {
            return Err(Fault::Checksum);
        }
        if fails {
            self.write_cell(target, *header, GARBAGE);
        } else {
            self.write_or_lie(target, *header, payload);
        }
        match (fails, self.random.percent(30)) {
            (true, true) => Err(Fault::NoSpace),
            (true, false) => Err(Fault::Device),
            (false, _) => Ok(Done::Plain),
        }
    }

    pub(crate) fn write_cell(&mut self, target: DiskFrame, header: BlockHeader, payload: u64) {
        let before = self
            .cells
            .get(&target)
            .and_then(|cell| if cell.synced { Some((cell.header, cell.payload)) } else { cell.before });
        self.cells.insert(target, Cell { header, payload, synced: false, before });
    }

    pub(crate) fn commit(
        &mut self,
        put: &[(DiskFrame, BlockHeader, UseStats)],
        delete: &[BlockId],
        applied: bool,
    ) {
        for (frame, header, _) in put {
            let lied = self.lied.contains(frame);
            let Some(cell) = self.cells.get_mut(frame) else {
                assert!(lied, "what is committed was written");
                continue;
            };
            assert!(lied || cell.header == *header, "{frame:?}: the catalog is told of what was written");
            cell.synced = true;
            cell.before = None;
        }
        if applied {
            for (frame, header, _) in put {
                self.committed.insert(header.block);
                self.catalog.insert(header.block, (*frame, *header));
            }
            for block in delete {
                self.catalog.remove(block);
            }
        }
    }

    pub(crate) fn clear_durably(&mut self, id: SpaceId, generation: u64) {
        for space in self.spaces.iter_mut().filter(|space| space.id == id) {
            space.durable_generation = space.durable_generation.max(generation);
        }
        self.catalog.retain(|_, (_, header)| header.space != id || header.generation >= generation);
    }

    fn published(&mut self, event: Event) {
        let durable = |tiers: &Residence| tiers.nvme;
        match event {
            Event::Sealed { block, tiers, .. } => {
                assert!(self.events.insert(block, tiers).is_none(), "{block} is sealed once");
            }
            Event::Moved { block, tiers, .. } => {
                assert!(self.events.insert(block, tiers).is_some(), "{block} moves after it was sealed");
                if !durable(&tiers) {
                    self.durable.remove(&block);
                }
            }
            Event::Evicted { block, .. } => {
                assert!(self.events.remove(&block).is_some(), "{block} is evicted after it was sealed");
                self.durable.remove(&block);
            }
            Event::Cleared { space } => {
                let cleared = self.spaces.iter().find(|known| known.id == space).expect("it is known");
                assert!(
                    cleared.chains.iter().flatten().all(|block| !self.events.contains_key(block)),
                    "a cleared space is empty"
                );
                self.seen.clears += 1;
            }
        }
    }

    fn check_events(&self) {
        for block in self.spaces.iter().flat_map(|space| space.chains.iter().flatten()) {
            let told = self.events.get(block).copied().unwrap_or_default();
            let is = self.core.stat(*block).map(|view| view.tiers).unwrap_or_default();
            assert_eq!(told, is, "{block}: the event stream tells where it is");
        }
    }

    /// Everybody who was granted a read and whose fence has not moved sees the sealed bytes.
    pub(crate) fn check_reads(&mut self) {
        let reads: Vec<_> = self.clients.values().flat_map(Client::reads).collect();
        for read in reads {
            let Some(chunk) = self.chunks.get(&read.frame.chunk) else { continue };
            let cell = &chunk.frames[read.frame.index as usize];
            if cell.fence != read.fence {
                self.seen.moved += 1;
                continue;
            }
            self.seen.reads += 1;
            assert_eq!(
                checksum_of(read.block, cell.payload),
                read.checksum,
                "a read of {} in {:?} sees other bytes than were sealed",
                read.block,
                read.frame
            );
        }
    }

    /// Somebody who lost his lease, or a child of a dead process, still writes.
    fn ghost_writes(&mut self) {
        let steps = self.steps;
        self.ghosts.retain(|(_, _, until)| *until >= steps);
        for place in 0..self.ghosts.len() {
            if self.random.percent(50) {
                let (frame, _, _) = self.ghosts[place];
                if self.chunks.contains_key(&frame.chunk) {
                    self.frame(frame).payload = GARBAGE;
                }
            }
        }
    }

    /// Everything ends well: then nothing may be held and nobody may be waiting.
    pub(crate) fn quiesce(&mut self) {
        self.faults = false;
        self.set_degraded(false);
        for device in (0..DEVICES).map(DeviceId::new) {
            self.tell(Input::DeviceState { device, usable: true });
        }
        self.gpus_back();
        self.drain();
        for client in self.clients.values() {
            assert!(client.sent.is_empty(), "requests without an answer: {:?}", client.sent);
        }
        let sessions: Vec<SessionId> = self.clients.keys().copied().collect();
        for session in sessions {
            self.close(session);
        }
        self.drain();
        self.core.check();
        self.check_events();
        let tiers = self.core.tier_views();
        assert_eq!(tiers.pinned.frames.pinned, 0, "nothing is pinned when nobody is there");
        assert_eq!(tiers.pinned.frames.filling, 0, "nothing is being filled when nobody is there");
        assert_eq!(tiers.pinned.frames.quarantined, 0, "replaced windows are gone");
        assert_eq!(tiers.pinned.windows, 0, "windows end with their sessions");
        for gpu in &tiers.hbm {
            let frames = gpu.memory.frames;
            assert_eq!(
                (frames.pinned, frames.filling, frames.quarantined),
                (0, 0, 0),
                "{:?} holds nothing back",
                gpu.gpu
            );
            assert_eq!((gpu.memory.windows, gpu.running), (0, 0), "windows and copies end");
        }
        assert_eq!(self.core.lease_count(), 0, "leases end with their sessions");
        assert_eq!(self.core.waiting_count(), 0, "nobody waits");
        self.seen.count(self.core.counters());
    }

    fn drain(&mut self) {
        let mut left = 20_000;
        for _ in 0..100 {
            while let Some(pending) = self.pending.pop() {
                let outcome = self.finish(&pending);
                self.tell(Input::OpDone { op: pending.op, outcome });
                self.check_reads();
                left -= 1;

                assert!(left > 0, "operations feed on each other: {:?}", pending.effect);
            }
            self.now += 100_000;
            self.tell(Input::Tick);
        }
        while let Some(pending) = self.pending.pop() {
            let outcome = self.finish(&pending);
            self.tell(Input::OpDone { op: pending.op, outcome });
        }
    }
}

/// What a check of a payload answers.
fn is_sound(expect: BlockHeader, payload: u64, fails: bool) -> Result<Done, Fault> {
    let sound = checksum_of(expect.block, payload) == expect.checksum;
    if sound && !fails { Ok(Done::Plain) } else { Err(Fault::Checksum) }
}

fn block_id(space: u8, chain: u8, place: u8) -> BlockId {
    let mut hasher = DefaultHasher::new();
    (space, chain, place).hash(&mut hasher);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&hasher.finish().to_le_bytes());
    bytes[8] = space;
    bytes[9] = chain;
    bytes[10] = place;
    BlockId::from_bytes(bytes)
}

fn outcome_is(effect: &Effect, name: &str) -> bool {
    format!("{effect:?}").starts_with(name)
}
