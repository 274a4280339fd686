//! Read leases: what is there is pinned, what is not is promoted or verified.

use crate::api::{Effect, Grant, IoClass, MissReason, Reply, Residence};
use crate::core::{Core, Op};
use crate::evict::Relist;
use crate::ids::{BlockId, DiskFrame, Fence, FrameRef, GpuId, LeaseId, Memory, OpId, SessionId, TenantId};
use crate::memory::Allocated;
use crate::residence::Vacate;
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::chunk::{Filler, FrameState};
use crate::state::count;
use crate::state::session::{Held, LeaseKind};
use crate::state::space::{HEADER_PAGE_BYTES, SpaceIndex};
use crate::units::{Micros, Now};
use crate::waiting::{Asker, WaitKind};

/// Requests' worth of blocks that may queue for promotion.
pub(crate) const WANTED_REQUESTS_MAX: usize = 16;

/// What those who wait for a block are told if it cannot be granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) otherwise: Grant,
    /// Another tier may be tried.
    pub(crate) again: bool,
}

/// For whom blocks are pinned: read off a lease once for many of them.
#[derive(Clone, Copy, Debug)]
struct Holder {
    session: SessionId,
    tenant: TenantId,
    /// Bytes that its tenant may yet lease.
    allowance: u64,
    /// Where it reads.
    memory: Memory,
}

/// How a read lease is to be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) answer_by: Now,
    pub(crate) class: IoClass,
    pub(crate) memory: Memory,
}

/// What a read lease found.
struct Looked {
    grants: Vec<Grant>,
    items: Vec<Option<Held>>,
    /// Positions and entries of what is there but not readable now.
    slower: Vec<(u32, BlockIndex)>,
    /// Depth of the first block, and the space, as the first known block tells.
    first: Option<(u32, SpaceIndex)>,
}

impl Core {
    pub(crate) fn lease_read(
        &mut self,
        asker: Asker,
        tenant: TenantId,
        blocks: &[BlockId],
        ttl: Option<Micros>,
        how: Reading,
    ) -> Option<Reply> {
        let Reading { answer_by, class, memory } = how;
        let lease = match self.add_lease(asker.session, tenant, LeaseKind::Read, ttl, 0) {
            Ok(lease) => lease,
            Err(limit) => return Some(Reply::Throttled(limit)),
        };
        self.tick = self.tick.next();
        let waits = answer_by > self.now && self.may_wait(asker.session).is_ok();
        let allowance = self.lease_allowance(tenant, asker.session);
        let holder = Holder { session: asker.session, tenant, allowance, memory };
        let Looked { mut grants, items, slower, first } = self.pin_all(holder, blocks);
        self.charge(tenant, asker.session, items.iter().flatten().map(|held| held.bytes).sum());
        if let Some(lease) = self.leases.get_mut(&lease) {
            (lease.items, lease.repeat) = (items, asker.repeat);
        }
        self.asked(asker.session, blocks, first, memory);
        let open = self.promote_all(slower, &mut grants, class, memory);
        self.count_grants(&grants);
        if open.is_empty() || !waits {
            self.grant_where_it_is(lease, memory, blocks, &mut grants);
            return Some(self.leased(lease, grants));
        }
        let waited_for = open.iter().map(|&(_, index)| index).collect();
        let blocks = if memory == Memory::Pinned { Vec::new() } else { blocks.to_vec() };
        let kind = WaitKind::Read { lease, blocks, grants, class, open: waited_for, memory };
        let wait = self.wait(asker, Some(answer_by), kind);
        if let Some(wait) = self.waits.get_mut(&wait) {
            wait.pending = count(open.len());
        }
        for (position, index) in open {
            let arrivals = match memory {
                Memory::Pinned => &mut self.arrivals,
                Memory::Hbm(gpu) => &mut self.gpus.at_mut(gpu).arrivals,
            };
            arrivals.entry(index).or_default().push((wait, position));
        }
        None
    }

    /// What did not come to a device in time is granted in Pinned, if it is there.
    pub(crate) fn grant_where_it_is(
        &mut self,
        lease: LeaseId,
        memory: Memory,
        blocks: &[BlockId],
        grants: &mut [Grant],
    ) {
        if memory == Memory::Pinned {
            return;
        }
        for (position, &block) in blocks.iter().enumerate() {
            if matches!(grants.get(position), Some(Grant::Promoting | Grant::Throttled))
                && let Some(index) = self.blocks.find(block)
                && let Some(grant) = self.grant_resident(lease, position, index, Memory::Pinned)
            {
                grants[position] = grant;
            }
        }
    }

    /// Pins what is readable now, and marks all that is known as used.
    fn pin_all(&mut self, mut holder: Holder, blocks: &[BlockId]) -> Looked {
        let mut looked = Looked {
            grants: Vec::with_capacity(blocks.len()),
            items: Vec::with_capacity(blocks.len()),
            slower: Vec::new(),
            first: None,
        };
        let mut previous = None;
        for (position, &block) in (0..).zip(blocks) {
            previous = self.find_after(holder.tenant, previous, block);
            let Some(index) = previous else {
                looked.grants.push(Grant::Missing(MissReason::Unknown));
                looked.items.push(None);
                continue;
            };
            if looked.first.is_none() {
                let block = self.blocks.at(index);
                looked.first = Some((block.depth.saturating_sub(position), block.space));
            }
            let (grant, item) = match self.pin_resident(&mut holder, index) {
                Some(pinned) => pinned,
                None => (self.unreadable(index), None),
            };
            self.touch(index);
            if grant == Grant::Promoting {
                looked.slower.push((position, index));
            }
            looked.grants.push(grant);
            looked.items.push(item);
        }
        looked
    }

    /// What to say of a block that cannot be read in Pinned now.
    fn unreadable(&self, index: BlockIndex) -> Grant {
        if self.residence(index) != Residence::default() {
            return Grant::Promoting;
        }
        let filling = self.blocks.at(index).filling > 0;
        Grant::Missing(if filling { MissReason::Filling } else { MissReason::Unknown })
    }

    /// Starts to bring in what is there but not readable, unless computing it
    /// again is quicker. Returns what is on its way.
    fn promote_all(
        &mut self,
        slower: Vec<(u32, BlockIndex)>,
        grants: &mut [Grant],
        class: IoClass,
        memory: Memory,
    ) -> Vec<(u32, BlockIndex)> {
        let cheaper = self.is_cheaper_to_recompute(&slower);
        let mut open = Vec::with_capacity(slower.len());
        for (position, index) in slower {
            if cheaper && !self.blocks.at(index).residence().is_in_memory() {
                grants[position as usize] = Grant::Missing(MissReason::CheaperToRecompute);
                self.counters.cheaper_to_recompute += 1;
            } else if self.want_in(index, memory, class) {
                open.push((position, index));
            } else {
                grants[position as usize] = Grant::Throttled;
            }
        }
        open
    }

    /// Whether all of these would be computed before they are loaded. Only of
    /// models whose cost was declared: a client that never computes must not
    /// talk the store out of what it put there.
    fn is_cheaper_to_recompute(&self, slower: &[(u32, BlockIndex)]) -> bool {
        let mut bytes = vec![0u64; self.disks.devices.len()];
        let (mut compute, mut any) = (0.0, false);
        for &(_, index) in slower {
            let block = self.blocks.at(index);
            let space = self.spaces.at(block.space);
            let Nvme::Sealed { frame, .. } = block.nvme else { continue };
            if !space.compute.is_declared() {
                return false;
            }
            if !block.residence().is_in_memory() && block.arriving() == Arriving::No {
                any = true;
                compute += space.compute.cost().seconds(block.depth);
                bytes[usize::from(frame.device.get())] += space.frame_bytes.get();
            }
        }
        let loads = bytes.iter().zip(&self.disks.devices).filter(|&(&bytes, _)| bytes > 0);
        let load = loads.map(|(&bytes, device)| device.load.seconds(bytes)).fold(0.0, f64::max);
        any && load > compute
    }

    fn count_grants(&mut self, grants: &[Grant]) {
        for grant in grants {
            match grant {
                Grant::Granted { .. } => self.counters.hits += 1,
                Grant::Promoting => self.counters.hits_nvme += 1,
                Grant::Missing(_) | Grant::Throttled | Grant::Exists => self.counters.misses += 1,
            }
        }
    }

    /// The tenant's own block. `before` is the one before it in the request.
    pub(crate) fn find_after(
        &self,
        tenant: TenantId,
        before: Option<BlockIndex>,
        block: BlockId,
    ) -> Option<BlockIndex> {
        let index = self.blocks.find_after(before, block)?;
        (self.spaces.at(self.blocks.at(index).space).tenant == tenant).then_some(index)
    }

    /// Pins the Pinned copy for a lease that exists. `None`: see [`Core::pin_resident`].
    pub(crate) fn grant_resident(
        &mut self,
        id: LeaseId,
        position: usize,
        index: BlockIndex,
        memory: Memory,
    ) -> Option<Grant> {
        let lease = self.leases.get(&id)?;
        let (session, tenant) = (lease.session, lease.tenant);
        let allowance = self.lease_allowance(tenant, session);
        let mut holder = Holder { session, tenant, allowance, memory };
        let (grant, item) = self.pin_resident(&mut holder, index)?;
        if let Some(held) = item {
            self.charge(tenant, session, held.bytes);
            if let Some(lease) = self.leases.get_mut(&id) {
                lease.items[position] = Some(held);
            }
        }
        Some(grant)
    }

    /// Pins the Pinned copy. `None`: there is none, or a foreign session's bytes
    /// have to be verified first. The caller charges the tenant for the item and keeps it.
    #[inline(always)]
    fn pin_resident(&mut self, holder: &mut Holder, index: BlockIndex) -> Option<(Grant, Option<Held>)> {
        let block = self.blocks.at(index);
        let (frame, listed) = match holder.memory {
            Memory::Pinned => (block.pinned?, block.listed_pinned.is_listed()),
            Memory::Hbm(gpu) if !block.hbm.contains(gpu) => return None,
            Memory::Hbm(gpu) => {
                let entry = self.gpus.at(gpu).entries.of(index)?;
                (entry.frame?, entry.links.is_listed())
            }
        };
        let (name, checksum, memory) = (block.id, block.seal()?, holder.memory);
        let space = self.spaces.at(block.space);
        debug_assert!(space.tenant == holder.tenant, "a lease covers blocks of its own tenant");
        let (bytes, length) = (space.frame_bytes.get(), space.block_bytes);
        let now = self.now;
        let chunk = self.chunks.at_mut(frame.chunk);
        let cell = &chunk.frames[frame.index as usize];
        let FrameState::Sealed { block: _, pins: _, verified } = cell.state else { return None };
        if !verified && chunk.sealer != Some(holder.session) {
            return None;
        }
        if holder.allowance < bytes {
            return Some((Grant::Throttled, None));
        }
        holder.allowance -= bytes;
        let fence = cell.fence;
        chunk.pin(frame.index);
        chunk.touched = now;
        if listed {
            self.relist(index, Relist::Keep);
        }
        let offset = u64::from(frame.index) * bytes + HEADER_PAGE_BYTES;
        let checksum = Some(checksum);
        let grant = Grant::Granted { block: name, frame, fence, offset, length, checksum, memory };
        Some((grant, Some(Held { frame, fence, bytes })))
    }

    /// The same, for whichever memory.
    pub(crate) fn want_in(&mut self, index: BlockIndex, memory: Memory, class: IoClass) -> bool {
        match memory {
            Memory::Pinned => self.want(index, class),
            Memory::Hbm(gpu) => self.want_in_hbm(index, gpu, class),
        }
    }

    /// Puts a block into the queue of wanted ones. False: the queue is full.
    pub(crate) fn want(&mut self, index: BlockIndex, class: IoClass) -> bool {
        if self.blocks.at(index).arriving() != Arriving::No {
            self.raise(index, class);
            return true;
        }
        let limit = self.config.limits.blocks_per_request as usize * WANTED_REQUESTS_MAX;
        if self.wanted.len() + self.wanted_stalled.len() >= limit {
            return false;
        }
        self.blocks.at_mut(index).set_arriving(Arriving::Queued(class));
        self.wanted.push(index, class);
        true
    }

    /// Starts reads and verifications while there is room for them.
    pub(crate) fn pump_arrivals(&mut self) {
        while self.reads_running + self.verifies_running < self.config.limits.reads_in_flight {
            let Some((index, class)) = self.wanted.pop() else { break };
            let queued = self.blocks.try_at(index).map(|block| block.arriving());
            if queued == Some(Arriving::Queued(class)) {
                self.start_arrival(index, class);
            }
        }
    }

    fn start_arrival(&mut self, index: BlockIndex, class: IoClass) {
        let block = self.blocks.at(index);
        if let Some(frame) = block.pinned {
            let state = self.chunks.frame(frame).map(|cell| cell.state);
            if matches!(state, Some(FrameState::Sealed { verified: false, .. })) {
                self.start_verify(index, frame);
            } else {
                self.arrived(index, Arrival { otherwise: Grant::Missing(MissReason::Unknown), again: false });
            }
            return;
        }
        if !block.hbm.is_empty()
            && let Some(gpu) = self.device_of(index)
        {
            return self.start_demotion(index, gpu);
        }
        let block = self.blocks.at(index);
        let Nvme::Sealed { frame: source, sequence } = block.nvme else {
            self.arrived(index, Arrival { otherwise: Grant::Missing(MissReason::Unknown), again: false });
            return;
        };
        if !self.disks.usable(source.device) {
            self.arrived(index, Arrival { otherwise: Grant::Missing(MissReason::Device), again: false });
            return;
        }
        let space = block.space;
        let share = self.disks.share(self.config.limits.reads_in_flight);
        let device = self.disks.device_mut(source.device);
        if device.reads >= share {
            device.reads_waiting.push_back(index);
            return;
        }
        match self.take_pool_frame(space) {
            Allocated::Frame(target) => self.start_read(index, source, sequence, target, class),
            Allocated::Wait if self.is_awaited(index) => self.wanted_stalled.push(index),
            Allocated::Wait | Allocated::Never => {
                self.arrived(index, Arrival { otherwise: Grant::Throttled, again: false });
            }
        }
    }

    /// Whether somebody waits for the block in Pinned, himself or for a device of Hbm.
    pub(crate) fn is_awaited(&self, index: BlockIndex) -> bool {
        self.arrivals.contains_key(&index) || self.is_wanted_above(index)
    }

    /// A wanted block comes from a device of Hbm.
    fn start_demotion(&mut self, index: BlockIndex, gpu: GpuId) {
        match self.demote(index, gpu) {
            Allocated::Frame(_) => {}
            Allocated::Wait if self.is_awaited(index) => self.wanted_stalled.push(index),
            Allocated::Wait | Allocated::Never => {
                self.arrived(index, Arrival { otherwise: Grant::Throttled, again: false });
            }
        }
    }

    fn start_read(
        &mut self,
        block: BlockIndex,
        source: DiskFrame,
        sequence: u64,
        target: FrameRef,
        class: IoClass,
    ) {
        let op = self.start_read_of(block, source, sequence, target, class);
        self.blocks.at_mut(block).set_arriving(Arriving::Reading(op.into()));
    }

    /// Reads a copy on a device into a frame of Pinned or Hbm.
    pub(crate) fn start_read_of(
        &mut self,
        block: BlockIndex,
        source: DiskFrame,
        sequence: u64,
        target: FrameRef,
        class: IoClass,
    ) -> OpId {
        let expect = self.header_of(block, sequence);
        let frame_bytes = self.spaces.at(self.blocks.at(block).space).frame_bytes;
        let source_offset = self.disks.offset(source, frame_bytes);
        let op = self.start(Op::Read { block, source, target, sent: self.now, class, stuck: false });
        self.disks.device_mut(source.device).load.sent(frame_bytes.get());
        let chunk = self.chunks.at_mut(target.chunk);
        chunk.fill(target.index, block, Filler::Op(op.into()));
        self.blocks.at_mut(block).filling += 1;
        self.disks.cell_mut(source).busy += 1;
        self.reads_running += 1;
        self.disks.device_mut(source.device).reads += 1;
        self.effects.push_back(Effect::Read { op, source, source_offset, target, expect, class });
        op
    }

    /// A device read ended. The frame it filled was its own until now, whatever
    /// became of those who waited for it.
    pub(crate) fn read_done(
        &mut self,
        op: OpId,
        index: BlockIndex,
        (source, sent): (DiskFrame, Now),
        target: FrameRef,
        outcome: Result<(), crate::api::Fault>,
    ) {
        let bytes = self.spaces.at(self.blocks.at(index).space).frame_bytes.get();
        let now = self.now;
        self.disks.device_mut(source.device).load.answered(bytes, sent, now, outcome.is_ok());
        self.disks.cell_mut(source).busy -= 1;
        self.settle_cell(source);
        let block = self.blocks.at(index);
        let wanted = block.arriving() == Arriving::Reading(op.into());
        let current = matches!(block.nvme, Nvme::Sealed { frame, .. } if frame == source);
        let memory = self.chunks.at(target.chunk).memory;
        let fits = wanted && current && block.pinned.is_none() && memory == Memory::Pinned;
        let mut otherwise = MissReason::Unknown;
        let mut again = false;
        match outcome {
            Ok(()) if fits => {
                self.seal_frame(index, target, true, 0);
                self.counters.promotions += 1;
            }
            Ok(()) => {}
            Err(crate::api::Fault::Checksum) => {
                otherwise = MissReason::Checksum;
                self.counters.checksum_failures += 1;
                if current {
                    self.discard_nvme(index);
                }
            }
            // Taken back for want of anybody who waits; somebody may do so again by now.
            Err(crate::api::Fault::NotStarted) => {
                otherwise = MissReason::Device;
                again = self.is_awaited(index);
            }
            Err(_) => {
                otherwise = MissReason::Device;
                self.counters.device_faults += 1;
                self.disks.device_mut(source.device).faults += 1;
            }
        }
        if let Memory::Hbm(gpu) = memory {
            let outcome = outcome.map_err(|_| otherwise);
            return self.read_into_hbm(op, index, (gpu, target), current, outcome);
        }
        if wanted {
            self.arrived(index, Arrival { otherwise: Grant::Missing(otherwise), again });
        }
        // Only if it was not sealed: then it is still Filling.
        self.abandon_filling(target, Vacate::Free);
    }

    fn start_verify(&mut self, index: BlockIndex, frame: FrameRef) {
        let expect = self.header_of(index, 0);
        let fence = self.hold_frame(frame);
        let op = self.start(Op::Verify { block: index, frame, fence });
        self.blocks.at_mut(index).set_arriving(Arriving::Verifying(op.into()));
        self.verifies_running += 1;
        self.effects.push_back(Effect::Verify { op, frame, expect });
    }

    pub(crate) fn verify_done(
        &mut self,
        op: OpId,
        index: BlockIndex,
        frame: FrameRef,
        fence: Fence,
        outcome: Result<(), crate::api::Fault>,
    ) {
        if let Memory::Hbm(gpu) = self.chunks.at(frame.chunk).memory {
            let held = self.let_frame_go(frame, fence).then_some(frame);
            return self.verified_in_hbm(op, index, gpu, held, outcome);
        }
        self.verifies_running -= 1;
        self.memory_changed |= !self.gpus.is_empty();
        let wanted =
            self.blocks.try_at(index).is_some_and(|block| block.arriving() == Arriving::Verifying(op.into()));
        if self.let_frame_go(frame, fence) {
            match outcome {
                Ok(()) => self.mark_verified(frame),
                Err(_) => self.reject_pinned(index),
            }
        }
        if wanted {
            self.arrived(index, Arrival { otherwise: Grant::Missing(MissReason::Checksum), again: true });
        }
    }

    pub(crate) fn mark_verified(&mut self, frame: FrameRef) {
        let chunk = self.chunks.at_mut(frame.chunk);
        if let FrameState::Sealed { block, pins, verified: _ } = chunk.frames[frame.index as usize].state {
            chunk.set(frame.index, FrameState::Sealed { block, pins, verified: true });
        }
    }

    /// Settles everybody who waits for the block's Pinned copy.
    pub(crate) fn arrived(&mut self, index: BlockIndex, arrival: Arrival) {
        self.blocks.at_mut(index).set_arriving(Arriving::No);
        let mut waiters = self.arrivals.remove(&index).unwrap_or_default();
        waiters.retain(|(wait, _)| self.waits.contains_key(wait));
        // Last first, so that nobody is settled before the table is as it will be.
        let mut left = Vec::new();
        for (id, position) in waiters {
            let Some(wait) = self.waits.get(&id) else { continue };
            let WaitKind::Read { lease, class, .. } = wait.kind else { continue };
            let grant = self.grant_resident(lease, position as usize, index, Memory::Pinned);
            let there = self.residence(index);
            let retry = there.pinned || (there.nvme && arrival.again);
            let grant = match grant {
                Some(grant) => grant,
                None if retry && self.want(index, class) => {
                    left.push((id, position));
                    continue;
                }
                None => arrival.otherwise,
            };
            if let Some(WaitKind::Read { grants, .. }) = self.waits.get_mut(&id).map(|wait| &mut wait.kind) {
                grants[position as usize] = grant;
            }
            self.part_done(id);
        }
        if !left.is_empty() {
            self.arrivals.entry(index).or_default().extend(left);
        }
        let block = self.blocks.at(index);
        if block.hbm_coming > 0 && block.arriving() == Arriving::No {
            self.arrived_below(index, arrival.otherwise);
        }
        self.blocks.remove_if_gone(index);
    }
}
