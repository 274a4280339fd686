//! Read leases: what is there is pinned, what is not is promoted or verified.

use crate::api::{Effect, Grant, IoClass, Limit, MissReason, Reply, Residence};
use crate::core::{Core, Op};
use crate::ids::{BlockId, DiskFrame, Fence, FrameRef, LeaseId, OpId, TenantId};
use crate::memory::Allocated;
use crate::residence::{Relist, Vacate};
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::chunk::{Filler, FrameState};
use crate::state::count;
use crate::state::session::{Held, LeaseKind};
use crate::state::space::HEADER_PAGE_BYTES;
use crate::units::{Micros, Now};
use crate::waiting::{Asker, WaitKind};

/// Requests' worth of blocks that may queue for promotion.
const WANTED_REQUESTS_MAX: usize = 16;

/// What those who wait for a block are told if it cannot be granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) otherwise: Grant,
    /// Another tier may be tried.
    pub(crate) again: bool,
}

impl Core {
    pub(crate) fn lease_read(
        &mut self,
        asker: Asker,
        tenant: TenantId,
        blocks: &[BlockId],
        ttl: Option<Micros>,
        answer_by: Now,
        class: IoClass,
    ) -> Option<Reply> {
        let Some(lease) = self.add_lease(asker.session, tenant, LeaseKind::Read, ttl, blocks.len()) else {
            return Some(Reply::Throttled(Limit::Leases));
        };
        let waits = answer_by > self.now && self.may_wait();
        let mut grants = Vec::with_capacity(blocks.len());
        let mut open = Vec::new();
        for (position, &block) in blocks.iter().enumerate() {
            let grant = match self.find(tenant, block) {
                None => Grant::Missing(MissReason::Unknown),
                Some(index) => self.grant_or_want(lease, position, index, class),
            };
            if grant == Grant::Promoting {
                open.push(position);
            }
            match grant {
                Grant::Granted { .. } => self.counters.hits += 1,
                Grant::Promoting => self.counters.hits_nvme += 1,
                Grant::Missing(_) | Grant::Throttled | Grant::Exists => self.counters.misses += 1,
            }
            grants.push(grant);
        }
        for &block in blocks.iter().rev() {
            if let Some(index) = self.find(tenant, block) {
                self.touch(index);
            }
        }
        let deadline = (!open.is_empty() && waits).then_some(answer_by);
        let wait = self.wait(asker, deadline, WaitKind::Read { lease, grants, class, open: Vec::new() });
        if open.is_empty() || !waits {
            self.finish(wait);
            return None;
        }
        let mut waited_for = Vec::with_capacity(open.len());
        for &position in &open {
            if let Some(index) = self.find(tenant, blocks[position]) {
                self.arrivals.entry(index).or_default().push((wait, count(position)));
                waited_for.push(index);
            }
        }
        if let Some(wait) = self.waits.get_mut(&wait) {
            wait.pending = count(open.len());
            if let WaitKind::Read { open, .. } = &mut wait.kind {
                *open = waited_for;
            }
        }
        None
    }

    /// Grants a block that can be served, or starts to bring it in.
    fn grant_or_want(&mut self, lease: LeaseId, position: usize, index: BlockIndex, class: IoClass) -> Grant {
        if let Some(grant) = self.grant_resident(lease, position, index) {
            return grant;
        }
        if self.residence(index) != Residence::default() {
            return if self.want(index, class) { Grant::Promoting } else { Grant::Throttled };
        }
        let filling = self.blocks.at(index).filling > 0;
        Grant::Missing(if filling { MissReason::Filling } else { MissReason::Unknown })
    }

    /// Pins the Pinned copy for a lease. `None`: there is none, or a foreign
    /// session's bytes have to be verified first.
    pub(crate) fn grant_resident(
        &mut self,
        id: LeaseId,
        position: usize,
        index: BlockIndex,
    ) -> Option<Grant> {
        let block = self.blocks.at(index);
        let frame = block.pinned?;
        let (name, seal, space) = (block.id, block.seal?, self.spaces.at(block.space));
        let lease = self.leases.get(&id)?;
        let cell = self.chunks.frame(frame)?;
        let FrameState::Sealed { block: _, pins, verified, sealer } = cell.state else { return None };
        if !verified && sealer != Some(lease.session) {
            return None;
        }
        let (tenant, bytes, fence) = (lease.tenant, space.frame_bytes.get(), cell.fence);
        if !self.may_lease(tenant, bytes) {
            return Some(Grant::Throttled);
        }
        let offset = u64::from(frame.index) * bytes + HEADER_PAGE_BYTES;
        self.charge(tenant, bytes);
        let now = self.now;
        let chunk = self.chunks.at_mut(frame.chunk);
        chunk.set(frame.index, FrameState::Sealed { block: index, pins: pins + 1, verified, sealer });
        chunk.touched = now;
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.items[position] = Some(Held { frame, fence, bytes });
        }
        self.relist(index, Relist::Keep);
        let (length, checksum) = (seal.length, Some(seal.checksum));
        Some(Grant::Granted { block: name, frame, fence, offset, length, checksum })
    }

    /// Puts a block into the queue of wanted ones. False: the queue is full.
    pub(crate) fn want(&mut self, index: BlockIndex, class: IoClass) -> bool {
        if self.blocks.at(index).arriving != Arriving::No {
            self.raise(index, class);
            return true;
        }
        let limit = self.config.limits.blocks_per_request as usize * WANTED_REQUESTS_MAX;
        if self.wanted.len() + self.wanted_stalled.len() >= limit {
            return false;
        }
        self.blocks.at_mut(index).arriving = Arriving::Queued(class);
        self.wanted.push(index, class);
        true
    }

    /// Starts reads and verifications while there is room for them.
    pub(crate) fn pump_arrivals(&mut self) {
        while self.reads_running + self.verifies_running < self.config.limits.reads_in_flight {
            let Some((index, class)) = self.wanted.pop() else { break };
            let queued = self.blocks.try_at(index).map(|block| block.arriving);
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
            Allocated::Wait if self.arrivals.contains_key(&index) => self.wanted_stalled.push(index),
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
        let expect = self.header_of(block, sequence);
        let frame_bytes = self.spaces.at(self.blocks.at(block).space).frame_bytes;
        let source_offset = self.disks.offset(source, frame_bytes);
        let op = self.start(Op::Read { block, source, target, class, stuck: false });
        let chunk = self.chunks.at_mut(target.chunk);
        chunk.set(target.index, FrameState::Filling { block, filler: Filler::Op(op) });
        let entry = self.blocks.at_mut(block);
        entry.filling += 1;
        entry.arriving = Arriving::Reading(op);
        self.disks.cell_mut(source).busy += 1;
        self.reads_running += 1;
        self.disks.device_mut(source.device).reads += 1;
        self.effects.push_back(Effect::Read { op, source, source_offset, target, expect, class });
    }

    /// A device read ended. The frame it filled was its own until now, whatever
    /// became of those who waited for it.
    pub(crate) fn read_done(
        &mut self,
        op: OpId,
        index: BlockIndex,
        source: DiskFrame,
        target: FrameRef,
        outcome: Result<(), crate::api::Fault>,
    ) {
        self.disks.cell_mut(source).busy -= 1;
        self.settle_cell(source);
        let block = self.blocks.at(index);
        let wanted = block.arriving == Arriving::Reading(op);
        let current = matches!(block.nvme, Nvme::Sealed { frame, .. } if frame == source);
        let fits = wanted && current && block.pinned.is_none();
        let mut otherwise = MissReason::Unknown;
        let mut again = false;
        match outcome {
            Ok(()) if fits => {
                self.seal_frame(index, target, true, None, 0);
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
                again = self.arrivals.contains_key(&index);
            }
            Err(_) => {
                otherwise = MissReason::Device;
                self.counters.device_faults += 1;
                self.disks.device_mut(source.device).faults += 1;
            }
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
        self.blocks.at_mut(index).arriving = Arriving::Verifying(op);
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
        self.verifies_running -= 1;
        let wanted = self.blocks.try_at(index).is_some_and(|block| block.arriving == Arriving::Verifying(op));
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
        if let FrameState::Sealed { block, pins, verified: _, sealer } =
            chunk.frames[frame.index as usize].state
        {
            chunk.set(frame.index, FrameState::Sealed { block, pins, verified: true, sealer });
        }
    }

    /// Settles everybody who waits for the block's Pinned copy.
    pub(crate) fn arrived(&mut self, index: BlockIndex, arrival: Arrival) {
        self.blocks.at_mut(index).arriving = Arriving::No;
        let mut waiters = self.arrivals.remove(&index).unwrap_or_default();
        waiters.retain(|(wait, _)| self.waits.contains_key(wait));
        // Last first, so that nobody is settled before the table is as it will be.
        let mut left = Vec::new();
        for (id, position) in waiters {
            let Some(wait) = self.waits.get(&id) else { continue };
            let WaitKind::Read { lease, class, .. } = wait.kind else { continue };
            let grant = self.grant_resident(lease, position as usize, index);
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
        self.blocks.remove_if_gone(index);
    }
}
