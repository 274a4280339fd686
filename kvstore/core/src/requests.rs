//! Requests: limits and repeats first, then the short ones. The long ones have
//! their own files.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::api::{
    Effect, Grant, IoClass, Limit, MapAccess, MatchMode, MissReason, Refusal, Reply, Request, Residence,
};
use crate::core::{Core, Deadline};
use crate::evict::Relist;
use crate::ids::{BlockId, ChunkId, Memory, RequestId, SessionId, TenantId};
use crate::reading::Reading;
use crate::state::block::{BlockIndex, Nvme, Retained};
use crate::state::chunk::ChunkKind;
use crate::state::count;
use crate::state::gone::Owner;
use crate::state::session::{Answer, REPEATS_WAITING_MAX, Seen};
use crate::units::Micros;
use crate::waiting::{Asker, WaitKind};

impl Core {
    /// Serves a request. It is answered now, or waits in a limited table.
    pub(crate) fn request(&mut self, session: SessionId, request: RequestId, op: Request) {
        let repeat = repeat_of(&op);
        let asker = Asker { session, request, repeat };
        let Some(open) = self.sessions.get(&session) else {
            return self.answer(asker, Reply::Refused(Refusal::UnknownSession));
        };
        let tenant = open.tenant;
        let found = blocks_in(&op);
        let limit = self.config.limits.blocks_per_request;
        if found > limit as usize {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            let asker = Asker { repeat: None, ..asker };
            return self.answer(asker, Reply::Refused(Refusal::TooManyBlocks { found, limit }));
        }
        if let Some(repeat) = repeat
            && self.answer_repeat(session, request, repeat, &op)
        {
            return;
        }
        if let Some(reply) = self.serve(asker, tenant, op) {
            self.answer(asker, reply);
        }
    }

    /// A request whose id was used before gets the first one's answer. False: it is new.
    fn answer_repeat(&mut self, session: SessionId, request: RequestId, repeat: u64, op: &Request) -> bool {
        let content = content_of(op);
        let Some(open) = self.sessions.get_mut(&session) else { return false };
        let reply = match open.repeats.look(repeat, content) {
            Seen::New => {
                open.repeats.begin(repeat, content);
                return false;
            }
            Seen::Differs => Arc::new(Reply::Refused(Refusal::RepeatDiffers { repeat })),
            Seen::Same => match open.repeats.answer_mut(repeat) {
                None => return false,
                Some(Answer::Given(reply)) => Arc::clone(reply),
                // Whoever asks again after it ended has nothing.
                Some(&mut Answer::Ended { blocks }) => {
                    let ttl = self.config.limits.lease_ttl_default;
                    let blocks = vec![Grant::Missing(MissReason::Unknown); blocks];
                    Arc::new(Reply::Leased { lease: None, ttl, blocks })
                }
                Some(&mut Answer::Clearing { space, generation, blocks }) => {
                    if self.spaces.at(space).clearing > 0 {
                        Arc::new(Reply::Throttled(Limit::RequestsWaiting))
                    } else {
                        Arc::new(Reply::Cleared { generation, blocks })
                    }
                }
                Some(Answer::Waiting(also)) if also.len() >= REPEATS_WAITING_MAX => {
                    Arc::new(Reply::Throttled(Limit::RequestsWaiting))
                }
                Some(Answer::Waiting(also)) => {
                    also.push(request);
                    return true;
                }
            },
        };
        self.effects.push_back(Effect::Reply { session, request, reply });
        true
    }

    /// Whether the session, or another one of its client, has used this request id before.
    pub fn remembers(&self, session: SessionId, repeat: u64) -> bool {
        self.sessions.get(&session).is_some_and(|open| open.repeats.remembers(repeat))
    }

    /// `None`: the request waits, or has been answered.
    fn serve(&mut self, asker: Asker, tenant: TenantId, op: Request) -> Option<Reply> {
        if matches!(op, Request::LeaseWrite { .. } | Request::Seal { .. }) {
            self.burst.written(self.now);
        }
        match op {
            Request::Match { blocks, mode } => Some(self.matched(tenant, &blocks, mode)),
            Request::LeaseRead { blocks, ttl, answer_by, purpose, want, repeat: _ } => {
                let memory = match self.reachable(asker.session, want) {
                    Ok(memory) => memory,
                    Err(refusal) => return Some(Reply::Refused(refusal)),
                };
                let how = Reading { answer_by, class: purpose.class(), memory };
                self.lease_read(asker, tenant, &blocks, ttl, how)
            }
            Request::LeaseWrite { space, blocks, parent, ttl, want, repeat: _ } => {
                let memory = match self.reachable(asker.session, want) {
                    Ok(memory) => memory,
                    Err(refusal) => return Some(Reply::Refused(refusal)),
                };
                self.lease_write(asker, tenant, (space, memory), blocks, parent, ttl)
            }
            Request::Seal { lease, blocks, durability, repeat: _ } => {
                self.seal(asker, lease, &blocks, durability)
            }
            Request::Renew { lease, ttl } => Some(self.renew(asker.session, lease, ttl)),
            Request::Release { leases } => Some(self.release(asker.session, &leases)),
            Request::Abort { lease, indexes } => Some(self.abort(asker.session, lease, &indexes)),
            Request::Touch { blocks, reads } => Some(self.touched(tenant, &blocks, &reads)),
            Request::Prefetch { blocks, want } => Some(self.prefetch(tenant, &blocks, want)),
            Request::Shrink { gpu, bytes, answer_by } => self.shrink(asker, gpu, bytes, answer_by),
            Request::Retain { blocks, ttl, priority } => Some(self.retain(tenant, &blocks, ttl, priority)),
            Request::Clear { space, repeat: _ } => self.clear(asker, tenant, space),
            Request::ReturnWindow { chunk } => Some(self.return_window(asker.session, chunk)),
            Request::MapChunk { chunk } => Some(self.map_chunk(asker.session, tenant, chunk)),
            Request::Flush => self.flush(asker),
        }
    }

    /// The tenant's own block. Another tenant's is answered like one that does not exist.
    pub(crate) fn find(&self, tenant: TenantId, block: BlockId) -> Option<BlockIndex> {
        let index = self.blocks.find(block)?;
        (self.spaces.at(self.blocks.at(index).space).tenant == tenant).then_some(index)
    }

    /// Tiers that could serve the block now.
    pub(crate) fn residence(&self, index: BlockIndex) -> Residence {
        let block = self.blocks.at(index);
        let nvme = match block.nvme {
            Nvme::Sealed { frame, .. } => self.disks.usable(frame.device),
            Nvme::None | Nvme::Writing { .. } | Nvme::Committing { .. } | Nvme::Deleting => false,
        };
        Residence { pinned: block.pinned.is_some(), nvme, hbm: block.hbm }
    }

    /// Where a session's blocks go that it wants there. In a device's memory nothing keeps a process that maps a
    /// chunk from writing into it: so only sessions that may read each other's windows map any.
    fn reachable(&self, session: SessionId, want: Memory) -> Result<Memory, Refusal> {
        match want {
            Memory::Pinned => Ok(Memory::Pinned),
            Memory::Hbm(gpu) if self.gpus.find(gpu).is_none() => Err(Refusal::UnknownGpu { gpu }),
            Memory::Hbm(_) if self.is_isolated(session) || !self.is_local(session) => Ok(Memory::Pinned),
            Memory::Hbm(_) => Ok(want),
        }
    }

    fn matched(&mut self, tenant: TenantId, blocks: &[BlockId], mode: MatchMode) -> Reply {
        let mut found = Vec::with_capacity(blocks.len());
        let mut previous = None;
        for &block in blocks {
            previous = self.find_after(tenant, previous, block);
            let there = previous
                .map(|index| self.residence(index))
                .filter(|residence| *residence != Residence::default());
            found.push(there);
            if there.is_none() && mode == MatchMode::Prefix {
                break;
            }
        }
        Reply::Matched { blocks: found }
    }

    /// From tail to head, so that parents stay newer than their children.
    fn touched(&mut self, tenant: TenantId, blocks: &[BlockId], reads: &[u32]) -> Reply {
        let mut touched = 0;
        self.read_again(tenant, blocks, reads);
        self.tick = self.tick.next();
        for &block in blocks.iter().rev() {
            let Some(index) = self.find(tenant, block) else { continue };
            if self.residence(index) != Residence::default() {
                self.touch(index);
                touched += 1;
            }
        }
        Reply::Touched { count: touched }
    }

    fn prefetch(&mut self, tenant: TenantId, blocks: &[BlockId], want: Memory) -> Reply {
        if let Memory::Hbm(gpu) = want
            && self.gpus.find(gpu).is_none()
        {
            return Reply::Refused(Refusal::UnknownGpu { gpu });
        }
        let (mut started, mut resident) = (0, 0);
        for &block in blocks {
            let Some(index) = self.find(tenant, block) else { continue };
            let there = self.residence(index);
            if there.is_in(want) {
                resident += 1;
            } else if (there.is_in_memory() || there.nvme) && self.want_in(index, want, IoClass::Prefetch) {
                started += 1;
            }
        }
        Reply::Prefetched { started, resident }
    }

    fn retain(&mut self, tenant: TenantId, blocks: &[BlockId], ttl: Micros, priority: u8) -> Reply {
        let until = self.now.after(ttl);
        let limit = self.retained_bytes_max();
        let mut retained = 0;
        for &block in blocks {
            let Some(index) = self.find(tenant, block) else { continue };
            if self.residence(index) == Residence::default() {
                continue;
            }
            self.unretain(index);
            let bytes = self.spaces.at(self.blocks.at(index).space).frame_bytes.get();
            let held = self.tenants.entry(tenant).or_default();
            if priority > 0 && held.retained_bytes + bytes <= limit {
                held.retained_bytes += bytes;
                self.blocks.at_mut(index).set_retained(true);
                self.retained.insert(index, Retained { priority, until });
                self.at(until, Deadline::Retain(index, block));
                retained += 1;
            }
            self.relist(index, Relist::Touch);
        }
        Reply::Retained { count: retained }
    }

    fn retained_bytes_max(&self) -> u64 {
        let slots: u64 = self.config.device_slots.iter().map(|&slots| u64::from(slots)).sum();
        let capacity = self.config.pinned_bytes.get() + slots * self.config.chunk_bytes.get();
        capacity / 100 * u64::from(self.config.limits.retained_percent.min(100))
    }

    fn map_chunk(&mut self, session: SessionId, tenant: TenantId, id: ChunkId) -> Reply {
        let refused = Reply::Refused(Refusal::NotYourChunk { chunk: id });
        let chunk = self.chunks.find(id);
        let owner = chunk.map(Owner::of).or_else(|| self.chunks.gone.find(id));
        let isolated = self.is_isolated(session);
        let own = owner.is_some_and(|owner| owner.admits(session, tenant, isolated));
        if !own || !self.is_local(session) {
            return refused;
        }
        let gone = Reply::Refused(Refusal::ChunkGone { chunk: id });
        let Some(chunk) = chunk else { return gone };
        let access = match chunk.kind {
            ChunkKind::Window { owner, .. } if owner == session => MapAccess::Write,
            ChunkKind::Window { .. }
            | ChunkKind::Closing { .. }
            | ChunkKind::Pool
            | ChunkKind::Retiring
            | ChunkKind::Replacing => MapAccess::Read,
            ChunkKind::Creating { .. } => return refused,
            ChunkKind::Dropping => return gone,
        };
        self.chunks.at_mut(id).mappers.insert(session);
        Reply::MayMap { chunk: id, access }
    }

    /// Makes everything that is sealed urgent and waits for it. Walks the whole
    /// table: it is asked for at the end of a daemon's life, or by hand.
    fn flush(&mut self, asker: Asker) -> Option<Reply> {
        let mut open = Vec::new();
        for index in (0..self.blocks.end()).map(BlockIndex::new) {
            let unsaved = |block: &crate::state::block::Block| {
                block.residence().is_in_memory() && !block.residence().nvme
            };
            if self.blocks.try_at(index).is_some_and(unsaved) {
                open.push(index);
            }
        }
        if open.is_empty() {
            return Some(Reply::Flushed { blocks: 0, failed: 0 });
        }
        if !self.is_persisting() {
            return Some(Reply::Flushed { blocks: 0, failed: open.len() as u64 });
        }
        if let Err(limit) = self.may_wait(asker.session) {
            return Some(Reply::Throttled(limit));
        }
        let wait = self.wait(asker, None, WaitKind::Flush { blocks: 0, failed: 0 });
        if let Some(wait) = self.waits.get_mut(&wait) {
            wait.pending = count(open.len());
        }
        for index in open {
            self.durables.entry(index).or_default().push((wait, 0));
            self.persist_now(index);
            if self.is_clear_stuck(self.blocks.at(index).space) {
                self.durable(index, false);
            }
        }
        None
    }
}

/// How many blocks, leases or positions a request names.
fn blocks_in(op: &Request) -> usize {
    match op {
        Request::Match { blocks, .. }
        | Request::LeaseRead { blocks, .. }
        | Request::LeaseWrite { blocks, .. }
        | Request::Touch { blocks, .. }
        | Request::Prefetch { blocks, .. }
        | Request::Retain { blocks, .. } => blocks.len(),
        Request::Seal { blocks, .. } => blocks.len(),
        Request::Release { leases } => leases.len(),
        Request::Abort { indexes, .. } => indexes.len(),
        Request::Renew { .. }
        | Request::Clear { .. }
        | Request::ReturnWindow { .. }
        | Request::MapChunk { .. }
        | Request::Shrink { .. }
        | Request::Flush => 0,
    }
}

fn repeat_of(op: &Request) -> Option<u64> {
    match op {
        Request::LeaseRead { repeat, .. }
        | Request::LeaseWrite { repeat, .. }
        | Request::Seal { repeat, .. }
        | Request::Clear { repeat, .. } => *repeat,
        Request::Match { .. }
        | Request::Renew { .. }
        | Request::Release { .. }
        | Request::Abort { .. }
        | Request::Touch { .. }
        | Request::Prefetch { .. }
        | Request::Retain { .. }
        | Request::ReturnWindow { .. }
        | Request::MapChunk { .. }
        | Request::Shrink { .. }
        | Request::Flush => None,
    }
}

/// Eight bytes at a time: block ids are uniform already, and a request has hundreds.
/// Two runs agree, whatever the machine.
struct Fingerprint(u64);

impl Fingerprint {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Hundreds of blocks, several at a time: each word by itself waits for the one before it.
    fn mix_blocks(&mut self, blocks: &[BlockId]) {
        let mut lanes = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5), Self(6), Self(7)];
        for some in blocks.chunks(lanes.len() / 2) {
            for (lane, block) in lanes.as_chunks_mut::<2>().0.iter_mut().zip(some) {
                let [low, high] = words(block.as_u128());
                lane[0].mix(low);
                lane[1].mix(high);
            }
        }
        lanes.into_iter().for_each(|lane| self.mix(lane.0));
        self.mix(blocks.len() as u64);
    }
}

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.mix(u64::from_le_bytes(word));
        }
        self.mix(bytes.len() as u64);
    }

    fn write_u128(&mut self, value: u128) {
        let [low, high] = words(value);
        self.mix(low);
        self.mix(high);
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(value.into());
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

/// Lowest first.
fn words(value: u128) -> [u64; 2] {
    let bytes = value.to_le_bytes();
    let [low, high] = bytes.as_chunks::<8>().0 else { unreachable!("16 bytes are twice eight") };
    [*low, *high].map(u64::from_le_bytes)
}

/// Fingerprint of what a request asks for. Not of how long it may take: a
/// repeat comes later than the first.
fn content_of(op: &Request) -> u64 {
    let mut hasher = Fingerprint(0);
    std::mem::discriminant(op).hash(&mut hasher);
    match op {
        // Nor how urgent it is.
        Request::LeaseRead { blocks, ttl, want, repeat: _, answer_by: _, purpose: _ } => {
            hasher.mix_blocks(blocks);
            (ttl, want).hash(&mut hasher);
        }
        Request::LeaseWrite { space, blocks, parent, ttl, want, repeat: _ } => {
            hasher.mix_blocks(blocks);
            (space, parent, ttl, want).hash(&mut hasher);
        }
        Request::Seal { lease, blocks, durability, repeat: _ } => {
            (lease, blocks, durability).hash(&mut hasher);
        }
        Request::Clear { space, repeat: _ } => space.hash(&mut hasher),
        Request::Match { .. }
        | Request::Renew { .. }
        | Request::Release { .. }
        | Request::Abort { .. }
        | Request::Touch { .. }
        | Request::Prefetch { .. }
        | Request::Retain { .. }
        | Request::ReturnWindow { .. }
        | Request::MapChunk { .. }
        | Request::Shrink { .. }
        | Request::Flush => {}
    }
    hasher.finish()
}
