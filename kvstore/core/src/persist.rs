//! Write-behind to Nvme: what is due is written, then committed, then durable.
//!
//! A frame on a device goes Filling, Sealed, Evicting, Free. Its catalog entry
//! is deleted before it is used again. What a failed write or sync covered is quarantined.

use std::collections::{BTreeMap, VecDeque};

use crate::api::{BlockHeader, Effect, Fault, IoClass, Via};
use crate::core::{BURST_MAX, Core, Deadline, Delete, Op, Put, RETRY_AFTER};
use crate::ids::{BlockId, DeviceId, DiskFrame, Fence, FrameRef};
use crate::policy::{Choice, Devices};
use crate::state::block::{BlockIndex, Nvme, WRITE_FAULTS_MAX};
use crate::state::disk::{DiskState, SlotState, device_id};
use crate::state::space::SpaceIndex;
use crate::units::Micros;

/// Blocks evicted from a full device at a time, at least, so that one commit serves many.
const EVICT_BATCH: usize = 16;
/// Small blocks are evicted by so many bytes at a time: a commit takes milliseconds, and until it ends what waits for the
/// room is not written. 16 blocks of 64 KiB a commit would hold a device to some 60 MiB/s.
const EVICT_BYTES: u64 = 32 << 20;
/// At most one in so many blocks is evicted ahead of need.
const AHEAD_PART: usize = 16;
/// Puts and deletes in one commit.
const COMMIT_MAX: usize = 1024;

/// Entries that the queues of blocks to be written may have, besides two a block, before they are looked through.
const QUEUED_MIN: usize = 4096;

/// A block that is to be written, unless its place has become another's.
type Queued = (BlockIndex, BlockId);

/// Blocks of one space that wait for a frame on a device. The first of them asks for one when some may have come free,
/// and the others behind it.
#[derive(Debug, Default)]
pub(crate) struct Stalled {
    /// Memory waits for these; they are marked as urgent.
    urgent: VecDeque<Queued>,
    due: VecDeque<Queued>,
    again: bool,
}

impl Stalled {
    pub(crate) fn len(&self) -> usize {
        self.urgent.len() + self.due.len()
    }

    /// Something ended that may have left a frame.
    pub(crate) fn ask_again(&mut self) {
        self.again = true;
    }

    /// `urgent`: for what memory waits for only.
    fn asks_again(&self, urgent: bool) -> bool {
        self.again && !(urgent && self.urgent.is_empty())
    }

    fn push(&mut self, next: Queued, class: IoClass) {
        match class {
            IoClass::Demotion => self.urgent.push_back(next),
            _ => self.due.push_back(next),
        }
    }

    fn first(&self) -> Option<(Queued, IoClass)> {
        let urgent = self.urgent.front().map(|&next| (next, IoClass::Demotion));
        urgent.or_else(|| self.due.front().map(|&next| (next, IoClass::Persistence)))
    }

    fn pop(&mut self) {
        if self.urgent.pop_front().is_none() {
            self.due.pop_front();
        }
    }
}

/// What became of the wish for a frame on a device.
enum DiskAllocated {
    Frame(DiskFrame),
    Wait,
    Never,
}

impl Core {
    /// Whether sealed blocks are copied to Nvme without being asked to.
    pub(crate) fn is_written_behind(&self) -> bool {
        !self.disks.devices.is_empty()
    }

    /// Copies a sealed block to Nvme, if it is likely enough to come back. `added`:
    /// blocks that its request computed. Asked again when it is used.
    pub(crate) fn consider(&mut self, index: BlockIndex, id: BlockId, added: u32) {
        let block = self.blocks.at(index);
        let (stats, bytes) = (block.stats(), self.spaces.at(block.space).frame_bytes);
        let idle = self.reads_running == 0 && self.wanted.len() == 0;
        let devices = if idle { Devices::Idle } else { Devices::Busy };
        let (now, duel) = (self.now, &self.duels.nvme);
        let admitted =
            self.admit.as_mut().is_none_or(|admit| admit.decide(now, duel, stats, added, bytes, devices));
        self.blocks.at_mut(index).set_refused(!admitted);
        if admitted {
            self.write_behind(index, id);
        } else {
            self.counters.admissions_refused += 1;
            self.memory_changed = true;
        }
    }

    /// Queues a sealed block for Nvme. It does not wait while memory is full, for
    /// it must be written before it can make room.
    pub(crate) fn write_behind(&mut self, index: BlockIndex, id: BlockId) {
        if self.chunks.pinned_len() >= self.chunks_max() {
            self.ready.push_back((index, id));
        } else {
            // A burst may hold it back afterwards.
            let delay = self.config.persist_delay.get().saturating_sub(BURST_MAX.get());
            self.due.push_back((self.now.after(Micros::new(delay)), index, id));
        }
    }

    /// Puts a sealed block in front of those that are merely due.
    pub(crate) fn persist_now(&mut self, index: BlockIndex) {
        let block = self.blocks.at_mut(index);
        block.set_refused(false);
        if block.nvme == Nvme::None && !block.is_urgent() {
            block.set_urgent(true);
            let id = block.id;
            self.urgent.push_back((index, id));
        }
    }

    /// Queues a block that could not be written for another try.
    pub(crate) fn persist_later(&mut self, index: BlockIndex, after: Micros) {
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
        let burst = self.burst.is_on(self.now);
        while self.writes_running < self.config.limits.writes_in_flight {
            if let Some(next) = self.urgent.pop_front() {
                self.write_or_wait(next, IoClass::Demotion);
            } else if let Some(space) = self.stalled_again(burst) {
                self.write_stalled(space);
            } else if burst {
                break;
            } else if let Some(next) = self.ready.pop_front() {
                self.write_or_wait(next, IoClass::Persistence);
            } else {
                break;
            }
        }
    }

    /// Whether something waits for the end of a burst only.
    pub(crate) fn is_held_back(&self) -> bool {
        let copies = !self.ready.is_empty() || self.stalled.values().any(|stalled| stalled.asks_again(false));
        copies && self.is_persisting()
            || self.wants_reserve().is_some()
            || self.ahead.due
            || self.duels.are_behind()
    }

    /// A space whose first block asks for a frame once more. They take turns.
    fn stalled_again(&mut self, urgent: bool) -> Option<SpaceIndex> {
        let (before, behind) =
            (self.stalled.range(..self.stalled_next), self.stalled.range(self.stalled_next..));
        let (&space, _) = behind.chain(before).find(|(_, stalled)| stalled.asks_again(urgent))?;
        self.stalled_next = SpaceIndex(space.0.wrapping_add(1));
        Some(space)
    }

    fn write_stalled(&mut self, space: SpaceIndex) {
        let Some((next, class)) = self.stalled.get(&space).and_then(Stalled::first) else { return };
        let waits = self.try_write(next, class, false).is_some();
        let Some(stalled) = self.stalled.get_mut(&space) else { return };
        if waits {
            stalled.again = false;
            return;
        }
        stalled.pop();
        if stalled.len() == 0 {
            self.stalled.remove(&space);
        }
    }

    fn write_or_wait(&mut self, next: Queued, class: IoClass) {
        if let Some(space) = self.try_write(next, class, true) {
            self.stalled.entry(space).or_default().push(next, class);
        }
    }

    /// The block's space, if it must wait for a frame: `behind` others of it, where any wait.
    fn try_write(&mut self, (index, id): Queued, class: IoClass, behind: bool) -> Option<SpaceIndex> {
        let block = self.blocks.try_at(index).filter(|block| block.id == id)?;
        let (space, pinned, nvme) = (block.space, block.pinned, block.nvme);
        if class == IoClass::Demotion {
            self.blocks.at_mut(index).set_urgent(false);
        }
        if pinned.is_none() && nvme == Nvme::None && self.demote_to_write(index) {
            return None;
        }
        let source = pinned.filter(|_| nvme == Nvme::None)?;
        let must_wait = self.spaces.at(space).clearing > 0 || behind && self.stalled.contains_key(&space);
        match if must_wait { DiskAllocated::Wait } else { self.take_disk_frame(space) } {
            DiskAllocated::Frame(target) => self.start_write(index, source, target, class),
            DiskAllocated::Wait => {
                self.blocks.at_mut(index).set_urgent(class == IoClass::Demotion);
                return Some(space);
            }
            DiskAllocated::Never => {
                self.counters.writes_without_room += 1;
                self.blocks.at_mut(index).set_write_faults(WRITE_FAULTS_MAX);
                self.durable(index, false);
                self.memory_changed = true;
                self.emptying_due = true;
                self.persist_later(index, RETRY_AFTER);
            }
        }
        None
    }

    /// Entries of blocks that can be written as soon as there is room.
    pub(crate) fn queued(&self) -> usize {
        self.ready.len() + self.stalled.values().map(Stalled::len).sum::<usize>()
    }

    /// As many as there may be.
    pub(crate) fn queued_max(&self) -> usize {
        2 * self.blocks.len() as usize + QUEUED_MIN
    }

    /// Nothing is taken out of the queues while nothing can be persisted: what has gone meanwhile, and what is named
    /// twice, goes.
    pub(crate) fn forget_queued(&mut self) {
        if self.queued() <= self.queued_max() {
            return;
        }
        let (blocks, mut named) = (&self.blocks, Vec::new());
        let mut is_first = |&(index, id): &Queued| {
            let place = index.get() as usize;
            if named.len() <= place {
                named.resize(place + 1, false);
            }
            let is_held = blocks.try_at(index).is_some_and(|block| block.id == id);
            is_held && !std::mem::replace(&mut named[place], true)
        };
        // What is marked as urgent stays where it is looked for.
        self.stalled.values_mut().for_each(|stalled| stalled.urgent.retain(&mut is_first));
        self.stalled.values_mut().for_each(|stalled| stalled.due.retain(&mut is_first));
        self.ready.retain(&mut is_first);
        self.stalled.retain(|_, stalled| stalled.len() > 0);
    }

    fn start_write(&mut self, index: BlockIndex, source: FrameRef, target: DiskFrame, class: IoClass) {
        // Where somebody waits for the block to be durable, it is written for him.
        let early = class == IoClass::Demotion && !self.durables.contains_key(&index);
        self.counters.demotions += u64::from(early);
        self.write_sequence += 1;
        let header = self.header_of(index, self.write_sequence);
        let via = if self.chunks.at(source.chunk).may_be_written() { Via::Bounce } else { Via::Direct };
        let frame_bytes = self.spaces.at(self.blocks.at(index).space).frame_bytes;
        let target_offset = self.disks.offset(target, frame_bytes);
        let fence = self.hold_frame(source);
        let op = self.start(Op::Write { block: index, source, fence, target, header, via, stuck: false });
        self.disks
            .slot_mut(target.device, target.slot)
            .set(target.index, DiskState::Filling { block: index });
        self.disks.cell_mut(target).busy += 1;
        self.blocks.at_mut(index).nvme = Nvme::Writing { frame: target, sequence: header.write_sequence };
        self.writes_running += 1;
        self.disks.device_mut(target.device).writes += 1;
        self.effects.push_back(Effect::Write { op, source, target, target_offset, header, via, class });
    }

    pub(crate) fn write_done(
        &mut self,
        index: BlockIndex,
        source: (FrameRef, Fence),
        target: DiskFrame,
        header: BlockHeader,
        via: Via,
        outcome: Result<(), Fault>,
    ) {
        let (source, fence) = source;
        let same = self.let_frame_go(source, fence);
        self.disks.cell_mut(target).busy -= 1;
        let writing = Nvme::Writing { frame: target, sequence: header.write_sequence };
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
                block.set_write_faults(0);
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
            Err(Fault::NotStarted) => self.write_not_started(index, target),
            Err(fault) => self.write_failed(index, target, fault),
        }
    }

    /// The device never had it, or nothing refers to what it has: its frame is as good as before.
    fn write_not_started(&mut self, index: BlockIndex, target: DiskFrame) {
        self.disks.slot_mut(target.device, target.slot).set(target.index, DiskState::Evicting);
        self.settle_cell(target);
        self.transition(index, |block| block.nvme = Nvme::None);
        if self.blocks.at(index).residence().is_in_memory() {
            self.persist_later(index, RETRY_AFTER);
        }
        self.blocks.remove_if_gone(index);
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
        block.set_write_faults(block.write_faults() + 1);
        let again = block.write_faults() < WRITE_FAULTS_MAX;
        self.memory_changed = true;
        self.emptying_due = true;
        self.durable(index, false);
        if again && self.blocks.at(index).residence().is_in_memory() {
            self.persist_later(index, RETRY_AFTER);
        }
        self.blocks.remove_if_gone(index);
    }

    fn pause_persisting(&mut self) {
        self.persist_paused_until = self.now.after(RETRY_AFTER);
        self.at(self.persist_paused_until, Deadline::Retry);
    }

    /// One round of commits at a time; what is written meanwhile goes into the
    /// next. Each device has a commit of its own, so that one that fails to sync
    /// fails its own blocks only.
    pub(crate) fn pump_commit(&mut self) {
        if self.commits_running > 0 || self.degraded || self.now < self.persist_paused_until {
            return;
        }
        if self.commit_puts.is_empty() && self.commit_deletes.is_empty() {
            return;
        }
        let rest = self.commit_puts.split_off(self.commit_puts.len().min(COMMIT_MAX));
        let queued = std::mem::replace(&mut self.commit_puts, rest);
        let mut by_device: BTreeMap<DeviceId, Vec<Put>> = BTreeMap::new();
        for put in queued {
            if self.is_committing(put) {
                by_device.entry(put.frame.device).or_default().push(put);
            } else {
                self.disks.cell_mut(put.frame).busy -= 1;
                self.settle_cell(put.frame);
            }
        }
        let count = self.commit_deletes.len().min(COMMIT_MAX);
        let deletes: Vec<Delete> = self.commit_deletes.drain(..count).collect();
        if !deletes.is_empty() {
            self.start_commit(Vec::new(), deletes);
        }
        for puts in by_device.into_values() {
            self.start_commit(puts, Vec::new());
        }
    }

    fn start_commit(&mut self, puts: Vec<Put>, deletes: Vec<Delete>) {
        let stats = |put: &Put| self.blocks.at(put.block).stats();
        let put = puts.iter().map(|put| (put.frame, put.header, stats(put))).collect();
        let delete = deletes.iter().map(|delete| delete.id).collect();
        let op = self.start(Op::Commit { puts, deletes });
        self.commits_running += 1;
        self.effects.push_back(Effect::Commit { op, put, delete });
    }

    fn is_committing(&self, put: Put) -> bool {
        let current = Nvme::Committing { frame: put.frame, sequence: put.header.write_sequence };
        self.blocks.try_at(put.block).is_some_and(|block| block.nvme == current)
    }

    pub(crate) fn commit_done(&mut self, puts: &[Put], deletes: &[Delete], outcome: Result<(), Fault>) {
        self.commits_running -= 1;
        for &put in puts {
            self.disks.cell_mut(put.frame).busy -= 1;
            match (self.is_committing(put), outcome) {
                (true, Ok(())) => self.put_done(put),
                (true, Err(Fault::NotStarted)) => self.write_not_started(put.block, put.frame),
                (true, Err(fault)) => self.write_failed(put.block, put.frame, fault),
                (false, Ok(()) | Err(Fault::NotStarted)) => {}
                (false, Err(_)) => self.quarantine_cell(put.frame),
            }
            self.settle_cell(put.frame);
        }
        match outcome {
            Ok(()) => deletes.iter().for_each(|&delete| self.delete_done(delete)),
            // Only its own device could not sync; the others go on.
            Err(Fault::Device | Fault::NotStarted) if deletes.is_empty() => self.counters.commit_faults += 1,
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
        let pinned = block.residence().is_in_memory();
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
        let share = self.disks.share(self.config.limits.writes_in_flight);
        let (mut carving, mut busy) = (false, false);
        for step in 0..devices {
            let place = (first + step) % devices;
            let device = device_id(place);
            if !self.disks.devices[place].usable || self.disks.devices[place].writes >= share {
                busy |= self.disks.devices[place].usable;
                continue;
            }
            if let Some(frame) = self.take_open_frame(space, device) {
                self.spaces.at_mut(space).device_next = (place + 1) % devices;
                self.make_room_ahead(space);
                return DiskAllocated::Frame(frame);
            }
            carving |= self.spaces.at(space).slots_carving[place] > 0 || self.carve_slot(space, device);
        }
        if carving || busy || self.make_room(space) { DiskAllocated::Wait } else { DiskAllocated::Never }
    }

    /// Evicts while there are frames left, so that the write after the last of them
    /// does not wait for a commit that could have run before.
    fn make_room_ahead(&mut self, space: SpaceIndex) {
        let in_flight = self.config.limits.writes_in_flight as usize;
        let low = in_flight.max(self.evict_batch(space) / 2).min(self.evicted_ahead_max(space));
        let devices = (0..self.disks.devices.len()).map(device_id);
        let mut left = 0;
        for device in devices.filter(|&device| self.disks.usable(device)) {
            if !self.disks.devices[usize::from(device.get())].slots_free.is_empty() {
                return;
            }
            let open = &self.spaces.at(space).slots_open[usize::from(device.get())];
            for &slot in open {
                left += self.disks.find_slot(device, slot).map_or(0, |slot| slot.free.len());
                if left >= low {
                    return;
                }
            }
        }
        self.make_room(space);
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
            Err(Fault::NotStarted) => {
                carved.state = SlotState::Free;
                self.disks.device_mut(device).slots_free.insert(slot);
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

    /// Blocks of a space that may be evicted ahead of need.
    fn evicted_ahead_max(&self, space: SpaceIndex) -> usize {
        usize::try_from(self.spaces.at(space).blocks_nvme).unwrap_or(usize::MAX) / AHEAD_PART
    }

    /// Blocks of a space to evict at a time.
    fn evict_batch(&self, space: SpaceIndex) -> usize {
        let frame_bytes = self.spaces.at(space).frame_bytes.get().max(1);
        let blocks = usize::try_from(EVICT_BYTES / frame_bytes).unwrap_or(usize::MAX);
        blocks.min(COMMIT_MAX).min(self.evicted_ahead_max(space)).max(EVICT_BATCH)
    }

    /// Evicts the coldest of this space, or empties a slot of a colder one. False: nothing can leave.
    fn make_room(&mut self, space: SpaceIndex) -> bool {
        let mut coming = self.commits_running > 0 || !self.commit_deletes.is_empty();
        if let Some(other) = self.coldest_space().filter(|&other| other != space) {
            coming |= self.retire_slot(other);
        }
        if coming {
            return true;
        }
        for _ in 0..self.evict_batch(space) {
            match self.nvme_victim(space) {
                Choice::Evict(index) => self.evict_from_nvme(index),
                Choice::Demote(_) | Choice::Nothing => break,
            }
            coming = true;
        }
        coming
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
