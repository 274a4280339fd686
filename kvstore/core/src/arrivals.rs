//! Blocks on their way to a device of Hbm: from Pinned, from another device, or
//! from Nvme, and who waits for them.
//!
//! Promises: a frame that a copy fills is its own until the copy ends, whoever
//! gave up waiting; who waits is answered once, and with what the slower tiers
//! have where the device cannot take the block in time.

use crate::api::{Effect, Grant, IoClass, MissReason};
use crate::core::{Core, Op};
use crate::gpu_config::HbmReads;
use crate::ids::{FrameRef, GpuId, Memory, OpId};
use crate::memory::Allocated;
use crate::reading::WANTED_REQUESTS_MAX;
use crate::state::block::{BlockIndex, Nvme};
use crate::state::chunk::FrameState;
use crate::state::gpu::Coming;
use crate::waiting::WaitKind;

/// Why a block that was wanted on a device is not there.
const DEVICE: Grant = Grant::Missing(MissReason::Device);

/// What the bytes of a device's copy are made from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// A frame of Pinned or of another device.
    Frame(FrameRef),
    /// A device of Nvme, straight.
    Nvme,
    /// A device of Nvme, by a frame in Pinned.
    Below,
    Nothing,
}

impl Core {
    fn coming(&self, index: BlockIndex, gpu: GpuId) -> Coming {
        self.gpus.at(gpu).entries.of(index).map_or(Coming::No, |entry| entry.coming)
    }

    pub(crate) fn set_coming(&mut self, index: BlockIndex, gpu: GpuId, coming: Coming) {
        let entries = &mut self.gpus.at_mut(gpu).entries;
        let slot = entries.enter(index);
        let entry = entries.at_mut(slot);
        let before = std::mem::replace(&mut entry.coming, coming);
        entry.fetched &= coming != Coming::No;
        entries.settle(index);
        let block = self.blocks.at_mut(index);
        match (before == Coming::No, coming == Coming::No) {
            (true, false) => block.hbm_coming += 1,
            (false, true) => block.hbm_coming -= 1,
            (true, true) | (false, false) => {}
        }
    }

    /// Puts a block into a device's queue of wanted ones. False: the queue is full, or the device is lost.
    pub(crate) fn want_in_hbm(&mut self, index: BlockIndex, gpu: GpuId, class: IoClass) -> bool {
        match self.coming(index, gpu) {
            Coming::No => {}
            Coming::Queued(current) => {
                if class < current {
                    // Its old entry is out of date from now on.
                    self.set_coming(index, gpu, Coming::Queued(class));
                    self.gpus.at_mut(gpu).wanted.push(index, class);
                }
                return true;
            }
            Coming::Below(current) => {
                if class < current {
                    self.set_coming(index, gpu, Coming::Below(class));
                    self.raise(index, class);
                }
                return true;
            }
            Coming::Moving(op) => {
                self.raise_read(op, class);
                return true;
            }
            Coming::Verifying(_) => return true,
        }
        let limit = self.config.limits.blocks_per_request as usize * WANTED_REQUESTS_MAX;
        let held = self.gpus.at_mut(gpu);
        if !held.usable || held.wanted.len() + held.stalled.len() >= limit {
            return false;
        }
        held.wanted.push(index, class);
        self.set_coming(index, gpu, Coming::Queued(class));
        true
    }

    /// Whether a device waits for the block's copy in Pinned.
    pub(crate) fn is_wanted_above(&self, index: BlockIndex) -> bool {
        self.blocks.at(index).hbm_coming > 0
            && self.gpus.ids().any(|gpu| matches!(self.coming(index, gpu), Coming::Below(_)))
    }

    /// Starts copies to and from devices while there is room for them.
    pub(crate) fn pump_gpus(&mut self, memory_changed: bool) {
        for gpu in self.gpus.ids() {
            if memory_changed {
                for index in std::mem::take(&mut self.gpus.at_mut(gpu).stalled) {
                    if let Some(Coming::Queued(class)) = self.queued_in(index, gpu) {
                        self.gpus.at_mut(gpu).wanted.push(index, class);
                    }
                }
            }
            while self.gpus.at(gpu).running < self.gpus.at(gpu).config.copies_in_flight {
                let Some((index, class)) = self.gpus.at_mut(gpu).wanted.pop() else { break };
                if self.queued_in(index, gpu) == Some(Coming::Queued(class)) {
                    self.start_coming(index, gpu, class);
                }
            }
            self.pump_shrink(gpu);
        }
    }

    /// An entry of a queue may be out of date.
    fn queued_in(&self, index: BlockIndex, gpu: GpuId) -> Option<Coming> {
        self.blocks.try_at(index).map(|_| self.coming(index, gpu))
    }

    fn start_coming(&mut self, index: BlockIndex, gpu: GpuId, class: IoClass) {
        let unknown = Grant::Missing(MissReason::Unknown);
        if let Some(frame) = self.gpus.at(gpu).entries.of(index).and_then(|entry| entry.frame) {
            let state = self.chunks.frame(frame).map(|cell| cell.state);
            if matches!(state, Some(FrameState::Sealed { verified: false, .. })) {
                return self.verify_in_hbm(index, gpu, frame);
            }
            return self.came(index, gpu, unknown);
        }
        let source = self.source_for(index, gpu);
        match source {
            Source::Nothing => return self.came(index, gpu, unknown),
            // What had to leave Pinned again before the device had room is not fetched for ever.
            Source::Below if self.gpus.at(gpu).entries.of(index).is_some_and(|entry| entry.fetched) => {
                return self.came(index, gpu, Grant::Throttled);
            }
            Source::Below => {
                self.set_coming(index, gpu, Coming::Below(class));
                if !self.want(index, class) {
                    self.came(index, gpu, Grant::Throttled);
                }
                // Reads of wanted blocks are looked at again in this round.
                self.memory_changed = true;
                return;
            }
            Source::Nvme if self.reads_are_full() => {
                return self.gpus.at_mut(gpu).stalled.push_back(index);
            }
            Source::Nvme | Source::Frame(_) => {}
        }
        let space = self.blocks.at(index).space;
        let target = match self.take_hbm_frame(space, gpu) {
            Allocated::Frame(target) => target,
            Allocated::Wait if self.gpus.at(gpu).arrivals.contains_key(&index) => {
                return self.gpus.at_mut(gpu).stalled.push_back(index);
            }
            Allocated::Wait | Allocated::Never => return self.came(index, gpu, Grant::Throttled),
        };
        // What was evicted for the frame may have been the source.
        match self.source_for(index, gpu) {
            Source::Frame(source) => self.start_copy_in(index, gpu, source, target),
            Source::Nvme if self.reads_are_full() => {
                self.free_frame(target);
                self.gpus.at_mut(gpu).stalled.push_back(index);
            }
            Source::Nvme => self.start_direct(index, gpu, target, class),
            Source::Below | Source::Nothing => {
                self.free_frame(target);
                self.gpus.at_mut(gpu).wanted.push(index, class);
            }
        }
    }

    fn reads_are_full(&self) -> bool {
        self.reads_running + self.verifies_running >= self.config.limits.reads_in_flight
    }

    /// The quickest place to bring a block from.
    fn source_for(&self, index: BlockIndex, gpu: GpuId) -> Source {
        let block = self.blocks.at(index);
        let config = &self.gpus.at(gpu).config;
        let on = |gpu: GpuId| {
            let held = self.gpus.at(gpu);
            held.entries.of(index).and_then(|entry| entry.frame).filter(|_| held.usable)
        };
        let others = block.hbm.without(gpu);
        if let Some(frame) = others.both(config.peers).iter().find_map(on) {
            return Source::Frame(frame);
        }
        if let Some(frame) = block.pinned.or_else(|| others.iter().find_map(on)) {
            return Source::Frame(frame);
        }
        match block.nvme {
            Nvme::Sealed { frame, .. } if self.disks.usable(frame.device) => match config.reads {
                HbmReads::Direct => Source::Nvme,
                HbmReads::ThroughPinned => Source::Below,
            },
            Nvme::None
            | Nvme::Writing { .. }
            | Nvme::Committing { .. }
            | Nvme::Sealed { .. }
            | Nvme::Deleting => Source::Nothing,
        }
    }

    fn start_copy_in(&mut self, index: BlockIndex, gpu: GpuId, source: FrameRef, target: FrameRef) {
        let op = self.start_moving(index, source, target);
        self.count_crossing(source, target);
        self.set_coming(index, gpu, Coming::Moving(op));
    }

    /// Reads a block from a device of Nvme straight into its frame.
    fn start_direct(&mut self, index: BlockIndex, gpu: GpuId, target: FrameRef, class: IoClass) {
        let block = self.blocks.at(index);
        let Nvme::Sealed { frame: source, sequence } = block.nvme else {
            self.free_frame(target);
            return self.came(index, gpu, Grant::Missing(MissReason::Unknown));
        };
        let op = self.start_read_of(index, source, sequence, target, class);
        self.set_coming(index, gpu, Coming::Moving(op));
    }

    fn verify_in_hbm(&mut self, index: BlockIndex, gpu: GpuId, frame: FrameRef) {
        let expect = self.header_of(index, 0);
        let fence = self.hold_frame(frame);
        let op = self.start(Op::Verify { block: index, frame, fence });
        self.set_coming(index, gpu, Coming::Verifying(op));
        self.gpus.at_mut(gpu).running += 1;
        self.effects.push_back(Effect::Verify { op, frame, expect });
    }

    /// A device's copy was compared with its checksum.
    pub(crate) fn verified_in_hbm(
        &mut self,
        op: OpId,
        index: BlockIndex,
        gpu: GpuId,
        held: Option<FrameRef>,
        outcome: Result<(), crate::api::Fault>,
    ) {
        self.gpus.at_mut(gpu).running -= 1;
        self.memory_changed = true;
        let wanted = self.queued_in(index, gpu) == Some(Coming::Verifying(op));
        match (held, outcome) {
            (Some(frame), Ok(())) => self.mark_verified(frame),
            (Some(_), Err(crate::api::Fault::Checksum)) => self.reject_in_hbm(index, gpu),
            (Some(_), Err(_)) => self.gpus.at_mut(gpu).faults += 1,
            (None, _) => {}
        }
        if wanted {
            self.came(index, gpu, Grant::Missing(MissReason::Checksum));
        }
    }

    /// A read from Nvme straight into a device's frame ended. `current`: the copy that it read is still the block's.
    pub(crate) fn read_into_hbm(
        &mut self,
        op: OpId,
        index: BlockIndex,
        (gpu, target): (GpuId, FrameRef),
        current: bool,
        outcome: Result<(), MissReason>,
    ) {
        let wanted = self.coming(index, gpu) == Coming::Moving(op);
        let there = self.blocks.at(index).hbm.contains(gpu);
        if wanted && current && !there && outcome.is_ok() && self.gpus.at(gpu).usable {
            self.seal_in_hbm(index, gpu, target, true, 0);
            self.counters.promotions_hbm += 1;
        }
        if wanted && current && !there && outcome == Err(MissReason::Device) && self.gpus.at(gpu).usable {
            // The straight way failed, which says nothing of the device: it comes by Pinned.
            let class = self.class_of_those_who_wait(index, gpu);
            self.set_coming(index, gpu, Coming::Below(class));
            self.memory_changed = true;
            if !self.want(index, class) {
                self.came(index, gpu, Grant::Throttled);
            }
        } else if wanted {
            self.came(index, gpu, Grant::Missing(outcome.err().unwrap_or(MissReason::Unknown)));
        }
        // Only if it was not sealed: then it is still Filling.
        self.abandon_filling(target, crate::residence::Vacate::Free);
    }

    fn class_of_those_who_wait(&self, index: BlockIndex, gpu: GpuId) -> IoClass {
        let waiters = self.gpus.at(gpu).arrivals.get(&index).into_iter().flatten();
        let classes = waiters.filter_map(|(wait, _)| match self.waits.get(wait)?.kind {
            WaitKind::Read { class, .. } => Some(class),
            WaitKind::Write { .. }
            | WaitKind::Seal { .. }
            | WaitKind::Flush { .. }
            | WaitKind::Shrink { .. }
            | WaitKind::Clear { .. } => None,
        });
        classes.min().unwrap_or(IoClass::Prefetch)
    }

    /// The block's way to Pinned has ended: those that come through it go on.
    pub(crate) fn arrived_below(&mut self, index: BlockIndex, otherwise: Grant) {
        for gpu in self.gpus.ids() {
            let Coming::Below(class) = self.coming(index, gpu) else { continue };
            if self.blocks.at(index).pinned.is_some() {
                self.set_coming(index, gpu, Coming::Queued(class));
                self.memory_changed = true;
                let held = self.gpus.at_mut(gpu);
                held.wanted.push(index, class);
                if let Some(entry) = held.entries.of_mut(index) {
                    entry.fetched = true;
                }
            } else {
                self.came(index, gpu, otherwise);
            }
        }
    }

    /// Settles everybody who waits for the block on a device: it is there, or this is what they are told unless
    /// another memory has it.
    pub(crate) fn came(&mut self, index: BlockIndex, gpu: GpuId, otherwise: Grant) {
        self.set_coming(index, gpu, Coming::No);
        let waiters = self.gpus.at_mut(gpu).arrivals.remove(&index).unwrap_or_default();
        let (mut left, mut below) = (Vec::new(), Vec::new());
        for (id, position) in waiters {
            let Some(wait) = self.waits.get(&id) else { continue };
            let WaitKind::Read { lease, class, .. } = wait.kind else { continue };
            let place = position as usize;
            let grant = self.grant_resident(lease, place, index, Memory::Hbm(gpu));
            let unverified = self.blocks.at(index).hbm.contains(gpu) && self.gpus.at(gpu).usable;
            let grant = match grant.or_else(|| self.grant_resident(lease, place, index, Memory::Pinned)) {
                Some(grant) => grant,
                None if unverified && self.want_in_hbm(index, gpu, class) => {
                    left.push((id, position));
                    continue;
                }
                // Pinned has it, and its bytes were not compared yet.
                None if self.blocks.at(index).pinned.is_some() && self.want(index, class) => {
                    below.push((id, position));
                    continue;
                }
                None => otherwise,
            };
            if let Some(WaitKind::Read { grants, .. }) = self.waits.get_mut(&id).map(|wait| &mut wait.kind) {
                grants[place] = grant;
            }
            self.part_done(id);
        }
        if !below.is_empty() {
            self.memory_changed = true;
            self.arrivals.entry(index).or_default().extend(below);
        }
        if !left.is_empty() {
            self.gpus.at_mut(gpu).arrivals.entry(index).or_default().extend(left);
        }
        self.blocks.remove_if_gone(index);
    }

    /// A device is gone or back. What it held are misses at once; its frames stay what operations hold until those
    /// end.
    pub(crate) fn gpu_state(&mut self, gpu: GpuId, usable: bool) {
        if self.gpus.find(gpu).is_none() {
            return;
        }
        let was_usable = std::mem::replace(&mut self.gpus.at_mut(gpu).usable, usable);
        self.memory_changed = true;
        self.emptying_due = true;
        if was_usable && !usable {
            self.vacate_gpu(gpu);
            let entries = self.gpus.at(gpu).entries.iter();
            let coming: Vec<BlockIndex> =
                entries.filter(|entry| entry.coming != Coming::No).map(|entry| entry.block).collect();
            for index in coming {
                if self.blocks.try_at(index).is_some() {
                    self.came(index, gpu, DEVICE);
                }
            }
            self.unwait_copies_of(gpu);
        }
    }
}
