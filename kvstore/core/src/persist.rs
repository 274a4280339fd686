//! Write-behind to Nvme: what is due is written, then committed, then durable.
//!
//! A frame on a device goes Filling, Sealed, Evicting, Free. Its catalog entry
//! is deleted before it is used again. What a failed write or sync covered is quarantined.

use crate::api::{BlockHeader, Effect, Fault, IoClass, UseStats, Via};
use crate::core::{Core, Deadline, Delete, Op, Put, RETRY_AFTER};
use crate::ids::{BlockId, DeviceId, DiskFrame, Fence, FrameRef, OpId};
use crate::policy::{Candidate, Choice, victim};
use crate::state::block::{Arriving, BlockIndex, Nvme};
use crate::state::chunk::ChunkKind;
use crate::state::disk::{DiskState, SlotState, device_id};
use crate::state::lru::Tier;
use crate::state::space::SpaceIndex;
use crate::units::Micros;

/// Blocks evicted from a full device at a time, so that one commit serves many.
const EVICT_BATCH: u32 = 16;
/// Puts and deletes in one commit.
const COMMIT_MAX: usize = 1024;
/// Device errors after which memory no longer waits for a block to be written.
pub(crate) const WRITE_FAULTS_MAX: u8 = 3;

/// What became of the wish for a frame on a device.
enum DiskAllocated {
    Frame(DiskFrame),
    Wait,
    Never,
}

impl Core {
    /// Puts a sealed block in front of those that are merely due.
    pub(crate) fn persist_now(&mut self, index: BlockIndex) {
        let block = self.blocks.at_mut(index);
        if block.nvme == Nvme::None && !block.urgent {
            block.urgent = true;
            let id = block.id;
            self.urgent.push_back((index, id));
        }
    }

    /// Queues a block that could not be written for another try.
    fn persist_later(&mut self, index: BlockIndex, after: Micros) {
        let at = self.now.after(after);
        let id = self.blocks.at(index).id;
        // The queue is in order of time; a retry goes behind what is due before it.
        let place = self.due.partition_point(|&(due, _, _)| due <= at);
        self.due.insert(place, (at, index, id));
    }

    /// Starts writes while there is room for them.
    pub(crate) fn pump_writes(&mut self) {
        if !self.is_persisting() || self.now < self.persist_paused_until {
            return;
        }
        while self.writes_running < self.config.limits.writes_in_flight {
            let (class, next) = match self.urgent.pop_front() {
                Some(next) => (IoClass::Demotion, next),
                None => match self.ready.pop_front() {
                    Some(next) => (IoClass::Persistence, next),
                    None => break,
                },
            };
            self.try_write(next, class);
        }
    }

    fn try_write(&mut self, (index, id): (BlockIndex, BlockId), class: IoClass) {
        let Some(block) = self.blocks.try_at(index).filter(|block| block.id == id) else { return };
        let (space, pinned, nvme) = (block.space, block.pinned, block.nvme);
        if class == IoClass::Demotion {
            self.blocks.at_mut(index).urgent = false;
        }
        let Some(source) = pinned.filter(|_| nvme == Nvme::None) else { return };
        if self.spaces.at(space).clearing > 0 {
            self.writes_stalled.push((index, id));
            return;
        }
        match self.take_disk_frame(space) {
            DiskAllocated::Frame(target) => self.start_write(index, source, target, class),
            DiskAllocated::Wait => self.writes_stalled.push((index, id)),
            DiskAllocated::Never => {
                self.counters.writes_without_room += 1;
                self.blocks.at_mut(index).write_faults = WRITE_FAULTS_MAX;
                self.durable(index, false);
                self.memory_changed = true;
                self.emptying_due = true;
                self.persist_later(index, RETRY_AFTER);
            }
        }
    }

    fn start_write(&mut self, index: BlockIndex, source: FrameRef, target: DiskFrame, class: IoClass) {
        self.write_sequence += 1;
        let header = self.header_of(index, self.write_sequence);
        let via = match self.chunks.at(source.chunk).kind {
            ChunkKind::Window { .. } | ChunkKind::Replacing => Via::Bounce,
            ChunkKind::Pool | ChunkKind::Retiring | ChunkKind::Creating { .. } | ChunkKind::Dropping => {
                Via::Direct
            }
        };
        let frame_bytes = self.spaces.at(self.blocks.at(index).space).frame_bytes;
        let target_offset = self.disks.offset(target, frame_bytes);
        let fence = self.hold_frame(source);
        let op = self.start(Op::Write { block: index, source, fence, target, header, via });
        self.disks
            .slot_mut(target.device, target.slot)
            .set(target.index, DiskState::Filling { block: index });
        self.disks.cell_mut(target).busy += 1;
        self.blocks.at_mut(index).nvme = Nvme::Writing { frame: target, op };
        self.writes_running += 1;
        self.effects.push_back(Effect::Write { op, source, target, target_offset, header, via, class });
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one operation, taken apart once")]
    pub(crate) fn write_done(
        &mut self,
        op: OpId,
        index: BlockIndex,
        source: (FrameRef, Fence),
        target: DiskFrame,
        header: BlockHeader,
        via: Via,
        outcome: Result<(), Fault>,
    ) {
        self.writes_running -= 1;
        let (source, fence) = source;
        let same = self.let_frame_go(source, fence);
        self.disks.cell_mut(target).busy -= 1;
        let writing = Nvme::Writing { frame: target, op };
        let current = self.blocks.try_at(index).is_some_and(|block| block.nvme == writing);
        if !current {
            if matches!(
                outcome,
                Err(Fault::Device | Fault::NoSpace | Fault::Catalog | Fault::NoMemory | Fault::StillMapped)
            ) {
                self.quarantine_cell(target);
            }
            return self.settle_cell(target);
        }
        match outcome {
            Ok(()) => {
                if same && via == Via::Bounce {
                    self.mark_verified(source);
                }
                let block = self.blocks.at_mut(index);
                block.nvme = Nvme::Committing { frame: target, sequence: header.write_sequence };
                block.write_faults = 0;
                self.disks.cell_mut(target).busy += 1;
                self.commit_puts.push(Put { block: index, frame: target, header });
            }
            Err(Fault::Checksum) => {
                self.transition(index, |block| block.nvme = Nvme::None);
                self.disks.slot_mut(target.device, target.slot).set(target.index, DiskState::Evicting);
                self.settle_cell(target);
                if same {
                    self.reject_pinned(index);
                }
                self.blocks.remove_if_gone(index);
            }
            Err(fault) => self.write_failed(index, target, fault),
        }
    }

    fn write_failed(&mut self, index: BlockIndex, target: DiskFrame, fault: Fault) {
        self.counters.device_faults += 1;
        self.disks.device_mut(target.device).faults += 1;
        self.quarantine_cell(target);
        if fault == Fault::NoSpace {
            self.pause_persisting();
        }
        self.transition(index, |block| block.nvme = Nvme::None);
        let block = self.blocks.at_mut(index);
        block.write_faults = block.write_faults.saturating_add(1);
        let again = block.write_faults < WRITE_FAULTS_MAX;
        self.memory_changed = true;
        self.emptying_due = true;
        self.durable(index, false);
        if again && self.blocks.at(index).pinned.is_some() {
            self.persist_later(index, RETRY_AFTER);
        }
        self.blocks.remove_if_gone(index);
    }

    fn pause_persisting(&mut self) {
        self.persist_paused_until = self.now.after(RETRY_AFTER);
        self.at(self.persist_paused_until, Deadline::Retry);
    }

    /// One commit at a time; what is written meanwhile goes into the next.
    pub(crate) fn pump_commit(&mut self) {
        if self.commit_running || self.degraded || self.now < self.persist_paused_until {
            return;
        }
        if self.commit_puts.is_empty() && self.commit_deletes.is_empty() {
            return;
        }
        let rest = self.commit_puts.split_off(self.commit_puts.len().min(COMMIT_MAX));
        let queued = std::mem::replace(&mut self.commit_puts, rest);
        let mut puts = Vec::with_capacity(queued.len());
        for put in queued {
            if self.is_committing(put) {
                puts.push(put);
            } else {
                self.disks.cell_mut(put.frame).busy -= 1;
                self.settle_cell(put.frame);
            }
        }
        let count = self.commit_deletes.len().min(COMMIT_MAX);
        let deletes: Vec<Delete> = self.commit_deletes.drain(..count).collect();
        if puts.is_empty() && deletes.is_empty() {
            return;
        }
        let put = puts.iter().map(|put| (put.frame, put.header, self.use_stats(put.block))).collect();
        let delete = deletes.iter().map(|delete| delete.id).collect();
        let op = self.start(Op::Commit { puts, deletes });
        self.commit_running = true;
        self.effects.push_back(Effect::Commit { op, put, delete });
    }

    /// What the catalog keeps of a block's past.
    fn use_stats(&self, _block: BlockIndex) -> UseStats {
        UseStats::default()
    }

    fn is_committing(&self, put: Put) -> bool {
        let current = Nvme::Committing { frame: put.frame, sequence: put.header.write_sequence };
        self.blocks.try_at(put.block).is_some_and(|block| block.nvme == current)
    }

    pub(crate) fn commit_done(&mut self, puts: &[Put], deletes: &[Delete], outcome: Result<(), Fault>) {
        self.commit_running = false;
        for &put in puts {
            self.disks.cell_mut(put.frame).busy -= 1;
            match (self.is_committing(put), outcome) {
                (true, Ok(())) => self.put_done(put),
                (true, Err(fault)) => self.write_failed(put.block, put.frame, fault),
                (false, Ok(())) => {}
                (false, Err(_)) => self.quarantine_cell(put.frame),
            }
            self.settle_cell(put.frame);
        }
        match outcome {
            Ok(()) => deletes.iter().for_each(|&delete| self.delete_done(delete)),
            Err(_) => {
                self.counters.commit_faults += 1;
                for &delete in deletes.iter().rev() {
                    self.commit_deletes.push_front(delete);
                }
                self.pause_persisting();
            }
        }
        self.disk_changed = true;
        self.memory_changed = true;
    }

    fn put_done(&mut self, put: Put) {
        let sequence = put.header.write_sequence;
        self.disks
            .slot_mut(put.frame.device, put.frame.slot)
            .set(put.frame.index, DiskState::Sealed { block: put.block });
        self.transition(put.block, |block| block.nvme = Nvme::Sealed { frame: put.frame, sequence });
        self.counters.persisted += 1;
        self.durable(put.block, true);
    }

    fn delete_done(&mut self, delete: Delete) {
        self.disks.cell_mut(delete.frame).busy -= 1;
        self.settle_cell(delete.frame);
        let block = self.blocks.try_at(delete.block).filter(|block| block.id == delete.id);
        let Some(block) = block.filter(|block| block.nvme == Nvme::Deleting) else { return };
        let pinned = block.pinned.is_some();
        let damaged = self.disks.cell(delete.frame).is_some_and(|cell| cell.state == DiskState::Quarantined);
        self.transition(delete.block, |block| block.nvme = Nvme::None);
        // What was evicted as the coldest is not written again at once: it would push out the next.
        if pinned && self.durables.contains_key(&delete.block) {
            self.persist_now(delete.block);
        } else if pinned && damaged {
            self.persist_later(delete.block, Micros::new(0));
        }
        self.blocks.remove_if_gone(delete.block);
    }

    /// Evicts a block from Nvme. Its frame is used again after the commit.
    fn evict_from_nvme(&mut self, index: BlockIndex) {
        let Nvme::Sealed { frame, .. } = self.blocks.at(index).nvme else { return };
        self.counters.evictions_nvme += 1;
        self.delete_copy(index, frame, DiskState::Evicting);
    }

    /// A copy on a device turned out to be damaged: it is served no more.
    pub(crate) fn discard_nvme(&mut self, index: BlockIndex) {
        let Nvme::Sealed { frame, .. } = self.blocks.at(index).nvme else { return };
        self.delete_copy(index, frame, DiskState::Quarantined);
    }

    /// Bytes that came from a damaged frame are on their way to a device, or there.
    pub(crate) fn forget_written(&mut self, index: BlockIndex, frame: DiskFrame) {
        match self.blocks.at(index).nvme {
            Nvme::Writing { .. } => {
                self.disks.slot_mut(frame.device, frame.slot).set(frame.index, DiskState::Evicting);
                self.transition(index, |block| block.nvme = Nvme::None);
            }
            Nvme::Committing { .. } => self.delete_copy(index, frame, DiskState::Evicting),
            Nvme::None | Nvme::Sealed { .. } | Nvme::Deleting => {}
        }
    }

    fn delete_copy(&mut self, index: BlockIndex, frame: DiskFrame, state: DiskState) {
        let id = self.blocks.at(index).id;
        self.disks.slot_mut(frame.device, frame.slot).set(frame.index, state);
        self.disks.cell_mut(frame).busy += 1;
        self.commit_deletes.push_back(Delete { block: index, id, frame });
        self.transition(index, |block| block.nvme = Nvme::Deleting);
    }

    fn quarantine_cell(&mut self, frame: DiskFrame) {
        self.disks.slot_mut(frame.device, frame.slot).set(frame.index, DiskState::Quarantined);
    }

    /// A frame that holds nothing is free when nothing is in flight on it.
    pub(crate) fn settle_cell(&mut self, frame: DiskFrame) {
        let cell = *self.disks.cell_mut(frame);
        if cell.state != DiskState::Evicting || cell.busy > 0 {
            return;
        }
        let slot = self.disks.slot_mut(frame.device, frame.slot);
        slot.set(frame.index, DiskState::Free);
        let (state, unscanned) = (slot.state, slot.unscanned);
        let empty = slot.counts.free == slot.counts.total();
        self.disk_changed = true;
        match state {
            SlotState::Carved { space } if !unscanned => {
                self.open_slots(space, frame.device).insert(frame.slot);
            }
            SlotState::Retiring { .. } if empty => {
                self.disks.slot_mut(frame.device, frame.slot).state = SlotState::Free;
                self.disks.device_mut(frame.device).slots_free.insert(frame.slot);
            }
            SlotState::Carved { .. } | SlotState::Retiring { .. } => {}
            SlotState::Free | SlotState::Carving { .. } | SlotState::Quarantined => {}
        }
    }

    pub(crate) fn open_slots(
        &mut self,
        space: SpaceIndex,
        device: DeviceId,
    ) -> &mut std::collections::BTreeSet<u32> {
        &mut self.spaces.at_mut(space).slots_open[usize::from(device.get())]
    }

    /// A free frame, device by device in turn. A device without an open slot gets one on the way.
    fn take_disk_frame(&mut self, space: SpaceIndex) -> DiskAllocated {
        if self.spaces.at(space).frames_per_slot == 0 {
            return DiskAllocated::Never;
        }
        let devices = self.disks.devices.len();
        let first = self.spaces.at(space).device_next;
        let mut carving = false;
        for step in 0..devices {
            let place = (first + step) % devices;
            if !self.disks.devices[place].usable {
                continue;
            }
            let device = device_id(place);
            if let Some(frame) = self.take_open_frame(space, device) {
                self.spaces.at_mut(space).device_next = (place + 1) % devices;
                return DiskAllocated::Frame(frame);
            }
            carving |= self.spaces.at(space).slots_carving[place] > 0 || self.carve_slot(space, device);
        }
        if carving || self.make_room(space) { DiskAllocated::Wait } else { DiskAllocated::Never }
    }

    fn take_open_frame(&mut self, space: SpaceIndex, device: DeviceId) -> Option<DiskFrame> {
        let slot = *self.open_slots(space, device).first()?;
        let held = self.disks.slot_mut(device, slot);
        let index = held.take(None).expect("an open slot has a free frame");
        if held.free.is_empty() {
            self.open_slots(space, device).remove(&slot);
        }
        Some(DiskFrame { device, slot, index })
    }

    fn carve_slot(&mut self, space: SpaceIndex, device: DeviceId) -> bool {
        let Some(slot) = self.disks.device_mut(device).slots_free.pop_first() else { return false };
        self.disks.slot_mut(device, slot).state = SlotState::Carving { space };
        let held = self.spaces.at_mut(space);
        held.slots_carving[usize::from(device.get())] += 1;
        let (id, frame_bytes) = (held.id, held.frame_bytes);
        let op = self.start(Op::CarveSlot { device, slot, space });
        self.effects.push_back(Effect::CarveSlot { op, device, slot, space: id, frame_bytes });
        true
    }

    pub(crate) fn carve_done(
        &mut self,
        device: DeviceId,
        slot: u32,
        space: SpaceIndex,
        outcome: Result<(), Fault>,
    ) {
        let held = self.spaces.at_mut(space);
        held.slots_carving[usize::from(device.get())] -= 1;
        let frames = held.frames_per_slot;
        let carved = self.disks.slot_mut(device, slot);
        match outcome {
            Ok(()) => {
                carved.state = SlotState::Carved { space };
                carved.carve(frames);
                self.open_slots(space, device).insert(slot);
            }
            Err(_) => {
                carved.state = SlotState::Quarantined;
                self.counters.device_faults += 1;
                self.disks.device_mut(device).faults += 1;
                self.pause_persisting();
            }
        }
        self.disk_changed = true;
    }

    /// Evicts the coldest of this space, or empties a slot of a colder one. False: nothing can leave.
    fn make_room(&mut self, space: SpaceIndex) -> bool {
        let mut coming = self.commit_running || !self.commit_deletes.is_empty();
        if let Some((other, _)) = self.coldest_space().filter(|&(other, _)| other != space) {
            coming |= self.retire_slot(other);
        }
        if coming {
            return true;
        }
        for _ in 0..EVICT_BATCH {
            match self.nvme_victim(space) {
                Choice::Evict(index) => self.evict_from_nvme(index),
                Choice::Demote(_) | Choice::Nothing => break,
            }
            coming = true;
        }
        coming
    }

    fn nvme_victim(&self, space: SpaceIndex) -> Choice {
        let lists = self.spaces.at(space).lru_nvme;
        victim(lists.coldest_first(&self.blocks, Tier::Nvme).map(|index| {
            let block = self.blocks.at(index);
            let busy = match block.nvme {
                Nvme::Sealed { frame, .. } => self.disks.cell(frame).is_none_or(|cell| cell.busy > 0),
                Nvme::None | Nvme::Writing { .. } | Nvme::Committing { .. } | Nvme::Deleting => true,
            };
            let leaf = block.children_pinned == 0 && block.children_nvme == 0;
            Candidate { block: index, leaf, busy: busy || block.arriving != Arriving::No, expendable: true }
        }))
    }

    /// The space whose next victim was not used for longest.
    fn coldest_space(&self) -> Option<(SpaceIndex, crate::units::Now)> {
        let coldest = self.spaces.iter().filter_map(|(index, held)| {
            let first = held.lru_nvme.coldest_first(&self.blocks, Tier::Nvme).next()?;
            Some((index, self.blocks.at(first).touched))
        });
        coldest.min_by_key(|&(index, touched)| (touched, index))
    }

    /// Empties the slot that holds the coldest block of a space, for another space.
    fn retire_slot(&mut self, space: SpaceIndex) -> bool {
        let Choice::Evict(index) = self.nvme_victim(space) else { return false };
        let Nvme::Sealed { frame: DiskFrame { device, slot, .. }, .. } = self.blocks.at(index).nvme else {
            return false;
        };
        let held = self.disks.slot_mut(device, slot);
        let counts = held.counts;
        if held.unscanned
            || counts.filling + counts.quarantined > 0
            || held.cells.iter().any(|cell| cell.busy > 0)
        {
            return false;
        }
        held.state = SlotState::Retiring { space };
        let blocks: Vec<BlockIndex> = held
            .cells
            .iter()
            .filter_map(|cell| match cell.state {
                DiskState::Sealed { block } => Some(block),
                DiskState::Free
                | DiskState::Filling { .. }
                | DiskState::Evicting
                | DiskState::Quarantined => None,
            })
            .collect();
        self.open_slots(space, device).remove(&slot);
        for block in blocks {
            self.evict_from_nvme(block);
        }
        true
    }
}
